"""Layer importance: measuring the layer ablation, and choosing the set of layers whose removal costs least."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_scoring.base.files import fingerprint, remove_leftovers
from data_scoring.base.parquet import parquet_fingerprint
from data_scoring.base.progress import Progress
from flows.launch import launcher
from flows.launch.job_fields import device_kind, job_fields
from flows.run.folder import Run
from flows.run.stored_model import StoredModel
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.devices import resolve_precision
from trainer.jobs import AblationJob
from trainer.parallel_config import check_layout

# Sums of increases are compared in integer billionths of a nat, so that ties do not depend on the order of addition.
_UNITS_PER_NAT = 10**9


def measure_importance(run: Run, teacher: StoredModel, folder: Path, num_samples: int, progress: Progress) -> Path:
    """Return skips.parquet in `folder`: the increase of the loss without each block of one to three teacher layers.

    Measured in the layout of `run` on `num_samples` random samples of its corpus (all, if there are fewer), unless the
    file is current. One row per block, the first of length 0 for the whole model: start (layers count from 0), length,
    loss (nats per token), increase, stderr. Raises ValueError if the vocabularies differ, or the layout does not divide
    the teacher.
    """
    config, corpus, checkpoint = run.config, run.corpus(), teacher.checkpoint
    vocab_size = read_checkpoint_record(checkpoint).get("vocab_size", corpus.vocab_size)
    if vocab_size != corpus.vocab_size:
        raise ValueError(
            f"{checkpoint}: was trained with a tokenizer of {vocab_size} entries, but that of {corpus.folder} has "
            f"{corpus.vocab_size}; give the teacher's tokenizer as tokenizer.path"
        )
    check_layout(teacher.config, config.resolved_train, config.parallel, corpus.seq_length)
    precision = resolve_precision(config.train.precision, device_kind(config))
    identity = fingerprint("skips", corpus.fingerprint, teacher.identity, num_samples, config.seed, precision)
    fields = job_fields(run, 1, identity) | {"model": teacher.config, "round_folder": folder.absolute()}
    job = AblationJob(
        **fields,
        weights=checkpoint.absolute(),
        num_samples=num_samples,
        micro_batch_size=config.score.micro_batch_size,
    )
    if parquet_fingerprint(job.result) != identity:
        remove_leftovers(folder)
        launcher.launch(job, run.folder, "importance", progress, config.launch)
    return job.result


@dataclass(frozen=True)
class LayerAblation:
    """A measured layer ablation: the row of skips.parquet of each block, by first layer and number of layers."""

    rows: dict[tuple[int, int], dict[str, Any]]

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the model."""
        return sum(length == 1 for _, length in self.rows)

    @property
    def longest(self) -> int:
        """Return the number of layers of the longest block."""
        return max(length for _, length in self.rows)

    def added(self, layer: int, before: int) -> int:
        """Return the increase, in units, of also skipping `layer` when the `before` layers just before it are skipped.

        Layers farther away than the longest measured block are ignored.
        """
        before = min(before, self.longest - 1)
        return self._increase(layer - before, before + 1) - self._increase(layer - before, before)

    def _increase(self, start: int, length: int) -> int:
        value: float = self.rows[start, length]["increase"] if length else 0.0
        return round(value * _UNITS_PER_NAT)


def read_ablation(path: Path) -> LayerAblation:
    """Return the layer ablation in a skips.parquet."""
    return LayerAblation({(row["start"], row["length"]): row for row in pq.read_table(path).to_pylist()})


def predict_increase(skips: Path, layers: Sequence[int]) -> float:
    """Return the predicted increase of the loss, nats per token, if only the `layers`, counted from 0, are kept.

    It is the sum over runs of skipped layers. A run costs its measured increase; in a run longer than any measured
    block, each further layer costs what it adds to the longest measured block that ends with it.
    """
    measured = read_ablation(skips)
    total = before = 0
    for layer in range(measured.num_layers):
        if layer in layers:
            before = 0
        else:
            total += measured.added(layer, before)
            before += 1
    return total / _UNITS_PER_NAT


def keep_layers(skips: Path, num_layers: int) -> tuple[int, ...]:
    """Return the `num_layers` layers to keep, counted from 0: those with the least `predict_increase`.

    The first and the last layer are kept, unless only one layer is. Of sets with equal cost, to a billionth of a nat,
    the one that drops earlier layers is chosen. Raises ValueError if the larger model has fewer layers.
    """
    measured = read_ablation(skips)
    depth = measured.num_layers
    if not 1 <= num_layers <= depth:
        raise ValueError(f"num_layers: {num_layers} is not between 1 and the {depth} layers of the larger model")
    inner = range(1, depth - 1) if num_layers > 1 else range(depth)
    dropped = _cheapest_drop(measured, inner, depth - num_layers)
    return tuple(layer for layer in range(depth) if layer not in dropped)


def _cheapest_drop(measured: LayerAblation, layers: range, count: int) -> tuple[int, ...]:
    """Return the `count` of the `layers` whose removal costs least.

    Dynamic programming. The state is the number of layers dropped so far, and the number dropped just before the next
    layer, up to the longest measured block. `best` has the least cost of each state and the layers dropped for it.
    """
    best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, 0): (0, ())}
    for layer in layers:
        options: list[tuple[tuple[int, int], tuple[int, tuple[int, ...]]]] = []
        for (number, before), (cost, dropped) in best.items():
            options.append(((number, 0), (cost, dropped)))
            if number < count:
                state = (number + 1, min(before + 1, measured.longest - 1))
                options.append((state, (cost + measured.added(layer, before), (*dropped, layer))))
        best = {}
        for state, option in options:
            best[state] = min(best.get(state, option), option)
    return min(option for (number, _), option in best.items() if number == count)[1]
