"""The run folder: the paths of a run's files, the completion records, and approvals."""

import importlib.metadata
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_scoring.base.files import read_json, write_json, writing
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.refine_config import RefineConfig
from flows.run.config import RunConfig, differences, parse_config

_PACKAGES = ("torch", "megatron-core", "datasets", "tokenizers", "pyarrow", "duckdb", "prefect", "numpy")


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

    def refine_config(self, round_number: int) -> RefineConfig:
        """Return a round's refine configuration: the run's, with the approved changes."""
        approval = self.approval(round_number)
        if approval is None:
            return self.config.refine
        return RefineConfig.model_validate({**self.config.refine.model_dump(), **approval})

    def approval(self, round_number: int) -> dict[str, Any] | None:
        """Return the approved fields of `refine` for a round, or None if it is not approved yet."""
        approval: dict[str, Any] | None = read_json(self._record_path("approval", round_number))
        return approval

    def awaits_approval(self, round_number: int) -> bool:
        """Return whether a round's selection still needs approval."""
        return round_number > 1 and self.config.rounds.approval and self.approval(round_number) is None

    def approve(self, round_number: int, policy: str, sampling_rate: float) -> None:
        """Approve that a round trains on what `policy` and `sampling_rate` keep.

        Raises ValueError if the policy needs a field that the configuration does not set.
        """
        approval = {"policy": policy, "sampling_rate": sampling_rate}
        RefineConfig.model_validate({**self.config.refine.model_dump(), **approval})
        write_json(self._record_path("approval", round_number), approval)

    def recorded(self, stage: str, round_number: int) -> str | None:
        """Return the fingerprint that a stage was completed with, or None if it was not completed."""
        record = read_json(self._record_path(stage, round_number))
        return None if record is None else str(record["fingerprint"])

    def record(self, stage: str, round_number: int, identity: str, started: float) -> None:
        """Write the completion record of a stage with the fingerprint `identity`.

        started: its start time, in seconds since the epoch.
        """
        now = time.time()
        content = {
            "fingerprint": identity,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(now - started, 3),
        }
        write_json(self._record_path(stage, round_number), content)

    def forget(self, stage: str, round_number: int) -> None:
        """Delete the completion record of a stage, so that it is repeated."""
        self._record_path(stage, round_number).unlink(missing_ok=True)

    def _record_path(self, stage: str, round_number: int) -> Path:
        return self.round_folder(round_number) / f"{stage}.json"


def open_run(config: RunConfig) -> Run:
    """Return the run of `config`, after creating its folder or checking an existing one.

    Raises ValueError, naming the fields that differ, if the folder was created by another configuration.
    """
    folder = config.folder.absolute()
    path = folder / "run.yaml"
    # Before there is a corpus, nothing depends on the configuration: the user may have corrected it after an error.
    if path.exists() and (folder / "corpus" / "manifest.json").exists():
        different = differences(read_run(folder).config, config)
        if different:
            raise ValueError(
                f"{path}: this folder was created by another configuration ({'; '.join(different)}); "
                "set another name, restore the fields, or delete the folder"
            )
    content = {"config": config.model_dump(mode="json"), "versions": package_versions()}
    with writing(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Run(config, folder)


def read_run(folder: Path) -> Run:
    """Return the run in `folder`. Raises ValueError if there is none."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder (it has no run.yaml); start one with `reprise run CONFIG.yaml`")
    values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Run(parse_config(values["config"], str(path)), folder.absolute())


def package_versions() -> dict[str, str]:
    """Return the versions of Python, Reprise and the packages that results depend on."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"reprise": importlib.metadata.version("reprise"), "python": platform.python_version(), **versions}
