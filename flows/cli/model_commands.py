"""`reprise model`: the sizes of the presets, or of a configuration's model."""

import argparse
from pathlib import Path

from flows.display.markdown import markdown_table
from flows.run.config import read_config
from trainer.config import ModelConfig
from trainer.presets import PRESETS

_HEAD = ["model", "layers", "width", "heads", "FFN", "terms", "r", "vocabulary", "parameters (M)", "embedding, head"]
# The default vocabulary of a tokenizer that is trained on the corpus.
_VOCAB_SIZE = 2048


def add_model(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `reprise`."""
    command = commands.add_parser("model", help="list the model presets, or describe one model")
    command.add_argument("model", nargs="?", metavar="PRESET|CONFIG", help="preset, or a YAML configuration")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )
    command.add_argument(
        "--vocab-size", type=int, help=f"vocabulary size for models that do not set one (default: {_VOCAB_SIZE})"
    )
    command.set_defaults(command=_describe)


def _describe(options: argparse.Namespace) -> None:
    name: str | None = options.model
    is_path = name is not None and (Path(name).suffix in (".yaml", ".yml") or Path(name).is_file())
    is_file = is_path and name not in PRESETS
    if options.set and not is_file:
        raise ValueError("--set: overrides need a configuration file; give one")
    if options.vocab_size is not None and options.vocab_size < 2:
        raise ValueError(f"--vocab-size: {options.vocab_size} is too small; give 2 or more")
    default = options.vocab_size or _VOCAB_SIZE
    if name is None:
        models = {preset: ModelConfig(preset=preset) for preset in PRESETS}
    elif is_file:
        from flows.stages.prepare import vocabulary_size

        config = read_config(Path(name), options.set)
        models = {config.run_name: config.model}
        default = options.vocab_size or vocabulary_size(config)
    elif name in PRESETS:
        models = {name: ModelConfig(preset=name)}
    else:
        raise ValueError(f"model: {name!r} is neither a file nor a preset; choose one of {', '.join(PRESETS)}")
    print(markdown_table(_HEAD, [_row(name, model, default) for name, model in models.items()]))
    if any(model.vocab_size is None for model in models.values()):
        print(f"\n* the tokenizer's vocabulary; counted with {default:,} entries (--vocab-size)")


def _row(name: str, model: ModelConfig, default_vocab_size: int) -> list[str]:
    vocab_size = model.vocab_size or default_vocab_size
    return [
        name,
        *(f"{number:,}" for number in (model.num_layers, model.hidden_size, model.num_attention_heads, model.ffn_size)),
        str(model.activation_terms),
        "-" if model.shortcut_reduction is None else str(model.shortcut_reduction),
        f"{vocab_size:,}" if model.vocab_size else "*",
        f"{model.num_parameters(vocab_size) / 1e6:,.1f}",
        f"{model.embedding_share(vocab_size):.1%}",
    ]
