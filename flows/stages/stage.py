"""The interface of a stage: when it applies, what it needs, what decides its result, and its work."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from data_scoring.base.engine import Engine
from data_scoring.base.files import fingerprint
from data_scoring.base.progress import Progress, silent
from data_scoring.ledger import refresh_ledger
from flows.cluster.engines import open_engine
from flows.launch import launcher
from flows.launch.launcher import KeptRanks
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.run.fork_record import read_fork
from flows.stages import verification
from trainer.job import Job


class Stage(ABC):
    """One stage of a run. It reads and writes files of the run folder; its completion record is written last.

    name: of its record, `<name>.json` in the folder of its round, and of its command, task and status.
    help: what `reprise <name>` does, or None if the stage has no command. Such a stage is done by the command of the
    stage before it in its round, or else by the command of the next one.
    """

    name: str
    help: str | None = None

    @abstractmethod
    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return the round that the stage works on at `place`, or None if it does not apply there.

        place: 0 before the first round, then the number of the round.
        """

    def is_needed(self, config: RunConfig) -> bool:
        """Return whether a later stage needs this one."""
        return True

    def needs(self, config: RunConfig, round_number: int) -> list[tuple[str, int]]:
        """Return the stages, with their rounds, that have to be complete before this one."""
        return []

    @abstractmethod
    def inputs(self, stages: "Stages", round_number: int) -> list[Any]:
        """Return what decides the stage's result: values of the configuration, and fingerprints of its input files."""

    @abstractmethod
    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the files that the stage has written, whose checksums go into its record."""

    def how_to_repeat(self, run: Run, round_number: int, record: Path) -> str:
        """Return what a person has to delete for the stage to write a damaged file, listed in `record`, again."""
        return f"delete it and {record} to write it again"

    def is_complete(self, stages: "Stages", round_number: int) -> bool:
        """Return whether the stage was completed with the current inputs."""
        return stages.run.recorded(self.name, round_number) == stages.fingerprint(self.name, round_number)

    def has_begun(self, run: Run, round_number: int) -> bool:
        """Return whether a change of inputs would discard what the stage has done: by default, if it is complete."""
        return run.record_path(self.name, round_number).exists()

    def can_follow_training(self, config: RunConfig) -> bool:
        """Return whether the ranks that have trained the round can do this stage's work right after it."""
        return False

    def waits_for(self, run: Run, round_number: int) -> str | None:
        """Return what a person has to do before the stage can run, or None."""
        return None

    def do(self, stages: "Stages", round_number: int, progress: Progress) -> bool:
        """Complete the stage; return whether there was anything left to do.

        Raises ValueError if a stage that it needs is not complete, or if a file that a stage has written is damaged.
        """
        if self.is_complete(stages, round_number):
            return False
        for name, number in self.needs(stages.run.config, round_number):
            stages.require(name, number)
        stages.verify(progress)
        self.check(stages, round_number)
        run, started = stages.run, time.time()
        # An interrupted repetition must not leave new files beside the checksums of the old ones.
        run.forget(self.name, round_number)
        self.work(stages, round_number, progress)
        identity = stages.fingerprint(self.name, round_number)
        run.record(self.name, round_number, identity, started, self.files(run, round_number))
        refresh_ledger(run.folder)
        return True

    def check(self, stages: "Stages", round_number: int) -> None:  # noqa: B027 - most stages replace nothing
        """Raise ValueError if the stage would replace what must not be lost; called before anything is changed."""

    @abstractmethod
    def work(self, stages: "Stages", round_number: int, progress: Progress) -> None:
        """Do the stage's work. Files of an interrupted attempt are reused or replaced."""


class Stages:
    """The stages of one run: checks and completes them.

    kept: keeps ranks from one stage to the next; None: each launch starts its own.
    """

    def __init__(self, run: Run, table: Sequence[Stage], kept: KeptRanks | None = None) -> None:
        self.run, self.kept = run, kept
        self._table = {stage.name: stage for stage in table}

    def fingerprint(self, name: str, round_number: int) -> str:
        """Return the fingerprint of a stage's inputs."""
        return fingerprint(name, *self._table[name].inputs(self._at(name, round_number), round_number))

    def is_complete(self, name: str, round_number: int) -> bool:
        """Return whether a stage was completed with the current inputs."""
        return self._table[name].is_complete(self._at(name, round_number), round_number)

    def require(self, name: str, round_number: int) -> None:
        """Raise ValueError if a stage is not complete; the message says what completes it."""
        config, stage, folder = self.run.config, self._table[name], quote(str(self.run.folder))
        rounds = config.rounds.num_rounds
        numbers = [stage.round_number(config, place) for place in range(rounds + 2)]
        if round_number not in numbers or round_number > rounds:
            raise ValueError(
                f"{self.run.folder}: has no {name} of round {round_number}: its rounds.num_rounds is {rounds}; give "
                "another round, or raise rounds.num_rounds"
            )
        if self.is_complete(name, round_number):
            return
        if round_number in numbers[:-1]:
            remedy = f"run `reprise run {folder}`, which does all missing stages"
        else:
            remedy = f"run `reprise {name} {folder} --round {round_number}`, as a run leaves out this stage at its end"
        raise ValueError(f"{self.run.folder}: {name} of round {round_number} is not complete; {remedy}")

    def verify(self, progress: Progress = silent) -> None:
        """Raise ValueError if a file that a stage has written is damaged or missing; see `verification.verify`."""
        verification.verify(self.run, [*self._table.values()], progress)

    def open_engine(self) -> Engine:
        """Return the run's engine, a context manager: where the stage's work on parts of its input runs."""
        return open_engine(self.run.config.engine, self.run.folder)

    def launch(self, job: Job, name: str, progress: Progress) -> None:
        """Run `job` on the run's ranks; see `flows.launch.launcher.launch`."""
        launcher.launch(job, self.run.folder, name, progress, self.run.config.launch, self.kept)

    def complete(self, name: str, round_number: int, progress: Progress) -> bool:
        """Complete a stage; return whether there was anything left to do."""
        return self._table[name].do(self._at(name, round_number), round_number, progress)

    def _at(self, name: str, round_number: int) -> "Stages":
        """Return the stages with the configuration of a stage's round: those that a fork shares may have another."""
        if read_fork(self.run.folder) is None:
            return self
        config, stage = self.run.config, self._table[name]
        places = range(config.rounds.num_rounds + 2)
        place = next((each for each in places if stage.round_number(config, each) == round_number), round_number)
        return Stages(replace(self.run, config=self.run.config_at(place)), [*self._table.values()], self.kept)
