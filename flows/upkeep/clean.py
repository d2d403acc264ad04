"""Cleaning: files of a run that nothing needs any more, what deleting them frees, and what is lost with them."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_scoring.contamination import contaminated_samples
from data_scoring.refine import near_duplicates
from flows.run.folder import read_run
from flows.run.fork_record import FORK
from flows.run.locks import is_locked, locked, wait_for_ranks_to_end
from flows.stages.stage_order import steps_of
from flows.stages.status import is_done, status_of
from trainer.checkpoint_folder import list_checkpoints

# Folders of trials, beside the run whose configuration they vary, end with these.
_EXPERIMENTS = ("-compare", "-ladder", "-sweep", "-grid")
_SCRATCH = (near_duplicates.SCRATCH, contaminated_samples.SCRATCH, ".spill")
_HIDDEN = ("*.tmp", "*.tmp.wal", "*.sharing")


@dataclass(frozen=True)
class Category:
    """Files that can be deleted together: what they are, and what cannot be done without them.

    find: returns their paths, given the folder of a run or of trials.
    """

    name: str
    title: str
    cost: str
    find: Callable[[Path], Iterable[Path]]


@dataclass(frozen=True)
class Offer:
    """What can be deleted in one category: paths, and the bytes that deleting each of them frees.

    shared: the bytes below each path that deleting it does not free, since another folder has the files, too.
    """

    category: Category
    paths: Sequence[Path]
    freed: Sequence[int]
    shared: Sequence[int]


def find_offers(folder: Path, names: Sequence[str]) -> list[Offer]:
    """Return what can be deleted in the categories `names` of the run in `folder`, or of the trials in it.

    Raises ValueError if there is no run and no trial, if a category is unknown, and if a process works in a folder.
    """
    unknown = [name for name in names if name not in CATEGORIES]
    if unknown:
        raise ValueError(f"--only: {unknown[0]!r} is not a category; choose from {', '.join(CATEGORIES)}")
    if (folder / "run.yaml").exists():
        # Raises ValueError if it is damaged.
        read_run(folder)
    elif not _holds_trials(folder):
        raise ValueError(
            f"{folder}: not a run folder, nor one of trials (NAME{', NAME'.join(_EXPERIMENTS)}); give one of these"
        )
    for place in _places(folder, names):
        _check_idle(place)
    found = {name: _paths(folder, name) for name in names}
    counts = _links(path for paths in found.values() for path in paths)
    return [_offer(CATEGORIES[name], paths, counts) for name, paths in found.items() if paths]


def delete(folder: Path, offers: Sequence[Offer]) -> int:
    """Return the freed bytes, after deleting what was offered, except what is needed or gone by now.

    Raises ValueError if a process works in a folder.
    """
    total = 0
    names = [offer.category.name for offer in offers]
    with ExitStack() as stack:
        for place in _places(folder, names):
            _check_idle(place)
            stack.enter_context(locked(place))
        for offer in offers:
            still_offered = {*_paths(folder, offer.category.name)}
            for path, freed in zip(offer.paths, offer.freed, strict=True):
                if path in still_offered:
                    _delete(path)
                    total += freed
    return total


def _paths(folder: Path, name: str) -> list[Path]:
    """Return what a category can delete, in order, without what lies in a folder that is deleted as a whole."""
    found = {path for path in CATEGORIES[name].find(folder) if _is_inside(path)}
    return sorted(path for path in found if not found & {*path.parents})


def _is_inside(path: Path) -> bool:
    """Return whether a path of a run is in the run's folder: what is behind a link may be another run's."""
    run_folder = next(parent for parent in path.parents if (parent / "run.yaml").exists())
    return path.parent.resolve().is_relative_to(run_folder.resolve())


def _places(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the folders that the categories concern, each of which has a lock."""
    own = [folder] if (folder / "run.yaml").exists() else []
    trials = [place for experiment in _experiments(folder) for place in (experiment, *_trials(experiment))]
    return [*own, *(trials if "trials" in names else [])]


def _check_idle(folder: Path) -> None:
    """Raise ValueError if a process works in a run's folder."""
    if is_locked(folder):
        raise ValueError(f"{folder}: in use by a running process; wait for it to end, or stop it")
    if (folder / ".ranks.lock").exists():
        wait_for_ranks_to_end(folder / ".ranks.lock", 0)


