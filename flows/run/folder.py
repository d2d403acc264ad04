"""The run folder: where everything of a run lies, what of it is complete, and who may write to it."""

import importlib.metadata
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_scoring.base.files import checksum, fingerprint, read_json, write_json, writing
from data_scoring.base.parquet import parquet_fingerprint
from data_scoring.config import Policy, RefineConfig
from data_scoring.contamination.contaminated_samples import samples_fingerprint
from data_scoring.corpus.corpus import Corpus
from data_scoring.evaluation.items import item_files
from data_scoring.evaluation.tasks import resolve_names
from data_scoring.losses.shard_scoring import losses_path
from flows.run.config import RunConfig, differences, parse_config

_PACKAGES = ("torch", "megatron-core", "datasets", "tokenizers", "pyarrow", "duckdb", "prefect", "numpy")

_NOT_IN_WEIGHTS = {
    "micro_batch_size",
    "loss_kernel",
    "activation_kernel",
    "validate_every_steps",
    "global_batch_tokens",
    "max_tokens",
}
# Changes with what an item's prompts, its scores, or their files are.
_EVALUATION_FORMAT = 1
# Fields that came after 0.3, with the value that leaves everything as it was: runs from before go on.
_NEUTRAL = {
    "start_from": None,
    "inherit": None,
    "init": "gpt2",
    "activation_terms": 1,
    "activation_scales": "channel",
    "shortcut_reduction": None,
    "shortcut_input": "normalised",
    "head_size": None,
    "tied_embeddings": False,
    "attention_bias": "none",
    "ffn_bias": False,
    "rotary_scaling": None,
}


