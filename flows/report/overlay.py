"""The overlay of several runs: their losses and their scores in tasks on one page, each from its ledger."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb

from data_scoring.base.files import checksum
from data_scoring.evaluation.tasks import Column
from data_scoring.ledger import open_ledger
from flows.display.figures import render_optional
from flows.display.result_page import Page, Picture, Section, write_page
from flows.evaluation.results import columns_of, read_other_columns, score_rows, shown
from flows.evaluation.results_table import column_title, table_cells
from flows.report.overlay_plots import Curves, read_curves, task_scores, training_losses, validation_losses
from flows.run.folder import Run

# Of the names of runs in the page's file name: how many, and how many bytes in all.
_MOST_NAMES, _MOST_BYTES = 4, 150
_PLOTS = {
    "training": (
        training_losses,
        "Training loss, a moving average over a thirtieth of a round's steps. Losses of the first tenth of the tokens "
        "may be above the figure.",
    ),
    "validation": (validation_losses, "Validation loss by source. Scales differ."),
    "scores": (
        task_scores,
        "Scores in tasks. The bands are standard errors, a dot is the end of a round, the dotted line the score of "
        "guessing.",
    ),
}


@dataclass(frozen=True)
class _Final:
    """The last results of a run so far.

    losses: validation loss (nats per token) and its number of tokens by source; scores: (task, score, standard error,
    chance), as tables show them; columns: of tasks that are not in the table of tasks; text: what identifies the
    tokenizer and the held-out text; None: there is no corpus yet.
    """

    run: Run
    label: str
    num_rounds: int
    num_steps: int
    num_tokens: int
    train_loss: float | None
    losses: dict[str, tuple[float, int]]
    scores: list[tuple[str, float, float | None, float | None]]
    columns: list[Column]
    text: tuple[str, str] | None

    @property
    def loss(self) -> float | None:
        """Return the validation loss over all tokens."""
        total = sum(count for _, count in self.losses.values())
        return sum(loss * count for loss, count in self.losses.values()) / total if total else None

    @property
    def bits_per_byte(self) -> float | None:
        """Return the validation loss in bits per byte over all held-out text, or None if its size is unknown."""
        if not self.losses or self.text is None:
            return None
        corpus = self.run.corpus()
        held_out = corpus.held_out_text
        if not self.losses.keys() <= held_out.keys():
            return None
        num_bytes = {source: held_out[source][1] for source in self.losses}
        bits = ((corpus.bits_per_byte(name, loss) or 0) * num_bytes[name] for name, (loss, _) in self.losses.items())
        return sum(bits) / sum(num_bytes.values())


def write_overlay(runs: Sequence[Run], output: Path | None = None) -> Page:
    """Write the overlay of `runs` to `output`, with Markdown and pictures named after it, and return the page.

    By default it is written beside the first run's folder, named after the runs. Nothing in a run's folder changes.
    Raises ValueError if a run is given twice, or if `output` is not the name of an HTML file.
    """
    if output is not None and output.suffix != ".html":
        raise ValueError(f"--output: {str(output)!r} does not end in .html; name an HTML file")
    labels = label_runs([run.folder for run in runs])
    finals, curves = [], []
    for run, label in zip(runs, labels, strict=True):
        with open_ledger(run.folder) as ledger:
            finals.append(_read_final(ledger, run, label))
            curves.append(read_curves(ledger, label))
    path = output or runs[0].folder.with_name(f"overlay-{_joined([run.folder.name for run in runs])}.html")
    made = [_runs(finals), _losses(finals), _scores(finals)]
    return write_page(
        path, " and ".join(labels), _notes(finals), [section for section in made if section.cells], _pictures(curves)
    )


def label_runs(folders: Sequence[Path]) -> list[str]:
    """Return a distinct label for each run folder: its name, after those of its parents as far as needed.

    Raises ValueError if a folder is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    labels = []
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            first = folders[resolved.index(folder)]
            raise ValueError(f"{folders[number]}: the same run as {first}; give each run once")
        depth = 1
        while sum(other.parts[-depth:] == folder.parts[-depth:] for other in resolved if other != folder):
            depth += 1
        # In a table of Markdown these would end a cell, or begin emphasis.
        labels.append(" ".join("/".join(folder.parts[-depth:]).split()).replace("|", "¦").replace("*", "∗"))
    return labels


