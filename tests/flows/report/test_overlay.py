"""Several runs on one page: what each has so far, told apart, against independent sums over their files."""

import json
import os
import shutil
from pathlib import Path
from re import fullmatch

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_scoring.ledger import open_ledger
from flows.cli.main import main
from flows.display.figures import legend_label, line_style, smooth
from flows.report.overlay import label_runs
from flows.report.overlay_plots import read_curves, task_scores, training_losses, validation_losses
from flows.run.config import parse_config
from flows.run.folder import open_run
from tests.conftest import MakeOnce
from tests.flows.fakes import values, write_texts
from tests.flows.stages.test_verification import STOPS, make_runs

# A finished run, one after its first round, and one without a step.
_, FIRST_ROUND, WHOLE = STOPS


@pytest.fixture
def runs(make_once: MakeOnce, tmp_path: Path) -> Path:
    """A folder of runs: whole, short, old (of a version that did not record the held-out bytes) and begun."""
    made, folder = make_once("verified", make_runs), tmp_path / "runs"
    for name, stop in (("whole", WHOLE), ("short", FIRST_ROUND), ("old", FIRST_ROUND)):
        shutil.copytree(made / stop, folder / name, copy_function=os.link)
    manifest = folder / "old" / "corpus" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["validation_bytes"], content["record_checksum"]
    manifest.unlink()
    manifest.write_text(json.dumps(content))
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    open_run(parse_config({**values(tmp_path / "texts", folder), "name": "begun"}, "test"))
    return folder


