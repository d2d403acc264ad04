"""Generation speed of a round's model, measured as in the paper: 2 prompt tokens, 510 new tokens, batches of 20."""

from data_scoring.base.files import fingerprint, read_json
from data_scoring.base.progress import Progress
from flows.launch import launcher
from flows.launch.job_fields import device_kind, final_checkpoint, job_fields
from flows.run.folder import Run
from flows.stages.stage_order import fingerprint_of
from trainer.jobs import GenerateJob


def generation_speed(run: Run, round_number: int, progress: Progress, num_new_tokens: int = 510) -> float:
    """Return the new tokens per second that one replica of a round's model generates greedily.

    Measured once, and stored in the round's generation.json with the device and the layout.
    """
    parallel = run.config.parallel.model_dump()
    identity = fingerprint(
        fingerprint_of(run, "train", round_number), device_kind(run.config), parallel, num_new_tokens
    )
    job = GenerateJob(
        **job_fields(run, round_number, identity),
        weights=final_checkpoint(run, round_number),
        num_new_tokens=num_new_tokens,
    )
    path = run.round_folder(round_number) / "generation.json"
    measured = read_json(path)
    if measured is None or measured["fingerprint"] != identity:
        launcher.launch(job, run.folder, f"generate-{round_number}", progress, run.config.launch)
        measured = read_json(path)
    return float(measured["tokens_per_second"])
