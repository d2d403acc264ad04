"""Floating-point operations of a training step, and what the pipeline adds to its time."""

from trainer.config import ModelConfig
from trainer.parallel_config import ParallelConfig

FORMULA = "a token: 6 (parameters - embedding) + 12 layers x heads x channels x sequence"


def model_flops(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """Return the FLOPs per token of training: two per weight in the forward pass, four in the backward pass.

    The embedding is a lookup and not counted. Attention is counted without causal masking, as in PaLM (Chowdhery et al.
    2022, its appendix on model FLOPs utilization), though a causal kernel skips half of it. Recomputation is not
    counted.
    """
    embedding = 0 if model.tied_embeddings else vocab_size * model.hidden_size
    attention = 12 * model.num_layers * model.num_attention_heads * model.channels * seq_length
    return 6.0 * (model.num_parameters(vocab_size) - embedding) + attention


def pipeline_bubble(parallel: ParallelConfig, num_microbatches: int) -> float:
    """Return the factor by which filling and draining the pipeline lengthens a step: 1 + idle time / microbatches."""
    return 1 + idle_microbatches(parallel) / num_microbatches


def idle_microbatches(parallel: ParallelConfig) -> float:
    """Return how long stages idle in a step while the pipeline fills and drains, in times of a microbatch on a stage.

    That is (stages - 1) / chunks of a stage. Source: Narayanan et al. 2021, "Pipeline Model Parallelism".
    """
    return (parallel.pipeline - 1) / parallel.virtual_pipeline
