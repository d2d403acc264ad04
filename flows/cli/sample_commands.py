"""The command `samples`: samples of a run with their text."""

import argparse
import shutil
from typing import TYPE_CHECKING, Any

from flows.cli.json_output import add_json, print_json
from flows.cli.options import path

if TYPE_CHECKING:
    from flows.report.samples import Samples

_COUNT = 20


def add_samples(commands: Any) -> None:
    """Add `samples`."""
    samples = commands.add_parser("samples", help="show samples of a run with text, loss, fate and place")
    samples.add_argument("run", type=path, metavar="RUN", help="run folder")
    orders = samples.add_mutually_exclusive_group()
    for name, text in (("hardest", "greatest losses (default)"), ("easiest", "least losses")):
        orders.add_argument(f"--{name}", type=int, nargs="?", const=_COUNT, metavar="N", help=f"the N {text}")
    for name, text in (
        ("dropped", "what the next round left out by its losses, the easiest first"),
        ("forgotten", "what the round has forgotten most since it trained on it"),
        ("typical", "of each source, what is nearest its median loss"),
    ):
        orders.add_argument(f"--{name}", action="store_true", help=text)
    samples.add_argument(
        "--where", metavar="SQL", help="only samples that meet a DuckDB condition; docs/samples.md has the columns"
    )
    samples.add_argument("--source", metavar="S", help="only samples of this source")
    samples.add_argument(
        "--round", type=int, metavar="R", help="losses after round R, and what round R + 1 kept (default: the last)"
    )
    samples.add_argument("--limit", type=int, default=_COUNT, metavar="N", help="at most N samples (default: 20)")
    samples.add_argument("--chars", type=int, metavar="N", help="show N characters of each text (default: one line)")
    output = samples.add_mutually_exclusive_group()
    output.add_argument("--html", type=path, metavar="FILE", help="write a page with the whole texts instead")
    add_json(output)
    samples.set_defaults(command=_samples)


def _samples(options: argparse.Namespace) -> None:
    from flows.report.samples import find_samples
    from flows.report.samples_page import write_samples_page

    order, count = _order(options)
    for name, value in (("limit", count), ("chars", options.chars)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} is not above 0; give a number of at least 1")
    found = find_samples(
        options.run, order, count, where=options.where, source=options.source, scored_round=options.round
    )
    if options.json:
        print_json(_document(found, options.chars))
        return
    if not found.has_origins:
        print("note: this corpus was prepared by a version before 0.12: files and documents of samples are unknown")
    if options.html is not None:
        write_samples_page(options.html, options.run.absolute().name, found)
        print(f"page: {options.html}")
        return
    _print(found, options.chars)


def _order(options: argparse.Namespace) -> tuple[str, int]:
    """Return what is asked for and how many."""
    for name in ("hardest", "easiest"):
        if getattr(options, name) is not None:
            return name, getattr(options, name)
    named = next((name for name in ("dropped", "forgotten", "typical") if getattr(options, name)), None)
    return named or ("hardest" if options.where is None else "all"), options.limit


def _document(found: "Samples", chars: int | None) -> dict[str, Any]:
    """Return what was found by names with units; of each text, the first `chars` characters, or all."""
    nowhere = dict.fromkeys(("file", "document", "first_token", "num_documents"))
    samples = [
        {
            "shard": each.shard,
            "sample": each.sample,
            "source": each.source,
            "num_tokens": each.num_tokens,
            "loss_nats_per_token": each.loss,
            "seen_loss_nats_per_token": each.seen_loss,
            "forgotten_nats_per_token": each.forgotten,
            "fate": each.fate,
            "reason": each.reason,
            "text": each.text[:chars],
            **(nowhere if each.origin is None else each.origin._asdict()),
        }
        for each in found.samples
    ]
    return {"title": found.title, "scored_round": found.scored_round, "samples": samples}


def _print(found: "Samples", chars: int | None) -> None:
    from flows.display.visible_text import cut, cut_to_width, visible

    indent, width = "   ", shutil.get_terminal_size().columns
    print(f"{found.title}:" if found.samples else f"{found.title}: none")
    for number, sample in enumerate(found.samples, start=1):
        print(f"{number:>2} {visible(sample.summary)}")
        if sample.place:
            print(f"{indent}{visible(sample.place)}")
        # Cut first: a text may have millions of characters.
        if chars is None:
            text = cut_to_width(visible(sample.text[: width + 1]), width - len(indent))
        else:
            text = visible(cut(sample.text, chars))
        print(f"{indent}{text}")
