"""Samples of a run with their text, their fate and where they come from: the hardest, the easiest and others.

In SQL, `query` reads the same from the ledger; from a notebook, both take the run folder's path.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from data_scoring.base.messages import one_line, shown
from data_scoring.base.sql import literal
from data_scoring.corpus.documents import Origin
from data_scoring.corpus.sample_texts import SampleTexts
from data_scoring.ledger import open_ledger
from data_scoring.refine.candidates import EXCLUSIONS
from data_scoring.sandboxed_query import SECONDS, ask
from flows.run.folder import Run, read_run

KEPT, DROPPED, PUT_ASIDE = "kept", "dropped", "put aside"


class _Order(NamedTuple):
    """Samples that can be asked for: a title, a condition, and the order, in SQL."""

    title: str
    condition: str
    order: str


# The title's {} are the rounds that scored and that selected the samples.
ORDERS = {
    "hardest": _Order("The hardest samples after round {0}", "loss is not null", "loss desc"),
    "easiest": _Order("The easiest samples after round {0}", "loss is not null", "loss"),
    "dropped": _Order("Samples that round {1} dropped, the easiest first", f"fate = '{DROPPED}'", "loss"),
    "forgotten": _Order("Samples that round {0} forgot most", "forgotten > 0", "forgotten desc"),
    "typical": _Order("Typical samples after round {0}: those nearest their source's median loss", "loss is not null",
                      "place, source"),
    "all": _Order("Samples after round {0}", "true", "shard"),
}  # fmt: skip
_KNOWN = ("shard", "sample", "source", "num_tokens", "loss", "seen_loss", "forgotten", "fate", "reason")
# What conditions can name.
COLUMNS = (*_KNOWN, "text", "file", "document", "first_token", "num_documents")


@dataclass(frozen=True)
class Sample:
    """A sample with its text.

    loss: that after the round, nats per token; seen_loss: that in the step that trained on it; forgotten: the
    difference. fate: kept, dropped or put aside for the next round, and the reason. What is unknown is None.
    """

    shard: int
    sample: int
    source: str
    num_tokens: int
    loss: float | None
    seen_loss: float | None
    forgotten: float | None
    fate: str | None
    reason: str | None
    text: str
    origin: Origin | None

    @property
    def summary(self) -> str:
        """Return losses, fate, source and identity on one line."""
        losses = {"loss": self.loss, "when trained on": self.seen_loss, "forgotten": self.forgotten}
        numbers = [f"{name} {value:.3f}" for name, value in losses.items() if value is not None]
        identity = f"shard {self.shard} sample {self.sample}, {self.num_tokens:,} tokens"
        return "  ".join(filter(None, [", ".join(numbers), self.decision, self.source, identity]))

    @property
    def place(self) -> str:
        """Return file, document and number of other documents as text; empty if they are unknown."""
        return place_of(self.origin)

    @property
    def decision(self) -> str:
        """Return fate and reason as text; empty before a selection."""
        return "" if self.fate is None else f"{self.fate} ({self.reason})"


@dataclass(frozen=True)
class Samples:
    """Samples that were found, with a title.

    scored_round: the round after which losses were measured; None if there is none. has_origins: whether the corpus
    says where samples come from.
    """

    title: str
    scored_round: int | None
    samples: list[Sample]
    has_origins: bool


def place_of(origin: Origin | None) -> str:
    """Return file, document and number of other documents as text; empty if they are unknown."""
    if origin is None:
        return ""
    others = origin.num_documents - 1
    more = f", and {others:,} more document{'' if others == 1 else 's'}" if others else ""
    return f"{origin.file} document {origin.document:,} from token {origin.first_token:,}{more}"


def texts_of(run: Run) -> SampleTexts:
    """Return the texts of a run's samples."""
    return SampleTexts(run.corpus_folder, run.config.seed, run.config.tokenizer.end_of_document)


def query(
    run_folder: Path | str, sql: str, seconds: float = SECONDS, is_restricted: bool = True
) -> duckdb.DuckDBPyRelation:
    """Return the rows that `sql` selects from a run's ledger, in which sample_text, sample_origin and sample_texts are.

    Raises ValueError as `ask` does.
    """
    run = read_run(Path(run_folder))
    return ask(run.folder, sql, seconds, is_restricted, texts_of(run).register)


