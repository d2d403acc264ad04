"""lm-eval's tasks as Reprise runs them: their rows handed in, their prompts as long as the model takes.

Imported by `flows.evaluation.task_loading` when tasks are loaded, and not before: importing lm-eval takes a second.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

# What a task's configuration has of ours, which lm-eval does not know.
_OURS = ("class", "fits", "num_tokens")

# Compiled templates that are kept: a few for each subject of a task, and MMLU has 57.
_NUM_TEMPLATES = 512
# What is patched is lm-eval's own, and so all threads'.
_patching = threading.RLock()


@contextmanager
def patched_harness() -> Iterator[None]:
    """Have lm-eval keep compiled templates, draw no bars and log errors alone, inside and for one thread at a time.

    It compiles a prompt's templates anew for each item and each of its examples, which took most of the time; it draws
    a bar for each subject; and it warns of every task whose aggregation is its default or whose rows are handed in.
    """
    env, logger = lm_eval.utils.env, logging.getLogger("lm_eval.api.task")
    with _patching:
        before = env.from_string, lm_eval.api.task.tqdm, logger.level
        env.from_string = functools.lru_cache(_NUM_TEMPLATES)(env.from_string)
        lm_eval.api.task.tqdm = lambda iterable, **_: iterable
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            env.from_string, lm_eval.api.task.tqdm, level = before
            logger.setLevel(level)


class HarnessTask(ConfigurableTask):
    """A task of lm-eval's that reads `custom_dataset(config)` and drops examples where a prompt is too long.

    `config` is lm-eval's task definition, with `fits` besides.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._fits: Fits = config["fits"]
        self._num_examples: dict[tuple[str, ...], int | None] = {}
        self._validation: datasets.Dataset | None = None
        theirs = {key: value for key, value in config.items() if key not in _OURS}
        if theirs.get("test_split"):
            # What is not scored is not read either.
            theirs["validation_split"] = None
        super().__init__(config=theirs)

    def download(self, *_: Any, **__: Any) -> None:
        """Take the rows that are handed in; lm-eval's own way would warn of each."""
        self.dataset: datasets.DatasetDict = self.config.custom_dataset(self.config)

    def validation_docs(self) -> datasets.Dataset:
        """Return the items, processed once: lm-eval maps HellaSwag's anew, with a bar, each time it asks for them."""
        if self._validation is None and self.has_validation_docs():
            docs, process = self.dataset[self.config.validation_split], self.config.process_docs
            with _quiet():
                self._validation = process(docs) if process else docs
        return self._validation

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests of the items asked for."""
        with patched_harness():
            super().build_all_requests(**kwargs)

    def num_examples(self, doc: dict[str, Any]) -> int | None:
        """Return how many examples can go before an item's question; None where the question alone is too long.

        Examples are dropped one by one from the end, as OpenCompass' inferencers do (`icl_ppl_inferencer.py`).
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
            raise ValueError(f"{self.config.task}: an item longer than the model is asked; leave it out of `samples`")
        return self._prompt(doc, min(count, num_fewshot), **kwargs)

    def _prompt(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> str:
        return str(super().fewshot_context(doc=doc, num_fewshot=num_fewshot, **kwargs))

    def _is_short_enough(self, prompt: str, continuations: Sequence[str]) -> bool:
        return self._fits(prompt, continuations)

    def _continuations(self, doc: dict[str, Any]) -> tuple[str, ...]:
        if self.OUTPUT_TYPE == "generate_until":
            # A word that is a token in any vocabulary, as often as tokens may be generated.
            return (" a" * self.config.generation_kwargs["max_gen_toks"],)
        return tuple(f"{self.config.target_delimiter}{choice}" for choice in self.doc_to_choice(doc))


class WholeTextTask(HarnessTask):
    """A choice by the mean loss of the whole text, prompt and option (`score_whole_text`).

    That text is asked as one, for some tokenizers join the prompt's last characters with the option's first.
    `config` has `num_tokens` besides.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        count = config["num_tokens"]

        def score(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
            texts = _join(self._prompt(doc, 0), self._continuations(doc))
            return score_whole_text([likelihood for likelihood, _ in results], count(texts), self.doc_to_target(doc))

        # lm-eval looks a metric up, on the hub if need be, unless its task has a function for it.
        super().__init__({**config, "process_results": score, "metric_list": WHOLE_TEXT_METRICS})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Return a request an option, for the whole text."""
        return [
            Instance(
                request_type="loglikelihood", doc=doc, arguments=("", text), idx=number, metadata=kwargs["metadata"]
            )
            for number, text in enumerate(_join(ctx, self._continuations(doc)))
        ]

    def _is_short_enough(self, prompt: str, continuations: Sequence[str]) -> bool:
        return self._fits("", _join(prompt, continuations))


class SummaryTask(HarnessTask):
    """A summary to generate, scored by ROUGE (`score_summary`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({**config, "process_results": score_summary, "metric_list": SUMMARY_METRICS})


def _join(prompt: str, continuations: Sequence[str]) -> list[str]:
    return [prompt + continuation for continuation in continuations]


@contextmanager
def _quiet() -> Iterator[None]:
    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
