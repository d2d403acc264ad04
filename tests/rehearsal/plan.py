"""The rehearsals: jobs, with the rank and the number of ranks."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rehearsal:
    """A job, done as one rank.

    job: path of its JSON; result: path of the JSON that says what it asked of the device. has_host_data: whether what
    is on the host has data while the model is built and cut for a checkpoint, which of a large one would take minutes.
    checkpoint: whether it is saved, which takes a layout of one rank, or only planned, or not even that. flaw: one of
    `flaws.FLAWS`, which has to be found. stop_after: the step after which a round is asked to stop.
    """

    job: str
    result: str
    rank: int = 0
    world_size: int = 1
    has_host_data: bool = True
    checkpoint: Literal["saved", "planned", "none"] = "saved"
    flaw: str | None = None
    stop_after: int | None = None
