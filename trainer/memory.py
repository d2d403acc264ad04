"""Memory estimates for training: the peak of the rank that needs most, and the size of a checkpoint on disk.

The figures follow from what torch's autograd saves for the layers of `trainer.model`, whose core attention does not
materialise the scores. Layers of Transformer Engine save no more. Memory of the device's libraries and fragmentation in
its allocator are not included.
"""

from dataclasses import astuple, dataclass

from data_scoring.config import padded_vocab_size
from kernels.linear_cross_entropy import chunk_bytes, chunk_rows
from kernels.series_activation_recompute import workspace_bytes
from trainer.config import ModelConfig, Precision, TrainConfig
from trainer.devices import has_fused_adam
from trainer.parallel_config import ParallelConfig

_SINGLE = 4
# Host memory of a rank's process besides tensors: the interpreter, torch and Megatron.
PROCESS_BYTES = 1 << 29
# Memory that the C library's allocator holds in addition, as a share of what each step allocates and frees (34 % with
# 30 M parameters in float32).
_UNUSED_SHARE = 0.4


@dataclass(frozen=True)
class RankMemory:
    """A rank's peak memory in bytes, by purpose.

    optimizer: both moments, and main weights if the model's are bfloat16. activations: saved by layers for the backward
    pass, for all microbatches in flight. logits: additional memory of head and loss. workspace: additional memory of a
    layer's backward pass or of the optimizer step, beyond activations and logits.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def states(self) -> int:
        """Return the persistent part: weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Workload:
    """A model in training under a parallel layout.

    vocab_size: the entries of embedding and head, without padding. train: as returned by `TrainConfig.resolve`,
    with the kernels that `trainer.devices.resolve_kernels` selects. kind: of the device, cuda, npu or cpu.
    """

    model: ModelConfig
    vocab_size: int
    seq_length: int
    train: TrainConfig
    parallel: ParallelConfig
    precision: Precision
    kind: str

    @property
    def element_bytes(self) -> int:
        """Return the bytes per weight or activation."""
        return 2 if self.precision == "bfloat16" else _SINGLE

    @property
    def micro_batch_tokens(self) -> int:
        """Return the tokens per microbatch."""
        return self.train.micro_batch_size * self.seq_length

    @property
    def num_microbatches(self) -> int:
        """Return the microbatches of a step on each data-parallel rank."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)

    @property
    def num_parameters(self) -> int:
        """Return the parameters of the model, with the padding of embedding and head."""
        return self.model.num_parameters(padded_vocab_size(self.vocab_size))

    def rows(self, padded: bool) -> int:
        """Return the rows of the embedding, and of the head, on each tensor-parallel rank."""
        size = padded_vocab_size(self.vocab_size)
        return (size if padded else min(size, self.vocab_size)) // self.parallel.tensor

    def in_flight(self, stage: int) -> int:
        """Return the most passes through a chunk whose activations a pipeline stage, counted from 0, holds at once.

        A pass is that of one microbatch through the stage's layers, or, in the interleaved schedule, through those of
        one of its chunks. Each comes before its stage's first backward pass, but for the last one.
        """
        stages, chunks = self.parallel.pipeline, self.parallel.virtual_pipeline
        before = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
        return min(before + 1, chunks * self.num_microbatches)


def rank_memory(workload: Workload) -> RankMemory:
    """Return the peak memory in a training step of the rank that needs most.

    That rank is on the first pipeline stage, which has the embedding and the most microbatches in flight, or on the
    last, which has the head.
    """
    stages = {0, workload.parallel.pipeline - 1}
    return max((stage_memory(workload, stage) for stage in stages), key=lambda memory: memory.total)


def kinds_of_stages(pipeline: int) -> dict[str, int]:
    """Return a pipeline stage, counted from 0, of each kind: first, middle, last; `only`, if there is just one.

    Of the middle stages it is the first, which has the most microbatches in flight.
    """
    if pipeline == 1:
        return {"only": 0}
    return {"first": 0, **({"middle": 1} if pipeline > 2 else {}), "last": pipeline - 1}


def needed_bytes(workload: Workload, on_host: bool) -> int:
    """Return the bytes that a rank takes at its peak, beside the libraries of a device.

    on_host: whether it computes on the CPU; its memory is then the process's, with what the C library holds unused.
    """
    memory = rank_memory(workload)
    return memory.total + (PROCESS_BYTES + unused_bytes(memory) if on_host else 0)


def unused_bytes(memory: RankMemory) -> int:
    """Return the host memory that the C library's allocator holds beyond what a rank on CPU uses."""
    return round((memory.activations + memory.logits + memory.workspace) * _UNUSED_SHARE)


