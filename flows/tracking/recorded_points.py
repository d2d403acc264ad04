"""What a run folder holds that a tracker has not got yet, as points."""

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from data_scoring.base.files import checksum
from data_scoring.base.live_rows import live_path, read_live_rows
from data_scoring.ledger import read_rows
from flows.run.folder import Run
from flows.tracking.tracker import Point

_TRAINED = ("loss", "lr", "grad_norm", "tokens_per_second")


class RoundCursor(TypedDict):
    """How far a round was sent.

    identity: of the training, by its fingerprint; a round that is trained anew is sent anew. steps, validation: rows of
    the two files. others: the keys of other points.
    """

    identity: str
    steps: int
    validation: int
    others: list[str]


class Unsent:
    """Finds the points of a run that were not sent; remembers which files have not changed since.

    rounds: the cursors, by the number of the round as text.
    """

    def __init__(self, run: Run, rounds: dict[str, RoundCursor]) -> None:
        self._run, self.rounds = run, rounds
        self._seen: dict[int, Any] = {}
        self._lengths: dict[int, int] = {}

    def batches(self) -> Iterator[tuple[list[Point], dict[str, RoundCursor]]]:
        """Yield points, with the cursors that hold once these were sent; `sent` has to be called before the next."""
        before = 0
        for number in range(1, self._run.config.rounds.num_rounds + 1):
            folder = self._run.round_folder(number)
            signature = _signature(folder)
            if signature != self._seen.get(number):
                points, cursor, self._lengths[number] = self._unsent(number, before)
                if points or self.rounds.get(str(number)) != cursor:
                    yield points, {**copy.deepcopy(self.rounds), str(number): cursor}
                self._seen[number] = signature
            if not self._lengths.get(number):
                return
            before += self._lengths[number]

    def sent(self, rounds: dict[str, RoundCursor]) -> None:
        """Note that the points of a batch were sent."""
        self.rounds = rounds

    def _unsent(self, number: int, before: int) -> tuple[list[Point], RoundCursor, int]:
        """Return a round's points, its cursor after them, and its steps; `before` are the steps of earlier rounds."""
        folder = self._run.round_folder(number)
        path = folder / "steps.parquet"
        identity, rows = read_live_rows(path)
        cursor = self.rounds.get(str(number)) or RoundCursor(identity="", steps=0, validation=0, others=[])
        if identity is not None and cursor["identity"] != identity:
            cursor = {**cursor, "identity": identity, "steps": 0, "validation": 0}
        fallback = path.stat().st_mtime if path.exists() else 0.0
        times = [_seconds(row.get("ended_at"), fallback) for row in rows]
        points = [
            Point(
                f"{number}-{identity}-step-{row['step']}",
                before + row["step"],
                time,
                {"round": number, **{f"train/{name}": row[name] for name in _TRAINED if row[name] is not None}},
            )
            for row, time in zip(rows[cursor["steps"] :], times[cursor["steps"] :], strict=True)
        ]
        owner, measured = read_live_rows(folder / "validation.parquet", cursor["validation"])
        if owner != identity:
            # Those of earlier training, until the first validation of this one.
            measured = []
        points += [
            Point(
                f"{number}-{identity}-validation-{row['step']}-{row['source']}",
                before + row["step"],
                times[row["step"] - 1] if 0 < row["step"] <= len(times) else fallback,
                {f"validation/{row['source']}": row["loss"]},
            )
            for row in measured
        ]
        others = [*self._of_stages(number, before, len(rows), cursor), *self._scores(number, before, cursor)]
        return (
            [*points, *others],
            {
                "identity": cursor["identity"],
                "steps": max(cursor["steps"], len(rows)),
                "validation": cursor["validation"] + len(measured),
                "others": [*cursor["others"], *(point.key for point in others)],
            },
            len(rows),
        )

    def _of_stages(self, number: int, before: int, num_steps: int, cursor: RoundCursor) -> Iterator[Point]:
        """Yield the figures of a round's completed stages that were not sent."""
        run, end = self._run, before + num_steps
        for stage, step, read in (("refine", before, _refined), ("train", end, _trained), ("score", end, _scored)):
            identity = run.recorded(stage, number) if num_steps or stage == "refine" else None
            key = f"{number}-{identity}-{stage}"
            if identity is not None and key not in cursor["others"]:
                values = {name: float(value) for name, value in read(run, number).items() if value is not None}
                yield Point(key, step, run.record_path(stage, number).stat().st_mtime, values)

    def _scores(self, number: int, before: int, cursor: RoundCursor) -> Iterator[Point]:
        """Yield the scores of a round's models that were not sent."""
        for folder in sorted(self._run.round_folder(number).glob("evaluation/step-*/scores")):
            step = int(folder.parent.name.removeprefix("step-"))
            prefix = f"{number}-{cursor['identity']}-scores-{step}"
            # Another evaluation, such as of more items, is sent anew.
            keys = {path.stem: f"{prefix}-{path.stem}-{checksum(path)}" for path in folder.glob("*.parquet")}
            new = {task: key for task, key in keys.items() if key not in cursor["others"]}
            if not new:
                continue
            for task, score in read_rows(
                self._run.folder,
                f"select task, score from scores where round = {number} and step = {step} and subject is null "
                "and score is not null order by task",
            ):
                if task in new:
                    time = (folder / f"{task}.parquet").stat().st_mtime
                    yield Point(new[task], before + step, time, {f"scores/{task}": score})


def _refined(run: Run, number: int) -> dict[str, Any]:
    """Return what a round's selection keeps, and by which losses."""
    [row] = read_rows(
        run.folder,
        f"""select avg(kept::int), avg(loss) filter (kept), avg(loss) filter (not kept), min(loss) filter (kept),
            max(loss) filter (kept) from selection where round = {number}""",
    )
    names = ("kept_share", "mean_loss_kept", "mean_loss_dropped", "least_loss_kept", "greatest_loss_kept")
    return dict(zip((f"refine/{name}" for name in names), row, strict=True))


def _trained(run: Run, number: int) -> dict[str, Any]:
    return _of_rounds(run, number, ("train_loss", "validation_loss", "training_seconds", "training_cost"))


def _scored(run: Run, number: int) -> dict[str, Any]:
    return _of_rounds(run, number, ("scoring_seconds", "scoring_cost"))


def _of_rounds(run: Run, number: int, names: tuple[str, ...]) -> dict[str, Any]:
    rows = read_rows(run.folder, f"select {', '.join(names)} from rounds where round = {number}")
    return dict(zip((f"rounds/{name}" for name in names), rows[0], strict=True)) if rows else {}


def _seconds(ended_at: datetime | None, fallback: float) -> float:
    return fallback if ended_at is None else ended_at.replace(tzinfo=UTC).timestamp()


def _signature(folder: Path) -> list[tuple[str, int, int]]:
    """Return what changes whenever a round has something new."""
    logs = [folder / name for name in ("steps.parquet", "validation.parquet")]
    files = [
        *logs, *map(live_path, logs), *(folder / f"{stage}.json" for stage in ("refine", "train", "score")),
        *folder.glob("evaluation/step-*/scores/*.parquet"),
    ]  # fmt: skip
    found = []
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return found
