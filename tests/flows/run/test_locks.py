"""The lock of a run: whoever takes it removes what a killed process has left."""

from pathlib import Path

import pytest

from flows.run.locks import locked


def test_temporary_files_of_a_killed_process_are_removed_wherever_stages_write(tmp_path: Path) -> None:
    places = [tmp_path, tmp_path / "corpus", tmp_path / "rounds" / "1", tmp_path / "rounds" / "1" / "seen"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".near-duplicates-0.8.parquet.17-abcd.tmp").write_bytes(b"half")
        (place / "kept.parquet").write_bytes(b"whole")
    with locked(tmp_path):
        assert [*tmp_path.rglob("*.tmp")] == []
        assert len([*tmp_path.rglob("kept.parquet")]) == len(places)
        with pytest.raises(ValueError, match="in use by process"), locked(tmp_path):
            pass