def add_scores(run: Path, points: dict[int, float], number: int = 1, task: str = "hellaswag") -> None:
    """Write scores in a task, 0 to 1, after steps of a round; the last is that of the round's end."""
    for step, score in points.items():
        row = {
            "is_end": step == max(points), "task": task, "subject": None, "metric": "acc_norm", "score": score,
            "stderr": 0.01, "chance": 0.25, "num_items": 100, "num_unscorable": 0, "num_fewshot": 0, "num_shortened": 0,
        }  # fmt: skip
        path = run / "rounds" / str(number) / "evaluation" / f"step-{step:08d}" / "scores" / f"{task}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({key: pa.array([value], pa.string() if value is None else None)
                                 for key, value in row.items()}), path)  # fmt: skip


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_runs_in_all_states_are_on_one_page(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[Path, int]:
        # Locks are linked to those of runs that other processes' tests use.
        written = (".verified.json", ".lock", ".ledger.lock")
        inside = (path for path in runs.glob("*/**/*") if path.is_file() and path.name not in written)
        return {path: path.stat().st_mtime_ns for path in inside}

    add_scores(runs / "whole", {3: 0.3, 9: 0.4})
    add_scores(runs / "short", {9: 0.35})
    before = files()
    monkeypatch.chdir(runs)
    assert main(["report", "whole", "short", "old", "begun"]) == 0
    assert files() == before
    page = runs / "overlay-whole-short-old-begun.html"
    text = page.with_suffix(".md").read_text()
    assert text.split("\n\n![")[0] in capsys.readouterr().out
    assert page.read_text().count("data:image/png;base64,") == 3
    for name in ("training", "validation", "scores"):
        assert (runs / f"overlay-whole-short-old-begun-{name}.png").stat().st_size > 5000
    steps = [pq.read_table(runs / "whole" / "rounds" / number / "steps.parquet") for number in "12"]
    num_tokens = sum(table["num_tokens"].to_numpy().sum() for table in steps)
    # The last losses of the fake ranks, over 300 and 100 tokens: 4.5 of a, 2.5 of b.
    corpus = json.loads((runs / "whole" / "corpus" / "manifest.json").read_text())
    bits = sum(
        loss / np.log(2) * source["validation_tokens"]
        for source, loss in zip(corpus["sources"], (4.5, 2.5), strict=True)
    ) / sum(corpus["validation_bytes"].values())
    whole = cells(text, "whole")
    assert whole[:3] == ["2 of 2", str(sum(map(len, steps))), f"{num_tokens:,}"]
    assert whole[4:] == ["4.0000", f"{bits:.4f}"]
    assert cells(text, "short")[0] == "1 of 2" and cells(text, "short")[4:] == ["4.0000", f"{bits:.4f}"]
    assert cells(text, "old")[4:] == ["4.0000", "–"]
    assert cells(text, "begun") == ["0 of 2", "0", "0", "–", "–", "–"]
    assert cells(text, "a") == ["4.5000"] * 3
    assert "Without a training step so far: begun." in text
    scores = text.split("## Scores in tasks")[1]
    assert cells(scores, "whole") == ["**40.0** ± 1.0"] and cells(scores, "short") == ["35.0 ± 1.0"]


def test_curves_are_the_runs_own(runs: Path) -> None:
    add_scores(runs / "whole", {3: 0.3, 9: 0.4})
    curves = []
    for name in ("whole", "short", "begun"):
        with open_ledger(runs / name) as ledger:
            curves.append(read_curves(ledger, name))
    training = training_losses(curves)
    assert training is not None
    # Two rounds of one run, one of the other.
    lines = training.axes[0].get_lines()
    assert [line.get_color() for line in lines] == [line_style(number)["color"] for number in (0, 0, 1)]
    first, second = (pq.read_table(runs / "whole" / "rounds" / n / "steps.parquet").to_pydict() for n in "12")
    places = (sum(first["num_tokens"]) + np.cumsum(second["num_tokens"])) / 1e6
    expected = smooth(places, np.asarray(second["loss"]))
    np.testing.assert_allclose(lines[1].get_xdata(), expected[0])
    np.testing.assert_allclose(lines[1].get_ydata(), expected[1], rtol=1e-6)
    assert [text.get_text() for text in training.axes[0].get_legend().get_texts()] == ["whole", "short"]
    validation = validation_losses(curves)
    assert validation is not None
    assert [axes.get_title() for axes in validation.axes] == ["a", "b"]
    [whole, short] = validation.axes[0].get_lines()
    assert whole.get_ydata().tolist()[-1] == short.get_ydata().tolist()[-1] == 4.5
    assert (len(whole.get_ydata()), len(short.get_ydata())) == (4, 2)
    scores = task_scores(curves)
    assert scores is not None
    np.testing.assert_allclose(scores.axes[0].get_lines()[0].get_ydata(), [30, 40])
    seen = np.cumsum(first["num_tokens"])
    np.testing.assert_allclose(scores.axes[0].get_lines()[0].get_xdata(), [seen[2] / 1e6, seen[8] / 1e6])
    assert training_losses(curves[2:]) is validation_losses(curves[2:]) is task_scores(curves[2:]) is None
    plt.close("all")


def test_scores_of_two_runs_over_all_rounds_are_in_one_figure(runs: Path) -> None:
    """As in the paper's figure of HellaSwag: a model trained in rounds, and one trained on everything again."""
    shutil.copytree(runs / "whole", runs / "other")
    points = {
        ("whole", "hellaswag"): {1: {3: 0.30, 9: 0.40}, 2: {2: 0.45, 4: 0.50}},
        ("other", "hellaswag"): {1: {3: 0.28, 9: 0.35}, 2: {4: 0.42}},
        ("whole", "piqa"): {1: {9: 0.60}, 2: {4: 0.70}},
        ("other", "piqa"): {1: {9: 0.55}, 2: {4: 0.65}},
    }
    for (run, task), rounds in points.items():
        for number, scores in rounds.items():
            add_scores(runs / run, scores, number, task)
    curves = []
    for name in ("whole", "other"):
        with open_ledger(runs / name) as ledger:
            curves.append(read_curves(ledger, name))
    figure = task_scores(curves)
    assert figure is not None
    steps = [pq.read_table(runs / "whole" / "rounds" / n / "steps.parquet")["num_tokens"].to_numpy() for n in "12"]
    seen = {1: np.cumsum(steps[0]), 2: steps[0].sum() + np.cumsum(steps[1])}
    axes_of = {axes.get_title(): axes for axes in figure.axes}
    assert [*axes_of] == ["PIQA", "HellaSwag"]
    for (run, task), rounds in points.items():
        axes = axes_of[{"hellaswag": "HellaSwag", "piqa": "PIQA"}[task]]
        [line] = [line for line in axes.get_lines() if line.get_label() == run]
        assert line.get_color() == line_style(["whole", "other"].index(run))["color"]
        places = [seen[number][step - 1] / 1e6 for number, scores in rounds.items() for step in scores]
        np.testing.assert_allclose(line.get_xdata(), places)
        np.testing.assert_allclose(line.get_ydata(), [100 * s for scores in rounds.values() for s in scores.values()])
        # A dot at the end of each round.
        dots = [each for each in axes.get_lines() if each.get_marker() == "o" and each.get_color() == line.get_color()]
        np.testing.assert_allclose(dots[0].get_xdata(), [seen[1][8] / 1e6, seen[2][3] / 1e6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["whole", "other"]
    plt.close("all")
    # On the page it is one picture, and the table has the last scores of both.
    assert main(["report", str(runs / "whole"), str(runs / "other")]) == 0
    page = runs / "overlay-whole-other.html"
    assert "Scores in tasks" in page.read_text() and (runs / "overlay-whole-other-scores.png").exists()
    scores = page.with_suffix(".md").read_text().split("## Scores in tasks")[1]
    assert cells(scores, "whole")[::2] == ["**70.0** ± 1.0", "**50.0** ± 1.0"]
    assert cells(scores, "other")[::2] == ["65.0 ± 1.0", "42.0 ± 1.0"]


def test_different_text_is_said(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = runs / "short" / "corpus" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["record_checksum"]
    content["validation"]["sources"][0]["num_samples"] += 1
    manifest.unlink()
    manifest.write_text(json.dumps(content))
    output = tmp_path / "elsewhere" / "page.html"
    (runs / "short").rename(runs / f"{90 * 'é'} (old)")
    both = [str(runs / "whole"), str(runs / f"{90 * 'é'} (old)")]
    assert main(["report", *both, "--output", str(output)]) == 0
    assert "The runs hold out different text" in output.read_text()
    assert not list(runs.glob("overlay*"))
    assert main(["report", *both]) == 0
    # Names of up to 255 bytes, which a link of Markdown can hold.
    assert all(fullmatch(r"overlay-whole-é+(-training|-validation)?\.(html|md|png)", path.name)
               for path in runs.glob("overlay*"))  # fmt: skip
    tokenizer = Path(both[1]) / "corpus" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    tokenizer.write_bytes(content + b"\n")
    # A damaged file is an error here, too.
    capsys.readouterr()
    assert main(["report", *both]) == 1
    assert "tokenizer.json" in capsys.readouterr().err


def test_labels_are_distinct(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x", "b/x", "y", "c|*d")]
    assert label_runs(folders) == ["a/x", "b/x", "y", "c¦∗d"]
    assert legend_label("_x") == " _x" and legend_label("a $b$\nc") == r"a \$b\$ c"
    assert len(legend_label("x" * 99)) == 40
    assert len({tuple(line_style(number).values()) for number in range(24)}) == 24


def test_mistakes_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(runs / "whole")
    mistakes = {
        (str(runs / "whole"), str(tmp_path / "link")): f"{tmp_path}/link: the same run as {runs}/whole; give each run",
        (str(runs / "whole"), str(runs / "short"), "--output", "x.md"): "--output: 'x.md' does not end in .html",
        (str(runs / "whole"), str(tmp_path)): f"{tmp_path}: not a run folder (it has no run.yaml)",
    }
    for arguments, message in mistakes.items():
        assert main(["report", *arguments]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {message}")
    assert not list(tmp_path.rglob("overlay*"))
