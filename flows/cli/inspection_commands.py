"""The commands that only look: `status`, `runs`, `verify`, `advise` and `doctor`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.json_output import add_json, print_json
from flows.cli.options import path
from flows.cli.plan_command import add_assume
from flows.run.config import read_config
from flows.run.folder import read_run

if TYPE_CHECKING:
    from flows.stages.status import RunStatus


def add_inspection(commands: Any) -> None:
    """Add the commands to the parser's `commands`."""
    status = commands.add_parser("status", help="show which stages of a run are done, running or failed")
    status.add_argument("run", type=path, metavar="RUN", help="run folder")
    add_json(status)
    status.set_defaults(command=_status)
    runs = commands.add_parser("runs", help="show the status of every run in a folder, one line each")
    runs.add_argument(
        "folder", type=path, nargs="?", default=Path("runs"), help="folder of run folders (default: runs)"
    )
    add_json(runs)
    runs.set_defaults(command=_runs)
    verify = commands.add_parser("verify", help="compare every file of a run with its recorded checksum")
    verify.add_argument("run", type=path, metavar="RUN", help="run folder")
    add_json(verify)
    verify.set_defaults(command=_verify)
    advise = commands.add_parser("advise", help="say whether a round drawn by loss pays, from what a run measured")
    advise.add_argument("run", type=path, metavar="RUN", help="run folder")
    add_json(advise)
    advise.set_defaults(command=_advise)
    doctor = commands.add_parser("doctor", help="check this machine, and what it lacks for a configuration")
    doctor.add_argument("config", type=path, nargs="?", metavar="CONFIG", help="YAML configuration")
    doctor.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )
    add_assume(doctor)
    add_json(doctor)
    doctor.set_defaults(command=_doctor)


def _status(options: argparse.Namespace) -> None:
    from flows.run.fork_record import describe_fork
    from flows.stages.status import read_run_status

    status = read_run_status(options.run)
    if options.json:
        print_json(status)
        return
    if forked := describe_fork(options.run):
        print(forked)
    for row in status.stages:
        print(f"{row.name:<10} {row.state:<8} {row.detail}".rstrip())


def _runs(options: argparse.Namespace) -> None:
    from flows.stages.status import UNREADABLE, read_run_statuses

    statuses = read_run_statuses(options.folder)
    if options.json:
        print_json({"folder": options.folder.absolute(), "runs": statuses})
    else:
        for status in statuses:
            print(_run_line(status))
    unreadable = [status for status in statuses if status.state == UNREADABLE]
    if unreadable:
        others = f"; {len(unreadable) - 1} more cannot be read either" if len(unreadable) > 1 else ""
        raise ValueError(f"{unreadable[0].error}{others}")


def _run_line(status: "RunStatus") -> str:
    if status.error is not None:
        return f"{status.name:<20} {status.state}"
    current, state = status.current, status.state
    if current is not None:
        state = f"{state} at {current.name}  {current.detail}".rstrip()
    return f"{status.name:<20} {status.num_stages_done} of {status.num_stages} stages  {state}"


def _verify(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.stages.stage_order import STAGES
    from flows.stages.verification import examine

    run = read_run(options.run)
    with TerminalProgress() as progress:
        found = list(examine(run, STAGES, progress))
    damaged = sum(each.damage is not None for each in found)
    if options.json:
        print_json({"folder": run.folder, "num_damaged": damaged, "examined": found})
    else:
        for each in found:
            print(f"ok       {each.name}" if each.damage is None else f"damaged  {each.damage}")
    if damaged:
        raise ValueError(f"{options.run}: {damaged} of its files are damaged; see the lines above")


def _advise(options: argparse.Namespace) -> None:
    from data_scoring.ledger import open_ledger
    from flows.report.round_facts import read_facts
    from flows.report.verdict import judge
    from flows.stages.stage_order import stages_of

    run = read_run(options.run)
    stages_of(run).verify()
    with open_ledger(run.folder) as ledger:
        facts = read_facts(run, ledger)
    verdict = judge(facts, run.config)
    if options.json:
        print_json({"verdict": verdict, "facts": None if facts is None else facts.named_figures()})
    else:
        print(verdict.text)


def _doctor(options: argparse.Namespace) -> None:
    from flows.orchestration.doctor import examine
    from flows.planning.auto import resolve_auto
    from flows.planning.workload import with_devices
    from trainer.hardware import assumed_hardware

    if options.config is None:
        if options.assume is not None:
            raise ValueError("--assume: needs a configuration; give one")
        if options.set:
            raise ValueError("--set: needs a configuration; give one")
        findings = examine(None)
    else:
        hardware = None if options.assume is None else assumed_hardware(options.assume)
        config = read_config(options.config, options.set)
        config = config if hardware is None else with_devices(config, hardware)
        findings = examine(resolve_auto(config, hardware)[0], hardware)
    missing = sum(finding.state == "missing" for finding in findings)
    if options.json:
        print_json({"num_missing": missing, "findings": findings})
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.text}")
    if missing:
        raise ValueError(
            f"{options.config}: {missing} requirement{'' if missing == 1 else 's'} missing on this machine; "
            "see the lines above"
        )
