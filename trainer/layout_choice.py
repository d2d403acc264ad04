"""Layouts: which micro batch fits, which layout to choose for given devices, and what makes a workload fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.config import MOST_MICRO_BATCH_SIZE, ModelConfig
from trainer.hardware import GIB, Hardware
from trainer.memory import Workload, needed_bytes
from trainer.parallel_config import ParallelConfig

# Tokens of a microbatch beyond which matrix products gain little: on accelerators, and on a CPU with its small caches.
ENOUGH_TOKENS = 16_384
ENOUGH_TOKENS_ON_CPU = 2048
# Microbatches per pipeline stage that keep filling and draining the pipeline below a fifth of a step.
_MICROBATCHES_A_STAGE = 4
# Every rank has part of each vocabulary row that is padded to 128 and of the heads: more ranks than this never help.
_MOST_TENSOR = 16


@dataclass(frozen=True)
class Choice:
    """A layout and a micro batch, with one sentence for each decision."""

    parallel: ParallelConfig
    micro_batch_size: int
    reasons: tuple[str, ...]


def fits(workload: Workload, hardware: Hardware) -> bool:
    """Return whether the rank of `workload` that needs most has the memory that it needs."""
    return needed_bytes(workload, hardware.kind == "cpu") <= hardware.usable


def micro_batches(workload: Workload) -> list[int]:
    """Return the micro batches that divide the batch of a data-parallel rank evenly, the smallest first.

    The pipeline schedule has to take as many microbatches.
    """
    share, rest = divmod(workload.train.global_batch_size, workload.parallel.data)
    sizes = [] if rest else [size for size in range(1, min(share, MOST_MICRO_BATCH_SIZE) + 1) if share % size == 0]
    return [size for size in sizes if workload.parallel.can_schedule(share // size)]


def largest_micro_batch(workload: Workload, hardware: Hardware) -> int | None:
    """Return the largest micro batch that fits, or None if none does."""
    return max(
        (size for size in micro_batches(workload) if fits(with_micro_batch(workload, size), hardware)), default=None
    )


def with_micro_batch(workload: Workload, size: int) -> Workload:
    """Return `workload` with another micro batch."""
    return replace(workload, train=workload.train.model_copy(update={"requested_micro_batch_size": size}))


def choose_micro_batch(workload: Workload, hardware: Hardware) -> int | None:
    """Return the micro batch to use with the layout of `workload`, or None if none fits.

    It is the largest that fits, has no more tokens than matrix products gain from, and leaves enough microbatches for
    the pipeline; the smallest, if even that has more tokens or leaves fewer.
    """
    sizes = [size for size in micro_batches(workload) if fits(with_micro_batch(workload, size), hardware)]
    if not sizes:
        return None
    enough = ENOUGH_TOKENS_ON_CPU if hardware.kind == "cpu" else ENOUGH_TOKENS
    wanted = [size for size in sizes if size * workload.seq_length <= enough]
    if workload.parallel.pipeline > 1:
        share = workload.train.global_batch_size // workload.parallel.data
        wanted = [size for size in wanted if share // size >= _MICROBATCHES_A_STAGE * workload.parallel.pipeline]
    return max(wanted, default=min(sizes))


def choose_layout(workload: Workload, hardware: Hardware, micro_batch_size: int | None = None) -> Choice | None:
    """Return the layout for training `workload` on `hardware`, or None if none fits.

    micro_batch_size: the one to use; None: choose one. As many devices as divide heads, layers and batch evenly work,
    with as many replicas of the model as possible: data parallelism communicates least. What a replica needs to fit is
    split over tensor-parallel ranks within a host first, then over pipeline stages.
    """
    if hardware.kind == "cpu":
        return _choose_on_cpu(workload, hardware, micro_batch_size)
    found = []
    for parallel in _layouts(workload, hardware):
        laid_out = replace(workload, parallel=parallel)
        size = micro_batch_size or choose_micro_batch(laid_out, hardware)
        if size is not None and size in micro_batches(laid_out) and fits(with_micro_batch(laid_out, size), hardware):
            found.append((parallel, size))
    if not found:
        return None
    parallel, size = min(
        found, key=lambda each: (-each[0].world_size, each[0].tensor * each[0].pipeline, each[0].pipeline)
    )
    return Choice(
        parallel, size, (*_layout_reasons(workload, hardware, parallel), *_size_reasons(workload, size, hardware))
    )


# The settings that take most memory, and changes to settings that take less, the fastest first.
_MOST_MEMORY = ("reference", "none")
_LESS_MEMORY: tuple[dict[str, str], ...] = (
    {"loss_kernel": "chunked"},
    {"loss_kernel": "chunked", "recompute": "selective"},
    {"loss_kernel": "chunked", "recompute": "full"},
)


def remedy(workload: Workload, hardware: Hardware) -> str:
    """Return the smallest change with which a workload that does not fit would, as fields to set."""
    size = largest_micro_batch(workload, hardware)
    if size is not None:
        return f"set train.micro_batch_size: {size}"
    smallest = with_micro_batch(workload, 1)
    for changes in _LESS_MEMORY:
        changed = {name: value for name, value in changes.items() if getattr(smallest.train, name) in _MOST_MEMORY}
        if fits(replace(smallest, train=smallest.train.model_copy(update=changed)), hardware):
            to_set = {"micro_batch_size": "1", **changed}
            return "set " + ", ".join(f"train.{name}: {value}" for name, value in to_set.items())
    for parallel in sorted(_splits(workload, hardware), key=lambda each: (each.tensor * each.pipeline, each.pipeline)):
        if fits(replace(smallest, parallel=parallel), hardware):
            fields = ", ".join(f"{name}: {value}" for name, value in parallel.model_dump(exclude_defaults=True).items())
            devices = parallel.world_size
            return (
                f"set train.micro_batch_size: 1 and parallel: {{{fields.replace('True', 'true')}}}, on {devices} "
                f"device{'' if devices == 1 else 's'}"
            )
    return "make the model smaller, shorten corpus.seq_length, or use devices with more memory"


def _choose_on_cpu(workload: Workload, hardware: Hardware, micro_batch_size: int | None) -> Choice | None:
    parallel = ParallelConfig(data=hardware.count)
    laid_out = replace(workload, parallel=parallel)
    size = micro_batch_size or choose_micro_batch(laid_out, hardware)
    if size not in micro_batches(laid_out) or not fits(with_micro_batch(laid_out, size), hardware):
        return None
    ranks = "1 rank a host" if hardware.per_node == 1 else f"{hardware.per_node} ranks a host"
    return Choice(
        parallel,
        size,
        (f"{ranks}, without splitting the model: on CPU, ranks of a host share its cores",
         *_size_reasons(workload, size, hardware)),
    )  # fmt: skip


def _layouts(workload: Workload, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Yield the layouts on as many devices of every host as possible that divide everything evenly."""
    for per_node in range(hardware.per_node, 0, -1):
        yield from _layouts_of(workload, per_node * hardware.num_nodes, per_node)


