"""The commands `fork` and `clean`."""

import argparse
import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from flows.cli.options import path
from flows.run.folder import read_run


def add_upkeep(commands: Any) -> None:
    """Add `fork` and `clean`."""
    fork = commands.add_parser("fork", help="make a run that shares the first rounds of another")
    fork.add_argument("run", type=path, metavar="RUN", help="run folder")
    fork.add_argument("--round", type=int, required=True, metavar="N", help="first round that is not shared")
    fork.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field from round N on"
    )
    fork.add_argument("--name", help="name of the new run, which is made beside RUN (default: RUN-fork-N)")
    fork.set_defaults(command=_fork)
    clean = commands.add_parser("clean", help="say what of a run can be deleted and what it frees, and delete it")
    clean.add_argument("run", type=path, metavar="RUN", help="run folder, or a folder of trials such as RUN-compare")
    clean.add_argument("--only", metavar="CATEGORY,…", help="of leftovers, checkpoints and trials (default: all)")
    clean.add_argument(
        "--yes", action="store_true", help="delete; without it, ask in a terminal, elsewhere delete nothing"
    )
    clean.set_defaults(command=_clean)


def _fork(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.upkeep.fork import fork

    with TerminalProgress() as progress:
        made = fork(read_run(options.run), options.round, options.set, options.name, progress)
    rounds = {1: "", 2: " and round 1"}.get(options.round, f" and rounds 1 to {options.round - 1}")
    folder = Path(os.path.relpath(made.run.folder))
    print(f"{folder} shares the corpus{rounds} with {options.run}")
    if made.copied_bytes:
        print(f"note: {made.copied_bytes:,} bytes were copied, as they could not be hard-linked")
    print(f"go on by: reprise run {quote(str(folder))}")


def _clean(options: argparse.Namespace) -> None:
    from flows.upkeep.clean import CATEGORIES, delete, find_offers

    names = [*CATEGORIES] if options.only is None else list(dict.fromkeys(options.only.split(",")))
    offers = find_offers(options.run, names)
    total = sum(sum(offer.freed) for offer in offers)
    if not offers:
        print(f"{options.run}: nothing to delete")
        return
    for offer in offers:
        print(f"{offer.category.name}: {offer.category.title}, {sum(offer.freed):,} bytes")
        print(f"  lost with them: {offer.category.cost}")
        for place, num_bytes, num_shared in zip(offer.paths, offer.freed, offer.shared, strict=True):
            shared = f"  ({num_shared:,} bytes stay, as another run shares them)" if num_shared else ""
            print(f"  {num_bytes:>15,}  {os.path.relpath(place, options.run)}{shared}")
    if not (options.yes or _is_confirmed(total)):
        print(f"nothing was deleted; --yes deletes all of this, {total:,} bytes; --only chooses categories")
        return
    print(f"freed {delete(options.run, offers):,} bytes")


def _is_confirmed(total: int) -> bool:
    """Return whether the person at the terminal agrees; False where there is none."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input(f"delete this and free {total:,} bytes? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
