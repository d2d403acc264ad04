"""Forks: runs that share the corpus and the first rounds of another run by hard links, and train on otherwise."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from data_scoring.base.field_effects import find_mark
from data_scoring.base.field_types import Name
from data_scoring.base.files import making, write_record
from data_scoring.base.progress import Progress
from data_scoring.base.validation import validated
from data_scoring.ledger import refresh_ledger
from data_scoring.losses.calibration import calibration_path
from data_scoring.refine.budget import budget_path
from flows.run.config import RunConfig, differences, override
from flows.run.folder import VERIFIED, Run, write_settings
from flows.run.fork_record import FORK, SECTIONS, Earlier, ForkRecord, read_fork, settings_of
from flows.run.locks import locked
from flows.run.sharing import share
from flows.stages.stage_order import is_complete, stages_of, steps_at, steps_to_train
from trainer.checkpoint_folder import list_checkpoints

# Sections that the corpus depends on, which every fork shares.
_OF_THE_CORPUS = ("corpus", "tokenizer", "seed")
# Round 1's weights decide it; a round starts from those of the one before.
_OF_ALL_ROUNDS = ("train.precision",)


@dataclass(frozen=True)
class Fork:
    """A new fork, and the bytes of the files that were copied because they could not be linked."""

    run: Run
    copied_bytes: int


def fork(source: Run, round_number: int, overrides: list[str], name: str | None, progress: Progress) -> Fork:
    """Return a new run beside `source` that shares its corpus and the rounds before `round_number` with it.

    overrides: fields, such as refine.policy=top, that hold from that round on. name: of the new run; None: the run's,
    with the round. Raises ValueError, in one line, if a field concerns what is shared, if the shared rounds are not
    complete, if the folder exists, and if the run is in use.
    """
    target = source.folder.with_name(_name(source, round_number, name))
    config = _config(source, overrides, target)
    _check_fields(source.config, config, round_number)
    _check_round(config, round_number)
    with locked(source.folder):
        if target.exists():
            raise ValueError(f"{target}: exists; give another --name")
        with making(target) as folder:
            _check_complete(source, round_number)
            stages_of(source).verify(progress)
            write_record(folder / FORK, {**_record(source, round_number, config, overrides)})
            made = Run(config, folder)
            copied = _share(source, made, round_number)
            write_settings(made)
    refresh_ledger(target)
    return Fork(Run(config, target), copied)


def _name(source: Run, round_number: int, name: str | None) -> str:
    """Return the name of the fork's folder. Raises ValueError if it cannot be one."""
    return validated(Name, name or f"{source.folder.name}-fork-{round_number}", "--name", "give another --name")


def _config(source: Run, overrides: list[str], target: Path) -> RunConfig:
    """Return the fork's configuration. Raises ValueError for invalid overrides."""
    config = override(source.config, overrides)
    for field in ("name", "output"):
        if getattr(config, field) != getattr(source.config, field):
            raise ValueError(f"--set {field}: a fork is made beside its run; give --name for another name")
    config.check_resolved()
    return config.model_copy(update={"output": str(target.parent), "name": target.name})


def _check_fields(old: RunConfig, new: RunConfig, round_number: int) -> None:
    """Raise ValueError if a field that differs concerns what the fork shares."""
    for line in differences(old, new):
        field = line.partition(":")[0]
        if field.partition(".")[0] in _OF_THE_CORPUS:
            raise ValueError(
                f"--set {field}: concerns the corpus, which a fork shares; start a new run, with another name, by "
                "`reprise run CONFIG.yaml`"
            )
        if round_number > 1 and _is_of_round_1(old, new, field):
            raise ValueError(
                f"--set {field}: concerns round 1, which a fork at round {round_number} shares; give --round 1, which "
                "shares the corpus alone"
            )


def _is_of_round_1(old: RunConfig, new: RunConfig, field: str) -> bool:
    """Return whether a field that differs decides the result of round 1 alone, or must be the same in all rounds."""
    found = find_mark(RunConfig, field)
    if field.startswith("refine.sources."):
        # Round 1 is without the sources that join later.
        return _late(old) != _late(new)
    is_of_first_mix = found is not None and found[1].stages == ("mix",)
    return field.partition(".")[0] not in SECTIONS or field in _OF_ALL_ROUNDS or is_of_first_mix


def _late(config: RunConfig) -> dict[str, int]:
    return {rule.name: rule.from_round for rule in config.refine.sources if rule.from_round > 1}


def _check_round(config: RunConfig, round_number: int) -> None:
    """Raise ValueError if the fork has no such round."""
    rounds = config.rounds.num_rounds
    if not 1 <= round_number <= rounds:
        more = f", or add it by --set rounds.num_rounds={round_number}" if round_number == rounds + 1 else ""
        raise ValueError(
            f"--round: {round_number} is not between 1 and rounds.num_rounds {rounds}; give one of these rounds{more}"
        )


def _check_complete(source: Run, round_number: int) -> None:
    """Raise ValueError if a stage before the round is not complete, or the checkpoint that it starts from is gone."""
    for step in steps_to_train(source.config, round_number - 1) if round_number > 1 else steps_at(source.config, 0):
        if not is_complete(source, step.stage.name, step.round_number):
            earlier = ", or give an earlier round" if round_number > 1 else ""
            raise ValueError(
                f"{source.folder}: {step.name} is not complete, which a fork at round {round_number} shares; complete "
                f"it by `reprise run {quote(str(source.folder))}`{earlier}"
            )
    folder = source.round_folder(round_number - 1) / "checkpoint"
    if round_number > 1 and not list_checkpoints(folder):
        raise ValueError(
            f"{folder}: holds no checkpoint for round {round_number} to start from, perhaps after `reprise clean`; "
            "fork at another round"
        )


def _record(source: Run, round_number: int, config: RunConfig, overrides: list[str]) -> ForkRecord:
    """Return the record of the fork: with the settings of the rounds before it, where they differ from its own."""
    known = read_fork(source.folder)
    bounds = {entry["before"] for entry in (known["earlier"] if known else [])}
    earlier: list[Earlier] = []
    for bound in sorted({*bounds, round_number} - {1}):
        # Rounds after the first one of the fork have its overrides, too.
        before = source.config_at(bound - 1)
        settings = settings_of(before if bound <= round_number else override(before, overrides))
        earlier.append({"before": bound, "sections": settings})
    while earlier and earlier[-1]["sections"] == settings_of(config):
        earlier.pop()
    return {"run": str(source.folder), "round": round_number, "earlier": earlier}


def _share(source: Run, made: Run, round_number: int) -> int:
    """Share what the fork has in common with its run; return the bytes that were copied instead."""
    copied = share(source.corpus_folder, made.corpus_folder)
    for number in range(1, round_number):
        copied += share(source.round_folder(number), made.round_folder(number))
    if round_number > 1:
        if (source.folder / "evaluation").exists():
            copied += share(source.folder / "evaluation", made.folder / "evaluation")
        if not is_complete(made, "score", round_number - 1):
            _forget_scores(made.round_folder(round_number - 1))
    # What the runs share on disk is not read again to verify it.
    if (source.folder / VERIFIED).exists():
        shutil.copyfile(source.folder / VERIFIED, made.folder / VERIFIED)
    return copied


def _forget_scores(folder: Path) -> None:
    """Delete the scores of a round from a fork that scores it otherwise; those of the other run stay."""
    shutil.rmtree(folder / "losses", ignore_errors=True)
    for path in (folder / "score.json", budget_path(folder), calibration_path(folder)):
        path.unlink(missing_ok=True)