def _layouts_of(workload: Workload, count: int, per_node: int) -> Iterator[ParallelConfig]:
    for tensor in _tensor_sizes(workload.model, per_node):
        for pipeline in _divisors(workload.model.num_layers):
            data, rest = divmod(count, tensor * pipeline)
            if rest == 0 and per_node % tensor == 0 and workload.train.global_batch_size % data == 0:
                yield _layout(workload, tensor, pipeline, data)


def _splits(workload: Workload, hardware: Hardware) -> Iterator[ParallelConfig]:
    """Yield layouts that split the model further than that of `workload`, with as many replicas."""
    for tensor in _tensor_sizes(workload.model, max(hardware.per_node, _MOST_TENSOR)):
        for pipeline in _divisors(workload.model.num_layers):
            if tensor >= workload.parallel.tensor and pipeline >= workload.parallel.pipeline:
                yield _layout(workload, tensor, pipeline, workload.parallel.data)


def _layout(workload: Workload, tensor: int, pipeline: int, data: int) -> ParallelConfig:
    sequence = tensor > 1 and workload.seq_length % tensor == 0
    return ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, sequence=sequence)


def _tensor_sizes(model: ModelConfig, most: int) -> list[int]:
    """Return the numbers of tensor-parallel ranks that divide heads, feed-forward layer and vocabulary evenly."""
    return [size for size in _divisors(128) if size <= most and _divides(model, size)]


def _divides(model: ModelConfig, size: int) -> bool:
    return not any(count % size for count in (model.num_attention_heads, model.num_groups, model.ffn_size))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _layout_reasons(workload: Workload, hardware: Hardware, parallel: ParallelConfig) -> Iterator[str]:
    split = parallel.tensor * parallel.pipeline
    if split == 1:
        yield f"tensor 1, pipeline 1: the whole model fits on a device of {hardware.memory / GIB:.1f} GiB"
    else:
        yield (
            f"tensor {parallel.tensor}, pipeline {parallel.pipeline}: of the layouts on these devices that fit, this "
            "splits the model least, over the devices of a host first"
        )
    if parallel.sequence:
        yield "sequence: tensor-parallel ranks also split the sequence: less memory for the same communication"
    idle = hardware.count - parallel.world_size
    rest = f"; {idle} devices stay idle, since more do not divide the batch, heads and layers evenly" if idle else ""
    yield f"data {parallel.data}: the replicas that {parallel.world_size} devices hold{rest}"


def _size_reasons(workload: Workload, size: int, hardware: Hardware) -> Iterator[str]:
    enough = ENOUGH_TOKENS_ON_CPU if hardware.kind == "cpu" else ENOUGH_TOKENS
    yield (
        f"micro batch {size}: {size * workload.seq_length:,} tokens; the largest that fits, divides the batch of "
        f"{workload.train.global_batch_size} evenly and has at most {enough:,} tokens, beyond which little is gained"
    )
