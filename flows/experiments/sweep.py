"""The architecture search: its trials, and how each is trained and measured. Plain functions on its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_scoring.base.field_effects import deciding
from data_scoring.base.files import write_record
from data_scoring.base.progress import Progress
from data_scoring.base.validation import read_record
from data_scoring.evaluation.tasks import other_tasks, resolve_names
from data_scoring.ledger import read_rows
from flows.evaluation.questions import check_items
from flows.evaluation.results import SCORE
from flows.experiments.generation_speed import generation_speed
from flows.experiments.search_space import SearchConfig, draw_models
from flows.experiments.trials import TRIAL_ERRORS, Trial, add_result, prepare_corpus, read_result, trial_config
from flows.run.config import RunConfig
from flows.run.folder import Run, open_run, read_run
from flows.run.locks import locked
from flows.stages.prepare import vocabulary_size
from flows.stages.stage_order import complete

_RECORD = "sweep.json"


def sweep_folder(config: RunConfig) -> Path:
    """Return the folder of the search that starts from `config`."""
    return config.folder.absolute().with_name(f"{config.run_name}-sweep")


def begin(config: RunConfig, search: SearchConfig, progress: Progress) -> Run:
    """Check the search before hours of work, and return the run with its corpus.

    Raises ValueError if the budget cannot be met, or if the folder belongs to another search.
    """
    folder = sweep_folder(config)
    if config.model.start_from is not None:
        raise ValueError("model.start_from: a search trains models of many shapes from random weights; leave it out")
    if config.model.inherits:
        raise ValueError("model.inherit: a search trains models of many shapes from random weights; leave it out")
    plan(config, search, vocabulary_size(config))
    if config.eval.asked:
        check_items(config.eval)
    before = read_record(folder / _RECORD, dict[str, Any])
    wanted = deciding(search, "train")
    if before is not None and before != wanted:
        different = [f"{name} {before.get(name)} there, {value} here" for name, value in wanted.items()
                     if before.get(name) != value]  # fmt: skip
        raise ValueError(
            f"{folder}: holds another search ({', '.join(different)}); set another name, or delete the folder"
        )
    corpus = prepare_corpus(config, folder, "corpus", config.seed, progress)
    write_record(folder / _RECORD, wanted)
    return corpus


def plan(config: RunConfig, search: SearchConfig, vocab_size: int) -> list[RunConfig]:
    """Return the configuration of each trial's run, for a tokenizer of `vocab_size` entries.

    Raises ValueError if there are fewer models than requested.
    """
    models = draw_models(search, config.model, config.parallel, config.model.vocab_size or vocab_size)
    folder = sweep_folder(config)
    return [
        trial_config(
            config,
            folder,
            Trial(
                f"depth-{model.num_layers}-width-{model.hidden_size}-ffn-{model.ffn_size}",
                {"model": model.model_dump()},
            ),
            config.seed,
        )
        for model in models
    ]


def measure(config: RunConfig, progress: Progress) -> bool:
    """Add a trained trial's generation speed to its row; return whether the row changed.

    The speed is measured again on another device or layout. If it cannot be measured, raises one of TRIAL_ERRORS and
    records it in the row.
    """
    row = read_result(config)
    if row["state"] != "trained":
        return False
    with _on_record(config):
        speed = generation_speed(read_run(config.folder), 1, progress)
    if speed == row["generation_speed"]:
        return False
    add_result(config, generation_speed=speed, reason=None)
    return True


def score(config: RunConfig, progress: Progress) -> bool:
    """Add a trained trial's scores in the tasks of `eval.tasks` to its row; return whether the row changed.

    If ranks fail, raises one of TRIAL_ERRORS and records it in the row.
    """
    row = read_result(config)
    if row["state"] != "trained" or not config.eval.asked:
        return False
    with _on_record(config), locked(config.folder):
        complete(open_run(config), "evaluate", 1, progress)
    asked, names = resolve_names(config.eval.asked), [part.name for part in SCORE]
    found = read_rows(config.folder, f"select {', '.join(names)} from final_scores where round = 1 and is_share")
    # Task files and groups stand for tasks of other names, which follow.
    place = {name: number for number, name in enumerate(asked)}
    found.sort(key=lambda entry: (place.get(entry[0], len(asked)), entry[0]))
    has_others = bool(other_tasks(asked))
    scores = [dict(zip(names, entry, strict=True)) for entry in found if entry[0] in place or has_others]
    if scores == row["scores"]:
        return False
    add_result(config, scores=scores, reason=None)
    return True


@contextmanager
def _on_record(config: RunConfig) -> Iterator[None]:
    """Record any of TRIAL_ERRORS raised in this context in the trial's row."""
    try:
        yield
    except TRIAL_ERRORS as error:
        add_result(config, reason=str(error).splitlines()[0])
        raise
