"""What a mistyped command or option is told."""

from pathlib import Path

import pytest

from flows.cli.main import main, make_parser


@pytest.mark.parametrize(("line", "usage", "error"), [
    ("sampels x", "reprise [-h]", "argument COMMAND: invalid choice: 'sampels'; did you mean samples?"),
    ("inherit compar", "reprise inherit [-h]", "argument ACTION: invalid choice: 'compar'; did you mean compare?"),
    ("completion bsh", "reprise completion [-h]", "invalid choice: 'bsh'; did you mean bash?"),
    ("samples x --hardst", "reprise samples [-h]", "unrecognized arguments: --hardst; did you mean --hardest?"),
    ("run x --sett=a=b", "reprise run [-h]", "unrecognized arguments: --sett=a=b; did you mean --set?"),
    # As argparse says it.
    ("xyzzy", "reprise [-h]", "invalid choice: 'xyzzy' (choose from 'init', 'run',"),
    ("runs x --xyzzy", "reprise [-h]", "unrecognized arguments: --xyzzy\n"),
    ("runs x y", "reprise [-h]", "unrecognized arguments: y\n"),
])  # fmt: skip
def test_the_nearest_is_named(line: str, usage: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"usage: {usage}")
    assert error in told


def test_what_is_known_is_not_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    """Abbreviated options are argparse's own, and an option's value may look like another option."""
    assert main(["runs", "/nonexistent", "--js"]) == 1
    assert main(["run", "/nonexistent.yaml", "--set=--sett"]) == 1
    assert "unrecognized" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("sql runs/a --timeout 5 QUERY", "query", "QUERY"),
        ("sql --timeout 5 runs/a QUERY", "query", "QUERY"),
        ("sql runs/a --timeout 5", "query", None),
        ("runs --json folder", "folder", Path("folder")),
        ("runs --json", "folder", Path("runs")),
        ("doctor --json a.yaml", "config", Path("a.yaml")),
    ],
)
def test_what_may_be_left_out_may_follow_an_option(line: str, field: str, value: object) -> None:
    assert getattr(make_parser().parse_args(line.split()), field) == value


def test_what_is_too_much_after_an_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["sql", "runs/a", "--timeout", "5", "QUERY", "another"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: another\n")
