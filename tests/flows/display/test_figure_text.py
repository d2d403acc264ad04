"""Text in figures: no empty boxes, whatever fonts are installed, and labels of bounded length."""

import warnings

import duckdb
import matplotlib.pyplot as plt
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from flows.display.figure_text import find_fonts, make_readable
from flows.display.figures import render
from flows.report.curves import kept_by_source

NAMES = ["北京", "новости", "é", "हिन्दी", "plain", "\U00020000", "long-" * 30]


def draw() -> Figure:
    figure, axes = plt.subplots()
    axes.barh(NAMES, range(len(NAMES)), label=NAMES[0])
    axes.set_title(NAMES[3])
    axes.text(0, 0, NAMES[5])
    axes.legend()
    other = figure.add_axes((0.5, 0.5, 0.2, 0.2))
    other.set_xticks(range(len(NAMES)), NAMES)
    return figure


@pytest.mark.parametrize("has_other_fonts", [True, False])
def test_every_letter_has_a_glyph(has_other_fonts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_other_fonts:
        monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with warnings.catch_warnings():
        # matplotlib warns of glyphs that are missing.
        warnings.simplefilter("error")
        assert render(lambda _: draw(), duckdb.connect()) is not None


def test_a_font_is_chosen_by_what_it_has() -> None:
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    assert find_fonts("plain é я") == ([], frozenset())
    fonts, missing = find_fonts("я北")
    assert set(fonts) <= names
    # Matplotlib's font of last resort has boxes for all letters.
    assert not any("Last Resort" in font for font in fonts)
    assert (missing == {"北"}) == (fonts == [])


def test_labels_are_escaped_and_cut_where_no_font_has_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    figure = draw()
    make_readable(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == ["\\u5317\\u4eac", "новости", "é"]
    assert labels[4] == "plain"
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == labels
    assert labels[6] == "long-long-long-long-…ong-long-long-long-"
    plt.close(figure)


def test_a_picture_of_a_thousand_sources_can_be_drawn() -> None:
    ledger = duckdb.connect()
    ledger.sql(
        "create table samples as select 0 as shard, i as sample, 's' || (i // 2) as source from range(4000) t(i)"
    )
    ledger.sql(
        "create table selection as select 0 as shard, i as sample, 2 as round, i % 3 = 0 as kept from range(4000) t(i)"
    )
    png = render(kept_by_source(2), ledger)
    assert png is not None
    height = int.from_bytes(png[20:24], "big")
    assert height < 4000
