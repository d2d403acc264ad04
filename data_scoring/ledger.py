"""The ledger: `ledger.duckdb`, a database of views over the run folder's Parquet files, without data of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from data_scoring.base.databases import replacing_views
from data_scoring.base.files import disk_error
from data_scoring.base.messages import one_line
from data_scoring.base.parquet import is_intact, write_parquet
from data_scoring.base.sql import SHARD_OF_FILE, condition_of_files, literal, parquet_rows, rows_beside


@dataclass(frozen=True)
class View:
    """A view: its description, its columns with type and meaning, and what it selects from the files `files`.

    optional: columns, with their types, that not all files have; they are null where missing.
    """

    comment: str
    files: str
    columns: dict[str, tuple[str, str]]
    selected: str
    optional: tuple[tuple[str, str], ...] = ()


# The last such folder on the way to the file, which may be relative, is the run's own, whatever the others are called.
_ROUND = r"regexp_extract(filename, '(?s)^(.*/)?[.r]ounds/([^/]+)/', 2)::int as round"
_STEP = r"regexp_extract(filename, '(?s)^.*/evaluation/step-([^/]+)/', 1)::int as step"
_SHARD = f"{SHARD_OF_FILE} as shard"
_PLACE = "file_row_number as place"
# Columns that are not in the files.
_COMPUTED = {"round": _ROUND, "step": _STEP, "shard": _SHARD, "place": _PLACE}

_ROUND_COLUMN = {"round": ("integer", "Number of the round, from 1.")}
_IDENTITY = {
    "shard": ("integer", "Shard of the sample, from 0."),
    "sample": ("integer", "Number of the sample in its shard, from 0."),
}

_SCALE = {
    "higher_is_better": ("boolean", "Whether a higher score is better."),
    "is_share": ("boolean", "Whether the score is a share, 0 to 1, which tables show in percent."),
}

VIEWS = {
    "samples": View(
        "Every training sample of the corpus.",
        "corpus/samples.parquet",
        {
            **_IDENTITY,
            "source": ("varchar", "Source of the sample's text."),
            "num_tokens": ("integer", "Predicted tokens of the sample: its length minus one."),
        },
        "shard, sample, source::varchar as source, num_tokens",
    ),
    "documents": View(
        "Where the documents of the training text come from; empty for a corpus before version 0.12.",
        "corpus/documents.parquet",
        {
            "source": ("varchar", "Source of the document."),
            "file": ("varchar", "File of the document."),
            "document": ("bigint", "Number of the document in its file, from 1: its line, row or paragraph."),
            "start": ("bigint", "Place of its first token in the source's training text, from 0."),
        },
        "source, file, document, start",
    ),
    "contamination": View(
        "Training samples that contain parts of evaluation items, one row per sample and item.",
        "corpus/contamination.parquet",
        {
            "task": ("varchar", "Task of the item."),
            "item": ("varchar", "Item of the task."),
            **_IDENTITY,
            "source": ("varchar", "Source of the sample's text."),
            "num_ngrams": ("bigint", "Distinct n-grams of the item that are wholly or partly in the sample."),
            "excerpt": ("varchar", "The first of them, normalised as for comparison: in lower case."),
        },
        "task, item, shard, sample, source, num_ngrams, excerpt",
    ),
    "contaminated_items": View(
        "Evaluation items that were searched for in the training text, and how much of each was found.",
        "corpus/contamination-items.parquet",
        {
            "task": ("varchar", "Task of the item."),
            "item": ("varchar", "Item of the task."),
            "num_ngrams": ("bigint", "Distinct n-grams of the item."),
            "num_found": ("bigint", "Those that are in the training text."),
            "num_common": ("bigint", "Those in more than 10 documents, which count as not found."),
            "share": ("double", "num_found / num_ngrams; null for an item that is too short."),
            "is_too_short": ("boolean", "Whether the item is too short to search for."),
        },
        "task, item, num_ngrams, num_found, num_common, share, is_too_short",
    ),
    "losses": View(
        "Losses of all samples under the model at the end of a round.",
        "rounds/*/losses/shard=*.parquet",
        {
            **_ROUND_COLUMN,
            **_IDENTITY,
            "num_tokens": ("integer", "Number of tokens over which the loss is the mean."),
            "loss": ("float", "Mean next-token negative log-likelihood, nats per token."),
        },
        f"{_ROUND}, {_SHARD}, sample, num_tokens, loss",
    ),
    "seen": View(
        "Losses of samples in the step that trained on them.",
        "rounds/*/seen/step=*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Optimizer step of the round, from 1."),
            **_IDENTITY,
            "loss": ("float", "Mean next-token negative log-likelihood before the step, nats per token."),
        },
        f"{_ROUND}, step, shard, sample, loss",
    ),
    "selection": View(
        "Which samples were kept for a round, which were not, and why.",
        "rounds/*/selection/shard=*.parquet",
        {
            **_ROUND_COLUMN,
            **_IDENTITY,
            "loss": ("float", "Loss on which the decision is based, nats per token."),
            "kept": ("boolean", "Whether the sample is in the round's mix."),
            "reason": ("varchar", "Why it is kept or not."),
            "probability": ("float", "With refine.weights, the probability with which the draw keeps a kept sample."),
        },
        f"{_ROUND}, {_SHARD}, sample, loss, kept, reason, probability",
        (("probability", "float"),),
    ),
    "mix": View(
        "The samples that a round trains on.",
        "rounds/*/mix.parquet",
        {
            **_ROUND_COLUMN,
            "place": ("bigint", "Place in the training order, from 0."),
            **_IDENTITY,
            "weight": ("float", "Weight of the sample's loss in training: 1 without refine.weights."),
        },
        f"{_ROUND}, {_PLACE}, shard, sample, coalesce(weight, 1)::float as weight",
        (("weight", "float"),),
    ),
    "budgets": View(
        "How the samples were scored after a round, and how the alternatives compare with scoring in full.",
        "rounds/*/budget.parquet",
        {
            **_ROUND_COLUMN,
            "candidate": ("varchar", "Budget: full, seen or prefix:P; calibration is the measurement itself."),
            "correlation": ("double", "Spearman's rank correlation with the full loss; null if not measured."),
            "overlap": ("double", "Share of the samples drawn by full loss that are also drawn by this loss."),
            "chance_overlap": ("double", "The same for a draw with the same random numbers that ignores the loss."),
            "sampling_rate": ("double", "refine.sampling_rate of these draws; the round's selection may have another."),
            "temperature": ("double", "Temperature of the draws by loss; the round's selection may have another."),
            "cost_tokens": ("bigint", "Cost of scoring all samples, in training tokens; a forward pass costs a third."),
            "chosen": ("boolean", "Whether the samples were scored with this budget."),
            "seconds": ("double", "Seconds that scoring took, with calibration and all attempts; null if not chosen."),
        },
        f"{_ROUND}, candidate, correlation, overlap, chance_overlap, sampling_rate, temperature, cost_tokens, chosen, "
        "seconds",
        (("seconds", "double"), ("sampling_rate", "double"), ("temperature", "double")),
    ),
    "lineage": View(
        "The parts of a larger model that round 1 starts from, one row per layer; empty without inheritance.",
        "rounds/*/inherit/lineage.parquet",
        {
            **_ROUND_COLUMN,
            "layer": ("integer", "Layer of the model, from 0."),
            "teacher_layer": ("integer", "The corresponding layer of the larger model, from 0."),
            "teacher": ("varchar", "Folder of the larger model."),
            "checkpoint": ("varchar", "Checkpoint of the larger model."),
            "method": ("varchar", "How the kept neurons were chosen (model.inherit.method)."),
            "channels": ("integer[]", "Kept channels of the residual stream, by their index in the larger model."),
            "ffn": ("integer[]", "Kept neurons of the feed-forward layer, by their index in the larger model."),
            "groups": ("integer[]", "Kept query groups, by their index in the larger model."),
            "heads": ("integer[]", "Kept query heads, by their index in the larger model."),
        },
        f"{_ROUND}, layer, teacher_layer, teacher, checkpoint, method, channels, ffn, groups, heads",
    ),
    "scores": View(
        "Scores of models in evaluation tasks, one row per task and one for each of its subjects.",
        "rounds/*/evaluation/step-*/scores/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which the model was evaluated."),
            "is_end": ("boolean", "Whether the model is the one at the end of the round, not one during training."),
            "task": ("varchar", "Task."),
            "subject": ("varchar", "Subject of the task; null for the task as a whole: the mean over its subjects."),
            "metric": ("varchar", "Metric: acc, acc_norm, acc_text, rouge1, or another of lm-eval's."),
            "score": ("double", "Score: 0 to 1 if is_share, else in the metric's own unit."),
            "stderr": ("double", "Standard error of the score over items; null if it is unknown."),
            "chance": ("double", "Score of guessing; null for a subject, or if it is unknown."),
            "num_items": ("bigint", "Items that were scored."),
            "num_unscorable": ("bigint", "Items that could not be scored; the view unscorable lists them."),
            "num_fewshot": ("integer", "Few-shot examples before each question."),
            "num_shortened": ("bigint", "Items with fewer examples, to fit the model's length; null for a subject."),
            **_SCALE,
        },
        f"{_ROUND}, {_STEP}, is_end, task, subject, metric, score, stderr, chance, num_items, num_unscorable, "
        "num_fewshot, num_shortened, coalesce(higher_is_better, true) as higher_is_better, "
        "coalesce(is_share, true) as is_share",
        (("higher_is_better", "boolean"), ("is_share", "boolean")),
    ),
    "metrics": View(
        "All metrics that lm-eval computes of models in tasks that are not Reprise's own.",
        "rounds/*/evaluation/step-*/metrics/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which the model was evaluated."),
            "is_end": ("boolean", "Whether the model is the one at the end of the round, not one during training."),
            "task": ("varchar", "Task."),
            "subject": ("varchar", "Task of a group; null for the task or group as a whole."),
            "metric": ("varchar", "Metric, by lm-eval's name."),
            "filter": ("varchar", "What was applied to the model's answers, by lm-eval's name; none: nothing."),
            "score": ("double", "Score, in the metric's own unit."),
            "stderr": ("double", "Standard error of the score; null if it is unknown."),
            "higher_is_better": ("boolean", "Whether a higher score is better."),
        },
        f"{_ROUND}, {_STEP}, is_end, task, subject, metric, filter, score, stderr, higher_is_better",
    ),
    "scored_items": View(
        "Scores of models in each item of evaluation tasks.",
        "rounds/*/evaluation/step-*/items/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which the model was evaluated."),
            "is_end": ("boolean", "Whether the model is the one at the end of the round, not one during training."),
            "task": ("varchar", "Task."),
            "subject": ("varchar", "Subject of the task, by lm-eval's name."),
            "item": ("varchar", "Location of the item: file and line, or place on the hub."),
            "score": ("double", "Score, as the task's; null if an item has none."),
        },
        f"{_ROUND}, {_STEP}, is_end, task, subject, item, score",
    ),
    "unscorable": View(
        "Evaluation items that could not be scored, and why.",
        "rounds/*/evaluation/step-*/unscorable/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which the other items were scored."),
            "task": ("varchar", "Task."),
            "item": ("varchar", "Location of the item: file and line, or place on the hub."),
            "reason": ("varchar", "Why it cannot be scored."),
        },
        f"{_ROUND}, {_STEP}, task, item, reason",
    ),
    "steps": View(
        "The optimizer steps of each round.",
        "rounds/*/steps.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Optimizer step of the round, from 1."),
            "loss": ("float", "Mean loss of the step's batch, nats per token; samples are not weighted."),
            "lr": ("float", "Learning rate of the step."),
            "grad_norm": ("float", "Norm of the gradient before clipping."),
            "num_samples": ("integer", "Samples in the batch."),
            "num_tokens": ("bigint", "Predicted tokens in the batch."),
            "tokens_per_second": ("float", "Predicted tokens per second, all ranks together."),
            "seconds": ("double", "Seconds of the round's training up to the end of the step, all attempts together."),
            "ended_at": ("timestamp", "Time at the end of the step, UTC."),
        },
        f"{_ROUND}, step, loss, lr, grad_norm, num_samples, num_tokens, tokens_per_second, seconds, ended_at",
        (("seconds", "double"), ("ended_at", "timestamp")),
    ),
    "validation": View(
        "Validation loss of each source during the rounds.",
        "rounds/*/validation.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which the loss was measured."),
            "source": ("varchar", "Source of the text."),
            "loss": ("double", "Mean loss over the source's validation tokens, nats per token."),
            "num_tokens": ("bigint", "Validation tokens of the source."),
        },
        f"{_ROUND}, step, source, loss, num_tokens",
    ),
    "validation_samples": View(
        "Losses of the validation samples under the model at the end of a round.",
        "rounds/*/validation-samples.parquet",
        {
            **_ROUND_COLUMN,
            "sample": ("integer", "Number of the validation sample, from 0."),
            "source": ("varchar", "Source of the sample's text."),
            "num_tokens": ("integer", "Predicted tokens of the sample."),
            "loss": ("float", "Mean next-token negative log-likelihood, nats per token."),
        },
        f"{_ROUND}, sample, source, num_tokens, loss",
    ),
}

# Views over views: (comment, columns, SQL).
DERIVED = {
    "final_scores": (
        "Scores of the model at the end of a round in each task as a whole.",
        {
            **_ROUND_COLUMN,
            "task": ("varchar", "Task."),
            "metric": ("varchar", "Metric: acc, acc_norm, acc_text, rouge1, or another of lm-eval's."),
            "score": ("double", "Score: 0 to 1 if is_share, else in the metric's own unit."),
            "stderr": ("double", "Standard error of the score over items; null if it is unknown."),
            "chance": ("double", "Score of guessing; null if it is unknown."),
            "num_items": ("bigint", "Items that were scored."),
            "num_unscorable": ("bigint", "Items that could not be scored."),
            **_SCALE,
        },
        """select round, task, metric, score, stderr, chance, num_items, num_unscorable, higher_is_better, is_share
        from scores
        where is_end and subject is null qualify step = max(step) over (partition by round) and score is not null""",
    ),
    "rounds": (
        "One row per round that has trained, with its cost and its result.",
        {
            **_ROUND_COLUMN,
            "num_steps": ("bigint", "Optimizer steps done."),
            "num_samples": ("bigint", "Samples trained on."),
            "num_tokens": ("bigint", "Predicted tokens trained on."),
            "train_loss": ("double", "Mean loss of the last tenth of the steps, nats per token."),
            "validation_loss": ("double", "Loss over all validation tokens after the last step, nats per token."),
            "training_seconds": ("double", "Seconds of training up to the end of the last step, all attempts."),
            "scoring_seconds": ("double", "Seconds of scoring after the round, all attempts; null if not scored."),
            "training_cost": ("bigint", "Cost of training, in training tokens: num_tokens."),
            "scoring_cost": ("bigint", "Cost of scoring, with calibration, in training tokens; null if not scored."),
        },
        """select s.round, s.num_steps, s.num_samples, s.num_tokens, s.train_loss, v.validation_loss,
            s.training_seconds, b.scoring_seconds, s.num_tokens as training_cost, b.scoring_cost
        from (
            select round, count(*) as num_steps, sum(num_samples)::bigint as num_samples,
                sum(num_tokens)::bigint as num_tokens, avg(loss) filter (step > 0.9 * last) as train_loss,
                max(seconds) as training_seconds
            from (select *, max(step) over (partition by round) as last from steps) group by round
        ) s left join (
            select round, sum(loss * num_tokens) / sum(num_tokens) as validation_loss
            from (select *, max(step) over (partition by round) as last from validation)
            where step = last group by round
        ) v using (round) left join (
            select round, sum(seconds) as scoring_seconds, sum(cost_tokens)::bigint as scoring_cost
            from budgets where chosen or candidate = 'calibration' group by round
        ) b using (round) order by s.round""",
    ),
    "forgetting": (
        "Loss of each sample when it was trained on and its loss after the round. Unless samples were scored in full "
        "(see budgets), the two losses are not over the same tokens.",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step that trained on the sample."),
            **_IDENTITY,
            "seen_loss": ("float", "Loss in the step that trained on the sample, nats per token."),
            "loss": ("float", "Loss under the model at the end of the round, nats per token."),
            "forgotten": ("float", "loss minus seen_loss: above 0 if the model got worse on the sample."),
        },
        """select round, step, shard, sample, seen.loss as seen_loss, losses.loss as loss,
            losses.loss - seen.loss as forgotten
        from seen join losses using (round, shard, sample)""",
    ),
}


def refresh_ledger(run_folder: Path) -> Path:
    """Write `ledger.duckdb` again and return its path; its views also cover files that will match later.

    Its views find the files beside it, so the run folder may be moved and copied.
    """
    run_folder = run_folder.resolve()
    path = run_folder / "ledger.duckdb"
    _write_empty_files(run_folder)
    with replacing_views(path) as connection:
        for name, view in VIEWS.items():
            rows = rows_beside(path, _pattern(view), options=_options(view))
            condition = condition_of_files(path)
            _create(connection, name, view.comment, view.columns, f"{_select(view, rows)} where {condition}")
        _create_derived(connection)
    return path


def _write_empty_files(run_folder: Path) -> None:
    """Write a file without rows for every view, since DuckDB reads no pattern that matches no file."""
    with duckdb.connect() as connection:
        for view in VIEWS.values():
            stored = {
                name: kind
                for name, (kind, _) in view.columns.items()
                if name not in _COMPUTED or _COMPUTED[name] not in view.selected
            }
            sql = _no_rows(stored)
            path = run_folder / ("." + view.files[1:].replace("*", "0"))
            if not is_intact(path, sql):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_parquet(path, connection.sql(sql).to_arrow_table(), sql)


@contextmanager
def open_ledger(run_folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection to the views of a run's ledger.

    They are created in memory, because another program may hold a lock on `ledger.duckdb`, or have written to it.
    """
    with duckdb.connect() as connection:
        create_views(connection, run_folder.resolve())
        yield connection


