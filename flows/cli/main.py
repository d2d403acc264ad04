"""The `reprise` command."""

import argparse
import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from data_scoring.base.files import explain
from data_scoring.config import Policy, RefineConfig
from flows.cli.evaluation_commands import add_evaluate
from flows.cli.experiment_commands import add_trial_commands, silence
from flows.cli.hugging_face_commands import add_hugging_face
from flows.cli.inheritance_commands import add_inherit
from flows.cli.model_commands import add_model
from flows.cli.tokenizer_commands import add_tokenizer
from flows.run.config import RunConfig, override, read_config
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.run.rank_errors import RanksFailedError
from flows.run.status import read_status

_STAGES = {
    "prepare": "make the corpus",
    "train": "train a round",
    "score": "score every sample under the model of a round",
    "refine": "select what a round trains on and make its mix",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 after a line that says what is wrong."""
    options = _parser().parse_args(arguments)
    # Nothing is reported home; set either variable yourself to decide otherwise.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        options.command(options)
    except (ValueError, RanksFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever reads the output, such as `head`, has seen enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        explanation = explain(error)
        if explanation is None:
            raise
        print(f"error: {explanation}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reprise", description="Train tiny language models in rounds: train, score, refine, train again."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="do the whole job; the same command resumes it")
    _add_target(run)
    run.add_argument("--dry-run", action="store_true", help="print how ranks would be launched and start nothing")
    run.set_defaults(command=_run)
    _add_stages(commands)
    approve = commands.add_parser("approve", help="let a round train on what refining keeps (rounds.approval)")
    approve.add_argument("run", type=Path, metavar="RUN", help="run folder")
    approve.add_argument("--round", type=int, help="number of the round (default: the one that waits)")
    _add_draw(approve, "another ")
    approve.set_defaults(command=_approve)
    join = commands.add_parser("join", help="start this host's ranks for a run of several nodes, until it is done")
    join.add_argument("run", type=Path, metavar="RUN", help="run folder, shared with the host that leads")
    join.add_argument("--interface", help="network interface that ranks talk over (default: the way to the leader)")
    join.set_defaults(command=_join)
    serve = commands.add_parser("serve", help="start Prefect's server and UI, the deployments and a worker")
    serve.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=4200, help="port of Prefect; the next one has the reports")
    serve.add_argument("--allow", type=Path, action="append", default=[], help="another folder that flows may use")
    serve.set_defaults(command=_serve)
    doctor = commands.add_parser("doctor", help="say what this machine has, and what it lacks for a configuration")
    doctor.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML configuration")
    doctor.set_defaults(command=_doctor)
    add_evaluate(commands)
    add_model(commands)
    add_tokenizer(commands)
    add_hugging_face(commands)
    add_trial_commands(commands)
    add_inherit(commands)
    status = commands.add_parser("status", help="say what of a run is done, running or failed")
    status.add_argument("run", type=Path, metavar="RUN", help="run folder")
    status.set_defaults(command=_status)
    runs = commands.add_parser("runs", help="say the same of every run in a folder, a line each")
    runs.add_argument(
        "folder", type=Path, nargs="?", default=Path("runs"), help="folder of run folders (default: runs)"
    )
    runs.set_defaults(command=_runs)
    report = commands.add_parser("report", help="write the report over what is there")
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")
    report.set_defaults(command=_report)
    sql = commands.add_parser("sql", help="ask the ledger, in DuckDB's SQL")
    sql.add_argument("run", type=Path, metavar="RUN", help="run folder")
    sql.add_argument("query", metavar="QUERY", help='such as "select * from rounds"')
    sql.set_defaults(command=_sql)
    return parser


def _add_stages(commands: Any) -> None:
    for stage, text in _STAGES.items():
        command = commands.add_parser(stage, help=text)
        _add_target(command)
        if stage != "prepare":
            command.add_argument("--round", type=int, help="number of the round (default: the first that lacks it)")
        if stage == "refine":
            command.add_argument("--dry-run", action="store_true", help="print what would be kept and write nothing")
            _add_draw(command, "with --dry-run: another ")
            command.add_argument("--temperature", type=float, help="with --dry-run: another temperature than the run's")
        command.set_defaults(command=_stage, stage=stage)


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", type=Path, metavar="CONFIG_OR_RUN", help="YAML configuration, or a run folder")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )


def _add_draw(command: argparse.ArgumentParser, prefix: str) -> None:
    command.add_argument("--policy", choices=get_args(Policy), help=f"{prefix}refine.policy than the run's")
    command.add_argument("--sampling-rate", type=float, help=f"{prefix}refine.sampling_rate than the run's")


def _config(options: argparse.Namespace) -> RunConfig:
    if not options.target.is_dir():
        return read_config(options.target, options.set)
    if options.set:
        raise ValueError("--set: overrides go with a configuration file, not with a run folder; give the file")
    config = read_run(options.target).config
    # The folder may have been moved or renamed since it was made.
    folder = options.target.absolute()
    return config.model_copy(update={"output": str(folder.parent), "name": folder.name})


def _run(options: argparse.Namespace) -> None:
    config = _config(options)
    if options.dry_run:
        from flows.stages.completion import launch_plan

        print(launch_plan(config))
        return
    # On a terminal the progress says what is going on, and one line says what went wrong.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    # Registered before Prefect's own, it runs after them.
    atexit.register(silence)
    from prefect.exceptions import CancelledRun

    from flows.orchestration.temporary_server import server
    from flows.pipeline import multi_round

    with server():
        try:
            report = multi_round(config)
        except CancelledRun:
            raise RanksFailedError("cancelled in Prefect; the same command goes on from here") from None
    print(f"report: {report}")


def _stage(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.stages import completion as stages

    if options.stage == "refine":
        if options.dry_run:
            _preview(options)
            return
        if options.policy or options.sampling_rate is not None or options.temperature is not None:
            raise ValueError(
                "--policy, --sampling-rate, --temperature: go with --dry-run; runs are refined as configured"
            )
    config = _config(options)
    with locked(config.folder), TerminalProgress() as progress:
        run = open_run(config)
        if options.stage == "prepare":
            stages.prepare(run, progress)
            return
        number = _first_without(run, options.stage) if options.round is None else options.round
        rounds = _rounds_with(run, options.stage)
        if number not in rounds:
            raise ValueError(
                f"--round: {number} is not between {rounds.start} and rounds.num_rounds {run.config.rounds.num_rounds}"
            )
        if options.stage == "refine":
            stages.refine(run, number, progress)
            stages.mix(run, number, progress)
        else:
            if options.stage == "train" and number == 1:
                stages.contamination(run, progress)
                stages.inherit(run, progress)
                stages.mix(run, number, progress)
            work: Callable[..., None] = getattr(stages, options.stage)
            work(run, number, progress)
    print(f"{options.stage} of round {number} is complete")


def _preview(options: argparse.Namespace) -> None:
    from flows.report.tables import summary
    from flows.stages import completion as stages

    # Nothing is made: so an override may go with a run folder too.
    if not options.target.is_dir():
        run = read_run(_config(options).folder)
    elif any(not each.startswith("refine.") for each in options.set):
        raise ValueError("--set: a dry run of a run folder takes overrides of refine alone, such as refine.policy=top")
    else:
        run = read_run(options.target)
        run = replace(run, config=override(run.config, options.set))
    number = _next_to_train(run) if options.round is None else options.round
    print(summary(stages.preview(run, number, _draw(run.refine_config(number), options))))


def _draw(refine: RefineConfig, options: argparse.Namespace) -> RefineConfig:
    """Return `refine` with what the command line says otherwise."""
    names = ("policy", "sampling_rate", "temperature")
    given = {name: getattr(options, name, None) for name in names}
    try:
        return RefineConfig.model_validate(
            {**refine.model_dump(), **{field: value for field, value in given.items() if value is not None}}
        )
    except ValidationError as error:
        detail, *_ = error.errors()
        if not detail["loc"]:
            # Several fields that do not go together.
            raise ValueError(f"refine.{detail['ctx']['error']}") from None
        field = str(detail["loc"][0]).replace("_", "-")
        raise ValueError(f"--{field}: {detail['msg']} (it is {detail['input']}); give another") from None


def _next_to_train(run: Run) -> int:
    """Return the first round after the first that has not trained."""
    rounds = _rounds_with(run, "refine")
    return next((number for number in rounds if not run.is_complete("train", number)), rounds.stop - 1)


def _approve(options: argparse.Namespace) -> None:
    run = read_run(options.run)
    with locked(run.folder):
        number = _next_to_train(run) if options.round is None else options.round
        if number not in _rounds_with(run, "refine") or not run.is_complete("score", number - 1):
            raise ValueError(f"--round: round {number} has nothing to approve yet; `reprise status {options.run}`")
        if run.is_complete("train", number):
            raise ValueError(f"--round: round {number} has been trained already; there is nothing left to decide")
        draw = _draw(run.refine_config(number), options)
        run.approve(number, draw.policy, draw.sampling_rate)
    print(f"round {number} may train on what policy {draw.policy} keeps at sampling rate {draw.sampling_rate:g}")


def _doctor(options: argparse.Namespace) -> None:
    from flows.orchestration.doctor import examine

    findings = examine(None if options.config is None else read_config(options.config, []))
    for finding in findings:
        print(f"{finding.state:<8} {finding.text}")
    lacks = sum(finding.state == "missing" for finding in findings)
    if lacks:
        raise ValueError(f"{options.config}: {lacks} of what it needs {'is' if lacks == 1 else 'are'} missing here")


def _join(options: argparse.Namespace) -> None:
    from flows.launch.hosts import join

    join(options.run, options.interface)


def _serve(options: argparse.Namespace) -> None:
    from flows.orchestration.serve import serve

    serve(options.host, options.port, options.allow)


def _rounds_with(run: Run, stage: str) -> range:
    return range(2 if stage == "refine" else 1, run.config.rounds.num_rounds + 1)


def _first_without(run: Run, stage: str) -> int:
    run.corpus()
    # Refining ends with the mix.
    last_part = "mix" if stage == "refine" else stage
    for number in _rounds_with(run, stage):
        if not run.is_complete(last_part, number):
            return number
    raise ValueError(f"{run.folder}: every round has completed {stage}; raise rounds.num_rounds to go on")


def _status(options: argparse.Namespace) -> None:
    for row in read_status(options.run):
        print(f"{row.name:<10} {row.state:<8} {row.detail}".rstrip())


def _runs(options: argparse.Namespace) -> None:
    folders = sorted(path.parent for path in options.folder.glob("*/run.yaml"))
    if not folders:
        raise ValueError(f"{options.folder}: holds no run; start one with `reprise run CONFIG.yaml`")
    for folder in folders:
        rows = read_status(folder)
        current = next((row for row in rows if row.state != "done"), None)
        state = f"{current.state} at {current.name}  {current.detail}".rstrip() if current else "done"
        print(f"{folder.name:<20} {sum(row.state == 'done' for row in rows)} of {len(rows)} stages  {state}")


def _report(options: argparse.Namespace) -> None:
    from flows.stages import completion as stages

    print(f"report: {stages.report(read_run(options.run))}")


def _sql(options: argparse.Namespace) -> None:
    from data_scoring.ledger import query, refresh_ledger

    read_run(options.run)
    refresh_ledger(options.run)
    query(options.run, options.query).show(max_rows=200, max_width=200)


if __name__ == "__main__":
    sys.exit(main())
