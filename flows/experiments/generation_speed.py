"""Generation speed of a round's model, measured as in the paper: 2 prompt tokens, 510 new tokens, batches of 20."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from data_scoring.base.files import fingerprint
from data_scoring.base.progress import Progress
from data_scoring.base.validation import read_record, required_record
from flows.launch import launcher
from flows.launch.job_fields import device_kind, final_checkpoint, job_fields
from flows.run.folder import Run
from flows.stages.stage_order import fingerprint_of
from trainer.jobs import GenerateJob

# Sequences generated at once; each of them grows at the batch's speed divided by this.
BATCH_SIZE = 20


class _Measured(TypedDict):
    fingerprint: str
    tokens_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def generation_speed(run: Run, round_number: int, progress: Progress, num_new_tokens: int = 510) -> float:
    """Return the new tokens per second that one replica of a round's model generates greedily, over a whole batch.

    Measured once, and stored in the round's generation.json with the device and the layout.
    """
    parallel = run.config.parallel.model_dump()
    identity = fingerprint(
        fingerprint_of(run, "train", round_number), device_kind(run.config), parallel, num_new_tokens
    )
    path = run.round_folder(round_number) / "generation.json"
    measured = read_record(path, _Measured)
    if measured is None or measured["fingerprint"] != identity:
        job = GenerateJob(
            **job_fields(run, round_number, identity),
            weights=final_checkpoint(run, round_number),
            batch_size=BATCH_SIZE,
            num_new_tokens=num_new_tokens,
        )
        launcher.launch(job, run.folder, f"generate-{round_number}", progress, run.config.launch)
        measured = required_record(path, _Measured)
    return measured["tokens_per_second"]
