"""Two runs of two rounds that have to be equal, whatever happened to one of them."""

from pathlib import Path

from tests.conftest import read_rows


def assert_equal_runs(run: Path, other: Path) -> None:
    """Assert that mixes, losses, and what training recorded are equal, row by row."""
    for number in ("1", "2"):
        mix = Path("rounds") / number / "mix.parquet"
        assert (run / mix).read_bytes() == (other / mix).read_bytes()
        for file, columns in (
            ("seen", ("step", "shard", "sample", "loss")),
            ("steps.parquet", ("step", "loss", "lr", "grad_norm")),
            ("validation.parquet", ("step", "source", "loss")),
            ("validation-samples.parquet", ("sample", "source", "loss")),
        ):
            places = (folder / "rounds" / number / file for folder in (run, other))
            mine, theirs = (read_rows(place, *columns) for place in places)
            assert mine == theirs
    places = (folder / "rounds" / "1" / "losses" for folder in (run, other))
    mine, theirs = (read_rows(place, "sample", "num_tokens", "loss") for place in places)
    assert mine == theirs
    assert len(list((run / "rounds" / "2" / "checkpoint").iterdir())) == 1
