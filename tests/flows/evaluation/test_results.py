"""The paper's rows, as quoted, and the columns that a table shows."""

import pytest

from data_scoring.evaluation.tasks import AVERAGE, PAPER
from flows.evaluation.results import columns_of, paper_rows
from flows.evaluation.results_table import Row

# Averages that the paper's text gives (arXiv 2402.02791, sections 1 and 4).
AVERAGES = {"PanGu-π-1B": 42.41, "PanGu-π-1B Pro": 51.28, "PanGu-π-1.5B Pro": 60.64, "Qwen-1.8B": 55.04}
# Questions of the public sets that the paper asks, as OpenCompass reads them; each accuracy is a count of these.
ITEMS = {"boolq": 3270, "axb": 1104, "piqa": 1838, "eprstmt": 160, "c3": 1825}


def test_quoted_scores_have_the_published_averages_and_are_counts_of_questions() -> None:
    rows = {row.label: row for row in paper_rows()}
    assert {label: rows[label].scores[AVERAGE] for label in AVERAGES} == pytest.approx(AVERAGES, abs=0.0051)
    for row in rows.values():
        assert row.kind == "quoted" and not row.errors
        for task, num_items in ITEMS.items():
            if task in row.scores:
                nearest = round(row.scores[task] / 100 * num_items) / num_items
                assert row.scores[task] == pytest.approx(100 * nearest, abs=0.0051), (row.label, task)


def test_quoted_rows_bring_no_columns_but_the_average() -> None:
    own = Row("mine, round 1", {"piqa": 50.0, "hellaswag": 25.0}, {})
    assert [column.name for column in columns_of([own, *paper_rows()])] == ["piqa", AVERAGE, "hellaswag"]
    whole = Row("mine, round 2", dict.fromkeys(PAPER, 30.0), {})
    assert [column.name for column in columns_of([whole])] == [*PAPER]
