"""The commands of a single run: `run`, one for each stage that has a command, and `approve`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import ValidationError

from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig
from flows.cli.options import check_text, path, read_resolved
from flows.evaluation.task_index import check_names
from flows.run.config import RunConfig, override
from flows.run.folder import VERIFIED, Run, open_run, read_run
from flows.run.locks import is_locked, locked
from flows.run.trackers import check_trackers
from flows.stages.changes import check_changes
from flows.stages.stage_order import STAGES, Step, is_complete, steps_at, steps_of_command
from trainer.checkpoint_folder import list_checkpoints


def add_run(commands: Any) -> None:
    """Add `run`, the stages' commands and `approve`."""
    run = commands.add_parser("run", help="do the whole run; the same command resumes it")
    _add_target(run)
    run.add_argument("--dry-run", action="store_true", help="print how ranks would be launched, without starting them")
    run.set_defaults(command=_run)
    for stage in STAGES:
        # `evaluate` takes several runs; see evaluation_commands.
        if stage.help is not None and stage.name != "evaluate":
            _add_stage(commands, stage.name, stage.help)
    approve = commands.add_parser("approve", help="approve the selection that a round trains on (rounds.approval)")
    approve.add_argument("run", type=path, metavar="RUN", help="run folder")
    approve.add_argument("--round", type=int, help="number of the round (default: the waiting one)")
    _add_draw(approve, "")
    approve.set_defaults(command=_approve)


def _add_stage(commands: Any, stage: str, text: str) -> None:
    command = commands.add_parser(stage, help=text)
    _add_target(command)
    if stage != "prepare":
        command.add_argument("--round", type=int, help="number of the round (default: the first incomplete one)")
    if stage == "refine":
        command.add_argument("--dry-run", action="store_true", help="print what would be kept, without writing it")
        _add_draw(command, "with --dry-run: ")
        command.add_argument("--temperature", type=float, help="with --dry-run: override refine.temperature")
    command.set_defaults(command=_stage, stage=stage)


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", type=path, metavar="CONFIG_OR_RUN", help="YAML configuration, or a run folder")
    command.add_argument(
        "--verify",
        choices=["changed", "full"],
        default="changed",
        help="files that are read to verify their checksums: those that changed since they were verified, or all",
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )


def _add_draw(command: argparse.ArgumentParser, prefix: str) -> None:
    command.add_argument("--policy", choices=[*POLICIES], help=f"{prefix}override refine.policy")
    command.add_argument("--sampling-rate", type=float, help=f"{prefix}override refine.sampling_rate")


def _forget_verified(options: argparse.Namespace, config: RunConfig) -> None:
    """With --verify full, make the run's stages read every file that they verify."""
    if options.verify == "full":
        (config.folder / VERIFIED).unlink(missing_ok=True)


def _config(options: argparse.Namespace) -> RunConfig:
    if not options.target.is_dir():
        return read_resolved(options.target, options.set)
    if options.set:
        raise ValueError("--set: overrides need a configuration file, not a run folder; give the file")
    config = read_run(options.target).config
    # The folder may have been moved or renamed since it was created.
    folder = options.target.absolute()
    return config.model_copy(update={"output": str(folder.parent), "name": folder.name})


def _run(options: argparse.Namespace) -> None:
    config = _config(options)
    if options.dry_run:
        from flows.stages.train import launch_plan

        print(launch_plan(config, _command(options, config)))
        return

    check_names(config.eval.asked)
    check_trackers(config.track)
    if not (config.folder / "corpus" / "manifest.json").exists():
        check_text(config)
    else:
        _print_state(config)
    _forget_verified(options, config)

    from flows.orchestration.here import run_here
    from flows.tracking.followers import undelivered

    report = run_here(_import_flow, config)
    run = read_run(config.folder)
    _print_notes(run)
    for line in undelivered(run):
        print(f"note: {line}; `reprise track {quote(str(config.folder))}` sends the rest")
    print(f"report: {report}")


def _command(options: argparse.Namespace, config: RunConfig) -> list[str]:
    """Return the command that does the run from any working directory."""
    overrides = list(options.set)
    if not options.target.is_dir() and not Path(config.output).is_absolute():
        overrides.append(f"output={config.folder.parent.absolute()}")
    return ["reprise", "run", str(options.target.absolute()), *(word for each in overrides for word in ("--set", each))]


def _print_state(config: RunConfig) -> None:
    """Print what is left of a run that has a corpus: the first stage that is not done, and how far it is."""
    from flows.stages.status import resumption

    stored = read_run(config.folder)
    if is_locked(config.folder):
        # Refused below.
        return
    check_changes(stored, config)
    following = resumption(replace(stored, config=config))
    if following is not None:
        print(f"resuming at {following}", file=sys.stderr)
        return
    report = config.folder / "report.html"
    print(f"nothing to do: all stages are done; verifies files and writes {report} again", file=sys.stderr)


def _import_flow() -> Any:
    from flows.pipeline import multi_round

    return multi_round


def _print_notes(run: Run) -> None:
    """Print what a user should know about the corpus."""
    for note in run.corpus().notes:
        print(f"note: {note}")


