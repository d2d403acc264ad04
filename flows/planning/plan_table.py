"""A plan as text: what does not fit first, then memory, time and disk."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.planning.plan import Plan

_GIB = 1 << 30
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "total")


def print_plan(plan: Plan) -> None:
    """Print the plan."""
    Console().print(Group(*_parts(plan)))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    if plan.fault is not None:
        yield Text(plan.fault, style="bold red")
    layout = ", ".join(f"{name} {value}" for name, value in plan.parallel.items() if value not in (1, False))
    yield Text(
        f"{plan.parameters / 1e6:,.1f} M parameters on {plan.hardware}\n"
        f"layout: {layout or 'one rank'}; micro batch {plan.micro_batch_size} (largest that fits: "
        f"{plan.largest_micro_batch or 'none'})"
    )
    yield from (Text(f"  {reason}") for reason in plan.reasons)
    if plan.suggestion is not None:
        yield Text(f"`auto` would choose {plan.suggestion}")
    yield _memory(plan)
    fitting = (f"{each.gigabytes} GB: {each.largest_micro_batch or 'does not fit'}" for each in plan.capacities)
    yield Text(f"largest micro batch with this layout on devices of {', '.join(fitting)}")
    yield Text(f"\n{plan.flops_a_token / 1e9:,.2f} GFLOP a token ({plan.flops_formula})")
    speed = "" if plan.tokens_per_second is None else f"{plan.tokens_per_second:,.0f} tokens/s in training; "
    yield Text(f"{speed}{plan.speed_basis}")
    yield _corpus(plan)
    if plan.rounds:
        yield _rounds(plan)
    yield from _times(plan)
    yield _disk(plan)


def _memory(plan: Plan) -> Table:
    stages = (f"{rank.kind} stage" for rank in plan.ranks)
    table = Table("peak memory of a rank, GiB", *stages)
    table.add_row("parameters", *(f"{rank.parameters:,}" for rank in plan.ranks))
    for part in _PARTS:
        table.add_row(part, *(_gib(getattr(rank, part), rank.total) for rank in plan.ranks))
    return table


def _gib(size: int, total: int) -> str:
    """Return `size` in GiB, with as many digits as the total needs."""
    return f"{size / _GIB:.{2 if total >= _GIB else 4}f}"


def _corpus(plan: Plan) -> Text:
    size = plan.corpus
    if size is None:
        return Text(f"corpus: {plan.corpus_basis}")
    return Text(f"corpus: {size.train_tokens:,} tokens in {size.num_samples:,} samples; from {size.basis}")


def _rounds(plan: Plan) -> Table:
    table = Table("round", "samples", "tokens", "steps", "training", "scoring after it")
    for each in plan.rounds:
        table.add_row(
            str(each.number),
            f"{each.samples:,}",
            f"{each.tokens:,}",
            f"{each.steps:,}",
            _time(each.train_seconds),
            "-" if each.number == len(plan.rounds) else _time(each.score_seconds),
        )
    return table


def _times(plan: Plan) -> Iterator[Text]:
    if plan.scoring is not None:
        prefixes = (
            f"first {prefix} tokens {_time(seconds)}" for prefix, seconds in plan.scoring.prefix_seconds.items()
        )
        yield Text(f"scoring once: full {_time(plan.scoring.full_seconds)}, {', '.join(prefixes)}, seen losses 0 s")
    if plan.total_seconds is not None:
        besides = f", {_time(plan.other_seconds)} of it for corpus, start and report" if plan.other_seconds else ""
        yield Text(f"in all: {_time(plan.total_seconds)}{besides}; without evaluation", style="bold")


def _disk(plan: Plan) -> Text:
    disk = plan.disk
    return Text(
        f"disk: corpus {_size(disk.corpus)}, losses {_size(disk.losses)}, checkpoints {_size(disk.checkpoint)} each, "
        f"{_size(disk.checkpoints_at_most)} at most, {_size(disk.checkpoints_at_the_end)} at the end"
    )


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / _GIB:.1f} GiB" if size >= _GIB // 10 else f"{size / (1 << 20):.1f} MiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
