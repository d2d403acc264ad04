"""What ranks import, imported once: the server that forks the ranks of tests loads this module, and nobody else does.

It computes nothing: a fork would lose the threads that compute.
"""

import gc
from importlib import import_module

from trainer.devices import initialise

# Comes before anything of Megatron.
initialise("cpu", 0)
for _name in (
    "checkpoint",
    "evaluate",
    "generate",
    "layer_ablation",
    "mask_learning",
    "model",
    "rank",
    "saver",
    "score",
    "taylor",
    "train",
):
    import_module(f"trainer.{_name}")
# Optimizers take it.
import_module("torch._dynamo")
# What is imported is never garbage.
gc.freeze()
