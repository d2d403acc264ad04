"""Where a corpus is prepared, and the engine that works on its parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_scoring.base.engine import Engine, Part, Result, Work, reporting
from data_scoring.base.progress import Progress


@dataclass(frozen=True)
class Preparation:
    """The preparation of a corpus in `folder`, from `seed`.

    skip_bad: whether bad records are skipped. is_long: whether there is so much text that starting processes pays.
    """

    folder: Path
    seed: int
    skip_bad: bool
    is_long: bool
    progress: Progress
    engine: Engine

    @property
    def staging(self) -> Path:
        """Return the folder of the files that are deleted once the corpus is complete."""
        return self.folder / "staging"

    def map(
        self, work: Work[Part, Result], parts: Sequence[Part], what: str, total: int | None = None
    ) -> Iterator[Result]:
        """Yield the result of `work` on each part, in order; the units done, of `total`, are reported as `what`."""
        return self.engine.map(work, parts, reporting(self.progress, what, total), self.is_long)
