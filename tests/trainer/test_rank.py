"""A rank leaves its error even where it cannot read its job."""

from pathlib import Path

import pytest

from trainer.rank import main
from trainer.rank_errors import root_cause


@pytest.mark.parametrize("content", ["{", "[]", '{"class": "trainer.jobs:ScoreJob", "seconds_to_stop": null}'])
def test_a_rank_whose_job_is_damaged_leaves_its_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train-1.job.json"
    path.write_text(content)
    (tmp_path / "errors").mkdir()
    with pytest.raises(ValueError, match=r"launch the job again"):
        main(path)
    error = root_cause(tmp_path / "errors")
    assert error is not None
    assert error.is_user_error
    assert error.message.startswith(f"{path}: ")
    assert len(error.message.splitlines()) == 1
