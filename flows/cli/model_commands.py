"""`reprise model`: the sizes of the presets, or of a configuration's model."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from data_scoring.base.files import writing
from flows.cli.json_output import add_json, print_json
from flows.cli.options import path
from flows.display.markdown import markdown_table
from flows.run.config import read_config
from trainer.config import ModelConfig
from trainer.presets import PRESETS

_HEAD = ["model", "layers", "width", "heads", "FFN", "terms", "r", "vocabulary", "parameters (M)", "embedding, head"]
# The default vocabulary of a tokenizer that is trained on the corpus.
_VOCAB_SIZE = 2048


@dataclass(frozen=True)
class _Model:
    """A model as other programs read it.

    has_own_vocabulary: whether the model sets vocab_size; otherwise it is assumed, and the tokenizer's counts.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    activation_terms: int
    shortcut_reduction: int | None
    vocab_size: int
    has_own_vocabulary: bool
    num_parameters: int
    embedding_share: float

    def row(self) -> list[str]:
        """Return the cells of the printed table."""
        sizes = (self.num_layers, self.hidden_size, self.num_attention_heads, self.ffn_hidden_size)
        return [
            self.name,
            *(f"{number:,}" for number in sizes),
            str(self.activation_terms),
            "-" if self.shortcut_reduction is None else str(self.shortcut_reduction),
            f"{self.vocab_size:,}" if self.has_own_vocabulary else "*",
            f"{self.num_parameters / 1e6:,.1f}",
            f"{self.embedding_share:.1%}",
        ]


def add_model(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `reprise`."""
    command = commands.add_parser("model", help="list the model presets, or describe one model")
    command.add_argument("model", nargs="?", metavar="PRESET|CONFIG", help="preset, or a YAML configuration")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )
    command.add_argument(
        "--vocab-size",
        help=f"vocabulary size for models that do not set one (default: {_VOCAB_SIZE}); several, such as 2048,48000: "
        "every model with each of them",
    )
    command.add_argument(
        "--figure",
        type=path,
        metavar="FILE.png",
        help="draw how the parameters split between embedding and head, and layers",
    )
    add_json(command)
    command.set_defaults(command=_describe)


def _describe(options: argparse.Namespace) -> None:
    name: str | None = options.model
    is_path = name is not None and (Path(name).suffix in (".yaml", ".yml") or Path(name).is_file())
    is_file = is_path and name not in PRESETS
    if options.set and not is_file:
        raise ValueError("--set: overrides need a configuration file; give one")
    sizes = [] if options.vocab_size is None else _sizes(options.vocab_size)
    if options.figure is not None and options.figure.suffix != ".png":
        raise ValueError(f"--figure: {str(options.figure)!r} does not end in .png; name a PNG file")
    default = sizes[0] if sizes else _VOCAB_SIZE
    if name is None:
        models = {preset: ModelConfig(preset=preset) for preset in PRESETS}
    elif is_file:
        from flows.stages.prepare import vocabulary_size

        config = read_config(Path(name), options.set)
        models = {config.run_name: config.model}
        default = sizes[0] if sizes else vocabulary_size(config)
    elif name in PRESETS:
        models = {name: ModelConfig(preset=name)}
    else:
        raise ValueError(f"model: {name!r} is neither a file nor a preset; choose one of {', '.join(PRESETS)}")
    if len(sizes) > 1:
        models = {
            f"{name}, {size:,}": model.model_copy(update={"vocab_size": size})
            for name, model in models.items()
            for size in sizes
        }
    described = [_describe_model(name, model, default) for name, model in models.items()]
    if options.figure is not None:
        _draw(options.figure, {name: (model, model.vocab_size or default) for name, model in models.items()})
    if options.json:
        print_json({"models": described, "figure": options.figure})
        return
    print(markdown_table(_HEAD, [each.row() for each in described]))
    if not all(each.has_own_vocabulary for each in described):
        print(f"\n* the tokenizer's vocabulary; counted with {default:,} entries (--vocab-size)")
    if options.figure is not None:
        print(f"\nfigure: {options.figure}")


def _sizes(text: str) -> list[int]:
    """Return the vocabulary sizes of a comma-separated list."""
    sizes = []
    for entry in text.split(","):
        if not entry.strip().isdecimal():
            raise ValueError(f"--vocab-size: {entry.strip()!r} is not an integer; give comma-separated integers")
        sizes.append(int(entry))
        if sizes[-1] < 2:
            raise ValueError(f"--vocab-size: {sizes[-1]} is too small; give 2 or more")
    return list(dict.fromkeys(sizes))


def _draw(target: Path, models: dict[str, tuple[ModelConfig, int]]) -> None:
    """Write the figure of how the parameters of `models`, each with its vocabulary size, split."""
    from flows.display.figures import render_figure
    from flows.models.parameter_split import draw_split

    png = render_figure(lambda: draw_split(models))
    with writing(target) as temporary:
        temporary.write_bytes(png)


def _describe_model(name: str, model: ModelConfig, default_vocab_size: int) -> _Model:
    vocab_size = model.vocab_size or default_vocab_size
    return _Model(
        name,
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.ffn_size,
        model.activation_terms,
        model.shortcut_reduction,
        vocab_size,
        model.vocab_size is not None,
        model.num_parameters(vocab_size),
        model.embedding_share(vocab_size),
    )
