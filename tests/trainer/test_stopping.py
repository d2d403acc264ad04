"""Events that end a rank: signals, the end of its launcher, another rank's failure; its writers end with it."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

HEADER = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from trainer.stopping import StopRequest, end_with_launcher
folder, stop = Path(sys.argv[1]), StopRequest()
end_with_launcher(SimpleNamespace(lock=folder / "lock", errors=folder, seconds_to_stop=6), stop)
"""


def end_of(script: str, folder: Path, launcher: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `script` as a rank whose launcher is this process, or another, and return how it ended."""
    command = [sys.executable, "-c", HEADER + script, str(folder)]
    environment = {**os.environ, "REPRISE_LAUNCHER": str(launcher or os.getpid())}
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=environment)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", -15),
        ("with StopRequest().heeded(): pass\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", -15),
        ("with (stop := StopRequest()).heeded(): os.kill(os.getpid(), 15)\nsys.exit(10 + stop.is_made)", 11),
        ("with StopRequest().heeded(): os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); sys.exit(13)", 13),
        (
            "with StopRequest().heeded(): os.kill(os.getpid(), 15); time.sleep(3.1); os.kill(os.getpid(), 15)\n"
            "time.sleep(20)",
            143,
        ),
        ("os.kill(os.getpid(), signal.SIGINT); sys.exit(12)", 12),
    ],
)
def test_a_rank_notes_one_sigterm_while_it_trains(script: str, code: int, tmp_path: Path) -> None:
    assert end_of(script, tmp_path).returncode == code


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "1"]) as launcher:
        threading.Thread(target=launcher.wait).start()
        started = time.monotonic()
        assert end_of("time.sleep(20)", tmp_path, launcher.pid).returncode == -15
        assert time.monotonic() - started < 8


@pytest.mark.parametrize(("seconds", "code"), [(8, 14), (14, 1)])
def test_a_rank_that_was_told_to_stop_saves_on_when_its_launcher_is_gone(
    seconds: int, code: int, tmp_path: Path
) -> None:
    """It has as long as a checkpoint of its size takes, 6 seconds here, and no longer."""
    with subprocess.Popen(["sleep", "4"]) as launcher:
        threading.Thread(target=launcher.wait).start()
        script = f"with stop.heeded(): os.kill(os.getpid(), 15); time.sleep({seconds}); sys.exit(14)"
        assert end_of(script, tmp_path, launcher.pid).returncode == code


def test_a_rank_ends_when_another_has_failed(tmp_path: Path) -> None:
    # Left three of the five seconds ago in which ranks that fail together may say why.
    (tmp_path / "rank-00001.json").touch()
    os.utime(tmp_path / "rank-00001.json", (time.time() - 3, time.time() - 3))
    started = time.monotonic()
    assert end_of("time.sleep(20)", tmp_path).returncode == 1
    assert 1.5 < time.monotonic() - started < 8


def test_what_a_rank_has_forked_ends_with_it_and_gives_up_the_lock(tmp_path: Path) -> None:
    script = """
writer = os.fork()
if writer == 0:
    os.close(1), os.close(2)
    time.sleep(20)
print(writer, flush=True)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    writer = int(end_of(script, tmp_path).stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_torchrun_passes_on_one_signal_and_waits_though_its_launcher_is_killed(tmp_path: Path) -> None:
    """Whoever told the launcher to stop kills it 4 seconds later, and the rank takes 7 to save."""
    (tmp_path / "rank.py").write_text(
        "import os, signal, sys, time\n"
        "def save(*_):\n"
        "    with open('signals', 'a') as file:\n"
        "        file.write('one\\n')\n"
        "    time.sleep(7)\n"
        "    open('saved', 'w').close()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(60)\n"
    )
    agent = [
        *(sys.executable, "-W", "ignore", "-m", "trainer.agent", "--standalone", "--nproc-per-node", "1"),
        "rank.py",
    ]
    launcher = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30"}
    with subprocess.Popen([sys.executable, "-c", launcher, *agent], cwd=tmp_path, env=environment) as process:
        wait_for_file(tmp_path / "ready")
        [torchrun] = psutil.Process(process.pid).children()
        torchrun.terminate()
        wait_for_file(tmp_path / "signals")
        time.sleep(4)
        process.kill()
    wait_for_file(tmp_path / "saved")
    psutil.wait_procs([torchrun], timeout=30)
    assert not torchrun.is_running()
    assert (tmp_path / "signals").read_text() == "one\n"


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
