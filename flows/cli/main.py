"""The `reprise` command."""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from data_scoring.base.caches import provide_caches
from data_scoring.base.exits import exit_with
from data_scoring.base.files import explain
from flows.cli.evaluation_commands import add_evaluate
from flows.cli.experiment_commands import add_trial_commands
from flows.cli.hugging_face_commands import add_hugging_face
from flows.cli.inheritance_commands import add_inherit
from flows.cli.init_command import add_init
from flows.cli.model_commands import add_model
from flows.cli.options import path
from flows.cli.plan_command import add_assume, add_plan
from flows.cli.run_commands import add_run
from flows.cli.sample_commands import add_samples
from flows.cli.sql_command import add_sql, answer
from flows.cli.tokenizer_commands import add_tokenizer
from flows.run.config import read_config
from flows.run.errors import RanksFailedError
from flows.run.folder import read_run


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status of one command: 0, or 1 after an error message (130 after an interrupt)."""
    options = _parser().parse_args(arguments)
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
        remedy = "" if options.command is answer else "; the same command resumes from here"
        print(f"stopped{remedy}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reprise", description="Train tiny language models in rounds: train, score, refine, train again."
    )
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
    doctor = commands.add_parser("doctor", help="check this machine, and what it lacks for a configuration")
    doctor.add_argument("config", type=path, nargs="?", metavar="CONFIG", help="YAML configuration")
    add_assume(doctor)
    doctor.set_defaults(command=_doctor)
    add_plan(commands)
    add_evaluate(commands)
    add_model(commands)
    add_tokenizer(commands)
    add_hugging_face(commands)
    add_trial_commands(commands)
    add_inherit(commands)
    status = commands.add_parser("status", help="show which stages of a run are done, running or failed")
    status.add_argument("run", type=path, metavar="RUN", help="run folder")
    status.set_defaults(command=_status)
    runs = commands.add_parser("runs", help="show the status of every run in a folder, one line each")
    runs.add_argument(
        "folder", type=path, nargs="?", default=Path("runs"), help="folder of run folders (default: runs)"
    )
    runs.set_defaults(command=_runs)
    verify = commands.add_parser("verify", help="compare every file of a run with its recorded checksum")
    verify.add_argument("run", type=path, metavar="RUN", help="run folder")
    verify.set_defaults(command=_verify)
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
    advise = commands.add_parser("advise", help="say whether a round drawn by loss pays, from what a run measured")
    advise.add_argument("run", type=path, metavar="RUN", help="run folder")
    advise.set_defaults(command=_advise)
    add_samples(commands)
    add_sql(commands)
    return parser


def _doctor(options: argparse.Namespace) -> None:
    from flows.orchestration.doctor import examine
    from flows.planning.auto import resolve_auto
    from flows.planning.workload import with_devices
    from trainer.hardware import assumed_hardware

    if options.config is None:
        if options.assume is not None:
            raise ValueError("--assume: needs a configuration; give one")
        findings = examine(None)
    else:
        hardware = None if options.assume is None else assumed_hardware(options.assume)
        config = read_config(options.config, [])
        config = config if hardware is None else with_devices(config, hardware)
        findings = examine(resolve_auto(config, hardware)[0], hardware)
    for finding in findings:
        print(f"{finding.state:<8} {finding.text}")
    missing = sum(finding.state == "missing" for finding in findings)
    if missing:
        raise ValueError(
            f"{options.config}: {missing} requirement{'' if missing == 1 else 's'} missing on this machine; "
            "see the lines above"
        )


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


def _status(options: argparse.Namespace) -> None:
    from flows.stages.status import read_status

    for row in read_status(options.run):
        print(f"{row.name:<10} {row.state:<8} {row.detail}".rstrip())


def _runs(options: argparse.Namespace) -> None:
    from flows.stages.status import read_status

    folders = sorted(path.parent for path in options.folder.glob("*/run.yaml"))
    if not folders:
        raise ValueError(f"{options.folder}: holds no run; start one with `reprise run CONFIG.yaml`")
    for folder in folders:
        rows = read_status(folder)
        current = next((row for row in rows if row.state != "done"), None)
        state = f"{current.state} at {current.name}  {current.detail}".rstrip() if current else "done"
        print(f"{folder.name:<20} {sum(row.state == 'done' for row in rows)} of {len(rows)} stages  {state}")


def _verify(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.stages.stage_order import STAGES
    from flows.stages.verification import examine

    run, damaged = read_run(options.run), 0
    with TerminalProgress() as progress:
        found = list(examine(run, STAGES, progress))
    for what, damage in found:
        print(f"damaged  {damage}" if damage else f"ok       {what}")
        damaged += bool(damage)
    if damaged:
        raise ValueError(f"{options.run}: {damaged} of its files are damaged; see the lines above")


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


def _advise(options: argparse.Namespace) -> None:
    from data_scoring.ledger import open_ledger
    from flows.report.verdict_section import verdict_text
    from flows.stages.stage_order import stages_of

    run = read_run(options.run)
    stages_of(run).verify()
    with open_ledger(run.folder) as ledger:
        print(verdict_text(run, ledger))


def run() -> NoReturn:
    """End this process with the exit status of its command line: the entry point of `reprise`."""
    exit_with(main)


if __name__ == "__main__":
    run()
