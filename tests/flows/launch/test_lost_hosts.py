"""A host that falls silent is lost, by the listener's clock; one that speaks is not."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.launch import hosts, torchrun
from flows.launch.hosts import Leader, join
from flows.launch.torchrun import Rendezvous, local_address
from flows.stages.status import is_done

MEETING = Rendezvous("now", "127.0.0.1:29400", 2, 1, 60, 20)


def say(folder: Path, rendezvous: str, beat: int) -> None:
    path = folder / "logs" / "nodes" / "h2-7.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "h2", "rendezvous": rendezvous, "beat": beat}))


def test_silence_is_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(hosts.time, "monotonic", lambda: clock[0])
    leader = Leader(tmp_path, tmp_path / "job.json", MEETING)
    assert leader.lost_host() is None
    announced = json.loads((tmp_path / "logs" / "rendezvous.json").read_text())
    assert Rendezvous(**announced["rendezvous"]) == MEETING
    # Who joined an attempt before this one is nobody's loss.
    say(tmp_path, "before", 1)
    # Nor is a host whose file 0.7 left behind, which calls the rendezvous otherwise.
    left = tmp_path / "logs" / "nodes" / "h3-8.json"
    left.write_text(json.dumps({"host": "h3", "meeting": "now", "beat": 1}))
    for _ in range(3):
        clock[0] += 25
        assert leader.lost_host() is None
    for beat in (1, 2, 3):
        say(tmp_path, "now", beat)
        clock[0] += 25
        assert leader.lost_host() is None
    clock[0] += 25
    assert leader.lost_host() is None
    clock[0] += 25
    assert leader.lost_host() == "h2"
    assert json.loads((tmp_path / "logs" / "rendezvous.json").read_text())["beat"] > announced["beat"]
    leader.end()
    assert not (tmp_path / "logs" / "rendezvous.json").exists()


def test_the_way_to_the_rendezvous_decides_the_address() -> None:
    assert local_address("127.0.0.1:29400", is_head=True) == ("127.0.0.1", "lo")
    with pytest.raises(ValueError, match=r"launch.rendezvous: nowhere.invalid:1 cannot be reached"):
        local_address("nowhere.invalid:1", is_head=True)
    assert torchrun.rank_environment("eth7", 20)["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_second_wish_to_stop_waits_for_the_first(tmp_path: Path) -> None:
    saving = "import pathlib, signal, sys, time\ndef save(*_):\n"
    saving += " time.sleep(1)\n pathlib.Path('saved').touch()\n sys.exit()\n"
    saving += "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", saving], cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()

    def again(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            torchrun.stop(process, 20)
    finally:
        signal.signal(signal.SIGALRM, before)
    process.stdout.close()
    assert (tmp_path / "saved").exists()
    assert process.returncode == 0


def test_a_run_of_one_host_is_not_joined(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        join(tmp_path, None, is_done)
