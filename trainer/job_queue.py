"""The jobs that the ranks of one launch do one after another, in two files beside the job that they were started for.

`<name>.next.json`, which the launcher writes, names the next job; `<name>.done.json`, which the first rank writes,
lists the jobs that are done. Without the first file, the ranks end after their job.
"""

import time
from pathlib import Path

from typing_extensions import TypedDict

from data_scoring.base.files import write_record
from data_scoring.base.validation import read_record

_SUFFIX = ".job.json"
_REMEDY = "launch the job again"
_SECONDS_BETWEEN_LOOKS = 0.05
# A launcher that ends takes its ranks with it, unless Slurm started them: these do not wait longer than this.
_SECONDS_TO_WAIT = 600.0


class _Next(TypedDict):
    job: str | None


class _Done(TypedDict):
    jobs: list[str]


class JobQueue:
    """The queue of the launch that was started for the job in `first`, <name>.job.json."""

    def __init__(self, first: Path) -> None:
        name = first.name.removesuffix(_SUFFIX)
        self._first = first
        self._next, self._done = (first.with_name(f"{name}.{part}.json") for part in ("next", "done"))

    def clear(self) -> None:
        """Delete both files; no ranks may be running."""
        self._next.unlink(missing_ok=True)
        self._done.unlink(missing_ok=True)

    def put(self, job: Path) -> None:
        """Have the ranks do the job in `job` next, unless it is done, and then wait."""
        write_record(self._next, {"job": str(job)})

    def end(self) -> None:
        """Have the ranks end once they have done their current job."""
        write_record(self._next, {"job": None})

    def is_done(self, job: Path) -> bool:
        """Return whether the ranks have done the job in `job`."""
        return str(job) in self._read_done()

    def mark_done(self, job: Path) -> None:
        """Record that the ranks have done the job in `job`, for a launcher that keeps them."""
        if self._next.exists():
            write_record(self._done, {"jobs": sorted({*self._read_done(), str(job)})})

    def wait(self) -> Path | None:
        """Return the next job once there is one, or None if the ranks have to end."""
        deadline = time.monotonic() + _SECONDS_TO_WAIT
        while (job := self._read_next()) is not None and self.is_done(job):
            if time.monotonic() > deadline:
                return None
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return job

    def _read_next(self) -> Path | None:
        record = read_record(self._next, _Next, _REMEDY)
        return None if record is None or record["job"] is None else Path(record["job"])

    def _read_done(self) -> list[str]:
        record = read_record(self._done, _Done, _REMEDY)
        return [] if record is None else record["jobs"]


def clear_queues(folder: Path) -> None:
    """Delete the files of all queues in `folder`; no ranks may be running."""
    for part in ("next", "done"):
        for path in folder.glob(f"*.{part}.json"):
            path.unlink()
