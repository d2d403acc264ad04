"""The paper's rows, as quoted: complete, with their averages, and counts of the questions that OpenCompass asks."""

import pytest

from data_scoring.evaluation.tasks import ABLATION, ABLATION_AVERAGE, AVERAGE, PAPER
from flows.evaluation.published import inheritance_rows, paper_rows
from flows.evaluation.results import columns_of
from flows.evaluation.results_table import Row

# Questions of the public sets, as OpenCompass reads them; an accuracy is a count of these.
ITEMS = {
    "boolq": 3270, "axb": 1104, "piqa": 1838, "eprstmt": 160, "c3": 1825,
    "arc_easy_opencompass": 567, "hellaswag_opencompass": 10_042,
}  # fmt: skip
# Printed figures that are no such count: docs/evaluation.md tells of them.
NO_COUNTS = {
    ("RWKV-5-1.5B", "axb"), ("PanGu-π-1.5B Pro", "piqa"), ("PanGu-π-1.5B Pro", "eprstmt"), ("PanGu-π-1.5B Pro", "c3"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "tasks", "average", "count"),
    [(paper_rows(), PAPER, AVERAGE, 13), (inheritance_rows(), ABLATION, ABLATION_AVERAGE, 5)],
    ids=["results", "inheritance"],
)
def test_rows_are_complete_and_every_average_is_the_mean_of_its_row(
    rows: list[Row], tasks: tuple[str, ...], average: str, count: int
) -> None:
    assert len({row.label for row in rows}) == len(rows) == count
    for row in rows:
        assert row.kind == "quoted" and not row.errors
        assert list(row.scores) == [*tasks, average]
        mean = sum(row.scores[task] for task in tasks) / len(tasks)
        # Both are printed with two digits.
        assert row.scores[average] == pytest.approx(mean, abs=0.0101), row.label


def test_accuracies_are_counts_of_questions_but_for_four() -> None:
    found = set()
    for row in [*paper_rows(), *inheritance_rows()]:
        for task, num_items in ITEMS.items():
            if task in row.scores:
                nearest = round(row.scores[task] / 100 * num_items) / num_items
                if row.scores[task] != pytest.approx(100 * nearest, abs=0.0051):
                    found.add((row.label, task))
    assert found == NO_COUNTS


def test_the_paper_s_own_figures_are_in_their_places() -> None:
    rows = {row.label: row.scores for row in [*paper_rows(), *inheritance_rows()]}
    # From the text: averages, and the best and the least strategy of inheritance.
    averages = {"PanGu-π-1B": 42.41, "PanGu-π-1B Pro": 51.28, "PanGu-π-1.5B Pro": 60.64, "Qwen-1.8B": 55.04}
    assert {label: rows[label][AVERAGE] for label in averages} == averages
    assert rows["Phi2-2.7B"]["mmlu"] == 58.49
    assert rows["inheritance: Learned"]["hellaswag_opencompass"] == 51.77
    assert max(rows, key=lambda label: rows[label].get(ABLATION_AVERAGE, 0)) == "inheritance: Learned"


def test_quoted_rows_add_only_the_average() -> None:
    own = Row("mine, round 1", {"piqa": 50.0, "hellaswag": 25.0}, {})
    assert [column.name for column in columns_of([own, *paper_rows()])] == ["piqa", AVERAGE, "hellaswag"]
    whole = Row("mine, round 2", dict.fromkeys(PAPER, 30.0), {})
    assert [column.name for column in columns_of([whole])] == [*PAPER]
