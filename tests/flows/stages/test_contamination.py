"""Contamination as a stage of a run: what is left out of which round, what the report says, what goes on."""

import json
import random
from pathlib import Path
from typing import Any

import duckdb
import pytest

from data_scoring.base.engine import LocalEngine
from data_scoring.base.progress import silent
from data_scoring.evaluation.items import ItemText
from data_scoring.sandboxed_query import ask
from flows.report.contamination_section import contamination
from flows.report.run_report import write_report
from flows.run.config import RunConfig, differences, parse_config
from flows.run.folder import Run, open_run
from flows.stages.contamination import list_contaminated
from flows.stages.refine import preview
from flows.stages.stage_order import complete
from tests.conftest import make_documents
from tests.evaluation_data import write_items
from tests.flows.fakes import FakeRanks, values

PLANTED = " ".join(f"planted{n}" for n in range(30))
ITEMS = [
    ItemText("boolq", "boolq.jsonl:1", PLANTED.title()),
    ItemText("boolq", "boolq.jsonl:2", "what no text has, " * 9),
    ItemText("c3", "c3.jsonl:1", "short"),
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; two documents of the second hold an item."""
    folder = tmp_path_factory.mktemp("texts")
    write_items(folder / "items")
    for name, seed in (("a", 1), ("b", 2)):
        documents = make_documents(40, seed)
        if name == "b":
            documents[5] += PLANTED
            documents += [PLANTED]
        random.Random(seed).shuffle(documents)
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return folder


def config_of(texts: Path, output: Path, **sections: Any) -> RunConfig:
    asked = {"tasks": ["piqa"], "data": str(texts / "items")}
    said = sections.pop("eval", {"contamination": "remove"})
    return parse_config({**values(texts, output), "eval": {**asked, **said}, **sections}, "test")


def run_rounds(run: Run, items: list[ItemText] = ITEMS) -> list[str]:
    """Go through the stages of two rounds, and return those that had anything to do."""
    done = {
        "prepare": complete(run, "prepare", 0, silent),
        "contamination": run.config.eval.contamination != "off"
        and list_contaminated(run, items, LocalEngine(1), silent),
        "mix 1": complete(run, "mix", 1, silent),
        "train 1": complete(run, "train", 1, silent),
        "score 1": complete(run, "score", 1, silent),
        "refine 2": complete(run, "refine", 2, silent),
        "mix 2": complete(run, "mix", 2, silent),
    }
    return [stage for stage, is_done in done.items() if is_done]


def section(run: Run) -> str:
    """Return what the report says of contamination."""
    with duckdb.connect(str(run.folder / "ledger.duckdb"), read_only=True) as ledger:
        return "\n".join(contamination(run, ledger))


def test_what_is_removed_is_in_no_round_and_the_report_says_so(texts: Path, tmp_path: Path, fakes: FakeRanks) -> None:
    run = open_run(config_of(texts, tmp_path))
    complete(run, "prepare", 0, silent)
    with pytest.raises(ValueError, match=r"eval\.contamination: remove needs the list .* run `reprise run"):
        complete(run, "mix", 1, silent)
    assert run_rounds(run) == ["contamination", "mix 1", "train 1", "score 1", "refine 2", "mix 2"]
    contaminated = set(ask(run.folder, "select distinct shard, sample from contamination").fetchall())
    assert len(contaminated) > 4
    assert ask(run.folder, "select distinct task, item, source from contamination").fetchall() == [
        ("boolq", "boolq.jsonl:1", "b")
    ]
    assert ask(run.folder, "select * from contaminated_items order by task, item").fetchall() == [
        ("boolq", "boolq.jsonl:1", 18, 18, 0, 1.0, False),
        ("boolq", "boolq.jsonl:2", 4, 0, 0, 0.0, False),
        ("c3", "c3.jsonl:1", 0, 0, 0, None, True),
    ]
    everything = set(ask(run.folder, "select shard, sample from samples").fetchall())
    mixes = {n: set(ask(run.folder, f"select shard, sample from mix where round = {n}").fetchall()) for n in (1, 2)}
    assert mixes[1] == everything - contaminated
    assert not mixes[2] & contaminated
    marked = ask(run.folder, "select shard, sample from selection where reason = 'contaminated' and not kept")
    assert set(marked.fetchall()) == contaminated
    assert ("contaminated", False, len(contaminated)) in preview(run, 2).reasons
    page = write_report(run).read_text()
    assert "1 of 3 evaluation items share 13 words" in page
    assert f"The {len(contaminated)} samples that hold them, of {len(everything)}, are left out of every round" in page
    excerpts = [" ".join(f"planted{n}" for n in range(first, first + 13)) for first in range(18)]
    assert any(f">{excerpt}</table>" in page for excerpt in excerpts)
    # The same again does nothing; neither do more items that overlap with nothing.
    assert run_rounds(run) == []
    assert run_rounds(run, [*ITEMS, ItemText("c3", "c3.jsonl:2", "nowhere to be found " * 5)]) == ["contamination"]
    # Without the item, its samples are there to be trained on, by whoever gives up what was trained without them.
    with pytest.raises(ValueError, match=r"trained with another configuration, corpus, mix .*delete"):
        run_rounds(run, ITEMS[1:])
    run.record_path("train", 1).unlink()
    assert run_rounds(run, ITEMS[1:])[:1] == ["train 1"]
    assert set(ask(run.folder, "select shard, sample from mix where round = 1").fetchall()) == everything
    assert "None of 2 evaluation items shares 13 words" in section(run)


def test_a_report_leaves_a_run_as_it_is(texts: Path, tmp_path: Path, fakes: FakeRanks) -> None:
    off = open_run(config_of(texts, tmp_path, eval={}))
    assert run_rounds(off) == ["prepare", "mix 1", "train 1", "score 1", "refine 2", "mix 2"]
    assert section(off) == ""
    report = open_run(config_of(texts, tmp_path, eval={"contamination": "report"}))
    assert run_rounds(report) == ["contamination"]
    assert "are trained on like all others (eval.contamination)" in section(report)
    assert section(off) == ""
    with pytest.raises(
        ValueError, match=r"created by another configuration .*eval\.contamination: 'report' there, 'remove'"
    ):
        open_run(config_of(texts, tmp_path))


def test_evaluation_decides_what_is_trained_only_where_it_removes(texts: Path, tmp_path: Path) -> None:
    plain, report, remove, shorter = (
        config_of(texts, tmp_path, eval=fields)
        for fields in (
            {}, {"contamination": "report", "contamination_ngram": 8}, {"contamination": "remove"},
            {"contamination": "remove", "contamination_ngram": 8},
        )
    )  # fmt: skip
    assert differences(plain, report) == []
    assert differences(remove, shorter) == ["eval.contamination_ngram: 13 there, 8 here"]
    unnamed = [config.model_copy(update={"name": None}).run_name for config in (plain, report, remove, shorter)]
    assert unnamed[0] == unnamed[1]
    assert len(set(unnamed)) == 3
    with pytest.raises(
        ValueError, match=r"score\.budget: 'seen' has no losses for samples that eval\.contamination: remove"
    ):
        config_of(texts, tmp_path, score={"budget": "seen"})
    with pytest.raises(ValueError, match=r"eval\.contamination_ngram: input should be greater than or equal to 5"):
        config_of(texts, tmp_path, eval={"contamination_ngram": 4})
