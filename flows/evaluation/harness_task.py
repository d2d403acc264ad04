"""Subclasses of lm-eval's tasks that take their rows from Reprise, and limit prompts to the model's length.

`flows.evaluation.task_loading` only imports this module when tasks are loaded: importing lm-eval takes a second.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from flows.evaluation.opencompass_scoring import (
    SUMMARY_METRICS,
    WHOLE_TEXT_METRICS,
    score_summary,
    score_whole_text,
)

# Whether a prompt with the longest of its continuations fits into the model.
Fits = Callable[[str, Sequence[str]], bool]

# Keys of a task's configuration that lm-eval does not know.
_OURS = ("class", "fits", "num_tokens")

# lm-eval's switch.
_NO_PROCESSES = "DISABLE_MULTIPROC"
# Number of compiled templates to cache: a few for each subject of a task, and MMLU has 57.
_NUM_TEMPLATES = 512
# The patches change lm-eval's global state, which all threads share.
_patching = threading.RLock()


@contextmanager
def patched_harness() -> Iterator[None]:
    """Make lm-eval cache compiled templates, show no progress bars and only log errors; one thread at a time.

    Unpatched, it compiles a prompt's templates for each item and each of its examples, which takes most of the time,
    shows a bar for each subject, and warns of every task with a default aggregation or a custom data set.
    """
    env, loggers = lm_eval.utils.env, [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    with _patching, _without_processes():
        before = env.from_string, lm_eval.api.task.tqdm, [logger.level for logger in loggers]
        env.from_string = functools.lru_cache(_NUM_TEMPLATES)(env.from_string)
        lm_eval.api.task.tqdm = lambda iterable, **_: iterable
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            env.from_string, lm_eval.api.task.tqdm, levels = before
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _without_processes() -> Iterator[None]:
    """Make lm-eval compute bootstrapped standard errors here: forking a process with threads may deadlock."""
    before = os.environ.get(_NO_PROCESSES)
    os.environ[_NO_PROCESSES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_PROCESSES]
        else:
            os.environ[_NO_PROCESSES] = before


class HarnessTask(ConfigurableTask):
    """An lm-eval task that reads `custom_dataset(config)` and drops examples if a prompt is too long.

    config: lm-eval's task definition, and `fits`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._fits: Fits = config["fits"]
        self._num_examples: dict[tuple[str, ...], int | None] = {}
        self._validation: datasets.Dataset | None = None
        theirs = {key: value for key, value in config.items() if key not in _OURS}
        if theirs.get("test_split"):
            # Do not load a split that is not scored.
            theirs["validation_split"] = None
        super().__init__(config=theirs)

    def download(self, *_: Any, **__: Any) -> None:
        """Set the data set from `custom_dataset`; lm-eval's own method would log a warning for each task."""
        self.dataset: datasets.DatasetDict = self.config.custom_dataset(self.config)

    def validation_docs(self) -> datasets.Dataset:
        """Return the processed items, cached: lm-eval would process HellaSwag's at each call, with a progress bar."""
        if self._validation is None and self.has_validation_docs():
            docs, process = self.dataset[self.config.validation_split], self.config.process_docs
            with without_bars():
                self._validation = process(docs) if process else docs
        return self._validation

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests of the given items."""
        with patched_harness():
            super().build_all_requests(**kwargs)

    def num_examples(self, doc: dict[str, Any]) -> int | None:
        """Return how many examples fit before an item's question; None if the question alone is too long.

        Examples are dropped one by one from the end, as in OpenCompass' inferencers (`icl_ppl_inferencer.py`).
        """
        continuations = self._continuations(doc)
        key = (self.doc_to_text(doc), *continuations)
        if key not in self._num_examples:
            self._num_examples[key] = next(
                (
                    count
                    for count in range(self.config.num_fewshot or 0, -1, -1)
                    if self._is_short_enough(self._prompt(doc, count), continuations)
                ),
                None,
            )
        return self._num_examples[key]

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> str:
        """Return the prompt of an item with as many of `num_fewshot` examples as fit."""
        count = self.num_examples(doc)
        if count is None:
            raise ValueError(f"{self.config.task}: an item is longer than the model's length; remove it from `samples`")
        return self._prompt(doc, min(count, num_fewshot), **kwargs)

    def _prompt(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> str:
        return str(super().fewshot_context(doc=doc, num_fewshot=num_fewshot, **kwargs))

    def _is_short_enough(self, prompt: str, continuations: Sequence[str]) -> bool:
        return self._fits(prompt, continuations)

    def _continuations(self, doc: dict[str, Any]) -> tuple[str, ...]:
        if self.OUTPUT_TYPE == "generate_until":
            # " a" is one token in any vocabulary; repeat it for the largest number of new tokens.
            return (" a" * self.config.generation_kwargs["max_gen_toks"],)
        return tuple(f"{self.config.target_delimiter}{choice}" for choice in self.doc_to_choice(doc))


@dataclass
class WholeTextInstance(Instance):
    """A request for the likelihood of a whole text, which begins with `question`."""

    question: str = ""


class WholeTextTask(HarnessTask):
    """A multiple-choice task scored by the mean loss of the whole text, prompt and option (`score_whole_text`).

    The text is a single request, since some tokenizers merge the prompt's last characters with the option's first.

    config: lm-eval's task definition, `fits`, and `num_tokens`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        count = config["num_tokens"]

        def score(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
            texts = _join(self._prompt(doc, 0), self._continuations(doc))
            return score_whole_text([likelihood for likelihood, _ in results], count(texts), self.doc_to_target(doc))

        # With `process_results`, lm-eval does not look the metric up on the hub.
        super().__init__({**config, "process_results": score, "metric_list": WHOLE_TEXT_METRICS})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Return a request for each option, for the whole text."""
        return [
            WholeTextInstance(
                request_type="loglikelihood",
                doc=doc,
                arguments=("", text),
                idx=number,
                metadata=kwargs["metadata"],
                question=ctx,
            )
            for number, text in enumerate(_join(ctx, self._continuations(doc)))
        ]

    def _is_short_enough(self, prompt: str, continuations: Sequence[str]) -> bool:
        return self._fits("", _join(prompt, continuations))


class SummaryTask(HarnessTask):
    """A summarisation task, scored by ROUGE (`score_summary`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({**config, "process_results": score_summary, "metric_list": SUMMARY_METRICS})


def _join(prompt: str, continuations: Sequence[str]) -> list[str]:
    return [prompt + continuation for continuation in continuations]


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch the progress bars of `datasets` off."""
    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
