"""`reprise tokenizer …`: commands about tokenizers."""

import argparse
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.cli.options import path
from trainer.config import ModelConfig


def add_tokenizer(commands: Any) -> None:
    """Add the commands about tokenizers to the parser's `commands`."""
    parser = commands.add_parser("tokenizer", help="reduce a tokenizer to the tokens that a corpus needs")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    compact = actions.add_parser(
        "compact", help="count tokens over a corpus, and remove the rarest from the vocabulary"
    )
    compact.add_argument(
        "--tokenizer", type=path, required=True, metavar="T",
        help="SentencePiece .model, tokenizer.json of a BPE, or GPT-2's vocabulary next to its merges",
    )  # fmt: skip
    compact.add_argument(
        "--corpus", type=path, required=True, metavar="C",
        help="run folder, YAML configuration, or a file, folder or glob of text",
    )  # fmt: skip
    size = compact.add_mutually_exclusive_group()
    size.add_argument(
        "--vocab-size",
        type=int,
        help="tokens to keep (default: the size that makes training cheapest within the paper's rule)",
    )
    size.add_argument("--coverage", type=float, help="keep the fewest tokens that cover this share of the corpus")
    compact.add_argument(
        "--output", type=path, help="folder to create (default: next to T, named after T and the size)"
    )
    compact.add_argument(
        "--model",
        help="preset, or YAML configuration, whose parameter shares are shown (default: C's, or the paper's)",
    )
    compact.add_argument("--checkpoint", type=path, help="checkpoint, run or model folder to prune with the vocabulary")
    compact.add_argument("--round", type=int, help="round of the run whose checkpoint is pruned (default: the last)")
    compact.add_argument("--end-of-document", help="token that ends a document, if T does not define it")
    compact.set_defaults(command=_compact)


def _compact(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.models.vocabulary_pruning import prune_vocabulary
    from flows.models.vocabulary_pruning_report import summarise
    from flows.models.vocabulary_pruning_result import Request
    from flows.run.stored_model import find_checkpoint

    if options.round is not None and options.checkpoint is None:
        raise ValueError("--round: needs --checkpoint RUN; give that, too")
    request = Request(
        options.tokenizer,
        options.corpus,
        options.vocab_size,
        options.coverage,
        options.output,
        None if options.model is None else _model(options.model),
        None if options.checkpoint is None else find_checkpoint(options.checkpoint, options.round),
        options.end_of_document,
    )
    with TerminalProgress() as progress:
        made = prune_vocabulary(request, progress)
    print(f"{summarise(made)}\n\ntokenizer: {made.tokenizer}\nreport: {made.folder / 'report.html'}")
    if request.checkpoint is not None:
        print(f"checkpoint: {made.folder / 'checkpoint' / request.checkpoint.name}")


def _model(name: str) -> ModelConfig:
    from flows.run.config import read_config

    if Path(name).suffix in (".yaml", ".yml"):
        return read_config(Path(name), []).model
    try:
        return ModelConfig.model_validate({"preset": name})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"--model: {name!r} is neither a configuration (.yaml) nor a preset ({reason}); give one"
        ) from None
