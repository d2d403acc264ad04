"""Tasks of lm-eval, or of a user's files, as they are: only where data lies and how long prompts are is ours.

Imported only when such tasks are loaded: importing lm-eval takes a second.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks._factory as factory
from datasets.exceptions import DatasetGenerationError, DatasetsError
from lm_eval.api.task import ConfigurableTask

from data_scoring.base.messages import one_line
from data_scoring.evaluation.task_files import FILE_LOADERS, SUFFIXES, locate_data
from flows.evaluation.harness_task import Fits, patched_harness, without_bars


class UnusableTaskError(ValueError):
    """A task that cannot be evaluated; the message says why, and what to do."""


class OpenTask(ConfigurableTask):
    """A task that drops examples from prompts that are too long, and reads data sets from a folder, if there is one."""

    fits: Fits
    data: Path | None
    # Of the file that is being loaded.
    folder = Path()

    def __init__(self, **arguments: Any) -> None:
        self.num_examples: list[int] = []
        self._docs: dict[str, Any] = {}
        config = arguments["config"]
        name = config.get("task")
        for field, what in (
            ("doc_to_image", "images"),
            ("doc_to_audio", "audio"),
        ):
            if config.get(field) is not None:
                raise UnusableTaskError(
                    f"eval.tasks: {name}: asks about {what}, which models here cannot read; leave it out"
                )
        super().__init__(**arguments)
        if self.config.num_fewshot is None:
            self.set_config("num_fewshot", 0)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the data set: from files, from a folder of `data` with its name, or from the hub."""
        if callable(self.config.custom_dataset):
            super().download(dataset_kwargs, **kwargs)
            return
        path, source = str(self.DATASET_PATH), str(self.config.metadata.get("config_source", ""))
        # lm-eval does not say which group's file describes a task.
        folder = Path(source).parent if source.endswith(SUFFIXES) else self.folder
        arguments = {key: value for key, value in (dataset_kwargs or {}).items() if key != "trust_remote_code"}
        for key in arguments.keys() & {"data_files", "data_dir"}:
            arguments[key] = _located(arguments[key], folder)
        place = path
        is_file, is_here = path in FILE_LOADERS, locate_data(path, folder).is_dir()
        if is_here:
            place = str(locate_data(path, folder))
        elif self.data is not None and not is_file:
            place = str(self.data / path)
            if not Path(place).is_dir():
                raise UnusableTaskError(
                    f"eval.data: no folder {place}, which {self.config.task} needs; put the data set's repository "
                    f"{path} there, or leave {self.config.task} out of eval.tasks"
                )
        try:
            with without_bars():
                self.dataset = datasets.load_dataset(place, self.DATASET_NAME, **arguments)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            # That an error has occurred is not its reason.
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
            reason = one_line(cause or error) or type(error).__name__
            if is_file or is_here or self.data is not None:
                remedy = "correct dataset_path and data_files" if is_file else "put the whole data set there"
                raise UnusableTaskError(
                    f"eval.tasks: {self.config.task}: cannot read its data ({reason}); {remedy}"
                ) from None
            raise UnusableTaskError(
                f"eval.tasks: {self.config.task}: cannot read {path} from the hub ({reason}); try again, or put its "
                f"repository into DIR/{path} and set eval.data (--data) to DIR"
            ) from None

    def test_docs(self) -> Any:
        """Return the processed items of the test split, cached."""
        return self._cached("test", super().test_docs)

    def validation_docs(self) -> Any:
        """Return the processed items of the validation split, cached."""
        return self._cached("validation", super().validation_docs)

    def _cached(self, split: str, read: Callable[[], Any]) -> Any:
        if split not in self._docs:
            with without_bars():
                self._docs[split] = read()
        return self._docs[split]

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests of the given items."""
        self.num_examples = []
        with patched_harness():
            super().build_all_requests(**kwargs)

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> Any:
        """Return the prompt of an item, or of each of its inputs, with as many of `num_fewshot` examples as fit.

        The draw for the next item is the one that lm-eval makes, however many fit here.
        """
        context, count = super().fewshot_context(doc, num_fewshot, **kwargs), num_fewshot
        if num_fewshot:
            state = self.sampler.rnd.getstate()
            while count and not self._is_short_enough(doc, context):
                count -= 1
                context = super().fewshot_context(doc, count, **kwargs)
            self.sampler.rnd.setstate(state)
        self.num_examples.append(count)
        return context

    def _is_short_enough(self, doc: dict[str, Any], context: str | list[str]) -> bool:
        contexts = context if isinstance(context, list) else [context]
        return all(self.fits(each, self._continuations(doc)) for each in contexts)

    def _continuations(self, doc: dict[str, Any]) -> list[str]:
        delimiter = self.config.target_delimiter
        if self.OUTPUT_TYPE == "generate_until":
            return [" a" * int((self.config.generation_kwargs or {}).get("max_gen_toks", 0))]
        if self.OUTPUT_TYPE == "multiple_choice" and not self.multiple_input:
            return [f"{delimiter}{choice}" for choice in self.doc_to_choice(doc)]
        return [f"{delimiter}{self.doc_to_target(doc)}"]


@contextmanager
def opened_tasks(fits: Fits, data: Path | None) -> Iterator[type[OpenTask]]:
    """Make lm-eval build each task that its files describe as an `OpenTask`, of the yielded class."""
    kind = type("OpenTask", (OpenTask,), {"fits": staticmethod(fits), "data": data})
    with patched_harness():
        before = factory.ConfigurableTask
        factory.ConfigurableTask = kind
        try:
            yield kind
        finally:
            factory.ConfigurableTask = before


def _located(files: Any, folder: Path) -> Any:
    """Return `data_files` or `data_dir` with paths that can be opened from here."""
    if isinstance(files, str):
        return files if "://" in files else str(locate_data(files, folder))
    if isinstance(files, dict):
        return {key: _located(value, folder) for key, value in files.items()}
    assert isinstance(files, Sequence)
    return [_located(each, folder) for each in files]
