"""`reprise init`: a new folder to work in."""

import argparse
import shlex
from typing import Any

from flows.cli.options import path


def add_init(commands: Any) -> None:
    """Add `init`."""
    init = commands.add_parser("init", help="make a folder to work in: a configuration to edit, and a sample of text")
    init.add_argument("folder", type=path, metavar="FOLDER", help="folder, made if it does not exist")
    init.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> None:
    from flows.project.project_folder import make_project

    written = make_project(options.folder)
    names = sorted({f"{file.parts[0]}/" if len(file.parts) > 1 else file.name for file in written})
    print(f"{options.folder}: wrote {', '.join(names)}")
    enter = "" if options.folder.resolve() == options.folder.cwd() else f"  cd {shlex.quote(str(options.folder))}\n"
    print(
        f"Next:\n{enter}"
        "  reprise run mine.yaml    # trains on data/sample.jsonl for some minutes; edit mine.yaml for your own text\n"
        "  reprise plan mine.yaml   # what a run needs: memory, hours and disk\n"
        "  reprise serve            # or runs from Prefect's pages: the deployments in prefect.yaml"
    )
