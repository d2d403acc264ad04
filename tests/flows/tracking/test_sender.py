"""What a tracker holds is what the ledger holds, each number once, whatever happens on the way."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_scoring.base.parquet import write_parquet
from data_scoring.ledger import read_rows
from flows.evaluation.scores import SCORES
from flows.run.folder import Run, read_run
from flows.run.trackers import TrackerConfig
from flows.tracking import sender
from flows.tracking.sender import TrackerAwayError, record_path
from flows.tracking.tracker import tracker_class
from tests.flows.tracking.conftest import Rounds, step_row
from tests.flows.tracking.stores import READERS, read_tensorboard

Send = Callable[..., int]


def test_every_number_is_the_ledger_s(whole: Run, tracker: str, send: Send) -> None:
    assert send(whole, tracker) > 0
    found = READERS[tracker](whole.folder)
    steps = read_rows(
        whole.folder,
        "select row_number() over (order by round, step), round, loss, tokens_per_second from steps order by 1",
    )
    assert found["round"] == [(step, number) for step, number, *_ in steps]
    assert found["train/loss"] == [(step, loss) for step, _, loss, _ in steps]
    assert found["train/tokens_per_second"] == [(step, speed) for step, *_, speed in steps]
    # The fakes have neither.
    assert "train/lr" not in found
    first = sum(number == 1 for _, number, *_ in steps)
    for source in ("a", "b"):
        expected = read_rows(
            whole.folder,
            f"""select step + {first} * (round - 1), loss from validation where source = '{source}' order by all""",
        )
        assert found[f"validation/{source}"] == [(step, pytest.approx(loss, rel=1e-7)) for step, loss in expected]
    kept, total = read_rows(whole.folder, "select count(*) filter (kept), count(*) from selection where round = 2")[0]
    assert found["refine/kept_share"] == [(first, pytest.approx(kept / total, rel=1e-6))]
    for name in ("train_loss", "validation_loss", "training_cost"):
        values = [value for (value,) in read_rows(whole.folder, f"select {name} from rounds order by round")]
        ends = zip((first, len(steps)), values, strict=True)
        assert found[f"rounds/{name}"] == [(end, pytest.approx(value, rel=1e-6)) for end, value in ends]
    [(cost, seconds)] = read_rows(whole.folder, "select scoring_cost, scoring_seconds from rounds where round = 1")
    assert found["rounds/scoring_cost"] == [(first, cost)]
    assert found["rounds/scoring_seconds"] == [(first, pytest.approx(seconds, rel=1e-6))]
    # Another process has nothing to send.
    assert send(whole, tracker) == 0
    assert READERS[tracker](whole.folder) == found


def test_a_run_that_grows_and_is_killed_is_sent_once(rounds: Rounds, tracker: str, send: Send) -> None:
    steps, validation = rounds.open(1, "f")
    losses = [5.0, 4.5, 4.0, 3.5]
    for step, loss in enumerate(losses[:2], start=1):
        steps.append(step_row(step, loss))
    assert send(rounds.run, tracker, False) == 2
    steps.append(step_row(3, losses[2]))
    validation.append({"step": 3, "source": "a", "loss": 4.25, "num_tokens": 9})
    assert send(rounds.run, tracker, False) == 2
    validation.append({"step": 3, "source": "b", "loss": 4.75, "num_tokens": 9})
    assert send(rounds.run, tracker, False) == 1
    # The ranks are killed, and the last checkpoint is that of step 1: two steps are repeated.
    steps, validation = rounds.open(1, "f")
    steps.append(step_row(1, losses[0]))
    steps.flush()
    steps, validation = rounds.open(1, "f", 1)
    for step in (2, 3, 4):
        steps.append(step_row(step, losses[step - 1]))
        if step == 3:
            for source, loss in (("a", 4.25), ("b", 4.75)):
                validation.append({"step": 3, "source": source, "loss": loss, "num_tokens": 9})
    assert send(rounds.run, tracker, False) == 1
    steps.flush()
    validation.flush()
    steps, _ = rounds.open(2, "g")
    steps.append(step_row(1, 3.0))
    assert send(rounds.run, tracker) == 1
    found = READERS[tracker](rounds.run.folder)
    assert found["train/loss"] == [*enumerate([*losses, 3.0], start=1)]
    assert found["train/lr"] == [(step, pytest.approx(0.1 / (step % 4 or 4), rel=1e-6)) for step in range(1, 6)]
    assert found["validation/a"] == [(3, 4.25)]
    assert found["validation/b"] == [(3, 4.75)]
    assert found["round"] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow", "trackio"], indirect=True)
def test_what_was_sent_but_not_recorded_is_there_once(rounds: Rounds, tracker: str, send: Send) -> None:
    """As if the process were killed between the two. (Weights & Biases has no way to tell.)"""
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    assert send(rounds.run, tracker, False) == 1
    path = record_path(rounds.run.folder, tracker)
    before = path.read_bytes()
    for step in (2, 3):
        steps.append(step_row(step, 4.0))
    assert send(rounds.run, tracker, False) == 2
    path.write_bytes(before)
    assert send(rounds.run, tracker) == 2
    assert READERS[tracker](rounds.run.folder)["train/loss"] == [(1, 5.0), (2, 4.0), (3, 4.0)]


def test_a_round_that_is_trained_anew_is_sent_anew(rounds: Rounds, send: Send) -> None:
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    assert send(rounds.run, "tensorboard") == 1
    steps, _ = rounds.open(1, "other")
    steps.append(step_row(1, 6.0))
    assert send(rounds.run, "tensorboard") == 1
    found = read_tensorboard(rounds.run.folder / "tracking" / "tensorboard")
    assert found["train/loss"] == [(1, 5.0), (1, 6.0)]


def test_validation_of_earlier_training_is_not_the_new_one_s(rounds: Rounds, send: Send) -> None:
    def measure(fingerprint: str, loss: float) -> None:
        steps, validation = rounds.open(1, fingerprint)
        steps.append(step_row(1, loss))
        send(rounds.run, "tensorboard")
        validation.append({"step": 1, "source": "a", "loss": loss, "num_tokens": 9})
        steps.flush()
        validation.flush()
        send(rounds.run, "tensorboard")

    measure("f", 5.0)
    measure("other", 6.0)
    found = read_tensorboard(rounds.run.folder / "tracking" / "tensorboard")
    assert found["validation/a"] == [(1, 5.0), (1, 6.0)]


def test_scores_that_are_measured_anew_are_sent_anew(rounds: Rounds, send: Send) -> None:
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    folder = rounds.run.round_folder(1) / "evaluation" / "step-00000001" / "scores"
    for score in (0.25, 0.25, 0.5):
        row = {"is_end": True, "task": "boolq", "subject": None, "metric": "acc", "score": score}
        write_parquet(folder / "boolq.parquet", pa.Table.from_pylist([row], SCORES), "")
        send(rounds.run, "tensorboard")
    found = read_tensorboard(rounds.run.folder / "tracking" / "tensorboard")
    assert found["scores/boolq"] == [(1, 0.25), (1, 0.5)]


def test_runs_of_the_same_name_have_folders_of_their_own(rounds: Rounds, send: Send, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    other = read_run(Path(shutil.copytree(rounds.run.folder, tmp_path / "other" / rounds.run.folder.name)))
    for run in (rounds.run, other):
        assert send(run, "tensorboard", uri=str(logs)) == 1
    steps.append(step_row(2, 4.0))
    assert send(rounds.run, "tensorboard", uri=str(logs)) == 1
    name = rounds.run.folder.name
    assert read_tensorboard(logs / name)["train/loss"] == [(1, 5.0), (2, 4.0)]
    assert read_tensorboard(logs / f"{name}-2")["train/loss"] == [(1, 5.0)]


def test_a_copy_of_a_run_is_another_run(rounds: Rounds, send: Send, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    assert send(rounds.run, "tensorboard", uri=str(logs)) == 1
    copy = read_run(Path(shutil.copytree(rounds.run.folder, tmp_path / "copy")))
    steps.append(step_row(2, 4.0))
    assert send(rounds.run, "tensorboard", uri=str(logs)) == 1
    assert send(copy, "tensorboard", uri=str(logs)) == 1
    assert read_tensorboard(logs / rounds.run.folder.name)["train/loss"] == [(1, 5.0), (2, 4.0)]
    assert read_tensorboard(logs / "copy")["train/loss"] == [(1, 5.0)]


def test_an_empty_variable_counts_as_unset(rounds: Rounds, tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = tracker_class(tracker)
    monkeypatch.setenv(kind.variable, "")
    assert kind.located(TrackerConfig(name=tracker)).uri is None


def test_no_password_is_in_what_is_said(rounds: Rounds, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("POST https://me:secret@host:1/api failed, and https://key@host")

    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    monkeypatch.setattr(tracker_class("tensorboard"), "send", fail)
    with pytest.raises(TrackerAwayError) as raised:
        send(rounds.run, "tensorboard")
    assert str(raised.value) == "OSError: POST https://***@host:1/api failed, and https://***@host"


def test_another_place_gets_everything(
    rounds: Rounds, send: Send, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, _ = rounds.open(1, "f")
    steps.append(step_row(1, 5.0))
    assert send(rounds.run, "tensorboard") == 1
    assert send(rounds.run, "tensorboard", uri=str(tmp_path / "there")) == 1
    assert read_tensorboard(tmp_path / "there" / "x")["train/loss"] == [(1, 5.0)]
    monkeypatch.setenv("TENSORBOARD_LOGDIR", str(tmp_path / "elsewhere"))
    assert send(rounds.run, "tensorboard") == 1
    assert read_tensorboard(tmp_path / "elsewhere" / "x")["train/loss"] == [(1, 5.0)]


def test_tensorboard_has_the_configuration_and_the_pictures(whole: Run, send: Send) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send(whole, "tensorboard")
    events = EventAccumulator(str(whole.folder / "tracking" / "tensorboard")).Reload()
    [text] = events.Tensors("configuration")
    assert b"    name: x\n" in text.tensor_proto.string_val[0]
    pictures = sorted((whole.folder / "report").glob("*.png"))
    assert {f"report/{path.stem}" for path in pictures} == {*events.Tags()["images"]}
    [image] = events.Images(f"report/{pictures[0].stem}")
    assert image.encoded_image_string == pictures[0].read_bytes()
    assert image.width > 300
    # A configuration that has changed is sent again, and what has not is not.
    other = replace(whole, config=whole.config.model_copy(update={"output": "elsewhere"}))
    assert send(other, "tensorboard") == 0
    events.Reload()
    assert [b"output: elsewhere" in each.tensor_proto.string_val[0] for each in events.Tensors("configuration")] == [
        False,
        True,
    ]
    assert len(events.Images(f"report/{pictures[0].stem}")) == 1


def test_a_tracker_that_fails_gets_the_rest_later(rounds: Rounds, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = rounds.open(1, "f")
    for step in (1, 2):
        steps.append(step_row(step, 5.0))
    kind: Any = sender.tracker_class("tensorboard")
    write, calls = kind.send, []

    def fail(self: Any, points: Any) -> None:
        write(self, points)
        calls.append(len(points))
        raise RuntimeError("what a package\nraises")

    monkeypatch.setattr(kind, "send", fail)
    with pytest.raises(TrackerAwayError, match=r"^RuntimeError: what a package raises$"):
        send(rounds.run, "tensorboard")
    monkeypatch.undo()
    assert send(rounds.run, "tensorboard") == 2
    assert calls == [2]
    assert read_tensorboard(rounds.run.folder / "tracking" / "tensorboard")["train/loss"] == [(1, 5.0), (2, 5.0)]


def test_a_record_that_was_damaged_is_named(rounds: Rounds, send: Send) -> None:
    path = record_path(rounds.run.folder, "tensorboard")
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tensorboard.json: not valid JSON .*; delete it to send the run once more"):
        send(rounds.run, "tensorboard")


def test_a_run_of_an_earlier_version_is_sent(send: Send, tmp_path: Path) -> None:
    from flows.run.folder import read_run
    from tests import ROOT

    golden = ROOT / "tests" / "flows" / "stages" / "golden" / "plain"
    run = read_run(Path(shutil.copytree(golden, tmp_path / "plain")))
    send(run, "tensorboard")
    assert run.config.track == ()
