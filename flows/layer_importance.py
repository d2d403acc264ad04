"""Which layers of a model stay: what skipping each block of them costs, and the set whose absence costs least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_scoring.files import checksum, fingerprint, remove_leftovers
from data_scoring.progress import Progress
from data_scoring.scoring import parquet_fingerprint
from flows.jobs import device_kind, job_fields
from flows.launch import launch
from flows.run_folder import Run
from flows.stored_model import StoredModel
from trainer.checkpoint_folder import RECORD, read_checkpoint_record
from trainer.config import check_layout
from trainer.devices import resolve_precision
from trainer.jobs import SkipJob

# Sums of increases are compared in whole billionths of a nat, so that ties are ties whatever the order of adding.
_UNITS_PER_NAT = 10**9


def measure_importance(
    run: Run, teacher: StoredModel, checkpoint: Path, folder: Path, num_samples: int, progress: Progress
) -> Path:
    """Return skips.parquet in `folder`: what skipping each block of one, two and three layers of the teacher costs.

    Measured in the layout of `run` on `num_samples` random samples of its corpus, or on all where there are fewer,
    unless it is there already. `checkpoint` holds the teacher's weights, or those cut to the run's vocabulary. A row a
    block, the first of length 0 for the whole model: start (layers count from 0), length, loss (nats per token),
    increase, stderr. Raises ValueError where the vocabulary is another, or the layout does not divide the teacher.
    """
    config, corpus = run.config, run.corpus()
    vocab_size = read_checkpoint_record(checkpoint).get("vocab_size", corpus.vocab_size)
    if vocab_size != corpus.vocab_size:
        raise ValueError(
            f"{checkpoint}: was trained with a tokenizer of {vocab_size} entries, and that of {corpus.folder} has "
            f"{corpus.vocab_size}; give the teacher's tokenizer as tokenizer.path"
        )
    model = teacher.config
    if checkpoint != teacher.checkpoint:
        model = model.model_copy(update={"vocab_size": None})
    check_layout(model, config.resolved_train, config.parallel, corpus.seq_length)
    precision = resolve_precision(config.train.precision, device_kind(config))
    identity = fingerprint(
        "skips", corpus.fingerprint, checksum(checkpoint / RECORD), num_samples, config.seed, precision
    )
    fields = job_fields(run, 1, identity) | {"model": model, "round_folder": folder.absolute()}
    job = SkipJob(
        **fields,
        weights=checkpoint.absolute(),
        num_samples=num_samples,
        micro_batch_size=config.score.micro_batch_size,
    )
    if parquet_fingerprint(job.result) != identity:
        remove_leftovers(folder)
        launch(job, run.folder, "importance", progress, config.launch)
    return job.result


@dataclass(frozen=True)
class Skips:
    """What skipping costs, as measured: by first layer and number of layers, a row of skips.parquet."""

    rows: dict[tuple[int, int], dict[str, Any]]

    @property
    def num_layers(self) -> int:
        """Return the layers of the model."""
        return sum(length == 1 for _, length in self.rows)

    @property
    def longest(self) -> int:
        """Return the layers of the longest block."""
        return max(length for _, length in self.rows)


def read_skips(path: Path) -> Skips:
    """Return what a skips.parquet holds."""
    return Skips({(row["start"], row["length"]): row for row in pq.read_table(path).to_pylist()})


def keep_layers(skips: Path, num_layers: int) -> tuple[int, ...]:
    """Return the layers, counted from 0, that stay in a model of `num_layers`: those whose absence costs least.

    First and last stay, unless only one does. What the others cost is the sum, over runs of dropped layers, of the
    increase measured with that run skipped. A run longer than any that was measured is cut into as few measured ones as
    can be, in the cheapest way. Of sets that cost the same, to a billionth of a nat, that which drops earlier layers.
    Raises ValueError where the model has not as many layers.
    """
    measured = read_skips(skips)
    depth = measured.num_layers
    if not 1 <= num_layers <= depth:
        raise ValueError(f"num_layers: {num_layers} is not between 1 and the {depth} layers of the larger model")
    first = 1 if num_layers > 1 else 0
    dropped = _cheapest_drop(measured, first, depth - first, depth - num_layers)
    return tuple(layer for layer in range(depth) if layer not in dropped)


def predict_increase(skips: Path, layers: Sequence[int]) -> float:
    """Return the increase of the loss, nats per token, to be expected if but the `layers`, counted from 0, stay.

    The sum that `keep_layers` minimises.
    """
    measured = read_skips(skips)
    cost = _run_costs(measured)
    edges = [-1, *layers, measured.num_layers]
    runs = ((before + 1, after) for before, after in pairwise(edges) if after > before + 1)
    return sum(cost(start, end) for start, end in runs) / _UNITS_PER_NAT


def _run_costs(measured: Skips) -> Callable[[int, int], int]:
    """Return the function that gives what skipping the layers from `start` to before `end` costs, in units."""
    longest = measured.longest

    @cache
    def cost(start: int, end: int) -> int:
        length = end - start
        if length <= longest:
            increase: float = measured.rows[start, length]["increase"]
            return round(increase * _UNITS_PER_NAT)
        # Layers skipped together mostly cost more than the sum of each by itself: the fewer cuts the better.
        shortest = length - longest * (-(-length // longest) - 1)
        return min(cost(start, cut) + cost(cut, end) for cut in range(start + shortest, start + longest + 1))

    return cost


def _cheapest_drop(measured: Skips, first: int, last: int, count: int) -> tuple[int, ...]:
    """Return the `count` layers from `first` to before `last` whose absence costs least.

    A dynamic programme from the back: `best[layer][n]` is the cheapest way to drop n of the layers from `layer` on,
    given that the one before stays.
    """
    cost = _run_costs(measured)
    best: list[dict[int, tuple[int, tuple[int, ...]]]] = [{0: (0, ())} for _ in range(last + 2)]
    for layer in range(last - 1, first - 1, -1):
        options = best[layer + 1].copy()  # What is possible where this layer stays.
        for end in range(layer + 1, min(last, layer + count) + 1):
            run = tuple(range(layer, end))
            # The layer at `end` stays, so what follows begins behind it.
            for number, (rest, dropped) in best[end + 1].items():
                option = (cost(layer, end) + rest, run + dropped)
                total = number + len(run)
                if total <= count:
                    options[total] = min(options.get(total, option), option)
        best[layer] = options
    return best[first][count][1]