def read_rows(run_folder: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return the rows that `sql` selects from the views of a run's ledger."""
    with open_ledger(run_folder) as ledger:
        return ledger.sql(sql).fetchall()


def create_views(connection: duckdb.DuckDBPyConnection, run_folder: Path) -> None:
    """Create the ledger's views over the files in `run_folder`. Raises ValueError if a file is damaged."""
    for name, view in VIEWS.items():
        if any(run_folder.glob(_pattern(view))):
            sql = _select(view, parquet_rows(run_folder, _pattern(view), options=_options(view)))
        else:
            sql = _no_rows({column: kind for column, (kind, _) in view.columns.items()})
        _create(connection, name, view.comment, view.columns, sql)
    _create_derived(connection)


def _create_derived(connection: duckdb.DuckDBPyConnection) -> None:
    for name, (comment, columns, sql) in DERIVED.items():
        _create(connection, name, comment, columns, sql)


def _pattern(view: View) -> str:
    """Return the pattern that matches a view's files and its file without rows.

    The latter is in a hidden folder, whose name has a dot for the first letter: .ounds/0/mix.parquet. A list of two
    patterns would not do, because DuckDB requires a match for each.
    """
    return f"[.{view.files[0]}]{view.files[1:]}"


def _options(view: View) -> str:
    return "filename = true" + (", file_row_number = true, union_by_name = true" if view.optional else "")


def _select(view: View, rows: str) -> str:
    if not view.optional:
        return f"select {view.selected} from {rows}"
    missing = ", ".join(f"null::{kind} as {name}" for name, kind in view.optional)
    return f"select {view.selected} from (from {rows} union all by name select {missing} where false)"


def _no_rows(columns: dict[str, str]) -> str:
    return f"select {', '.join(f'null::{kind} as {name}' for name, kind in columns.items())} where false"


def _create(
    connection: duckdb.DuckDBPyConnection, name: str, comment: str, columns: dict[str, tuple[str, str]], sql: str
) -> None:
    try:
        connection.execute(f"create view {name} as {sql}")
    except duckdb.Error as error:
        if disk_error(str(error), Path()) is not None:
            raise
        raise ValueError(
            f"view {name}: {one_line(error, 600)}; restore the file, or delete it and run the same command again"
        ) from None
    connection.execute(f"comment on view {name} is {literal(comment)}")
    for column, (kind, meaning) in columns.items():
        connection.execute(f"comment on column {name}.{column} is {literal(f'{meaning} ({kind})')}")