def _joined(names: Sequence[str]) -> str:
    """Return the names of runs as part of a file's name, to which Markdown can link."""
    more = len(names) - _MOST_NAMES
    kept = [re.sub(r"[^\w.-]+", "-", name) for name in names[:_MOST_NAMES]]
    text = "-".join([*kept, *([f"{more}-more"] if more > 0 else [])])
    return text.encode()[:_MOST_BYTES].decode(errors="ignore")


def _read_final(ledger: duckdb.DuckDBPyConnection, run: Run, label: str) -> _Final:
    [(num_rounds, num_steps, num_tokens, train_loss)] = ledger.sql(
        """select count(*), coalesce(sum(num_steps), 0)::bigint, coalesce(sum(num_tokens), 0)::bigint,
            arg_max(train_loss, round) from rounds"""
    ).fetchall()
    losses = ledger.sql(
        """select source, loss, num_tokens from validation
        qualify (round, step) = max((round, step)) over () order by source"""
    ).fetchall()
    scores = ledger.sql(
        f"""select task, {shown("score")}, {shown("stderr")}, 100 * chance from final_scores
        qualify round = max(round) over (partition by task)"""
    ).fetchall()
    text = None
    if run.record_path("prepare", 0).exists():
        corpus = run.corpus()
        held_out = [part["checksums"] for part in corpus.manifest["validation"]["parts"]]
        text = (checksum(corpus.tokenizer_path), str([corpus.manifest["validation"]["sources"], held_out]))
    by_source = {source: (loss, count) for source, loss, count in losses}
    columns = read_other_columns(ledger)
    return _Final(run, label, num_rounds, num_steps, num_tokens, train_loss, by_source, scores, columns, text)


def _notes(finals: Sequence[_Final]) -> list[str]:
    notes = ["Against the tokens that each run has trained on, over all its rounds."]
    texts = [final.text for final in finals if final.text is not None]
    if len({tokenizer for tokenizer, _ in texts}) > 1:
        notes.append(
            "The runs have different tokenizers, so their losses per token are not comparable. Bits per byte are, "
            "where the held-out text is the same."
        )
    elif len(set(texts)) > 1:
        notes.append("The runs hold out different text: differences of their validation losses include that.")
    waiting = [final.label for final in finals if not final.num_steps]
    if waiting:
        notes.append(f"Without a training step so far: {', '.join(waiting)}.")
    return notes


def _pictures(curves: Sequence[Curves]) -> list[Picture]:
    drawn = [(name, render_optional(partial(draw, curves)), caption) for name, (draw, caption) in _PLOTS.items()]
    return [Picture(name, png, caption) for name, png, caption in drawn if png is not None]


def _runs(finals: Sequence[_Final]) -> Section:
    cells = [
        [
            final.label, f"{final.num_rounds} of {final.run.config.rounds.num_rounds}", f"{final.num_steps:,}",
            f"{final.num_tokens:,}", _number(final.train_loss), _number(final.loss), _number(final.bits_per_byte),
        ]
        for final in finals
    ]  # fmt: skip
    notes = [
        "As of the last step. Training loss is the mean of the last tenth of a round's steps, validation loss over "
        "all validation tokens; in nats per token, and in bits per byte of the held-out text."
    ]
    head = ["run", "rounds", "steps", "tokens", "training loss", "validation loss", "bits per byte"]
    return Section("Runs", notes, head, cells)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _losses(finals: Sequence[_Final]) -> Section:
    measured = [final for final in finals if final.losses]
    sources = list(dict.fromkeys(source for final in measured for source in final.losses))
    cells = [
        [source, *(_number(final.losses[source][0] if source in final.losses else None) for final in measured)]
        for source in sources
    ]
    return Section(
        "Validation loss by source", ["Nats per token."], ["source", *(final.label for final in measured)], cells
    )


def _scores(finals: Sequence[_Final]) -> Section:
    found = [(final.label, *entry) for final in finals for entry in final.scores]
    if not found:
        return Section("Scores in tasks", [])
    rows = score_rows(found)
    others = {column.name: column for final in finals for column in final.columns}
    columns = columns_of(rows, [*others.values()])
    notes = [
        "Percent, unless a column names a metric of another scale; after the last round that was evaluated. "
        "The best of a column is bold; ↓: lower is better."
    ]
    return Section("Scores in tasks", notes, ["run", *map(column_title, columns)], table_cells(rows, columns))
