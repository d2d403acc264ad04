"""The device check in its reduced form on this CPU, so that failures on a device are due to the device."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device.part import PARTS, Part
from benchmarks.device.record import Record, read_record, summarise
from benchmarks.device.run import check_device
from benchmarks.device.settings import FULL
from tests.test_imports import ROOT
from trainer.flops import model_flops


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a check of this CPU, which prepares by itself."""
    folder = tmp_path_factory.mktemp("device") / "output"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.device", "run", "--output", str(folder)]
    done = subprocess.run([*command, "--device", "cpu"], check=False, cwd=ROOT, capture_output=True, text=True)
    said = "".join(path.read_text()[-2000:] for path in sorted((folder / "logs").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + said
    return folder


@pytest.fixture(scope="module")
def parts(output: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads((output / "results.json").read_text())["parts"]}


def test_every_part_has_its_numbers(parts: dict[str, dict[str, Any]]) -> None:
    assert list(parts) == list(PARTS)
    assert all(part["status"] == "passed" and part["error"] is None for part in parts.values())
    for name in ("steps_of_2", "steps_of_8"):
        figures, samples = parts[name]["figures"], int(name[-1])
        assert figures["tokens_a_step"] == 2 * samples * 64
        speed = figures["tokens_per_second"]
        assert speed == pytest.approx(figures["tokens_a_step"] / figures["seconds_a_step"])
        share = speed * figures["model_flop_a_token"] / figures["matrix_products_flop_per_second"]
        assert figures["utilisation_of_the_matrix_product"] == pytest.approx(share)
        assert 0 < share < 1.5
        shares = [row["share"] for row in figures["top_kernels"]]
        assert len(shares) == 20
        assert shares == sorted(shares, reverse=True)
        assert 0.7 < sum(shares) <= 1
    for what in ("saving", "loading", "saving_asynchronously"):
        figures = parts["checkpoints"]["figures"]
        assert figures[f"{what}_gb_per_second"] * figures[f"{what}_seconds"] == pytest.approx(
            figures["checkpoint_gb"], 0.01
        )
    stopping = parts["stopping"]["figures"]
    assert 3 <= stopping["step_when_told"] <= stopping["step_saved"] < 5000
    assert 0 < stopping["from_sigterm_to_the_end_of_all_ranks_seconds"] < 20
    rows = parts["kernel_speed"]["figures"]["heads_of_256 x 2048 x 128"]
    assert [(row["kernel"], row["pass"]) for row in rows] == [
        (kernel, what) for kernel in ("reference", "chunked") for what in ("forward", "forward and backward")
    ]
    assert all(row["ms"] > 0 for row in [*rows, *parts["kernel_speed"]["figures"]["activation"]])
    assert parts["kernel_tests"]["figures"]["tests"] == 11


def test_losses_are_those_recorded_and_resumed_training_is_unbroken(
    output: Path, parts: dict[str, dict[str, Any]]
) -> None:
    recorded = json.loads((output / "prepared" / "recorded.json").read_text())
    figures = parts["small_model"]["figures"]
    for precision in ("float32", "bfloat16"):
        losses = figures[f"losses_{precision}_nats"]
        assert losses == recorded["losses"][precision]
        assert len(losses) == 20
        assert losses[0] == pytest.approx(math.log(2048), abs=0.1)
        assert losses[-1] < losses[0] - 0.05
    assert figures["generations_as_on_a_cpu"] == "6 of 6"
    resuming = parts["resuming"]["figures"]
    assert resuming["losses_resumed_nats"] == figures["losses_bfloat16_nats"]
    assert 5 <= resuming["killed_with_checkpoints_of_steps"][-1] < 20


def test_the_summary_shows_what_was_found(output: Path) -> None:
    summary = (output / "summary.md").read_text()
    assert "| steps_of_8 | passed | 1 of 1 |" in summary
    assert "- passed: stopping: steps that are lost: 0 (at most 0)" in summary
    assert sorted(path.name for path in output.iterdir()) == [
        "logs", "parts", "prepared", "results.json", "summary.md", "work",
    ]  # fmt: skip
    assert list((output / "work").iterdir()) == []


def test_a_part_that_fails_or_hangs_is_recorded_and_the_rest_goes_on(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    # There is no mix, which the first two need.
    shutil.copy(output / "prepared" / "recorded.json", prepared)
    assert check_device(prepared, tmp_path / "output", "cpu", 600, ["resuming", "stopping", "kernel_speed"]) == 1
    results = json.loads((tmp_path / "output" / "results.json").read_text())["parts"]
    assert [part["status"] for part in results] == ["failed", "failed", "passed"]
    for part in results[:2]:
        assert part["error"] == f"FileNotFoundError: [Errno 2] No such file or directory: '{prepared}/mix.parquet'"
    monkeypatch.setitem(PARTS, "resuming", Part("small_model", "check_resuming", {}, 6))
    assert check_device(output / "prepared", tmp_path / "hanging", "cpu", 600, ["resuming"]) == 1
    [part] = json.loads((tmp_path / "hanging" / "results.json").read_text())["parts"]
    assert part["error"] == "not done in 6 s"
    assert check_device(output / "prepared", tmp_path / "late", "cpu", 1, ["resuming"]) == 1
    [part] = json.loads((tmp_path / "late" / "results.json").read_text())["parts"]
    assert part["error"] == "no time was left for it"


def test_mistakes_are_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no recorded\.json; write it with `python -m benchmarks\.device prepare"):
        check_device(tmp_path, tmp_path / "output", "cpu", 600, None)
    with pytest.raises(ValueError, match="--only: 'steps' is not a part; choose from small_model, resuming"):
        check_device(None, tmp_path, "cpu", 600, ["steps"])


def test_checks_are_on_disk_at_once_and_fail_for_what_is_no_number(tmp_path: Path) -> None:
    record = Record(tmp_path / "part.json")
    record.figures(seconds=1.5)
    record.check("difference", 1e-5, 1e-4)
    record.check("difference", math.nan, 1e-4)
    record.check("difference", 2e-4, 1e-4)
    content = read_record(tmp_path / "part.json")
    assert [check["passed"] for check in content["checks"]] == [True, False, False]
    part = {"name": "part", "status": "failed", "seconds": 1.0, "error": "it broke", "log": "logs/part.log", **content}
    summary = summarise({"device": "cpu"}, [part])
    assert "| part | failed | 1 of 3 | 1.0 |" in summary
    assert "- **failed**: difference: nan (at most 0.0001)" in summary
    assert "Error (log: logs/part.log): `it broke`" in summary


def test_all_parts_end_in_ten_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= 600


def test_model_flops_by_hand() -> None:
    # A layer's matrices of pangu-pi-1b-pro: attention, feed-forward, shortcut; then the head; then attention's scores
    # and sums. Norms, scales and offsets add less than a thousandth.
    hidden, ffn, layers, vocabulary, seq_length = 1792, 4864, 21, 48_000, 2048
    matrices = layers * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden * hidden // 32) + vocabulary * hidden
    by_hand = 6 * matrices + 3 * layers * 2 * 2 * hidden * seq_length
    assert model_flops(FULL.large, vocabulary, seq_length) == pytest.approx(by_hand, rel=1e-3)
