"""The table in all its forms: places, averages, quoting, escaping."""

import pytest

from data_scoring.evaluation.tasks import AVERAGE, Column
from flows.evaluation.results_table import Row, rank, render_table, with_average

COLUMNS = [
    Column("mmlu", "MMLU", "Examination"),
    Column("ceval", "C-Eval", "Examination"),
    Column("boolq", "BoolQ", "Knowledge"),
    Column(AVERAGE, "Average", ""),
]
TASKS = ["mmlu", "ceval", "boolq"]
ROWS = [
    with_average(Row("chance", {"mmlu": 25, "ceval": 25, "boolq": 50}, {}, "chance"), TASKS),
    with_average(
        Row("a_1 & b, round 1", {"mmlu": 26.04, "ceval": 30, "boolq": 61}, {"mmlu": 3, "ceval": 4, "boolq": 0}), TASKS
    ),
    Row("<b>, round 2", {"mmlu": 26.01, "ceval": 31}, {"mmlu": 1.26}),
    Row("PanGu-π", {"boolq": 55.25, AVERAGE: 60.64}, {}, "quoted"),
]


def test_the_average_is_of_all_tasks_or_not_there() -> None:
    assert ROWS[1].scores[AVERAGE] == pytest.approx((26.04 + 30 + 61) / 3)
    # Independent errors add up in squares: 3² + 4² = 5².
    assert ROWS[1].errors[AVERAGE] == pytest.approx(5 / 3)
    assert AVERAGE not in with_average(ROWS[2], TASKS).scores
    assert with_average(ROWS[3], ["boolq"]).scores[AVERAGE] == 60.64


def test_places_are_of_what_is_shown_and_chance_has_none() -> None:
    # Both are shown as 26.0, so that nobody is second.
    assert rank(ROWS, COLUMNS[0]) == {1: "best", 2: "best"}
    assert rank(ROWS, COLUMNS[1]) == {2: "best", 1: "second"}
    assert rank(ROWS, COLUMNS[2]) == {1: "best", 3: "second"}
    assert rank(ROWS[:2], COLUMNS[0]) == {}


def test_markdown_marks_the_best_bold_and_the_second_underlined() -> None:
    lines = render_table(ROWS, COLUMNS, "markdown").splitlines()
    assert lines[0] == "| model | Examination: MMLU | Examination: C-Eval | Knowledge: BoolQ | Average |"
    assert lines[2] == "| chance | 25.0 | 25.0 | 50.0 | 33.3 |"
    assert (
        lines[3]
        == r"| a\_1 &amp; b, round 1 | **26.0** ± 3.0 | <u>30.0</u> ± 4.0 | **61.0** ± 0.0 | <u>39.0</u> ± 1.7 |"
    )
    assert lines[4] == "| &lt;b&gt;, round 2 | **26.0** ± 1.3 | **31.0** | – | – |"
    assert lines[5] == "| PanGu-π (quoted) | – | – | <u>55.2</u> | **60.6** |"


def test_a_terminal_has_groups_over_their_columns_and_no_codes_where_there_is_no_terminal() -> None:
    lines = render_table(ROWS, COLUMNS, "terminal").splitlines()
    assert lines[0].split() == ["Examination", "Knowledge"]
    assert lines[1].split() == ["model", "MMLU", "C-Eval", "BoolQ", "Average"]
    assert lines[3].split("round 1")[1].split() == ["26.0", "±3.0", "30.0", "±4.0", "61.0", "±0.0", "39.0", "±1.7"]
    assert "\x1b" not in "".join(lines)


def test_html_and_latex_escape_names() -> None:
    page = render_table(ROWS, COLUMNS, "html")
    assert "<td>&lt;b&gt;, round 2</td><td><b>26.0</b> ± 1.3</td>" in page
    assert '<th colspan="2" style="text-align:center">Examination</th>' in page
    lines = render_table(ROWS, COLUMNS, "latex").splitlines()
    assert lines[2] == r" & \multicolumn{2}{c}{Examination} & \multicolumn{1}{c}{Knowledge} & \multicolumn{1}{c}{} \\"
    assert lines[6].startswith(r"a\_1 \& b, round 1 & \textbf{26.0}\,$\pm$\,3.0 & \underline{30.0}")
    assert lines[8] == r"PanGu-$\pi$ (quoted) & -- & -- & \underline{55.2} & \textbf{60.6} \\"


def test_of_perplexities_the_lowest_is_best_and_none_is_percent() -> None:
    columns = [COLUMNS[0], Column("wiki", "wiki (word_perplexity)", "Other", is_share=False, higher_is_better=False)]
    rows = [
        Row("chance", {"mmlu": 25}, {}, "chance"),
        *(Row(name, {"wiki": value}, {}) for name, value in (("a", 1234.5678), ("b", 12.3454), ("c", 12.3456))),
    ]
    assert rank(rows, columns[1]) == {2: "best", 3: "second"}
    lines = render_table(rows, columns, "markdown").splitlines()
    assert lines[0] == "| model | Examination: MMLU | Other: wiki (word\\_perplexity) ↓ |"
    assert [line.rsplit("|", 2)[1].strip() for line in lines[2:6]] == ["–", "1234.568", "**12.345**", "<u>12.346</u>"]
    assert "Not in percent: wiki (word_perplexity); ↓: lower is better." in lines[-1]
    assert r"$\downarrow$" in render_table(rows, columns, "latex")
    assert "Not in percent" not in render_table(ROWS, COLUMNS, "html")
