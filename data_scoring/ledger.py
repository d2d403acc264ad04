"""The ledger: `ledger.duckdb`, which holds nothing but views over the run folder's Parquet files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb

from data_scoring.base.files import writing
from data_scoring.base.sql import literal, writing_errors


@dataclass(frozen=True)
class View:
    """A view: what it is, its columns with type and meaning, and the SQL over the files that match `files`."""

    comment: str
    files: str
    columns: dict[str, tuple[str, str]]
    sql: Callable[[str], str]


_ROUND = r"regexp_extract(filename, '.*rounds/(\d+)/', 1)::int as round"
_STEP = r"regexp_extract(filename, '.*evaluation/step-(\d+)/', 1)::int as step"
_SHARD = r"regexp_extract(filename, 'shard=(\d+)', 1)::int as shard"


def _plain(columns: str, order: str = "") -> Callable[[str], str]:
    return lambda files: f"select {columns} from read_parquet({files}, filename = true) {order}"


_ROUND_COLUMN = {"round": ("integer", "Number of the round, from 1.")}
_IDENTITY = {
    "shard": ("integer", "Shard of the sample, from 0."),
    "sample": ("integer", "Number of the sample in its shard, from 0."),
}

VIEWS = {
    "samples": View(
        "Every training sample of the corpus.",
        "corpus/samples.parquet",
        {
            **_IDENTITY,
            "source": ("varchar", "Source that the sample's text is from."),
            "num_tokens": ("integer", "Tokens that the sample predicts: its length less one."),
        },
        _plain("shard, sample, source::varchar as source, num_tokens"),
    ),
    "contamination": View(
        "Training samples that hold parts of evaluation items, a row a sample and item.",
        "corpus/contamination.parquet",
        {
            "task": ("varchar", "Task that the item is of."),
            "item": ("varchar", "Which of the task's items it is."),
            **_IDENTITY,
            "source": ("varchar", "Source that the sample's text is from."),
            "num_ngrams": ("bigint", "Distinct n-grams of the item that are in the sample, or in part."),
            "excerpt": ("varchar", "The first of them, as it was compared: in lower case."),
        },
        _plain("task, item, shard, sample, source, num_ngrams, excerpt"),
    ),
    "contaminated_items": View(
        "Evaluation items that were looked for in the training text, and how much of each is there.",
        "corpus/contamination-items.parquet",
        {
            "task": ("varchar", "Task that the item is of."),
            "item": ("varchar", "Which of the task's items it is."),
            "num_ngrams": ("bigint", "Distinct n-grams of the item."),
            "num_found": ("bigint", "Those that are in the training text."),
            "num_common": ("bigint", "Those that more than 10 documents have, which count as not found."),
            "share": ("double", "num_found / num_ngrams; null for an item that is too short."),
            "is_too_short": ("boolean", "Whether the item is too short to tell."),
        },
        _plain("task, item, num_ngrams, num_found, num_common, share, is_too_short"),
    ),
    "losses": View(
        "Losses of all samples under the model that a round ended with.",
        "rounds/*/losses/shard=*.parquet",
        {
            **_ROUND_COLUMN,
            **_IDENTITY,
            "num_tokens": ("integer", "Tokens that the loss is the mean of."),
            "loss": ("float", "Mean next-token negative log-likelihood, nats per token."),
        },
        _plain(f"{_ROUND}, {_SHARD}, sample, num_tokens, loss"),
    ),
    "seen": View(
        "Losses of samples in the very step that trained on them.",
        "rounds/*/seen/step=*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Optimizer step of the round, from 1."),
            **_IDENTITY,
            "loss": ("float", "Mean next-token negative log-likelihood before the step, nats per token."),
        },
        _plain(f"{_ROUND}, step, shard, sample, loss"),
    ),
    "selection": View(
        "What was kept for a round and what was not, and why.",
        "rounds/*/selection/shard=*.parquet",
        {
            **_ROUND_COLUMN,
            **_IDENTITY,
            "loss": ("float", "Loss that was decided by, nats per token."),
            "kept": ("boolean", "Whether the sample is in the round's mix."),
            "reason": ("varchar", "Why it is kept or not."),
        },
        _plain(f"{_ROUND}, {_SHARD}, sample, loss, kept, reason"),
    ),
    "mix": View(
        "The samples that a round trains on.",
        "rounds/*/mix.parquet",
        {
            **_ROUND_COLUMN,
            "place": ("bigint", "Place in the training order, from 0."),
            **_IDENTITY,
        },
        _plain(f"{_ROUND}, file_row_number as place, shard, sample"),
    ),
    "budgets": View(
        "How the samples were scored after a round, and what the ways to score that could have been would have missed.",
        "rounds/*/budget.parquet",
        {
            **_ROUND_COLUMN,
            "candidate": ("varchar", "Way to score: full, seen or prefix:P; calibration is the measuring itself."),
            "correlation": ("double", "Spearman's rank correlation with the full loss; null where not measured."),
            "overlap": ("double", "Share of the samples drawn by full loss that are drawn by this one too."),
            "chance_overlap": ("double", "The same of a draw with the same random numbers and no regard to loss."),
            "cost_tokens": ("bigint", "Cost of all samples in training tokens, of which a forward pass is a third."),
            "chosen": ("boolean", "Whether the samples were scored so."),
        },
        _plain(f"{_ROUND}, candidate, correlation, overlap, chance_overlap, cost_tokens, chosen"),
    ),
    "lineage": View(
        "What of a larger model round 1 starts from, a row a layer; nothing where it starts from no part of one.",
        "rounds/*/inherit/lineage.parquet",
        {
            **_ROUND_COLUMN,
            "layer": ("integer", "Layer of the model, from 0."),
            "teacher_layer": ("integer", "Layer of the larger model that it was, from 0."),
            "teacher": ("varchar", "Folder of the larger model."),
            "checkpoint": ("varchar", "Checkpoint that its weights are from."),
            "method": ("varchar", "How the neurons that stay were chosen (model.inherit.method)."),
            "channels": ("integer[]", "Channels of the residual stream that stay, by their numbers there."),
            "ffn": ("integer[]", "Neurons of the feed-forward layer that stay, by their numbers there."),
            "groups": ("integer[]", "Query groups that stay, by their numbers there."),
            "heads": ("integer[]", "Query heads that stay, by their numbers there."),
        },
        _plain(f"{_ROUND}, layer, teacher_layer, teacher, checkpoint, method, channels, ffn, groups, heads"),
    ),
    "scores": View(
        "What models score in evaluation tasks, a row a task and one for each of its subjects.",
        "rounds/*/evaluation/step-*/scores/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which it was measured."),
            "is_end": ("boolean", "Whether it is the model that the round ended with, not one on the way."),
            "task": ("varchar", "Task."),
            "subject": ("varchar", "Subject of the task; null for the task as a whole: the mean over its subjects."),
            "metric": ("varchar", "What the score is: acc, acc_norm, acc_text, rouge1."),
            "score": ("double", "Score, 0 to 1."),
            "stderr": ("double", "Its standard error over items; null where too few items tell."),
            "chance": ("double", "What guessing scores; null for a subject."),
            "num_items": ("bigint", "Items that were scored."),
            "num_unscorable": ("bigint", "Items that could not be; the view unscorable lists them."),
            "num_fewshot": ("integer", "Solved examples before each question."),
            "num_shortened": ("bigint", "Items whose examples were fewer, for the model's length; null for a subject."),
        },
        _plain(
            f"{_ROUND}, {_STEP}, is_end, task, subject, metric, score, stderr, chance, num_items, num_unscorable, "
            "num_fewshot, num_shortened"
        ),
    ),
    "scored_items": View(
        "What models score in each item of evaluation tasks.",
        "rounds/*/evaluation/step-*/items/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which it was measured."),
            "is_end": ("boolean", "Whether it is the model that the round ended with, not one on the way."),
            "task": ("varchar", "Task."),
            "subject": ("varchar", "Subject of the task, by lm-eval's name."),
            "item": ("varchar", "Where the item is: file and line, or place on the hub."),
            "score": ("double", "Score, 0 to 1."),
        },
        _plain(f"{_ROUND}, {_STEP}, is_end, task, subject, item, score"),
    ),
    "unscorable": View(
        "Evaluation items that no model was asked, and why.",
        "rounds/*/evaluation/step-*/unscorable/*.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which the others were asked."),
            "task": ("varchar", "Task."),
            "item": ("varchar", "Where the item is: file and line, or place on the hub."),
            "reason": ("varchar", "Why it cannot be scored."),
        },
        _plain(f"{_ROUND}, {_STEP}, task, item, reason"),
    ),
    "steps": View(
        "The optimizer steps of each round.",
        "rounds/*/steps.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Optimizer step of the round, from 1."),
            "loss": ("float", "Mean loss of the step's batch, nats per token."),
            "lr": ("float", "Learning rate of the step."),
            "grad_norm": ("float", "Norm of the gradient before clipping."),
            "num_samples": ("integer", "Samples in the batch."),
            "num_tokens": ("bigint", "Predicted tokens in the batch."),
            "tokens_per_second": ("float", "Predicted tokens per second, all ranks together."),
        },
        _plain(f"{_ROUND}, step, loss, lr, grad_norm, num_samples, num_tokens, tokens_per_second"),
    ),
    "validation": View(
        "Validation loss of each source during the rounds.",
        "rounds/*/validation.parquet",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step of the round after which it was measured."),
            "source": ("varchar", "Source of the text."),
            "loss": ("double", "Mean loss over the source's validation tokens, nats per token."),
            "num_tokens": ("bigint", "Validation tokens of the source."),
        },
        _plain(f"{_ROUND}, step, source, loss, num_tokens"),
    ),
}

# Views over views: (comment, columns, SQL).
DERIVED = {
    "final_scores": (
        "What the model that a round ended with scores in each task as a whole.",
        {
            **_ROUND_COLUMN,
            "task": ("varchar", "Task."),
            "metric": ("varchar", "What the score is: acc, acc_norm, acc_text, rouge1."),
            "score": ("double", "Score, 0 to 1."),
            "stderr": ("double", "Its standard error over items; null where too few items tell."),
            "chance": ("double", "What guessing scores."),
            "num_items": ("bigint", "Items that were scored."),
            "num_unscorable": ("bigint", "Items that could not be."),
        },
        """select round, task, metric, score, stderr, chance, num_items, num_unscorable from scores
        where is_end and subject is null qualify step = max(step) over (partition by round) and score is not null""",
    ),
    "rounds": (
        "One row a round that has trained, with its cost and its result.",
        {
            **_ROUND_COLUMN,
            "num_steps": ("bigint", "Optimizer steps done."),
            "num_samples": ("bigint", "Samples trained on."),
            "num_tokens": ("bigint", "Predicted tokens trained on."),
            "train_loss": ("double", "Mean loss of the last tenth of the steps, nats per token."),
            "validation_loss": ("double", "Loss over all validation tokens after the last step, nats per token."),
        },
        """select s.round, s.num_steps, s.num_samples, s.num_tokens, s.train_loss, v.validation_loss
        from (
            select round, count(*) as num_steps, sum(num_samples)::bigint as num_samples,
                sum(num_tokens)::bigint as num_tokens, avg(loss) filter (step > 0.9 * last) as train_loss
            from (select *, max(step) over (partition by round) as last from steps) group by round
        ) s left join (
            select round, sum(loss * num_tokens) / sum(num_tokens) as validation_loss
            from (select *, max(step) over (partition by round) as last from validation)
            where step = last group by round
        ) v using (round) order by s.round""",
    ),
    "forgetting": (
        "Loss of each sample when it was trained on beside its loss after the round; unless scored in full (see "
        "budgets), they are not of the same tokens.",
        {
            **_ROUND_COLUMN,
            "step": ("integer", "Step that trained on the sample."),
            **_IDENTITY,
            "seen_loss": ("float", "Loss in the step that trained on the sample, nats per token."),
            "loss": ("float", "Loss under the model that the round ended with, nats per token."),
            "forgotten": ("float", "loss less seen_loss: above 0 where the model got worse at it."),
        },
        """select round, step, shard, sample, seen.loss as seen_loss, losses.loss as loss,
            losses.loss - seen.loss as forgotten
        from seen join losses using (round, shard, sample)""",
    ),
}


def refresh_ledger(run_folder: Path) -> Path:
    """Write `ledger.duckdb` anew, its views covering the files that exist now and those that will match, and return it.

    It is renamed into place, so whoever has the old one open reads on undisturbed.
    """
    run_folder = run_folder.resolve()
    path = run_folder / "ledger.duckdb"
    with writing(path) as temporary, writing_errors(path), duckdb.connect(str(temporary)) as connection:
        for name, view in VIEWS.items():
            _create(connection, name, view.comment, view.columns, _select(run_folder, view))
        for name, (comment, columns, sql) in DERIVED.items():
            _create(connection, name, comment, columns, sql)
    return path


def _select(run_folder: Path, view: View) -> str:
    if any(run_folder.glob(view.files)):
        return view.sql(literal(run_folder / view.files))
    empty = ", ".join(f"null::{kind} as {name}" for name, (kind, _) in view.columns.items())
    return f"select {empty} where false"


def _create(
    connection: duckdb.DuckDBPyConnection, name: str, comment: str, columns: dict[str, tuple[str, str]], sql: str
) -> None:
    connection.execute(f"create view {name} as {sql}")
    connection.execute(f"comment on view {name} is {literal(comment)}")
    for column, (kind, meaning) in columns.items():
        connection.execute(f"comment on column {name}.{column} is {literal(f'{meaning} ({kind})')}")


def query(run_folder: Path, sql: str) -> duckdb.DuckDBPyRelation:
    """Return the rows that `sql` selects from the run's ledger, opened read-only.

    Raises ValueError with DuckDB's message where the query is wrong.
    """
    connection = duckdb.connect(str(run_folder / "ledger.duckdb"), read_only=True)
    try:
        result = connection.sql(sql)
        if result is not None:
            # A query may be sound and still fail on the way, at a cast say.
            result = result.materialize()
    except duckdb.Error as error:
        raise ValueError(
            f'sql: {" ".join(str(error).split())}; `reprise sql RUN "show tables"` lists the views'
        ) from None
    if result is None:
        raise ValueError("sql: the query returns no rows; write a select")
    return result
