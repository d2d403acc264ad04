"""Configuration of the layout over devices, and its checks against the model and its training."""

from pydantic import Field, model_validator

from data_scoring.base.field_types import Integer
from data_scoring.config import Config
from trainer.config import AUTO, ModelConfig, TrainConfig


class ParallelConfig(Config):
    """The degrees of tensor, pipeline and data parallelism, whose product is the number of processes."""

    tensor: Integer = Field(
        default=1, ge=1, le=1024, description="Ranks that each layer is split over (tensor parallelism)."
    )
    pipeline: Integer = Field(
        default=1, ge=1, le=1024, description="Stages that the layers are split into (pipeline parallelism)."
    )
    virtual_pipeline: Integer = Field(
        default=1,
        ge=1,
        le=1024,
        description="Chunks of layers that each pipeline stage has (Megatron's interleaved schedule); 1: no "
        "interleaving. With N chunks, filling and draining the pipeline leaves stages idle for 1/N of the time, but "
        "they communicate N times as much and hold more activations. A step's microbatches must be a multiple of "
        "pipeline. Results do not change.",
    )
    data: Integer = Field(
        default=1, ge=1, le=65_536, description="Replicas of the model, each training on its part of the batch."
    )
    sequence: bool = Field(
        default=False,
        description="Whether tensor-parallel ranks also split activations between layers along the sequence (sequence "
        "parallelism): less memory for the same communication.",
    )

    @model_validator(mode="after")
    def _check_needs(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "sequence: true needs tensor-parallel ranks, but tensor is 1; raise it, or set it to false"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline: {self.virtual_pipeline} needs pipeline stages, but pipeline is 1; raise it, or set "
                "virtual_pipeline to 1"
            )
        return self

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks that the layers are split into, over all pipeline stages."""
        return self.pipeline * self.virtual_pipeline

    def can_schedule(self, num_microbatches: int) -> bool:
        """Return whether the schedule takes this many microbatches: if interleaved, a multiple of the stages."""
        return self.virtual_pipeline == 1 or num_microbatches % self.pipeline == 0

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.tensor * self.pipeline * self.data


def check_layout(model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, seq_length: int) -> None:
    """Raise ValueError if `parallel` does not divide heads, layers, the batch of `train` or the sequence evenly."""
    if parallel.sequence and seq_length % parallel.tensor:
        raise ValueError(
            f"parallel.sequence: parallel.tensor {parallel.tensor} does not divide corpus.seq_length {seq_length}; "
            "change one of them, or set it to false"
        )
    for count, name in (
        (model.num_attention_heads, "model.num_attention_heads"),
        (model.num_groups, "model.num_query_groups"),
        (model.ffn_size, "model.ffn_hidden_size"),
        (128, "the vocabulary's padding"),
    ):
        if count % parallel.tensor:
            raise ValueError(f"parallel.tensor: {parallel.tensor} does not divide {name} {count}; choose a divisor")
    if model.num_layers % parallel.pipeline:
        raise ValueError(
            f"parallel.pipeline: {parallel.pipeline} does not divide model.num_layers {model.num_layers}; "
            "choose a divisor"
        )
    if model.num_layers % parallel.num_chunks:
        raise ValueError(
            f"parallel.virtual_pipeline: parallel.pipeline {parallel.pipeline} x {parallel.virtual_pipeline} chunks do "
            f"not divide model.num_layers {model.num_layers}; change one of them"
        )
    micro_batch_size = 1 if train.requested_micro_batch_size == AUTO else train.micro_batch_size
    if train.global_batch_size % (micro_batch_size * parallel.data):
        raise ValueError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x parallel.data {parallel.data}; change one of them"
        )
    num_microbatches = train.global_batch_size // (micro_batch_size * parallel.data)
    if not parallel.can_schedule(num_microbatches):
        raise ValueError(
            f"parallel.virtual_pipeline: {parallel.virtual_pipeline} needs a multiple of parallel.pipeline "
            f"{parallel.pipeline} microbatches a step, but train.global_batch_size {train.global_batch_size} / "
            f"(train.micro_batch_size {micro_batch_size} x parallel.data {parallel.data}) is {num_microbatches}; "
            "change one of them, or set it to 1"
        )
