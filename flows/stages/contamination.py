"""The stage `contamination`: the training samples that overlap with the run's evaluation items."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from data_scoring.base.engine import Engine
from data_scoring.base.progress import Progress
from data_scoring.contamination.contaminated_samples import (
    contaminated_items_path,
    contamination_path,
    samples_fingerprint,
    write_contamination,
)
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.evaluation.items import ItemText
from data_scoring.ledger import refresh_ledger
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.evaluation.questions import item_texts
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.stage import Stage, Stages


class Contamination(Stage):
    """List the samples that overlap with evaluation items, before the first mix, if `eval.contamination` is set."""

    name = "contamination"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return 0 (the whole run) before round 1's mix, if `eval.contamination` is set."""
        return 0 if place == 1 and config.eval.contamination != "off" else None

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the corpus and the length of the overlap; the items themselves are unknown before they are read."""
        return [stages.run.corpus().fingerprint, stages.run.config.eval.contamination_ngram]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the list of overlapping samples, and that of the items."""
        return [contamination_path(run.corpus_folder), contaminated_items_path(run.corpus_folder)]

    def is_complete(self, stages: Stages, round_number: int) -> bool:
        """Return whether a list of overlapping samples exists, for any items."""
        return contaminated_samples(stages.run) is not None

    def do(self, stages: Stages, round_number: int, progress: Progress) -> bool:
        """List the overlapping samples, unless a list for the same items exists."""
        run, started = stages.run, time.time()
        stages.verify(progress)
        run.forget(self.name, round_number)
        with stages.open_engine() as engine:
            is_new = list_contaminated(run, item_texts(run), engine, progress)
        identity = contaminated_samples(run)
        assert identity is not None
        run.record(self.name, round_number, identity, started, self.files(run, round_number))
        return is_new

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """List the overlapping samples."""
        self.do(stages, round_number, progress)


def list_contaminated(run: Run, items: Iterable[ItemText], engine: Engine, progress: Progress) -> bool:
    """List the training samples that overlap with evaluation items; return whether there was anything left to do.

    With eval.contamination: remove, `items` decide what is trained on: a run can only resume with the same items, or
    with items that overlap with the same samples.
    """
    config = run.config
    corpus = run.corpus()
    order = ReadingOrder(corpus, config.seed)
    opening = partial(open_tokenizer, corpus.tokenizer_path, config.tokenizer.end_of_document)
    if not write_contamination(order, opening, items, config.eval.contamination_ngram, engine, progress):
        return False
    refresh_ledger(run.folder)
    return True


def contaminated_samples(run: Run) -> str | None:
    """Return the fingerprint of the samples that overlap with evaluation items, or None if they were not listed."""
    corpus = run.corpus()
    return samples_fingerprint(corpus.folder, corpus.fingerprint, run.config.eval.contamination_ngram)


def samples_to_leave_out(run: Run) -> Path | None:
    """Return the file that lists the samples to leave out, or None if none are. Raises ValueError if it is missing."""
    if not run.config.eval.removes:
        return None
    if contaminated_samples(run) is None:
        raise ValueError(
            f"{run.folder}: eval.contamination: remove needs the list of samples that overlap with evaluation items, "
            f"which does not exist; run `reprise run {quote(str(run.folder))}`, which does all missing stages"
        )
    return contamination_path(run.corpus_folder)
