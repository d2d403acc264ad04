"""The fields that all jobs of a run share, and the final checkpoint of a round."""

from pathlib import Path
from typing import Any

from flows.run.config import RunConfig
from flows.run.folder import Run
from trainer.checkpoint_folder import list_checkpoints


def device_kind(config: RunConfig) -> str:
    """Return the kind of device of a run's ranks: cuda, npu or cpu.

    If the launcher cannot see the devices of its nodes, the configuration names the kind.
    """
    from trainer.devices import resolve

    return resolve(config.device) if config.launch.launcher_kind.sees_devices else config.device


def job_fields(run: Run, round_number: int, fingerprint: str) -> dict[str, Any]:
    """Return the fields of `trainer.job.Job` for a job of a round; `fingerprint` identifies its results."""
    config = run.config
    return {
        "corpus": run.corpus_folder,
        "round_folder": run.round_folder(round_number),
        "model": config.model,
        "parallel": config.parallel,
        "device": device_kind(config),
        "precision": config.train.precision,
        "activation_kernel": config.train.activation_kernel,
        "seed": config.seed,
        "fingerprint": fingerprint,
        "progress": run.folder / "logs" / "progress.json",
        "errors": run.folder / "logs" / "errors",
        "lock": run.folder / ".ranks.lock",
    }


def final_checkpoint(run: Run, round_number: int) -> Path:
    """Return the final checkpoint of a round. Raises ValueError if it is missing."""
    folder = run.round_folder(round_number) / "checkpoint"
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(
            f"{folder}: the round's checkpoint is missing, perhaps after `reprise clean`; restore it, or delete "
            f"{folder.parent / 'train.json'} to train the round again"
        )
    return checkpoints[-1]
