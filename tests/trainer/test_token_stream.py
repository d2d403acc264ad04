"""Tokens arrive in their order, once each, whenever the reader looks."""

from pathlib import Path

from trainer.token_stream import TokenStreamReader, TokenStreamWriter


def test_what_is_written_arrives_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    reader = TokenStreamReader(path)
    assert [*reader.read()] == []
    writer = TokenStreamWriter(path)
    writer.write(0, [5], is_open=True)
    writer.write(1, [7], is_open=True)
    assert [*reader.read()] == [(0, 5), (1, 7)]
    writer.write(0, [5, 6], is_open=False)
    writer.write(0, [5, 6], is_open=False)
    writer.write(1, [7], is_open=True)
    writer.write(1, [7], is_open=False)
    assert [*reader.read()] == [(0, 6), (0, None), (1, None)]
    assert [*reader.read()] == []


def test_half_a_pair_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    TokenStreamWriter(path).write(3, [4], is_open=True)
    content = path.read_bytes()
    path.write_bytes(content + content[:5])
    reader = TokenStreamReader(path)
    assert [*reader.read()] == [(3, 4)]
    path.write_bytes(content + content)
    assert [*reader.read()] == [(3, 4)]