def find_samples(
    run_folder: Path | str,
    order: str = "hardest",
    count: int = 20,
    *,
    where: str | None = None,
    source: str | None = None,
    scored_round: int | None = None,
) -> Samples:
    """Return at most `count` samples in one of `ORDERS`, with their texts.

    where: a DuckDB condition over `COLUMNS`; source: only its samples; scored_round: the round after which losses were
    measured, by default the last one from which a round was selected, or else the last one that was scored. Raises
    ValueError if there is no such order, source or round, or the condition is wrong.
    """
    if order not in ORDERS:
        raise ValueError(f"order: {shown(order)} is none of {', '.join(ORDERS)}; give one of these")
    if count < 1:
        raise ValueError(f"count: {count} is not above 0; give a number of at least 1")
    run = read_run(Path(run_folder))
    texts = texts_of(run)
    names = [entry["name"] for entry in texts.corpus.manifest["sources"]]
    if source is not None and source not in names:
        raise ValueError(f"source: {shown(source)} is none of the run's sources: {', '.join(names)}")
    scored = _scored_round(run, order, scored_round)
    sql = _query(order, count, scored, where, source)
    try:
        rows = ask(run.folder, sql, math.inf, register=texts.register).fetchall()
    except ValueError as error:
        if where is None:
            raise
        reason = str(error).removeprefix("sql: ").partition("; `reprise sql")[0].partition(" LINE ")[0]
        raise ValueError(
            f"where: {shown(where)}: {reason}; give a DuckDB condition over the columns {', '.join(COLUMNS)}"
        ) from None
    title = ORDERS[order].title.format(scored, scored + 1) if scored else "Samples"
    return Samples(title, scored or None, _with_texts(texts, rows), texts.has_origins)


def _with_texts(texts: SampleTexts, rows: list[tuple[Any, ...]]) -> list[Sample]:
    """Return the samples of `rows`, which have the columns of `COLUMNS` before the text, with text and origin."""
    places = [row[0] for row in rows], [row[1] for row in rows]
    return [
        Sample(**dict(zip(_KNOWN, row, strict=True)), text=text, origin=origin)
        for row, text, origin in zip(rows, texts.texts(*places), texts.origins(*places), strict=True)
    ]


def _known(scored: int) -> str:
    """Return the SQL of all samples with what is known after round `scored`: `COLUMNS` before the text."""
    aside = ", ".join(map(literal, EXCLUSIONS))
    return f"""select samples.*, coalesce(l.loss, d.loss) as loss, f.seen_loss, f.forgotten,
            case when d.kept then '{KEPT}' when d.reason::varchar in ({aside}) then '{PUT_ASIDE}'
                when not d.kept then '{DROPPED}' end as fate,
            d.reason::varchar as reason
        from samples left join (from losses where round = {scored}) l using (shard, sample)
        left join (from selection where round = {scored + 1}) d using (shard, sample)
        left join (from forgetting where round = {scored}) f using (shard, sample)"""


def _query(order: str, count: int, scored: int, where: str | None, source: str | None) -> str:
    # A condition may end in a comment.
    conditions = [ORDERS[order].condition, *([] if where is None else [f"{where}\n"])]
    if source is not None:
        conditions.append(f"source = {literal(source)}")
    every = f"""select * exclude (origin), origin.* from (
        select *, sample_text(shard, sample) as text, sample_origin(shard, sample) as origin from ({_known(scored)}))"""
    rows = f"select * from ({every}) where {' and '.join(f'({each})' for each in conditions)}"
    if order == "typical":
        rows = f"""select *, row_number() over (partition by source order by distance, shard, sample) as place from (
            select *, abs(loss - median(loss) over (partition by source)) as distance from ({rows}))"""
    return f"select {', '.join(_KNOWN)} from ({rows}) order by {ORDERS[order].order}, shard, sample limit {count}"


def _scored_round(run: Run, order: str, wanted: int | None) -> int:
    """Return the round after which samples are looked at. Raises ValueError if it has not what `order` needs."""
    with open_ledger(run.folder) as ledger:
        scored, selected = (
            [number for (number,) in ledger.sql(f"select distinct {column} from {view} order by all").fetchall()]
            for column, view in (("round", "losses"), ("round - 1", "selection"))
        )
        budgets = dict(ledger.sql("select round, candidate from budgets where chosen").fetchall())
    known = sorted({*scored, *selected})
    if wanted is not None and wanted not in known:
        rounds = f"give one of {', '.join(map(str, known))}" if known else "score round 1 first"
        raise ValueError(f"round {wanted} was not scored; {rounds}")
    if order != "all" and not known:
        raise ValueError(f"{run.folder}: no round has been scored yet; a condition alone shows samples without losses")
    number = wanted if wanted is not None else (selected or scored or [0])[-1]
    if order == "dropped" and number not in selected:
        raise ValueError(f"dropped: nothing was selected after round {number} yet; give another round, or refine")
    if order in ("hardest", "easiest", "typical") and number not in scored:
        raise ValueError(f"{order}: round {number} was not scored; give another round, or score it")
    if order == "forgotten":
        budget = budgets.get(number, "full")
        if number not in scored or budget != "full":
            how = f"scored by {one_line(budget)}, not in full" if number in scored else "not scored"
            raise ValueError(f"forgotten: round {number} was {how}; give a round that was")
    return number
