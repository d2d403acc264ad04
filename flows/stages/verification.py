"""Verification of a run's files: each is what its stage wrote, by the checksum in the stage's record."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from data_scoring.base.checksums import WrittenFile
from data_scoring.base.progress import Progress, silent
from flows.cluster.engines import open_engine
from flows.evaluation.rounds import evaluation_records
from flows.run.folder import Run
from trainer.checkpoint_folder import RECORD
from trainer.checkpoint_folder import find_damage as find_damage_in_checkpoint

if TYPE_CHECKING:
    from flows.stages.stage import Stage

_MOST_SHOWN = 3


@dataclass(frozen=True)
class Written:
    """The files that one record of a run lists, and the stage and round that wrote them."""

    stage: "Stage"
    round_number: int
    record: Path
    files: Mapping[Path, WrittenFile]

    @property
    def name(self) -> str:
        """Return the name of the stage and round, as `reprise status` shows it."""
        return f"{self.stage.name} {self.round_number}" if self.round_number else self.stage.name


@dataclass(frozen=True)
class Examined:
    """What was compared with its checksums: a record with the files that it lists, a checkpoint, or a damaged file.

    num_files: those that a record lists; None for the others. damage: one line about what is wrong, or None.
    """

    path: Path
    num_files: int | None = None
    damage: str | None = None

    @property
    def name(self) -> str:
        """Return the path and, of a record, how many files it lists."""
        if self.num_files is None:
            return str(self.path)
        return f"{self.path}: {f'{self.num_files} files' if self.num_files else 'no checksums recorded'}"


def written_files(run: Run, table: Sequence["Stage"]) -> list[Written]:
    """Return the files of all records of a run, in the order of its stages; records of version 0.8 list no files."""
    return [_read(run, *each) for each in _records(run, table)]


def _records(run: Run, table: Sequence["Stage"]) -> Iterator[tuple["Stage", int, Path]]:
    # The last round may be scored, too, although no later round is selected by its losses.
    for place in range(run.config.rounds.num_rounds + 2):
        for stage in table:
            number = stage.round_number(run.config, place)
            if number is not None:
                yield stage, number, run.record_path(stage.name, number)
    # Rounds may be evaluated whether the configuration asks for it or not.
    for stage in (stage for stage in table if stage.name == "evaluate"):
        for number in range(1, run.config.rounds.num_rounds + 1):
            yield from ((stage, number, record) for record in evaluation_records(run, number))


def _read(run: Run, stage: "Stage", round_number: int, record: Path) -> Written:
    if stage.name == "prepare":
        return Written(stage, round_number, record, run.corpus().files() if record.exists() else {})
    return Written(stage, round_number, record, run.recorded_files(record))


def find_damage(
    run: Run, written: Sequence[Written], progress: Progress = silent, reads_all: bool = False
) -> dict[Path, str]:
    """Return what is wrong with each file that is not as its stage wrote it; empty if all are.

    reads_all: read files that were verified before, too.
    """
    files = {path: entry for each in written for path, entry in each.files.items()}
    engine = run.config.engine
    other_hosts = None if engine.kind == "local" else partial(open_engine, engine, run.folder)
    return run.verifier(reads_all).find_damage(files, progress, other_hosts)


def verify(run: Run, table: Sequence["Stage"], progress: Progress = silent) -> None:
    """Raise ValueError if a file that a stage has written is damaged or missing.

    Files that were verified and have not changed since are not read again. Checkpoints are not included: they are
    verified whenever they are loaded.
    """
    written = written_files(run, table)
    damage = find_damage(run, written, progress)
    if damage:
        shown = [describe(run, written, path, reason) for path, reason in list(damage.items())[:_MOST_SHOWN]]
        others = f"; and {len(damage) - len(shown)} more files" if len(damage) > len(shown) else ""
        raise ValueError(f"{'; '.join(shown)}{others}; `reprise verify {quote(str(run.folder))}` lists everything")


def describe(run: Run, written: Sequence[Written], path: Path, reason: str) -> str:
    """Return one line about a damaged file: what is wrong, how to repair it, and which stages depend on it."""
    [owner, *_] = [each for each in written if path in each.files]
    later = dependents(run, written, owner)
    needed = f"; completed stages that depend on it: {', '.join(later)}" if later else ""
    source = path.resolve()
    if not source.is_relative_to(run.folder.resolve()):
        return f"{source}: changed since {owner.name} read it: {reason}; the run uses it in place: restore it{needed}"
    remedy = owner.stage.how_to_repeat(run, owner.round_number, owner.record)
    return f"{path}: damaged since {owner.name} wrote it: {reason}; restore it from a copy, or {remedy}{needed}"


def dependents(run: Run, written: Sequence[Written], owner: Written) -> list[str]:
    """Return the completed stages that depend on what `owner` wrote, directly or through other stages."""
    affected = {(owner.stage.name, owner.round_number)}
    names = []
    for each in written:
        key = (each.stage.name, each.round_number)
        needs = {*each.stage.needs(run.config, each.round_number), ("prepare", 0)}
        if key not in affected and needs & affected and each.record.exists():
            affected.add(key)
            names.append(each.name)
    return names


def examine(run: Run, table: Sequence["Stage"], progress: Progress = silent) -> Iterator[Examined]:
    """Yield each record, each damaged file that one lists, and each checkpoint of a run.

    Reads every file, whether it was verified before or not.
    """
    written: list[Written] = []
    for stage, number, record in _records(run, table):
        try:
            written.append(_read(run, stage, number, record))
        except ValueError as error:
            yield Examined(record, damage=str(error))
    damage = find_damage(run, written, progress, reads_all=True)
    for each in written:
        # The record of an evaluation lists no files: those of its steps have records of their own.
        if each.record.exists() and (each.files or each.stage.name != "evaluate"):
            yield Examined(each.record, len(each.files))
            for path in each.files.keys() & damage.keys():
                yield Examined(path, damage=describe(run, written, path, damage[path]))
    for checkpoint in sorted(run.folder.glob("rounds/*/**/checkpoint/step-*")):
        found = find_damage_in_checkpoint(checkpoint) if (checkpoint / RECORD).exists() else f"{RECORD} is missing"
        name, folder = checkpoint.parent.parent.name, checkpoint.parent.parent
        record = folder.with_name("inherit.json") if name == "inherit" else folder / "train.json"
        remedy = f"restore it from a copy, or delete it and {record} to make it again"
        yield Examined(checkpoint, damage=f"{checkpoint}: damaged: {found}; {remedy}" if found else None)
