"""The `reprise` command."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from data_scoring.base.caches import provide_caches
from data_scoring.base.exits import exit_with
from data_scoring.base.files import explain
from flows.cli.command_parser import CommandParser
from flows.cli.completion_command import add_completion
from flows.cli.evaluation_commands import add_evaluate
from flows.cli.experiment_commands import add_trial_commands
from flows.cli.generate_command import add_generate
from flows.cli.hugging_face_commands import add_hugging_face
from flows.cli.inheritance_commands import add_inherit
from flows.cli.init_command import add_init
from flows.cli.inspection_commands import add_inspection
from flows.cli.model_commands import add_model
from flows.cli.options import path
from flows.cli.plan_command import add_plan
from flows.cli.run_commands import add_run
from flows.cli.sample_commands import add_samples
from flows.cli.sql_command import add_sql
from flows.cli.tokenizer_commands import add_tokenizer
from flows.cli.track_command import add_track
from flows.cli.upkeep_commands import add_upkeep
from flows.cli.watch_command import add_watch
from flows.run.errors import RanksFailedError
from flows.run.folder import read_run
from flows.run.versions import version_line


class _Version(argparse.Action):
    """Prints the versions and exits; they are looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the versions and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_line())
        parser.exit()


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status of one command: 0, or 1 after an error message (130 after an interrupt).

    Raises SystemExit with 2 if the arguments are not those of a command, and with 0 after help and versions.
    """
    options = make_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: what the output's encoding lacks, such as letters in ASCII, is escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    # No telemetry, unless the user has set these variables.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    provide_caches()
    try:
        options.command(options)
        # Now, while what fails can still be told.
        print(end="", flush=True)
    except (ValueError, RanksFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        print(f"error: {explanation}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        is_resumable = getattr(options, "is_resumable", True)
        print("stopped; the same command resumes from here" if is_resumable else "stopped", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; each command's function is its default `command`."""
    parser: argparse.ArgumentParser = CommandParser(
        prog="reprise", description="Train tiny language models in rounds: train, score, refine, train again."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_init(commands)
    add_run(commands)
    join = commands.add_parser("join", help="start this host's ranks for a multi-node run, until the run is done")
    join.add_argument("run", type=path, metavar="RUN", help="run folder, shared with the leading host")
    join.add_argument(
        "--interface", help="network interface for communication between ranks (default: the route to the leader)"
    )
    join.set_defaults(command=_join)
    serve = commands.add_parser("serve", help="start Prefect's server and UI, the deployments and a worker")
    serve.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, local only)")
    serve.add_argument("--port", type=int, default=4200, help="port of Prefect; reports use the next port")
    serve.add_argument("--allow", type=path, action="append", default=[], help="additional folder that flows may use")
    serve.set_defaults(command=_serve)
    add_inspection(commands)
    add_plan(commands)
    add_evaluate(commands)
    add_model(commands)
    add_tokenizer(commands)
    add_hugging_face(commands)
    add_trial_commands(commands)
    add_inherit(commands)
    add_upkeep(commands)
    report = commands.add_parser("report", help="write the report of a run, complete or not, or overlay several runs")
    report.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run folder; several: one page for all")
    report.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="write the page there, and nothing to the run folder (default for several runs: overlay-….html beside the "
        "first run folder)",
    )
    report.set_defaults(command=_report)
    add_samples(commands)
    add_generate(commands)
    add_sql(commands)
    add_watch(commands)
    add_track(commands)
    add_completion(commands, parser)
    return parser


def _join(options: argparse.Namespace) -> None:
    from flows.launch.hosts import join
    from flows.stages.status import is_done

    join(options.run, options.interface, is_done)


def _serve(options: argparse.Namespace) -> None:
    from flows.orchestration.serve_place import check_place

    check_place(options.host, options.port)
    print("starting Prefect's server, a worker and a server for reports; this takes up to a minute", flush=True)
    from flows.orchestration.serve import serve

    serve(options.host, options.port, options.allow)


def _report(options: argparse.Namespace) -> None:
    from flows.report.overlay import write_overlay
    from flows.report.run_report import write_report
    from flows.stages.stage_order import stages_of

    runs = [read_run(folder) for folder in options.runs]
    for run in runs:
        stages_of(run).verify()
    if len(runs) > 1:
        page = write_overlay(runs, options.output)
        print(f"{page.text}\noverlay: {page.page}")
    else:
        print(f"report: {write_report(runs[0], options.output)}")


def run() -> NoReturn:
    """End this process with the exit status of its command line: the entry point of `reprise`."""
    exit_with(main)


if __name__ == "__main__":
    run()
