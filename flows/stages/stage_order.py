"""The stages of a run and their order: one list, read by the flow, the commands, status, trials and comparisons."""

from collections.abc import Iterator
from dataclasses import dataclass

from data_scoring.base.progress import Progress
from flows.launch.launcher import KeptRanks
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.contamination import Contamination
from flows.stages.evaluate import Evaluate
from flows.stages.inherit import Inherit
from flows.stages.mix import Mix
from flows.stages.prepare import Prepare
from flows.stages.refine import Refine
from flows.stages.score import Score
from flows.stages.stage import Stage, Stages
from flows.stages.train import Train

# To add a stage, write its class in a new file, and add an entry here.
STAGES: list[Stage] = [Prepare(), Contamination(), Inherit(), Score(), Refine(), Mix(), Train(), Evaluate()]


@dataclass(frozen=True)
class Step:
    """A stage's work on a round; `place` is 0 before the first round, then the number of the round that needs it."""

    stage: Stage
    round_number: int
    place: int

    @property
    def name(self) -> str:
        """Return the name shown by status and Prefect, such as `train 2`."""
        return f"{self.stage.name} {self.round_number}" if self.round_number else self.stage.name


def steps_of(config: RunConfig) -> list[Step]:
    """Return the steps of a run, in order."""
    return [step for place in range(config.rounds.num_rounds + 1) for step in steps_at(config, place)]


def steps_at(config: RunConfig, place: int) -> list[Step]:
    """Return the steps of a run before the first round (`place` 0), or for the round `place`."""
    numbers = ((stage, stage.round_number(config, place)) for stage in STAGES)
    return [Step(stage, number, place) for stage, number in numbers if number is not None]


def steps_to_train(config: RunConfig, round_number: int) -> list[Step]:
    """Return the steps that are needed to train a round, including that training."""
    steps = [step for place in range(round_number + 1) for step in steps_at(config, place)]
    [last] = [number for number, step in enumerate(steps) if (step.stage.name, step.place) == ("train", round_number)]
    return [step for step in steps[: last + 1] if step.stage.is_needed(config)]


def steps_of_command(config: RunConfig, command: str, place: int) -> list[Step]:
    """Return the steps of `reprise <command>` at `place`: its stage, and adjacent stages without a command."""
    steps = steps_at(config, place)
    with_command = [number for number, step in enumerate(steps) if step.stage.help is not None]
    chosen = []
    for number, step in enumerate(steps):
        before = [each for each in with_command if each <= number]
        owner = steps[before[-1] if before else with_command[0]]
        if owner.stage.name == command:
            chosen.append(step)
    return chosen


def complete_all(run: Run, steps: list[Step], progress: Progress) -> None:
    """Complete steps, in order; the ranks that have trained a round also do what follows it."""
    with KeptRanks() as kept:
        for step, following in with_next(steps):
            complete(run, step.stage.name, step.round_number, progress, kept)
            if not keeps_ranks(run.config, following):
                kept.close()


def keeps_ranks(config: RunConfig, following: Step | None) -> bool:
    """Return whether ranks are kept for the step `following`, if there is one."""
    return following is not None and following.stage.can_follow_training(config)


def with_next(steps: list[Step]) -> Iterator[tuple[Step, Step | None]]:
    """Yield each step with the one that follows it; None follows the last."""
    yield from zip(steps, [*steps[1:], None], strict=True)


def stages_of(run: Run, kept: KeptRanks | None = None) -> Stages:
    """Return the stages of a run; `kept` keeps ranks from one stage to the next."""
    return Stages(run, STAGES, kept)


def fingerprint_of(run: Run, stage: str, round_number: int = 0) -> str:
    """Return the fingerprint of a stage's inputs: its configuration, and the fingerprints of its input files."""
    return stages_of(run).fingerprint(stage, round_number)


def is_complete(run: Run, stage: str, round_number: int = 0) -> bool:
    """Return whether a stage was completed with the current inputs."""
    return stages_of(run).is_complete(stage, round_number)


def complete(run: Run, stage: str, round_number: int, progress: Progress, kept: KeptRanks | None = None) -> bool:
    """Complete a stage; return whether there was anything left to do.

    kept: keeps ranks from one stage to the next. Raises ValueError if a stage that it needs is not complete.
    """
    return stages_of(run, kept).complete(stage, round_number, progress)