def _leftovers(folder: Path) -> Iterator[Path]:
    """Yield what killed processes left, and what a complete stage needed only before it was complete."""
    if not (folder / "run.yaml").exists():
        return
    run = read_run(folder)
    for pattern in _HIDDEN:
        yield from (path for path in folder.rglob(f".{pattern}"))
    yield from (path for name in _SCRATCH for path in folder.rglob(name))
    done = {row.name for row in status_of(run) if row.state == "done"}
    if "prepare" in done:
        yield from folder.glob("corpus/staging")
    yield from (path for path in folder.glob("rounds/1/inherit/*") if path.name in ("work", "taylor"))
    for number in range(1, run.config.rounds.num_rounds + 1):
        if f"score {number}" in done:
            yield from run.round_folder(number).glob("losses/parts")
        if f"train {number}" in done:
            checkpoints = run.round_folder(number) / "checkpoint"
            yield from checkpoints.glob("damaged-*")
            yield from list_checkpoints(checkpoints)[:-1]


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the final checkpoints of rounds after which another round is complete."""
    if not (folder / "run.yaml").exists():
        return
    run = read_run(folder)
    is_open = {
        step.place for step, row in zip(steps_of(run.config), status_of(run), strict=True) if row.state != "done"
    }
    for number in range(1, run.config.rounds.num_rounds):
        if not any(place <= number + 1 for place in is_open):
            yield from list_checkpoints(run.round_folder(number) / "checkpoint")[-1:]


def _checkpoints_of_trials(folder: Path) -> Iterator[Path]:
    """Yield the final checkpoints of finished trials; those that other trials start from are kept."""
    for experiment in _experiments(folder):
        for trial in _trials(experiment):
            # A fork of a trial is made beside it, but is a run of its own.
            if not (trial / FORK).exists() and _is_finished(trial, experiment):
                yield from sorted(trial.glob("rounds/*/checkpoint/step-*"))


def _is_finished(trial: Path, experiment: Path) -> bool:
    """Return whether nothing is to be trained, measured or shared from a trial any more."""
    # The arms of a comparison continue from its bases; arms of more rounds, from those of fewer.
    is_start = trial.name.startswith(("base-seed-", "rounds-"))
    # A search measures the generation speed of its trials at the end.
    is_measured = not experiment.name.endswith("-sweep") or (trial / "rounds" / "1" / "generation.json").exists()
    return not is_start and is_measured and is_done(trial)


def _holds_trials(folder: Path) -> bool:
    """Return whether a folder of runs is one of trials; in others, such as runs/, are runs of their own."""
    return folder.absolute().name.endswith(_EXPERIMENTS) and bool(_trials(folder))


def _experiments(folder: Path) -> list[Path]:
    """Return the folders of trials beside a run, or the folder itself if it holds trials."""
    if not (folder / "run.yaml").exists():
        return [folder] if _holds_trials(folder) else []
    place = folder.absolute()
    beside = (place.with_name(f"{place.name}{suffix}") for suffix in _EXPERIMENTS)
    return [place for place in beside if place.is_dir()]


def _trials(experiment: Path) -> list[Path]:
    return sorted(path.parent for path in experiment.glob("[!.]*/run.yaml"))


# What `reprise clean` offers, by name.
CATEGORIES = {
    category.name: category
    for category in (
        Category("leftovers", "what killed processes and finished stages left", "nothing", _leftovers),
        Category(
            "checkpoints",
            "checkpoints of earlier rounds",
            "these rounds cannot be evaluated or scored anew, exported, forked after, started from, or inherited from",
            _checkpoints,
        ),
        Category(
            "trials",
            "checkpoints of finished trials of comparisons, ladders, searches and grids",
            "these trials cannot be evaluated anew, exported, forked, started from, or inherited from",
            _checkpoints_of_trials,
        ),
    )
}


def _links(paths: Iterable[Path]) -> Counter[tuple[int, int]]:
    """Return how many names of each file, by device and inode, are below `paths`."""
    names = {file for path in paths for file in _files(path)}
    return Counter((state.st_dev, state.st_ino) for state in map(os.lstat, names))


def _offer(category: Category, paths: Sequence[Path], counts: Counter[tuple[int, int]]) -> Offer:
    sizes = [_bytes(path, counts) for path in paths]
    return Offer(category, paths, [freed for freed, _ in sizes], [shared for _, shared in sizes])


def _bytes(path: Path, counts: Counter[tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes below `path` that are freed if all names that `counts` counts are deleted, and those that stay.

    A file frees its bytes where its last name is deleted: one that another run shares by a hard link frees none. One
    with several names among those deleted is divided among them.
    """
    freed = shared = 0.0
    for file in _files(path):
        state = os.lstat(file)
        names = counts[state.st_dev, state.st_ino]
        if names >= state.st_nlink:
            freed += state.st_size / names
        else:
            shared += state.st_size
    return round(freed), round(shared)


def _files(path: Path) -> list[Path]:
    if path.is_symlink() or not path.is_dir():
        return [path]
    return [file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]


def _delete(path: Path) -> None:
    """Delete a file or folder; a kill leaves no half of it under its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    hidden = path
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
    shutil.rmtree(hidden)
