"""Exit codes and messages of every command: 0 done, 1 an error in one line, 2 usage, 130 interrupted."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import inspection_commands
from flows.cli.main import main, make_parser
from flows.cli.options import path

# What required options take that are no paths, and one of a group of which one is required.
_VALUES = {
    "parameters": ["--parameters", "1e6"],
    "batch_tokens": ["--batch-tokens", "4096"],
    "policies": ["--policies", "loss"],
}
# They read nothing.
_WITHOUT_INPUT = {"completion", "init"}


def leaves(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield all commands by their names, such as `inherit compare`."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, parser
    for action in nested:
        for each, inner in action.choices.items():
            yield from leaves(inner, f"{name} {each}".strip())


COMMANDS = dict(leaves(make_parser()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_a_configuration_can_set_its_fields(command: str) -> None:
    actions = COMMANDS[command]._actions
    reads = any("CONFIG" in str(action.metavar) for action in actions if not action.option_strings)
    assert not reads or any("--set" in action.option_strings for action in actions)


def arguments_of(command: str, target: Path) -> list[str]:
    """Return arguments with which every path that a command needs is `target`."""
    parser, found = COMMANDS[command], command.split()
    groups = [group for group in parser._mutually_exclusive_groups if group.required]
    chosen = [group._group_actions[0] for group in groups]
    for action in parser._actions:
        if not action.option_strings:
            found.append("select 1" if action.dest == "query" else str(target))
        elif action.required or action in chosen:
            found += (
                [action.option_strings[0], str(target)]
                if action.type is path
                else _VALUES.get(action.dest, [action.option_strings[0], "1"])
            )
    return found


def make_target(kind: str, folder: Path) -> Path:
    target = folder / "it's no run"
    if kind == "empty folder":
        target.mkdir()
    elif kind == "folder of other files":
        (target / "corpus").mkdir(parents=True)
        (target / "corpus" / "manifest.json").write_text("{")
    elif kind == "other file":
        target.write_bytes(b"\x00\xff{")
    return target


@pytest.mark.parametrize("kind", ["empty folder", "folder of other files", "other file", "missing"])
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - _WITHOUT_INPUT))
def test_what_is_no_run_is_an_error_in_one_line(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments_of(command, make_target(kind, tmp_path))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert command == "serve" or "it's no run" in err or "its no run" in err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_usage_is_2_and_help_is_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--no-such-option"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), *arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == status
        assert err.startswith("usage: reprise ") if status else out.startswith(f"usage: reprise {command}")


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection_commands, "read_run", interrupt)
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr().err == "stopped; the same command resumes from here\n"


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    line = capsys.readouterr().out
    assert line.startswith("reprise ") and line.count("\n") == 1
    assert all(package in line for package in ("(Python 3.", ", torch 2.", ", megatron-core 0."))
