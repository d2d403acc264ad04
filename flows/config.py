"""The configuration of a whole run: every section, where it is read from, and what it refuses."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from data_scoring.config import Config, CorpusConfig, RefineConfig, ScoreConfig, TokenizerConfig
from trainer.config import CheckpointConfig, ModelConfig, ParallelConfig, TrainConfig, check_layout


class RoundsConfig(Config):
    """How many rounds are trained."""

    num_rounds: int = Field(default=2, ge=1, le=100, description="Rounds; each but the last is scored and refined.")


class RunConfig(Config):
    """One run: a corpus, a model, and rounds of training, scoring and refining."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(
        description="Name of the run and of its folder."
    )
    output: str = Field(default="runs", min_length=1, description="Folder that holds run folders.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of everything drawn at random.")
    device: Literal["auto", "cuda", "npu", "cpu"] = Field(default="auto", description="Device that ranks run on.")
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    score: ScoreConfig = ScoreConfig()
    refine: RefineConfig = RefineConfig()
    rounds: RoundsConfig = RoundsConfig()

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.output) / self.name


# What may differ when a run goes on: where and how fast it computes, not what.
_FREE = (
    "name", "output", "device", "parallel", "checkpoint", "rounds.num_rounds", "score.micro_batch_size",
    "train.micro_batch_size", "train.validate_every_steps",
)  # fmt: skip


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Return the configuration in the YAML file `path` with `overrides`, such as refine.sampling_rate=0.3, applied.

    Raises ValueError, a line for each mistake, naming file and field.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a run's YAML configuration, such as configs/demo.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}); repair it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no configuration; write fields such as name: and corpus:")
    for override in overrides:
        _apply(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], origin: str) -> RunConfig:
    """Return the configuration that `values` spell; `origin` names them in errors, which are ValueErrors."""
    try:
        config = RunConfig.model_validate(values)
        check_layout(config.model, config.train, config.parallel)
    except ValidationError as error:
        details = error.errors()
        # A list counts as too short when its entries are wrong; the entries' own mistakes are what to mend.
        places = [detail["loc"] for detail in details]
        shown = [
            detail
            for detail in details
            if not any(place != detail["loc"] and place[: len(detail["loc"])] == detail["loc"] for place in places)
        ]
        raise ValueError("\n".join(f"{origin}: {_explain(detail)}" for detail in shown)) from None
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return config


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"--set {override}: not FIELD=VALUE; write for example --set refine.sampling_rate=0.3")
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section} is not a section; name a field such as refine.sampling_rate")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: the value is not valid YAML; put it in quotes") from None


def _explain(detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    field = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _fields_of(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
        return f"{field}: unknown field; {remedy}"
    if detail["type"] == "value_error":
        prefix = f"{field}." if field else ""
        return prefix + str(detail["ctx"]["error"])
    shown = "" if detail["type"] == "missing" else f" (it is {detail['input']!r})"
    return f"{field}: {detail['msg'][0].lower()}{detail['msg'][1:]}{shown}; correct it"


def _fields_of(location: list[str]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if part.isdigit():
            continue
        model = model.model_fields[part].annotation
        model = next((entry for entry in getattr(model, "__args__", ()) if hasattr(entry, "model_fields")), model)
    return list(model.model_fields)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return a line for each field in which `new` differs from `old` such that results would differ."""
    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    return [
        f"{name}: {before.get(name)!r} there, {after.get(name)!r} here"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in _FREE)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping from dotted field names to values."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = {str(number): entry for number, entry in enumerate(value)}.items()
    else:
        return {prefix: value}
    return {
        name: leaf
        for key, entry in items
        for name, leaf in flatten(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }
