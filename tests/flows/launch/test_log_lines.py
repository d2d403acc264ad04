"""Logs as they are shown: new lines alone, not too many, and no secrets."""

from pathlib import Path

import pytest

from flows.launch.log_lines import LogTail, redact


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("loss 3.1 at step 7", "loss 3.1 at step 7"),
        ("using abcdefgh12345 to log in", "using *** to log in"),
        ("Authorization: Bearer hf_abcdefghijklmnopqrstuvwxyz", "Authorization: Bearer ***"),
        ("Authorization: Bearer eyJhbGciOi.x.y", "Authorization: Bearer ***"),
        ("redis://:hunter2hunter2@host", "redis://***@host"),
        ("GET https://me:pass@example.org/x", "GET https://***@example.org/x"),
        ("the value is on", "the value is on"),
    ],
)
def test_secrets_are_blotted_out(line: str, shown: str) -> None:
    assert redact(line, {"HF_TOKEN": "abcdefgh12345", "USE_AUTH": "on", "HOME": "/root"}) == shown


def test_only_new_and_whole_lines_are_read_and_few_of_them(tmp_path: Path) -> None:
    log = tmp_path / "train-1.log"
    log.write_text("old\n")
    tail = LogTail(tmp_path)
    assert list(tail.lines(3)) == []
    with log.open("a") as file:
        file.write("[rank 0]: one\n\n[rank 1]: two\nhalf")
        file.flush()
        assert list(tail.lines(3)) == ["[rank 0]: one", "[rank 1]: two"]
        file.write(" a line\n" + "more\n" * 10)
    (tmp_path / "score-1.log").write_text("new file\n")
    assert list(tail.lines(3)) == ["new file", "half a line", "more", "more", f"(8 more lines in {log})"]
    assert list(tail.lines(3)) == []
