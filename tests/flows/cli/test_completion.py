"""What a TAB completes, in real shells on a terminal."""

import os
import pty
import re
import select
import shutil
import time
from pathlib import Path

import pytest

from flows.cli.main import main

# How a shell starts without its user's settings, and how it reads the script, as docs/operation.md says.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source {}"),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -D; eval "$(cat {})"'),
    "fish": (["fish", "--no-config", "-i"], "source {}"),
}
TYPED = {
    "a command": ("compa\tsomething", "compare something"),
    "a run by its name": ("status dem\t", "status runs/demo"),
    "a run by its folder": ("status runs/de\t", "status runs/demo"),
    "a name with a space": ("report oth\t", "report runs/other one"),
    "a second run": ("report x dem\t", "report x runs/demo"),
    "an option": ("samples x --har\t7", "samples x --hardest 7"),
    "a choice": ("refine x --policy ran\t", "refine x --policy random"),
    "a configuration": ("run mi\t", "run mine.yaml"),
    "a configuration alone": ("plan mi\t", "plan mine.yaml"),
    "a field": ("run x --set refine.sampling_r\t", "run x --set refine.sampling_rate="),
    "a file": ("samples x --html pa\t", "samples x --html page.html"),
    "a command below another": ("inherit imp\tx", "inherit importance x"),
}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture
def script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    path = tmp_path / f"script.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def run_shell(shell: str, folder: Path, lines: list[str], seconds: float = 60) -> str:
    """Return what a shell on a terminal shows in `folder` while each line is typed, after it has ended."""
    command, _ = SHELLS[shell]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(folder)}
        os.execvpe(command[0], command, {**environment, "COLUMNS": "200", "LC_ALL": "C.UTF-8"})
    shown, deadline = b"", time.monotonic() + seconds
    waiting = [*lines, "exit\n"]
    quiet = 0
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    shown += os.read(terminal, 4096)
                except OSError:
                    # The shell has ended.
                    break
                quiet = 0
            elif (quiet := quiet + 1) >= 4 and waiting:
                # Typed only when the shell waits: some drop what comes before.
                os.write(terminal, waiting.pop(0).encode())
                quiet = 0
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)
    return shown.decode(errors="replace")


def test_a_tab_completes_commands_options_runs_and_files(shell: str, script: Path, tmp_path: Path) -> None:
    for folder in ("runs/demo", "runs/other one", "bin", "configs"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/demo/run.yaml", "runs/other one/run.yaml", "mine.yaml", "page.html"):
        (tmp_path / file).touch()
    stub = tmp_path / "bin" / "reprise"
    stub.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >> {tmp_path}/called\necho >> {tmp_path}/called\n')
    stub.chmod(0o755)
    # In zsh, shtab's scripts complete only the first of several arguments.
    expected = {name: row for name, row in TYPED.items() if (shell, name) != ("zsh", "a second run")}
    lines = [f"{SHELLS[shell][1].format(script)}\n", *(f"reprise {typed}\n" for typed, _ in expected.values())]
    shown = run_shell(shell, tmp_path, lines)
    called = (tmp_path / "called").read_text().splitlines()
    # A TAB calls nothing. A folder may end in a slash.
    found = [re.sub(r"/?\|", " ", line).strip() for line in called]
    assert dict(zip(expected, found, strict=True)) == {name: line for name, (_, line) in expected.items()}, shown


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "csh"])
    assert ended.value.code == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
