"""The rendezvous of test ranks for several process groups in succession."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

_NUMBERS = itertools.count()


def meet(ranks: Sequence[int] = (0, 1)) -> None:
    """Leave all process groups for a new one of these ranks, RANK in the environment being one of them.

    Groups that are not left keep their threads, which slow down all that follows. Stores are in RENDEZVOUS.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    name = f"{next(_NUMBERS)}-of-{'-'.join(map(str, ranks))}"
    store = torch.distributed.FileStore(str(Path(os.environ["RENDEZVOUS"]) / name), len(ranks))
    rank = ranks.index(int(os.environ["RANK"]))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(ranks))
