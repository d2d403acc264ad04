"""Which checkpoints a folder holds, told without loading Megatron."""

from pathlib import Path
from typing import Any

from data_scoring.files import read_json

RECORD = "reprise.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / RECORD).exists())


def read_checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """Return what was recorded with a checkpoint: its step and what the saver added."""
    record: dict[str, Any] = read_json(checkpoint / RECORD)
    return record
