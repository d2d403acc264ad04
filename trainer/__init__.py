"""Megatron-Core: devices, model, training, scoring, checkpoints."""
