"""The run folder: the paths of a run's files, the completion records, and approvals."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import yaml
from pydantic import Field
from typing_extensions import TypedDict

from data_scoring.base.checksums import FileVerifier, WrittenFile
from data_scoring.base.field_types import Count, PathText
from data_scoring.base.files import fingerprint, write_record, writing
from data_scoring.base.sql import check_path
from data_scoring.base.validation import checked_record, read_record, validated
from data_scoring.base.yaml_text import read_yaml
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.refine_config import RefineConfig
from flows.run.config import RunConfig, differences, parse_config
from flows.run.fork_record import config_at
from flows.run.versions import package_versions
from trainer.checkpoint_folder import list_checkpoints

# Format of run.yaml: from 2 on, it ends with its checksum.
_FORMAT = 2
# Remembers which files were verified since they last changed.
VERIFIED = ".verified.json"
# What `open_run` and the lock have written, before there is a corpus.
_FILES_OF_A_START = {"run.yaml", "run.yaml.bak", ".lock", ".report.lock", ".ledger.lock", VERIFIED}


class File(TypedDict):
    """A file that a record lists."""

    bytes: Count
    checksum: str


class Files(TypedDict):
    """A record of files, by their paths in the run folder; those of version 0.8 list none."""

    files: NotRequired[dict[PathText, File]]


class Completion(Files):
    """The completion record of a stage."""

    fingerprint: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _StoredConfig(TypedDict):
    """What is read of a stored configuration before it is validated as a whole."""

    name: str | None
    output: PathText


class _Settings(TypedDict):
    """What is read of run.yaml; early versions did not write where the run was started."""

    config: _StoredConfig
    versions: dict[str, str]
    started_in: NotRequired[PathText]


class Approval(TypedDict):
    """The approved selection of a round."""

    policy: str
    sampling_rate: float


@dataclass(frozen=True)
class Run:
    """A run: its configuration and its folder. Completion is always read from the folder, never cached."""

    config: RunConfig
    folder: Path

    @property
    def corpus_folder(self) -> Path:
        """Return the folder of the corpus."""
        return self.folder / "corpus"

    def round_folder(self, round_number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / "rounds" / str(round_number)

    def corpus(self) -> Corpus:
        """Return the prepared corpus, opened. Raises ValueError if it is not complete."""
        return Corpus(self.corpus_folder)

    def has_trained(self, round_number: int) -> bool:
        """Return whether a round's training has begun: there is a checkpoint, or the record of one that was deleted."""
        checkpoints = list_checkpoints(self.round_folder(round_number) / "checkpoint")
        return bool(checkpoints) or self.record_path("train", round_number).exists()

    def config_at(self, place: int) -> RunConfig:
        """Return the configuration of the stages at `place`: 0 before the first round, then the round's number.

        It is the run's own, except that a fork keeps the settings of the rounds that it shares.
        """
        return config_at(self.config, self.folder, place)

    def refine_config(self, round_number: int) -> RefineConfig:
        """Return a round's refine configuration: the run's, with the approved changes."""
        approval, refine = self.approval(round_number), self.config_at(round_number).refine
        if approval is None:
            return refine
        return validated(
            RefineConfig,
            {**dict(refine), **approval},
            self.record_path("approval", round_number),
            "delete it and approve the round again",
        )

    def approval(self, round_number: int) -> Approval | None:
        """Return the approved fields of `refine` for a round, or None if it is not approved yet."""
        path = self.record_path("approval", round_number)
        return read_record(path, Approval, "delete it and approve the round again")

    def awaits_approval(self, round_number: int) -> bool:
        """Return whether a round's selection still needs approval."""
        return round_number > 1 and self.config.rounds.approval and self.approval(round_number) is None

    def approve(self, round_number: int, policy: str, sampling_rate: float) -> None:
        """Approve that a round trains on what `policy` and `sampling_rate` keep.

        Raises ValueError if the policy needs a field that the configuration does not set.
        """
        approval: Approval = {"policy": policy, "sampling_rate": sampling_rate}
        validated(RefineConfig, {**dict(self.config_at(round_number).refine), **approval}, "approval")
        write_record(self.record_path("approval", round_number), approval)

    def recorded(self, stage: str, round_number: int) -> str | None:
        """Return the fingerprint that a stage was completed with, or None if it was not completed."""
        record = self.completion(stage, round_number)
        return None if record is None else record["fingerprint"]

    def completion(self, stage: str, round_number: int) -> Completion | None:
        """Return the completion record of a stage, or None if it was not completed."""
        return read_record(self.record_path(stage, round_number), Completion)

    def record(self, stage: str, round_number: int, identity: str, started: float, files: Iterable[Path]) -> None:
        """Write the completion record of a stage with the fingerprint `identity` and the checksums of its `files`.

        started: its start time, in seconds since the epoch.
        """
        seconds = time.time() - started
        content = {
            "fingerprint": identity,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(seconds, 3),
            "files": self.measured(files),
        }
        write_record(self.record_path(stage, round_number), content)

    def measured(self, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Return the size and checksum of each file as a record lists them, by its path in the run folder."""
        return {
            path.relative_to(self.folder).as_posix(): {"bytes": written.num_bytes, "checksum": written.checksum}
            for path, written in self.verifier().measure(files).items()
        }

    def recorded_files(self, record: Path) -> dict[Path, WrittenFile]:
        """Return the files that `record` lists; see the function of this name."""
        return {self.folder / name: written for name, written in recorded_files(record).items()}

    def verifier(self, reads_all: bool = False) -> FileVerifier:
        """Return the verifier of the run's files; see `FileVerifier`."""
        return FileVerifier(self.folder / VERIFIED, reads_all)

    def forget(self, stage: str, round_number: int) -> None:
        """Delete the completion record of a stage, so that it is repeated."""
        self.record_path(stage, round_number).unlink(missing_ok=True)

    def record_path(self, stage: str, round_number: int) -> Path:
        """Return the path of a stage's completion record; that of `prepare` is the corpus' manifest."""
        if stage == "prepare":
            return self.corpus_folder / "manifest.json"
        return (self.round_folder(round_number) if round_number else self.corpus_folder) / f"{stage}.json"


def recorded_files(record: Path) -> dict[str, WrittenFile]:
    """Return the files that a completion record lists, by their paths in the run folder.

    Empty if the record does not exist, or was written before version 0.9.
    """
    content = read_record(record, Files)
    return {
        name: WrittenFile(entry["checksum"], entry["bytes"]) for name, entry in (content or {}).get("files", {}).items()
    }


def refuse_changes(stored: Run, config: RunConfig) -> None:
    """Raise ValueError, naming the fields, if `config` differs from that of the run in a field that decides results."""
    different = differences(stored.config, config)
    if different:
        raise ValueError(refusal(stored, different, "set another name, restore the fields, or delete the folder"))


def refusal(stored: Run, different: Iterable[str], remedy: str) -> str:
    """Return the error for a configuration that differs from that of the run in a way that is not allowed."""
    path = stored.folder / "run.yaml"
    return f"{path}: this folder was created by another configuration ({'; '.join(different)}); {remedy}"


def open_run(config: RunConfig, check_changes: Callable[[Run, RunConfig], None] = refuse_changes) -> Run:
    """Return the run of `config`, after creating its folder or checking an existing one.

    check_changes: raises ValueError if a run that has a corpus cannot go on with `config`. Raises ValueError, too, if
    `auto` is not resolved yet.
    """
    config.check_resolved()
    folder = config.folder.absolute()
    check_path(folder)
    path = folder / "run.yaml"
    # Before there is a corpus, nothing depends on the configuration: the user may have corrected it after an error.
    if (folder / "corpus" / "manifest.json").exists() and (path.exists() or _backup(path).exists()):
        check_changes(read_run(folder), config)
    run = Run(config, folder)
    write_settings(run)
    return run


def write_settings(run: Run) -> None:
    """Write the run's configuration to its folder, with the versions of the packages that it runs with."""
    config, path = run.config, run.folder / "run.yaml"
    content = {
        "format": _FORMAT,
        "config": config.model_dump(mode="json"),
        "started_in": str(config.base),
        "versions": package_versions(),
    }
    content["checksum"] = fingerprint(content)
    for each in (_backup(path), path):
        with writing(each) as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def forget_start(folder: Path) -> None:
    """Delete the folder of a run that failed before anything was made; one that holds anything else is kept."""
    if folder.is_dir() and not folder.is_symlink() and {path.name for path in folder.iterdir()} <= _FILES_OF_A_START:
        shutil.rmtree(folder)


def _backup(path: Path) -> Path:
    return path.with_name(f"{path.name}.bak")


def read_run(folder: Path) -> Run:
    """Return the run in `folder`. Raises ValueError if there is none."""
    path = folder / "run.yaml"
    if not path.is_file() and _backup(path).is_file():
        raise ValueError(f"{path}: missing; copy {_backup(path).name} to {path.name}")
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder (it has no run.yaml); start one with `reprise run CONFIG.yaml`")
    stored = _read_settings(path)
    base = _base(folder.absolute(), stored)
    return Run(parse_config({**stored["config"]}, str(path), base), folder.absolute())


def _read_settings(path: Path) -> _Settings:
    """Return what run.yaml holds. Raises ValueError if the file is incomplete or was changed."""
    remedy = f"restore it from a copy, such as {_backup(path)}"
    try:
        values: Any = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{error}; or {remedy}") from None
    if not isinstance(values, dict) or not {"config", "versions"} <= values.keys():
        raise ValueError(f"{path}: damaged: it is incomplete; {remedy}")
    checksum = values.pop("checksum", None)
    if (checksum is None and "format" in values) or checksum not in (None, fingerprint(values)):
        raise ValueError(f"{path}: damaged, or edited: its checksum differs from its content; {remedy}")
    return checked_record(values, _Settings, path, remedy)


def _base(folder: Path, stored: _Settings) -> Path:
    """Return the folder that relative paths of a run's configuration count from."""
    recorded = stored.get("started_in")
    # Unlike Path.is_dir, this is false for a path that the user may not see, or that is too long for this machine.
    if recorded is not None and os.path.isdir(recorded):  # noqa: PTH112
        return Path(recorded)
    # Runs of 0.8 and before did not record it, and a project may be moved as a whole.
    inner = Path(stored["config"]["output"], folder.name)
    is_below = not inner.is_absolute() and ".." not in inner.parts and folder.parts[-len(inner.parts) :] == inner.parts
    return folder.parents[len(inner.parts) - 1] if is_below else Path.cwd()
