"""A program that writes the logits of a checkpoint as Megatron-LM's own code loads and computes it, on the CPU.

Its arguments: the file of the tokens, [batch, seq] int64, that of the logits to write, and Megatron-LM's options.
"""

import os
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

_ON_CPU = (
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--attention-backend", "unfused"),
    *("--use-cpu-initialization", "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-rope-fusion", "--no-persist-layer-norm", "--micro-batch-size", "1"),
)


def main() -> None:
    tokens_path, logits_path, *options = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    # Megatron-LM reads its options from there.
    sys.argv = ["pretrain_gpt.py", *options, *_ON_CPU]
    from gpt_builders import gpt_builder
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    # Without a GPU, it would not build the process groups that it then needs.
    initialize_megatron(allow_no_cuda=True, skip_mpu_initialization=True)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model = gpt_builder(get_args(), pre_process=True, post_process=True)
    # It compares the iterations that ranks have read, computes positions and draws random numbers on the GPU.
    torch.cuda.current_device = lambda: torch.device("cpu")
    tensor = torch.tensor
    torch.tensor = lambda *values, device=None, **kinds: tensor(*values, device=None, **kinds)
    loaded: list[object] = []
    load_strictly = model.load_state_dict
    model.load_state_dict = lambda state, strict: loaded.append(load_strictly(state, strict=True))
    load_checkpoint([model], None, None)
    assert len(loaded) == 1
    tensor_parallel.get_cuda_rng_tracker().fork = nullcontext
    tokens = torch.from_numpy(np.load(tokens_path))
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(length)[None], mask)
    np.save(Path(logits_path), logits.float().numpy())


if __name__ == "__main__":
    main()