def checkpoint_bytes(num_parameters: int, precision: Precision) -> int:
    """Return the bytes of a checkpoint: weights, and main weights and both moments in single precision."""
    return num_parameters * ((2 if precision == "bfloat16" else _SINGLE) + 3 * _SINGLE)


def stage_parameters(workload: Workload, stage: int) -> int:
    """Return the number of weights, including padding, on each rank of a pipeline stage, counted from 0."""
    model, parallel = workload.model, workload.parallel
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    # A tied embedding is on the first and the last stage; if they are the same stage, it is there once.
    matrices = is_first + (is_last and not (model.tied_embeddings and is_first))
    layers = model.num_layers // parallel.pipeline * model.layer_parameters(parallel.tensor)
    return layers + is_last * model.hidden_size + matrices * workload.rows(padded=True) * model.hidden_size


def stage_memory(workload: Workload, stage: int) -> RankMemory:
    """Return the peak memory in a training step of a rank of a pipeline stage, counted from 0."""
    count = stage_parameters(workload, stage)
    is_half, is_last = workload.precision == "bfloat16", stage == workload.parallel.pipeline - 1
    # In single precision, the weights themselves are the main weights.
    optimizer_bytes = (3 if is_half else 2) * _SINGLE
    share = -(-count // workload.parallel.data)
    activations, logits = _activations(workload, stage), _logits(workload) if is_last else 0
    # Unless a single kernel updates all parameters, the square roots of their second moments are held, too.
    step = share * _SINGLE if not has_fused_adam(workload.kind) else 0
    return RankMemory(
        weights=count * workload.element_bytes,
        gradients=count * _SINGLE,
        optimizer=share * optimizer_bytes,
        activations=activations,
        logits=logits,
        workspace=max(0, _layer_gradients(workload, stage) - logits, step - activations - logits),
    )


def _activations(workload: Workload, stage: int) -> int:
    """Return the bytes that a stage saves for the backward pass: in its layers and, on the last stage, their output."""
    model, parallel, is_last = workload.model, workload.parallel, stage == workload.parallel.pipeline - 1
    layers = model.num_layers // parallel.num_chunks
    hidden = model.hidden_size * workload.element_bytes * workload.micro_batch_tokens
    own_hidden = hidden // (parallel.tensor if parallel.sequence else 1)
    size = workload.in_flight(stage) * layers * _layer_bytes(workload) * workload.micro_batch_tokens
    if workload.train.recompute == "full":
        # The inputs of all layers.
        size = workload.in_flight(stage) * layers * own_hidden
    if parallel.virtual_pipeline > 1:
        # The outputs of chunks, except the model's last one; what is received and sent in the meantime: the next input,
        # and two gradients.
        size += (workload.in_flight(stage) - is_last + 3) * own_hidden
    if is_last:
        # The outputs of the last layer and of the final norm; the latter is not split along the sequence.
        size += own_hidden + hidden
    if parallel.sequence:
        # Megatron's buffer for gathering the sequence.
        size += hidden
    return size


def _layer_bytes(workload: Workload) -> int:
    """Return the bytes per token that a layer saves on each tensor-parallel rank for the backward pass."""
    model, parallel, size = workload.model, workload.parallel, workload.element_bytes
    hidden = model.hidden_size
    queries, keys_and_values = model.channels * model.num_attention_heads, 2 * model.channels * model.num_groups
    # Both norms: input, output unless it is computed again, and one value per token.
    stream = 2 * (hidden * size * (1 if workload.train.recompute == "selective" else 2) + _SINGLE)
    if model.shortcut_reduction is not None:
        # The outputs of the first matrix and of GELU.
        stream += 2 * (hidden // model.shortcut_reduction) * size
        if model.shortcut_input == "normalised":
            stream += hidden * size + _SINGLE
    # Rotated queries and keys, and values, in one tensor; the output.
    attention = (2 * queries + keys_and_values) * size + model.num_attention_heads * _SINGLE
    shared = attention + _num_ffn_tensors(workload) * model.ffn_size * size
    return (stream // parallel.tensor if parallel.sequence else stream) + shared // parallel.tensor


def _num_ffn_tensors(workload: Workload) -> int:
    """Return how many tensors of the feed-forward layer's width are saved."""
    # Gate and up, and the input of the last matrix unless it is computed again.
    kept = 2 if workload.train.recompute == "selective" else 3
    if workload.model.activation_terms > 1 and workload.train.activation_kernel == "reference":
        # The input of each term, and the sum of the terms.
        kept += workload.model.activation_terms + 1
    return kept


def _layer_gradients(workload: Workload, stage: int) -> int:
    """Return the most bytes that the backward pass of a layer allocates before freeing saved tensors.

    Those are the gradients in its feed-forward part, and all that it saves if it is computed again.
    """
    model, parallel = workload.model, workload.parallel
    size = 0
    if workload.train.recompute == "full":
        # All but its input; and the outputs of the last layer and of the final norm are free again.
        num_counted = 3 if stage == parallel.pipeline - 1 else 1
        size = _layer_bytes(workload) - num_counted * model.hidden_size * workload.element_bytes
    tokens, width, num_ffn_tensors, intermediates = workload.micro_batch_tokens, model.ffn_size // parallel.tensor, 3, 0
    if model.activation_terms > 1 and workload.train.activation_kernel == "reference":
        num_ffn_tensors = 6
    elif model.activation_terms > 1 and workload.train.activation_kernel == "recompute":
        # When its intermediate results are largest, the input of the last matrix is free again.
        num_ffn_tensors = 2
        intermediates = workspace_bytes(workload.kind != "cpu", workload.element_bytes, tokens, width)
    channels = 2 * model.hidden_size + num_ffn_tensors * width
    return tokens * (size + channels * workload.element_bytes) + intermediates


def _logits(workload: Workload) -> int:
    """Return the most bytes that head and loss take in their backward pass."""
    tokens, hidden, size = workload.micro_batch_tokens, workload.model.hidden_size, workload.element_bytes
    rows = workload.rows(padded=True)
    if workload.train.loss_kernel == "reference":
        # In single precision: log-probabilities, their gradient, and that of the logits. With tensor parallelism:
        # exponentials, their gradient, that of the labels' logits, and the sum of both.
        return tokens * rows * _SINGLE * (3 if workload.parallel.tensor == 1 else 4)
    # The gradients of the head's weights and of its input, which is accumulated in single precision; chunks of logits.
    kernel, is_accelerator = workload.train.loss_kernel, workload.kind != "cpu"
    kernel = "chunked" if kernel == "auto" else kernel
    chunk, copied = chunk_bytes(kernel, is_accelerator, size, tokens, rows), tokens * size
    if size != _SINGLE:
        # A chunk's part of the weights' gradient is in single precision, too. A product that is added to it is free
        # again when the input's gradient is converted.
        rows_of_chunk = min(rows, chunk_rows(kernel, is_accelerator))
        copied = rows_of_chunk * _SINGLE + max(rows_of_chunk, tokens) * size
    return hidden * (rows * size + tokens * _SINGLE + copied) + chunk
