"""A launcher of another package is used as the package's own are, once it has a row among the kinds."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from data_scoring.base.progress import silent
from data_scoring.config import padded_vocab_size
from flows.launch.launcher import Launcher, launch, launcher_class
from flows.run.config import LaunchConfig, RunConfig, parse_config
from flows.run.launcher_kinds import LAUNCHER_KINDS, LauncherKind
from flows.stages.train import launch_plan
from tests.conftest import TINY_MODEL, Ranks
from tests.flows.fakes import values, write_texts
from tests.flows.launch.plain_launcher import PlainLauncher
from tests.flows.launch.test_failures import failing
from tests.trainer.counting_job import counting, read_counts


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> LaunchConfig:
    """The configuration of a launcher that is registered for this test."""
    row = LauncherKind(
        "tests.flows.launch.plain_launcher:PlainLauncher", "processes of its own", sees_devices=False, is_joined=False
    )
    monkeypatch.setitem(LAUNCHER_KINDS, "plain", row)
    return LaunchConfig(kind="plain", max_restarts=0)


def test_configuration_accepts_its_kind_and_no_other(tmp_path: Path) -> None:
    described = {**values(write_texts(tmp_path), tmp_path), "launch": {"kind": "plain"}}
    config = parse_config(described, "test")
    assert launch_plan(config, ()).endswith(f"-m trainer.worker {tmp_path}/x/logs/train-1.job.json")
    schema = RunConfig.model_json_schema()["$defs"]["LaunchConfig"]["properties"]["kind"]
    assert (schema["type"], schema["enum"]) == ("string", ["local", "slurm", "ray", "plain"])
    with pytest.raises(ValueError, match=r"launch.kind: .* 'local', 'slurm', 'ray' or 'plain' \(it is 'pbs'\)"):
        parse_config({**described, "launch": {"kind": "pbs"}}, "test")
    # It says of itself that it does not see the devices of its nodes.
    with pytest.raises(ValueError, match=r"device: 'auto' cannot detect the nodes' devices with launch.kind plain"):
        parse_config({**described, "device": "auto"}, "test")


def test_every_kind_has_a_launcher() -> None:
    classes = [launcher_class(kind) for kind in LAUNCHER_KINDS]
    assert [each.__name__ for each in classes] == ["LocalLauncher", "SlurmLauncher", "RayLauncher", "PlainLauncher"]


def test_a_row_that_names_no_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAUNCHER_KINDS, "wrong", LauncherKind("os:getcwd", "nothing", True, False))
    with pytest.raises(TypeError, match="os:getcwd is not a Launcher"):
        launcher_class("wrong")


def test_commands_that_a_launcher_needs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = parse_config({**values(write_texts(tmp_path), tmp_path), "launch": {"kind": "plain"}}, "test")
    PlainLauncher.check(config)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"launch.kind: plain needs sh; start this on a host that has them"):
        PlainLauncher.check(config)


def test_it_runs_a_job_to_its_end(ranks: Ranks, plain: LaunchConfig) -> None:
    job = counting(ranks, "plain")
    launch(job, ranks.folder, "plain", silent, plain)
    vocab_size = padded_vocab_size(ranks.corpus.vocab_size)
    num_tokens = int(ranks.corpus.lengths(0).sum())
    assert read_counts(job) == {"num_parameters": TINY_MODEL.num_parameters(vocab_size), "num_tokens": num_tokens}


def test_a_rank_s_failure_is_reported(ranks: Ranks, plain: LaunchConfig) -> None:
    with pytest.raises(ValueError, match=r"train.lr: too high; lower it \(log: .*/logs/plain-failing.log\)"):
        launch(failing(ranks, "ValueError"), ranks.folder, "plain-failing", silent, plain)


def test_it_is_stopped_with_whoever_launched_it(ranks: Ranks, plain: LaunchConfig) -> None:
    seen = []

    def interrupt(what: str, done: int, total: int | None) -> None:
        seen.append(what)
        if what == "wait":
            raise KeyboardInterrupt

    job = failing(ranks, "wait")
    with pytest.raises(KeyboardInterrupt):
        launch(job, ranks.folder, "plain-stopped", interrupt, plain)
    assert seen[0] == "1 plain processes"
    with job.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _never_start(self: Launcher) -> None:
    raise ValueError("nowhere to start")


@pytest.mark.parametrize("kind", ["local", "slurm", "ray", "plain"])
def test_one_that_did_not_start_is_stopped_all_the_same(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stop: Callable[[Launcher], None] = launcher_class(kind).stop
    stopped = []

    def note(self: Launcher) -> None:
        stop(self)
        stopped.append(self.name)

    monkeypatch.setattr(launcher_class(kind), "start", _never_start)
    monkeypatch.setattr(launcher_class(kind), "stop", note)
    with pytest.raises(ValueError, match="nowhere to start"):
        launch(ranks.job("unstarted"), ranks.folder, "unstarted", silent, LaunchConfig(kind=kind))
    assert stopped == ["unstarted"]
