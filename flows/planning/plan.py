"""The plan of a run: what its ranks need, the layout to use, how long it takes, and the disk that it fills."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data_scoring.base.progress import Progress, silent
from data_scoring.config import prefix_of
from flows.planning.auto import resolve_auto
from flows.planning.corpus_size import CorpusSize, megatron_size, prepared_size, sampled_size
from flows.planning.duration import Duration
from flows.planning.measured_speed import MeasuredSpeed, is_measurable, measure
from flows.planning.workload import workload_of
from flows.run.config import RunConfig
from flows.run.folder import Run
from trainer.flops import FORMULA, model_flops
from trainer.hardware import CAPACITIES, GIB, Hardware, accelerator_kind
from trainer.layout_choice import choose_layout, fits, largest_micro_batch, remedy
from trainer.memory import Workload, checkpoint_bytes, kinds_of_stages, stage_memory, stage_parameters

UTILISATION = 0.4
# Bytes of a sample in losses/ (its number, tokens, source and loss) and in seen/ (step, shard, sample and loss).
_LOSS_BYTES, _SEEN_BYTES = 13, 16


@dataclass(frozen=True)
class RankPlan:
    """The parameters, and the bytes at the peak of a training step, of the ranks of a kind of pipeline stage."""

    kind: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    total: int


@dataclass(frozen=True)
class CapacityPlan:
    """The largest micro batch with the planned layout on devices of a capacity, GB; None: not even 1 fits."""

    gigabytes: int
    largest_micro_batch: int | None


@dataclass(frozen=True)
class RoundPlan:
    """A round: samples, predicted tokens, steps, and seconds of training and of scoring afterwards, if it is scored."""

    number: int
    samples: int
    tokens: int
    steps: int
    train_seconds: float | None
    score_seconds: float | None


@dataclass(frozen=True)
class ScoringPlan:
    """Seconds of scoring the corpus once, in full, and by the budget of the configuration; seen losses cost nothing."""

    full_seconds: float | None
    prefix_seconds: dict[int, float | None]
    seen_seconds: float = 0.0


@dataclass(frozen=True)
class DiskPlan:
    """Bytes of corpus, checkpoints (at most while a round trains, and at the end) and losses; None: unknown."""

    corpus: int | None
    checkpoint: int
    checkpoints_at_most: int
    checkpoints_at_the_end: int
    losses: int | None


@dataclass(frozen=True)
class Plan:
    """What a run needs, and how long it takes.

    fault: what does not fit, with the smallest change that would fit; None: everything fits. basis: of the speed.
    utilisation: the assumed share of the devices' peak FLOP/s; None: the speed is measured.
    """

    fault: str | None
    hardware: str
    parallel: dict[str, int | bool]
    micro_batch_size: int
    largest_micro_batch: int | None
    reasons: tuple[str, ...]
    suggestion: str | None
    parameters: int
    ranks: tuple[RankPlan, ...]
    capacities: tuple[CapacityPlan, ...]
    flops_a_token: float
    flops_formula: str
    utilisation: float | None
    speed_basis: str
    tokens_per_second: float | None
    corpus: CorpusSize | None
    corpus_basis: str
    rounds: tuple[RoundPlan, ...]
    scoring: ScoringPlan | None
    other_seconds: float
    total_seconds: float | None
    disk: DiskPlan


def make_plan(
    config: RunConfig, hardware: Hardware, utilisation: float = UTILISATION, progress: Progress = silent
) -> Plan:
    """Return the plan of a run of `config` on `hardware`.

    On this host's CPU, a small model's speed is measured; any other follows from `utilisation`, an assumed share of the
    devices' peak. Raises ValueError if the tokenizer cannot be opened, or if `auto` finds nothing that fits.
    """
    config, reasons = resolve_auto(config, hardware)
    workload = workload_of(config, hardware.kind)
    progress("planning: reading a sample of the text, and measuring", 0, None)
    speed, size, corpus_basis = _speed_and_size(config, workload, hardware)
    duration = Duration(config, workload, hardware, utilisation, speed)
    rounds = tuple(_rounds(config, size, duration)) if size is not None else ()
    other = duration.other(size)
    seconds = [part for each in rounds for part in (each.train_seconds, each.score_seconds or 0.0)]
    known = [each for each in seconds if each is not None]
    flops = model_flops(config.model, workload.vocab_size, workload.seq_length)
    return Plan(
        fault=_fault(workload, hardware),
        hardware=hardware.describe(),
        parallel=config.parallel.model_dump(),
        micro_batch_size=config.train.micro_batch_size,
        largest_micro_batch=largest_micro_batch(workload, hardware),
        reasons=reasons,
        suggestion=None if reasons else _suggestion(config, workload, hardware),
        parameters=workload.num_parameters,
        ranks=tuple(_ranks(workload)),
        capacities=tuple(_capacities(workload, hardware)),
        flops_a_token=flops,
        flops_formula=FORMULA,
        utilisation=utilisation if speed is None else None,
        speed_basis=duration.basis(),
        tokens_per_second=duration.tokens_per_second(),
        corpus=size,
        corpus_basis=corpus_basis,
        rounds=rounds,
        scoring=None if size is None else _scoring(config, size, duration),
        other_seconds=other,
        total_seconds=sum(known) + other if rounds and len(known) == len(seconds) else None,
        disk=_disk(config, workload, size),
    )


def _speed_and_size(
    config: RunConfig, workload: Workload, hardware: Hardware
) -> tuple[MeasuredSpeed | None, CorpusSize | None, str]:
    """Return the measured speed, the size of the corpus, and where it comes from, or why it is unknown."""
    speed = None
    try:
        if is_measurable(config, workload, hardware):
            speed, size = measure(config, workload.num_microbatches)
        else:
            size = prepared_size(Run(config, config.folder.absolute())) or megatron_size(config) or sampled_size(config)
    except (ValueError, OSError) as error:
        return None, None, f"unknown, since the text cannot be read: {error}"
    return speed, size, size.basis


def _fault(workload: Workload, hardware: Hardware) -> str | None:
    if workload.parallel.world_size > hardware.count:
        return (
            f"parallel: {workload.parallel.world_size} ranks need as many devices, but there are {hardware.count} "
            f"({hardware.describe()}); lower tensor, pipeline or data, or set parallel: auto"
        )
    if fits(workload, hardware):
        return None
    needed = max(stage_memory(workload, stage).total for stage in kinds_of_stages(workload.parallel.pipeline).values())
    return (
        f"does not fit: a rank takes {needed / GIB:.1f} GiB, but tensors may take {hardware.usable / GIB:.1f} of "
        f"{hardware.memory / GIB:.1f} GiB; {remedy(workload, hardware)}"
    )


def _suggestion(config: RunConfig, workload: Workload, hardware: Hardware) -> str | None:
    """Return the layout that `auto` would choose, if it is another one than that of `config`."""
    if hardware.kind == "cpu":
        hardware = replace(hardware, per_node=config.launch.processes_per_node or 1)
    chosen = choose_layout(workload, hardware)
    # The choice leaves out virtual_pipeline, which is no reason for another one.
    own = workload.parallel.model_copy(update={"virtual_pipeline": 1}), workload.train.micro_batch_size
    if chosen is None or (chosen.parallel, chosen.micro_batch_size) == own:
        return None
    fields = ", ".join(f"{name}: {str(value).lower()}" for name, value in chosen.parallel.model_dump().items())
    return f"parallel: {{{fields}}}, train.micro_batch_size: {chosen.micro_batch_size} ({'; '.join(chosen.reasons)})"


def _ranks(workload: Workload) -> Iterator[RankPlan]:
    for kind, stage in kinds_of_stages(workload.parallel.pipeline).items():
        memory = stage_memory(workload, stage)
        yield RankPlan(kind, stage_parameters(workload, stage), **vars(memory), total=memory.total)


def _capacities(workload: Workload, hardware: Hardware) -> Iterator[CapacityPlan]:
    kind = accelerator_kind(hardware.kind)
    for gigabytes, gib in CAPACITIES.items():
        device = Hardware(kind, hardware.num_nodes, hardware.per_node, round(gib * GIB))
        yield CapacityPlan(gigabytes, largest_micro_batch(workload, device))


def _rounds(config: RunConfig, size: CorpusSize, duration: Duration) -> Iterator[RoundPlan]:
    mean = size.train_tokens / max(1, size.num_samples)
    for number in range(1, config.rounds.num_rounds + 1):
        rate, most = 1.0, config.train.max_tokens
        if number > 1:
            rate, most = config.refine.draw_rate, config.refine.max_tokens
        samples = round(rate * size.num_samples)
        if most is not None:
            samples = min(samples, max(1, int(most / mean)))
        steps = math.ceil(samples / config.resolved_train.global_batch_size)
        scored = None
        if number < config.rounds.num_rounds:
            scored = _budget_seconds(config, size, duration)
        yield RoundPlan(number, samples, round(samples * mean), steps, duration.training(samples, steps, size), scored)


def _budget_seconds(config: RunConfig, size: CorpusSize, duration: Duration) -> float | None:
    """Return the seconds of scoring between two rounds; budget auto, which decides later, counts as full."""
    if config.score.budget == "seen":
        return 0.0
    return duration.scoring(size.num_samples, prefix_of(config.score.budget))


def _scoring(config: RunConfig, size: CorpusSize, duration: Duration) -> ScoringPlan:
    prefix = prefix_of(config.score.budget) or max(1, config.corpus.seq_length // 4)
    return ScoringPlan(duration.scoring(size.num_samples, None), {prefix: duration.scoring(size.num_samples, prefix)})


def _disk(config: RunConfig, workload: Workload, size: CorpusSize | None) -> DiskPlan:
    one = checkpoint_bytes(workload.num_parameters, workload.precision)
    rounds = config.rounds.num_rounds
    losses = None
    if size is not None:
        trained = size.num_samples * (1 + (rounds - 1) * config.refine.draw_rate)
        losses = round(size.num_samples * (rounds - 1) * _LOSS_BYTES + trained * _SEEN_BYTES)
    return DiskPlan(
        corpus=None if size is None else size.num_bytes,
        checkpoint=one,
        checkpoints_at_most=one * num_checkpoints(config),
        checkpoints_at_the_end=one * rounds,
        losses=losses,
    )


def num_checkpoints(config: RunConfig) -> int:
    """Return the most checkpoints on disk: one a round, those kept while one trains, and the one being written."""
    return config.rounds.num_rounds + config.checkpoint.keep_last + 1