@dataclass(frozen=True)
class Run:
    """A run: its configuration and its folder. What is done is read from the folder, never remembered."""

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
        """Return the prepared corpus, opened. Raises ValueError where it is not complete."""
        return Corpus(self.corpus_folder)

    def fingerprint(self, stage: str, round_number: int = 0) -> str:  # noqa: PLR0911 - a return a stage
        """Return what identifies a stage's inputs: its configuration and the fingerprints of the stages before it."""
        config = self.config
        if stage == "prepare":
            return fingerprint("prepare", config.corpus.model_dump(), config.tokenizer.model_dump(), config.seed)
        if stage == "refine":
            scored = self.fingerprint("score", round_number - 1)
            refine = self.refine_config(round_number)
            parts = [scored, refine.model_dump(exclude={"memory_gb"}), config.seed, round_number]
            if refine.policy == "excess":
                shards = range(config.corpus.num_shards)
                reference = Path(str(refine.reference))
                parts.append([parquet_fingerprint(losses_path(reference, shard)) for shard in shards])
            return fingerprint("refine", *parts)
        if stage == "inherit":
            model = config.model.model_dump(exclude={"preset", "start_from"})
            return fingerprint("inherit", self.corpus().fingerprint, model, config.seed)
        if stage == "mix":
            if round_number > 1:
                before = self.fingerprint("refine", round_number)
            else:
                before = self.fingerprint("prepare")
                late = sorted(rule.name for rule in config.refine.sources if rule.from_round > 1)
                if late or config.train.max_tokens is not None:
                    before = fingerprint(before, late, *filter(None, [config.train.max_tokens]))
                if config.eval.removes:
                    before = fingerprint(before, "without", self.contaminated_samples())
            return fingerprint("mix", before, self.corpus().fingerprint, config.seed, round_number)
        if stage == "train":
            # The mix stands for the round before too, whose weights this one starts from: it was scored with them.
            return fingerprint("train", self.fingerprint("mix", round_number), *self.training_inputs())
        trained = self.fingerprint("train", round_number)
        if stage == "evaluate":
            return fingerprint("evaluate", trained, *self._evaluation_inputs())
        assert stage == "score", stage
        budget = config.score.model_dump(include={"budget", "min_correlation", "calibration_samples"})
        return fingerprint("score", trained, budget)

    def contaminated_samples(self) -> str | None:
        """Return what identifies the samples with parts of evaluation items, or None where nobody has looked."""
        corpus = self.corpus()
        return samples_fingerprint(corpus.folder, corpus.fingerprint, self.config.eval.contamination_ngram)

    def _evaluation_inputs(self) -> list[Any]:
        """Return what decides what models are asked: the tasks, and the files that they are read from."""
        config = self.config.eval
        names = resolve_names(config.asked)
        files = [] if config.data is None else item_files(names, Path(config.data))
        prompts = importlib.metadata.version("lm_eval")
        return [_EVALUATION_FORMAT, prompts, names, config.limit, [[path.name, checksum(path)] for path in files]]

    def training_inputs(self) -> list[dict[str, Any]]:
        """Return what of the model's and training's configuration decides the weights that a round ends with."""
        train = self.config.resolved_train.model_dump(exclude=_NOT_IN_WEIGHTS)
        model = self.config.model.model_dump(exclude={"preset"})
        return [{name: value for name, value in model.items() if _NEUTRAL.get(name, ...) != value}, train]

    def refine_config(self, round_number: int) -> RefineConfig:
        """Return how a round is refined: as the configuration says, unless another way was approved."""
        approval = self.approval(round_number)
        if approval is None:
            return self.config.refine
        return RefineConfig.model_validate({**self.config.refine.model_dump(), **approval})

    def approval(self, round_number: int) -> dict[str, Any] | None:
        """Return the fields of `refine` with which a round's selection was approved, or None where it was not yet."""
        approval: dict[str, Any] | None = read_json(self._record_path("approval", round_number))
        return approval

    def awaits_approval(self, round_number: int) -> bool:
        """Return whether somebody has to approve what a round trains on before it does."""
        return round_number > 1 and self.config.rounds.approval and self.approval(round_number) is None

    def approve(self, round_number: int, policy: Policy, sampling_rate: float) -> None:
        """Record that a round may train on what `policy` and `sampling_rate` keep.

        Raises ValueError where the policy needs what the configuration does not say.
        """
        approval = {"policy": policy, "sampling_rate": sampling_rate}
        RefineConfig.model_validate({**self.config.refine.model_dump(), **approval})
        write_json(self._record_path("approval", round_number), approval)

    def is_complete(self, stage: str, round_number: int = 0) -> bool:
        """Return whether a stage has completed with the inputs that it would have now."""
        if stage == "prepare":
            manifest = read_json(self.corpus_folder / "manifest.json")
            return manifest is not None and manifest["stage_fingerprint"] == self.fingerprint("prepare")
        record = read_json(self._record_path(stage, round_number))
        return record is not None and record["fingerprint"] == self.fingerprint(stage, round_number)

    def record(self, stage: str, round_number: int, started: float) -> None:
        """Write the completion record of a stage that began at the time `started` (seconds since the epoch)."""
        now = time.time()
        content = {
            "fingerprint": self.fingerprint(stage, round_number),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(now - started, 3),
        }
        write_json(self._record_path(stage, round_number), content)

    def forget(self, stage: str, round_number: int) -> None:
        """Delete the completion record of a stage, which so is done anew."""
        self._record_path(stage, round_number).unlink(missing_ok=True)

    def _record_path(self, stage: str, round_number: int) -> Path:
        return self.round_folder(round_number) / f"{stage}.json"


def open_run(config: RunConfig) -> Run:
    """Return the run of `config`, its folder made or, where it is there, checked to be made by the same configuration.

    Raises ValueError, naming the fields that differ, where the folder is another run's.
    """
    folder = config.folder.absolute()
    path = folder / "run.yaml"
    # Until there is a corpus nothing depends on the configuration, and correcting it is what an error asked for.
    if path.exists() and (folder / "corpus" / "manifest.json").exists():
        different = differences(read_run(folder).config, config)
        if different:
            raise ValueError(
                f"{path}: this folder was made by another configuration ({'; '.join(different)}); "
                "set another name, or take the fields back, or delete the folder"
            )
    content = {"config": config.model_dump(mode="json"), "versions": package_versions()}
    with writing(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Run(config, folder)


def read_run(folder: Path) -> Run:
    """Return the run in `folder`. Raises ValueError where there is none."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder (it has no run.yaml); start one with `reprise run CONFIG.yaml`")
    values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Run(parse_config(values["config"], str(path)), folder.absolute())


def package_versions() -> dict[str, str]:
    """Return the versions of Python, Reprise and what its results depend on."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"reprise": importlib.metadata.version("reprise"), "python": platform.python_version(), **versions}
