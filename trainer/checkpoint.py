"""Loading checkpoints in Megatron's distributed format, under any tensor, pipeline and data-parallel layout."""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch.distributed.checkpoint.api import CheckpointException

from trainer.checkpoint_folder import RECORD, check_checkpoints, find_damage, list_checkpoints, set_aside
from trainer.data_parallel import gather_weights
from trainer.gradients import set_adam_kernel
from trainer.model_chunks import ModelChunks
from trainer.optimizer_state import load_states, needed_states, owned_states
from trainer.pickles import check_pickles, explain_refusal

_LOG = logging.getLogger(__name__)

_EXTRA = "_extra_state"
# Megatron's key for the states of parameters within the optimizer's state.
_PARAM_STATE = "param_state"
# What a group of the optimizer's parameters has besides its settings.
_OF_THE_LAST_STEP = ("params", "step")


def find_usable_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """Return the last intact checkpoint in `folder`, or None. Every rank must call this.

    Removes half-written checkpoints; renames damaged ones (`set_aside`). Raises ValueError if a checkpoint has another
    fingerprint: other training made it, which is not this training's to delete.
    """
    check_checkpoints(folder, fingerprint)
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        for leftover in folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        for path in folder.glob("step-*"):
            if not (path / RECORD).exists():
                _LOG.warning("%s: its %s is missing; set aside as %s", path, RECORD, set_aside(path).name)
    torch.distributed.barrier()
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = _find_damage_together(checkpoint)
        if damage is None:
            return checkpoint
        if is_first:
            _LOG.warning("%s: damaged (%s); set aside as %s", checkpoint, damage, set_aside(checkpoint).name)
    torch.distributed.barrier()
    return None


def _find_damage_together(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; each rank reads its share of the files."""
    ranks = torch.distributed.get_world_size()
    found: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(found, find_damage(checkpoint, torch.distributed.get_rank(), ranks))
    return next((damage for damage in found if damage is not None), None)


def load_checkpoint(checkpoint: Path, state: "TrainingState") -> None:
    """Load a complete training state, saved under any layout, into `state`."""
    state.load(_load(checkpoint, state.sharded(is_loading=True)))


def load_start(checkpoint: Path, state: "TrainingState") -> None:
    """Load weights and optimizer state of another round's checkpoint, saved under any layout, into a new `state`.

    The learning-rate schedule and the optimizer's settings stay those of `state`. Raises ValueError if the checkpoint
    is damaged.
    """
    damage = _find_damage_together(checkpoint)
    if damage is not None:
        raise ValueError(_failure(checkpoint, f"it is damaged: {damage}"))
    state.load_start(_load(checkpoint, state.sharded(is_loading=True)))


def load_weights(checkpoint: Path, model: ModelChunks) -> None:
    """Load only the weights of a checkpoint, saved under any layout, into `model`.

    Raises ValueError if the checkpoint is damaged.
    """
    damage = _find_damage_together(checkpoint)
    if damage is not None:
        raise ValueError(_failure(checkpoint, f"it is damaged: {damage}"))
    # Extra state, which layers of Transformer Engine save beside their weights, means nothing to torch's layers.
    wanted = {
        number: {name: part for name, part in chunk.items() if not name.endswith(_EXTRA)}
        for number, chunk in sharded_weights(model).items()
    }
    loaded = _load(checkpoint, {"model": wanted})["model"]
    # Megatron's wrapper for bfloat16 does not report missing keys.
    for number, decoder in enumerate(model.decoders):
        missing, unexpected = decoder.load_state_dict(loaded[number], strict=False)
        assert not unexpected
        assert all(name.endswith(_EXTRA) for name in missing), missing


def sharded_weights(model: ModelChunks) -> dict[int, ShardedStateDict]:
    """Return the sharded state dict of the weights of each chunk that this rank holds, by its number, from 0.

    In a checkpoint, weights have names of their own, which do not depend on the chunk.
    """
    return {number: decoder.sharded_state_dict(prefix="") for number, decoder in enumerate(model.decoders)}


def _load(checkpoint: Path, sharded: ShardedStateDict) -> dict[str, Any]:
    try:
        check_pickles(checkpoint)
        loaded: dict[str, Any] = dist_checkpointing.load(sharded, str(checkpoint), validate_access_integrity=False)
    except (
        *(RuntimeError, KeyError, OSError, EOFError),
        *(CheckpointException, CheckpointingException, pickle.UnpicklingError),
    ) as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise ValueError(explain_refusal(checkpoint, error) or _failure(checkpoint, reason)) from error
    return loaded


def _failure(checkpoint: Path, reason: str) -> str:
    return (
        f"{checkpoint}: cannot be loaded ({reason}); if the model was changed, use a new run folder; otherwise restore "
        f"it from a copy, or delete it and {checkpoint.parent.parent / 'train.json'} to train the round again"
    )


class TrainingState:
    """The state that a checkpoint holds: model (wrapped for data parallelism), optimizer and learning-rate schedule."""

    def __init__(self, model: ModelChunks, optimizer: Any, scheduler: Any) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def sharded(self, is_loading: bool) -> ShardedStateDict:
        """Return the sharded state dict of the parts of the state that this rank saves or loads.

        All ranks must call this together.
        """
        gather_weights(self.model)
        weights = sharded_weights(self.model)
        if is_loading:
            return {"model": weights, "optimizer": {_PARAM_STATE: needed_states(self._inner, weights)}}
        optimizer = {**self.optimizer.state_dict(), _PARAM_STATE: owned_states(self._inner, weights)}
        return {"model": weights, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load(self, loaded: dict[str, Any]) -> None:
        """Load the state that `dist_checkpointing.load` returned for `sharded`."""
        self._load_optimizer(loaded)
        # Megatron adds the loaded count to its own.
        self.scheduler.num_steps = 0
        self.scheduler.load_state_dict(loaded["scheduler"])
        set_adam_kernel(self.optimizer)

    def load_start(self, loaded: dict[str, Any]) -> None:
        """Load weights and optimizer state, but not the schedule, of what `dist_checkpointing.load` returned."""
        settings = [
            {name: value for name, value in group.items() if name not in _OF_THE_LAST_STEP}
            for group in self.optimizer.param_groups
        ]
        self._load_optimizer(loaded)
        for group, kept in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(kept)
        set_adam_kernel(self.optimizer)

    def _load_optimizer(self, loaded: dict[str, Any]) -> None:
        for number, decoder in enumerate(self.model.decoders):
            decoder.load_state_dict(loaded["model"][number])
        # This makes Megatron's optimizer, or MindSpeed's replacement, allocate its state; `load_states` then fills it.
        states = loaded["optimizer"].pop(_PARAM_STATE, {})
        self.optimizer.load_state_dict(loaded["optimizer"])
        load_states(self._inner, states)

    @property
    def _inner(self) -> Any:
        """Return Megatron's distributed optimizer, the only one in the chain since there are no experts."""
        [inner] = self.optimizer.chained_optimizers
        return inner
