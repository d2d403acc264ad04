"""The jobs that ranks are given: what all of them say, and the checkpoint that a round ended with."""

from pathlib import Path
from typing import Any

from flows.run.config import RunConfig
from flows.run.folder import Run
from trainer.checkpoint_folder import list_checkpoints


def device_kind(config: RunConfig) -> str:
    """Return the device that a run's ranks are on: cuda, npu or cpu.

    Where the launcher does not see the devices of its nodes, the configuration names it.
    """
    from trainer.devices import resolve

    return resolve(config.device) if config.launch.launcher_kind.sees_devices else config.device


def job_fields(run: Run, round_number: int, fingerprint: str) -> dict[str, Any]:
    """Return what every job says, `trainer.job.Job`, for one of a round whose results carry `fingerprint`."""
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
    """Return the checkpoint that a round ended with. Raises ValueError where it is gone."""
    folder = run.round_folder(round_number) / "checkpoint"
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(
            f"{folder}: the round's checkpoint is gone; restore it, or delete {folder.parent / 'train.json'} "
            "to train the round again"
        )
    return checkpoints[-1]