def _stage(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.stages.stage_order import complete
    from flows.tracking.followers import followed

    if options.stage == "refine":
        if options.dry_run:
            _preview(options)
            return
        if options.policy or options.sampling_rate is not None or options.temperature is not None:
            raise ValueError(
                "--policy, --sampling-rate, --temperature: only valid with --dry-run; change refine in the "
                "configuration instead"
            )
    config = _config(options)
    _forget_verified(options, config)
    check_trackers(config.track)
    with locked(config.folder), TerminalProgress() as progress:
        run = open_run(config, check_changes)
        number, steps = _steps(run, options.stage, getattr(options, "round", None))
        with followed(run):
            for step in steps:
                complete(run, step.stage.name, step.round_number, progress)
    if number:
        print(f"{options.stage} of round {number} is complete")
    else:
        _print_notes(run)


def _steps(run: Run, stage: str, wanted: int | None) -> tuple[int, list[Step]]:
    """Return the round that a stage's command works on, by default the first incomplete one, and its steps."""
    rounds, last = _rounds_with(run, stage), run.config.rounds.num_rounds
    if not rounds:
        raise ValueError(f"{run.folder}: a run with rounds.num_rounds {last} has no {stage}; raise rounds.num_rounds")
    if wanted is not None:
        if wanted not in rounds:
            raise ValueError(
                f"--round: {wanted} is not between {min(rounds)} and rounds.num_rounds {last}; give one of these"
            )
        return wanted, rounds[wanted]
    if 0 not in rounds:
        # Stages can only be checked for completion once there is a corpus; this raises ValueError without one.
        run.corpus()
        for number, steps in rounds.items():
            if not is_complete(run, steps[-1].stage.name, steps[-1].round_number):
                return number, steps
        raise ValueError(f"{run.folder}: every round has completed {stage}; raise rounds.num_rounds to continue")
    return 0, rounds[0]


def _rounds_with(run: Run, stage: str) -> dict[int, list[Step]]:
    """Return the rounds of a stage, each with the steps of its command."""
    config = run.config
    found = {}
    # The last round may be scored, too, although no later round is selected by its losses.
    for place in range(config.rounds.num_rounds + 2):
        for step in steps_at(config, place):
            if step.stage.name == stage and step.round_number <= config.rounds.num_rounds:
                found[step.round_number] = steps_of_command(config, stage, place)
    return found


def _preview(options: argparse.Namespace) -> None:
    from flows.report.tables import summary
    from flows.stages.refine import preview
    from flows.stages.stage_order import stages_of

    # Nothing is written, so overrides are allowed for a run folder, too.
    if not options.target.is_dir():
        run = read_run(_config(options).folder)
    elif any(not each.startswith("refine.") for each in options.set):
        raise ValueError(
            "--set: a dry run on a run folder can only override refine; give one such as refine.policy=top"
        )
    else:
        run = read_run(options.target)
    number = _next_to_train(run) if options.round is None else options.round
    stages_of(run).require("score", number - 1)
    stages_of(run).verify()
    config = run.config_at(number).model_copy(update={"refine": run.refine_config(number)})
    refine = override(config, [each for each in options.set if each.startswith("refine.")]).refine
    print(summary(preview(run, number, _draw(refine, options))))


def _draw(refine: RefineConfig, options: argparse.Namespace) -> RefineConfig:
    """Return `refine`, overridden by the command line."""
    names = ("policy", "sampling_rate", "temperature")
    given = {name: getattr(options, name, None) for name in names}
    try:
        return RefineConfig.model_validate(
            {**dict(refine), **{field: value for field, value in given.items() if value is not None}}
        )
    except ValidationError as error:
        detail, *_ = error.errors()
        if not detail["loc"]:
            # Several fields that are invalid together.
            raise ValueError(f"refine.{detail['ctx']['error']}") from None
        field = str(detail["loc"][0]).replace("_", "-")
        raise ValueError(f"--{field}: {detail['msg']} (it is {detail['input']}); correct it") from None


def _next_to_train(run: Run) -> int:
    """Return the first round from round 2 on that has not trained."""
    rounds = list(_rounds_with(run, "refine"))
    return next((number for number in rounds if not is_complete(run, "train", number)), rounds[-1] if rounds else 2)


def _approve(options: argparse.Namespace) -> None:
    run = read_run(options.run)
    with locked(run.folder):
        number, _ = _steps(run, "refine", _next_to_train(run) if options.round is None else options.round)
        if not is_complete(run, "score", number - 1):
            raise ValueError(
                f"--round: round {number} has nothing to approve yet; see `reprise status {quote(str(run.folder))}`"
            )
        if is_complete(run, "train", number):
            raise ValueError(f"--round: round {number} has been trained already; give a later round")
        draw = _draw(run.refine_config(number), options)
        checkpoints = run.round_folder(number) / "checkpoint"
        if draw != run.refine_config(number) and list_checkpoints(checkpoints):
            raise ValueError(
                f"--round: round {number} has begun to train on what was approved before; move {checkpoints} away to "
                "approve something else"
            )
        run.approve(number, draw.policy, draw.sampling_rate)
    print(f"approved: round {number} trains on what policy {draw.policy} keeps at sampling rate {draw.sampling_rate:g}")
