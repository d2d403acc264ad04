"""Events that end a rank: signals, the end of its launcher, another rank's failure; its writers end with it."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

# Tests wait for what is to happen; what takes that many seconds never will.
HANGING = 600
HEADER = f"""
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from trainer.stopping import StopRequest, end_with_launcher
folder, stop = Path(sys.argv[1]), StopRequest()
end_with_launcher(SimpleNamespace(lock=folder / "lock", errors=folder, seconds_to_stop=6), stop)
def hang():
    time.sleep({HANGING})
"""
# What a rank does, and how it ends.
SIGNALS = [
    ("os.kill(os.getpid(), signal.SIGTERM); hang()", -15),
    ("with StopRequest().heeded(): pass\nos.kill(os.getpid(), signal.SIGTERM); hang()", -15),
    ("with (stop := StopRequest()).heeded(): os.kill(os.getpid(), 15)\nsys.exit(10 + stop.is_made)", 11),
    ("with StopRequest().heeded(): os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); sys.exit(13)", 13),
    ("with StopRequest().heeded(): os.kill(os.getpid(), 15); time.sleep(3.1); os.kill(os.getpid(), 15)\nhang()", 143),
    ("os.kill(os.getpid(), signal.SIGINT); sys.exit(12)", 12),
]
# A rank that has been told to stop saves for some seconds after its launcher has ended.
SAVING = """
with stop.heeded():
    os.kill(os.getpid(), 15)
    print("told", flush=True)
    sys.stdin.readline()
    time.sleep({seconds})
    sys.exit(14)
"""
FORKING = """
writer = os.fork()
if writer == 0:
    os.close(1), os.close(2)
    hang()
print(writer, flush=True)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


class End(NamedTuple):
    """How a rank ended: its exit code, the seconds since it was started or lost its launcher, what it said, where."""

    code: int
    seconds: float
    said: str
    folder: Path


def rank(script: str, folder: Path, launcher: int) -> "subprocess.Popen[str]":
    """Start `script` as a rank that has this launcher."""
    command = [sys.executable, "-c", HEADER + script, str(folder)]
    environment = {**os.environ, "REPRISE_LAUNCHER": str(launcher)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def end(script: str, folder: Path) -> End:
    """Run a rank whose launcher is this process to its end."""
    started = time.monotonic()
    with rank(script, folder, os.getpid()) as process:
        said, _ = process.communicate(timeout=HANGING)
    return End(process.returncode, time.monotonic() - started, said, folder)


def end_after_launcher(script: str, folder: Path) -> End:
    """End a rank's launcher as soon as the rank has said a line, and tell it so."""
    with subprocess.Popen(["sleep", str(HANGING)]) as launcher, rank(script, folder, launcher.pid) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        launcher.kill()
        launcher.wait()
        ended = time.monotonic()
        said, _ = process.communicate("\n", timeout=HANGING)
    return End(process.returncode, time.monotonic() - ended, line + said, folder)


def end_after_failure(folder: Path) -> End:
    # Left three of the five seconds ago in which ranks that fail together may say why.
    (folder / "rank-00001.json").touch()
    os.utime(folder / "rank-00001.json", (time.time() - 3, time.time() - 3))
    return end("hang()", folder)


def end_under_torchrun(folder: Path) -> End:
    """Tell torchrun to stop, and kill its launcher while the rank saves, which goes on for 3 seconds."""
    (folder / "rank.py").write_text(
        "import os, signal, sys, time\n"
        "def save(*_):\n"
        "    with open('signals', 'a') as file:\n"
        "        file.write('one\\n')\n"
        "    while not os.path.exists('killed'):\n"
        "        time.sleep(0.05)\n"
        "    time.sleep(3)\n"
        "    open('saved', 'w').close()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('ready', 'w').close()\n"
        f"time.sleep({HANGING})\n"
    )
    agent = [
        *(sys.executable, "-W", "ignore", "-m", "trainer.agent", "--standalone", "--nproc-per-node", "1"),
        "rank.py",
    ]
    launcher = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30"}
    with subprocess.Popen([sys.executable, "-c", launcher, *agent], cwd=folder, env=environment) as process:
        wait_until((folder / "ready").exists)
        [torchrun] = psutil.Process(process.pid).children()
        torchrun.terminate()
        wait_until((folder / "signals").exists)
        process.kill()
        process.wait()
    ended = time.monotonic()
    (folder / "killed").touch()
    wait_until((folder / "saved").exists)
    psutil.wait_procs([torchrun], timeout=HANGING)
    assert not torchrun.is_running()
    return End(0, time.monotonic() - ended, (folder / "signals").read_text(), folder)


def wait_until(happens: Callable[[], bool], seconds: float = HANGING) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[End]"]]:
    """How ranks end; they run side by side, for most of the time each waits."""
    cases: dict[str, Callable[[Path], End]] = {script: partial(end, script) for script, _ in SIGNALS}
    cases |= {
        "launcher": partial(end_after_launcher, "print('ready', flush=True); hang()"),
        "saving": partial(end_after_launcher, SAVING.format(seconds=3)),
        "saving for ever": partial(end_after_launcher, SAVING.format(seconds=HANGING)),
        "failure": end_after_failure,
        "forking": partial(end, FORKING),
        "torchrun": end_under_torchrun,
    }
    with ThreadPoolExecutor(len(cases)) as pool:
        yield {name: pool.submit(case, tmp_path_factory.mktemp("rank")) for name, case in cases.items()}


@pytest.mark.parametrize(("script", "code"), SIGNALS)
def test_a_rank_notes_one_sigterm_while_it_trains(script: str, code: int, ends: dict[str, "Future[End]"]) -> None:
    assert ends[script].result().code == code


def test_a_rank_ends_with_its_launcher(ends: dict[str, "Future[End]"]) -> None:
    """By SIGTERM: one that does not heed it would end 6 seconds later, with 1."""
    assert ends["launcher"].result().code == -15


def test_a_rank_that_was_told_to_stop_saves_on_when_its_launcher_is_gone(ends: dict[str, "Future[End]"]) -> None:
    """It has as long as a checkpoint of its size takes, 6 seconds here, and no longer."""
    saved, ended = ends["saving"].result(), ends["saving for ever"].result()
    assert (saved.code, ended.code) == (14, 1)
    assert 5.9 < ended.seconds < 60


def test_a_rank_ends_when_another_has_failed(ends: dict[str, "Future[End]"]) -> None:
    ended = ends["failure"].result()
    assert ended.code == 1
    assert 1.5 < ended.seconds < 60


def test_what_a_rank_has_forked_ends_with_it_and_gives_up_the_lock(ends: dict[str, "Future[End]"]) -> None:
    ended = ends["forking"].result()
    assert ended.code == -9
    # It would end by itself ten times later.
    wait_until(partial(has_ended, int(ended.said)), HANGING / 10)
    with (ended.folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_torchrun_passes_on_one_signal_and_waits_though_its_launcher_is_killed(ends: dict[str, "Future[End]"]) -> None:
    """Whoever told the launcher to stop kills it while the rank saves."""
    ended = ends["torchrun"].result()
    assert ended.said == "one\n"
    assert ended.seconds > 3
