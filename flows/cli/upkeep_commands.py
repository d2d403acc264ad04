"""The commands `fork` and `clean`."""

import argparse
import os
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
