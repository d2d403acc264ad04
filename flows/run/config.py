"""The configuration of a run: its sections, reading it from YAML, and its validation."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator

from data_scoring.base.field_effects import FREE, Decides, Neutral, is_free, is_in_name
from data_scoring.base.field_types import Integer, Name, Number, PathText, Pattern
from data_scoring.base.files import fingerprint
from data_scoring.base.names import OneOf
from data_scoring.base.user_paths import BASE, USER_PATH
from data_scoring.base.validation import validated
from data_scoring.base.yaml_text import read_yaml
from data_scoring.config import (
    Config,
    CorpusConfig,
    EvalConfig,
    ScoreConfig,
    SourceConfig,
    TokenizerConfig,
    prefix_of,
)
from data_scoring.refine.policies import SEEN_LOSS
from data_scoring.refine.refine_config import RefineConfig
from flows.run.launcher_kinds import LAUNCHER_KINDS, LauncherKind
from flows.run.overrides import apply_override, with_lists
from flows.run.trackers import TrackerConfig
from trainer.config import AUTO, SET_A_NUMBER, CheckpointConfig, ModelConfig, TrainConfig
from trainer.parallel_config import ParallelConfig, check_layout

# Text that comes with every Python installation: the default sources, which the demo uses.
_DEMO_SOURCES = (
    SourceConfig(name="topics", format="python", path="topics"),
    SourceConfig(name="docstrings", format="python", path="docstrings", max_documents=150),
    SourceConfig(name="source", format="python", path="source", max_documents=60),
)
_SBATCH_OPTION = (
    "--(begin|comment|constraint|cpus-per-gpu|cpus-per-task|deadline|exclude|exclusive|gpus|gpus-per-node|gpus-per-task|"
    "licenses|mail-type|mail-user|mem|mem-per-cpu|mem-per-gpu|network|nice|nodelist|oversubscribe|priority|reservation|"
    r"signal|switches|tmp|wckey)(=[A-Za-z0-9_.,:@%+*&|()\[\]-]*)?"
)
SlurmWord = Annotated[str, Pattern(r"[A-Za-z0-9_.,:=@+-]+", "one word of letters, digits and _ . , : = @ + -")]
# A resource of Ray's nodes: CPU, GPU, NPU, or one that the user named, such as accelerator_type:H100.
_ResourceName = Annotated[str, Pattern("[A-Za-z][A-Za-z0-9_.:-]{0,99}", "the name of a resource, such as GPU")]

# Addresses of Ray's client are left to its own message.
_RAY_ADDRESS = "auto|local|(ray://)?[A-Za-z0-9_.-]+:[0-9]{1,5}"

FirstOrder = Literal["random", "sources"]


class RoundsConfig(Config):
    """How many rounds are trained, whether selections need approval, and what a round takes over from the last."""

    num_rounds: Annotated[Integer, FREE] = Field(
        default=2, ge=1, le=100, description="Number of rounds; all but the last are scored and refined."
    )
    approval: Annotated[bool, FREE] = Field(
        default=False,
        description="Wait before each round after the first until a person has approved or changed its selection.",
    )
    num_parts: Annotated[Integer, Decides(("refine",)), Neutral(8, is_in_name=False)] = Field(
        default=8,
        ge=1,
        le=1000,
        description="Parts, equal stretches of a round's training order, that the forgetting figure shows and that "
        "refine.within: part draws from (paper: 8).",
    )
    first_order: Annotated[FirstOrder, Decides(("mix",)), Neutral("random", is_in_name=False)] = Field(
        default="random",
        description="Training order of round 1: random, or source after source as corpus.sources lists them, each in "
        "random order. Later rounds are in random order.",
    )
    lr_factor: Annotated[Number, Decides(("train",)), Neutral(1.0, is_in_name=False)] = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Factor of the peak learning rate from one round to the next: round k has train.lr x "
        "lr_factor^(k-1); 1: every round has the same peak.",
    )
    keep_optimizer: Annotated[bool, Decides(("train",)), Neutral(False, is_in_name=False)] = Field(
        default=False,
        description="Whether a round starts with the last round's optimizer state: Adam's moments and number of steps, "
        "and in bfloat16 the weights in single precision; otherwise, it starts with a fresh optimizer. Warm-up and "
        "learning-rate schedule start anew either way.",
    )


class SlurmConfig(Config):
    """The resources to request from Slurm, for launch.kind slurm."""

    partition: SlurmWord | None = Field(default=None, description="Partition (sbatch --partition).")
    account: SlurmWord | None = Field(default=None, description="Account to charge (sbatch --account).")
    qos: SlurmWord | None = Field(default=None, description="Quality of service (sbatch --qos).")
    gres: SlurmWord | None = Field(default=None, description="Devices per node, such as gpu:8 (sbatch --gres).")
    cpus_per_rank: Integer = Field(
        default=4,
        ge=1,
        le=1024,
        description="CPUs per rank; sbatch --cpus-per-task is this times the node's ranks. Ignored if options has "
        "--cpus-per-task or --cpus-per-gpu.",
    )
    time_limit: (
        Annotated[str, Pattern("[0-9]{1,7}(-[0-9]{1,2})?(:[0-9]{2}){0,2}", "a time such as 90, 12:00:00 or 2-00:00:00")]
        | None
    ) = Field(
        default=None,
        description=(
            "Time limit of a round's job, which trains, evaluates and scores, D-HH:MM:SS (sbatch --time); "
            "one that reaches it is submitted again."
        ),
    )
    options: tuple[
        Annotated[
            str, Pattern(_SBATCH_OPTION, "an option of sbatch that names no file and no user, such as --mem=64G")
        ],
        ...,
    ] = Field(
        default=(),
        description="Other sbatch options, such as --constraint=a100 or --exclusive; options that name files or "
        "users are rejected.",
    )

    @property
    def names_cpus(self) -> bool:
        """Return whether the other options set the number of CPUs."""
        return any(option.startswith(("--cpus-per-task", "--cpus-per-gpu")) for option in self.options)


class LaunchConfig(Config):
    """Where ranks are started, and how often they are restarted."""

    kind: Annotated[str, OneOf(lambda: LAUNCHER_KINDS)] = Field(
        default="local",
        description=f"{'; '.join(f'{name}: {kind.description}' for name, kind in LAUNCHER_KINDS.items())}.",
    )
    nodes: Integer = Field(default=1, ge=1, le=10_000, description="Hosts; all see the run folder at the same path.")
    processes_per_node: Integer | None = Field(
        default=None, ge=1, le=1024, description="Ranks per host; null: all ranks divided by the number of hosts."
    )
    rendezvous: Annotated[str, Pattern("[A-Za-z0-9_.-]+:[0-9]{1,5}", "HOST:PORT, such as node1:29400")] | None = Field(
        default=None, description="HOST:PORT of the rendezvous on this host, for kind local with several nodes."
    )
    rendezvous_port: Integer = Field(
        default=29_400, ge=1024, le=65_535, description="Port of the rendezvous on the first node, for kind slurm."
    )
    interface: Annotated[str, Pattern("[A-Za-z0-9_.-]+", "the name of a network interface, such as eth0")] | None = (
        Field(
            default=None,
            description="Network interface for communication between ranks; null: the one that routes to the "
            "rendezvous.",
        )
    )
    join_minutes: Number = Field(default=30.0, gt=0, le=1e5, description="Minutes to wait for all hosts to join.")
    max_restarts: Integer = Field(
        default=3, ge=0, le=1000,
        description="Consecutive restarts, without a new checkpoint in between, of a stage that lost ranks or hosts.",
    )  # fmt: skip
    slurm: SlurmConfig = SlurmConfig()
    address: Annotated[str, Pattern(_RAY_ADDRESS, "auto, local, or HOST:PORT, such as node1:6379")] | None = Field(
        default=None,
        description="Ray cluster, for kind ray: auto: the one that RAY_ADDRESS names, or that runs on this host; "
        "HOST:PORT; or local: one that is started on this host and ends with the launch; null: engine.address.",
    )
    resources: dict[_ResourceName, Annotated[Number, Field(ge=0.0001)]] = Field(
        default={},
        description="Resources of a node, for kind ray, by Ray's names, such as {GPU: 8}. Unless named: a CPU for each "
        "of the node's ranks, and a GPU or NPU with device cuda or npu.",
    )

    @model_validator(mode="after")
    def _check_port(self) -> "LaunchConfig":
        if self.rendezvous is not None and not 1 <= int(self.rendezvous.rpartition(":")[2]) <= 65_535:
            raise ValueError(f"rendezvous: {self.rendezvous} has no port between 1 and 65535; correct it")
        return self

    @property
    def launcher_kind(self) -> LauncherKind:
        """Return the description of the launcher that `kind` names."""
        return LAUNCHER_KINDS[self.kind]

    def check(self, num_ranks: int) -> None:
        """Raise ValueError if `num_ranks` does not match the nodes, or if the nodes lack a rendezvous."""
        if num_ranks % self.nodes or self.processes_per_node not in (None, num_ranks // self.nodes):
            raise ValueError(
                f"launch.nodes: {self.nodes} nodes with {self.processes_per_node or 'an equal number of'} processes "
                f"each do not match the {num_ranks} processes of parallel; change one of them"
            )
        if self.launcher_kind.is_joined and self.nodes > 1 and self.rendezvous is None:
            raise ValueError("launch.rendezvous: not set, but several nodes need it; give this host's HOST:PORT")


class EngineConfig(Config):
    """Where data stages work: prepare, contamination and refine."""

    kind: Literal["local", "ray"] = Field(
        default="local",
        description="local: processes of this host; ray: tasks on a Ray cluster, all of whose nodes see the run folder "
        "and the sources at the same paths; needs the extra ray.",
    )
    processes: Integer | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Processes, for kind local; null: one for each core, for text that takes a minute or more, else "
        "none but this one.",
    )
    address: Annotated[str, Pattern(_RAY_ADDRESS, "auto, local, or HOST:PORT, such as node1:6379")] = Field(
        default="auto",
        description="Ray cluster, for kind ray: auto: the one that RAY_ADDRESS names, or that runs on this host; "
        "HOST:PORT; or local: one that is started on this host and ends with the stage.",
    )
    cpus_per_task: Integer = Field(
        default=1,
        ge=1,
        le=1024,
        description="CPUs of a task, for kind ray; more of them leave each task more of a node's memory.",
    )


class RunConfig(Config):
    """One run: a corpus, a model, and rounds of training, scoring and refining."""

    name: Annotated[Name | None, FREE] = Field(
        default=None,
        description="Name of the run and of its folder, which may be renamed: letters, digits and _ . -; null: run- "
        "and a fingerprint of the configuration, so that the same configuration resumes and another one starts a new "
        "run.",
    )
    output: Annotated[PathText, USER_PATH, FREE] = Field(
        default="runs", description="Folder of the run folders; it may be moved."
    )
    seed: Integer = Field(default=0, ge=0, lt=2**31, description="Seed of all random numbers.")
    device: Annotated[Literal["auto", "cuda", "npu", "cpu"], FREE] = Field(
        default="auto", description="Device that ranks run on."
    )
    corpus: CorpusConfig = CorpusConfig(sources=_DEMO_SOURCES)
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    requested_parallel: Annotated[
        Annotated[Literal["auto"], Tag("<auto>")] | Annotated[ParallelConfig, Tag("<layout>")],
        Discriminator(lambda value: "<auto>" if value == AUTO else "<layout>"),
        FREE,
    ] = Field(
        default=ParallelConfig(),
        alias="parallel",
        description="How the model and the batch are divided among ranks; auto: as `reprise plan` chooses for the "
        "devices when the run starts.",
    )
    launch: Annotated[LaunchConfig, FREE] = LaunchConfig()
    engine: Annotated[EngineConfig, FREE] = EngineConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: Annotated[CheckpointConfig, FREE] = CheckpointConfig()
    score: ScoreConfig = ScoreConfig()
    refine: RefineConfig = RefineConfig()
    rounds: RoundsConfig = RoundsConfig()
    # A change only repeats the evaluation, unless contamination is `remove`: then the items decide the mix.
    eval: Annotated[EvalConfig, Decides(unless=("contamination", "remove"))] = EvalConfig()
    track: Annotated[tuple[TrackerConfig, ...], FREE] = Field(
        default=(), description="Experiment trackers that receive what the run records."
    )
    _base: Path | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any) -> None:
        """Keep the folder that relative paths count from."""
        self._base = (context or {}).get(BASE)

    @model_validator(mode="before")
    @classmethod
    def _fill_within(cls, values: Any) -> Any:
        """Draw within parts if round 1 reads one source after the other, unless `refine.within` is set.

        A draw within shards would leave out the last sources, whose losses are low, and round 2 forgets them
        (docs/study.md).
        """
        sections = values if isinstance(values, dict) else {}
        rounds, refine = sections.get("rounds"), sections.get("refine", {})
        if isinstance(rounds, dict) and rounds.get("first_order") == "sources" and isinstance(refine, dict):
            return {**sections, "refine": {"within": "part", **refine}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _fill_address(cls, values: Any) -> Any:
        """Launch on the Ray cluster of the engine, unless `launch.address` is set."""
        sections = values if isinstance(values, dict) else {}
        engine, launch = sections.get("engine"), sections.get("launch")
        if isinstance(engine, dict) and isinstance(launch, dict) and launch.get("kind") == "ray":
            found = launch.get("address") or engine.get("address")
            return {**sections, "launch": {**launch, "address": found}}
        return values

    @model_validator(mode="after")
    def _check_layout(self) -> "RunConfig":
        layout = ParallelConfig() if self.requested_parallel == AUTO else self.parallel
        check_layout(self.model, self.resolved_train, layout, self.corpus.seq_length)
        for number in range(1, self.rounds.num_rounds + 1):
            self.train_of(number)
        if self.rounds.first_order == "sources" and self.train.max_tokens is not None:
            raise ValueError(
                "train.max_tokens: with rounds.first_order: sources, it would leave out the last sources; set "
                "corpus.sources[].max_documents instead"
            )
        self._check_budget()
        self._check_track()
        self._check_address()
        names = [source.name for source in self.corpus.sources]
        for rule in self.refine.sources:
            if rule.name not in names:
                raise ValueError(f"refine.sources: {rule.name!r} is not a source; choose from {', '.join(names)}")
        if all(any(rule.name == name and rule.from_round > 1 for rule in self.refine.sources) for name in names):
            raise ValueError(
                "refine.sources: all sources join after round 1, which has nothing to train on; lower one from_round"
            )
        if self.requested_parallel != AUTO:
            self.launch.check(self.parallel.world_size)
        if (prefix_of(self.score.budget) or 0) > self.corpus.seq_length:
            raise ValueError(
                f"score.budget: {self.score.budget} is more than the corpus.seq_length of {self.corpus.seq_length}; "
                "lower it, or set full"
            )
        if self.eval.contamination != "off" and not self.eval.asked:
            raise ValueError(
                f"eval.contamination: {self.eval.contamination!r} needs evaluation items; set eval.tasks, or set off"
            )
        if not self.launch.launcher_kind.sees_devices and self.device == "auto":
            raise ValueError(
                f"device: 'auto' cannot detect the nodes' devices with launch.kind {self.launch.kind}; "
                "set cuda, npu or cpu"
            )
        return self

    def _check_address(self) -> None:
        """Raise ValueError if engine and launcher name different Ray clusters."""
        address = self.launch.address or "auto"
        if self.engine.kind == self.launch.kind == "ray" and address != self.engine.address:
            raise ValueError(
                f"launch.address: {address}, but engine.address is {self.engine.address}, and a process connects to "
                "one Ray cluster; set the same"
            )

    def _check_track(self) -> None:
        names = [tracker.name for tracker in self.track]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"track: {name} is listed more than once; leave the others out")

    def _check_budget(self) -> None:
        budget = self.score.budget
        if SEEN_LOSS in self.refine.columns and budget != "full":
            raise ValueError(
                f"score.budget: {budget!r} does not give the losses of whole samples, which policy "
                f"{self.refine.policy} compares with seen losses; set full"
            )
        if budget == "seen" and any(rule.from_round > 1 for rule in self.refine.sources):
            raise ValueError(
                "score.budget: 'seen' has no losses for sources that join later (refine.sources); set another budget"
            )
        if budget == "seen" and self.train.max_tokens is not None:
            raise ValueError(
                "score.budget: 'seen' has no losses for samples that train.max_tokens leaves out; set another budget"
            )
        if budget == "seen" and self.eval.removes:
            raise ValueError(
                "score.budget: 'seen' has no losses for samples that eval.contamination: remove leaves out; set "
                "another budget"
            )
        prefix = prefix_of(budget)
        if prefix is not None and prefix < self.refine.min_tokens:
            raise ValueError(
                f"score.budget: {budget!r} scores fewer tokens than refine.min_tokens {self.refine.min_tokens} "
                "requires; change one of them"
            )

    @property
    def parallel(self) -> ParallelConfig:
        """Return how the model and the batch are divided. Raises ValueError if that is `auto` and not chosen yet."""
        if isinstance(self.requested_parallel, str):
            raise ValueError(f"parallel: {AUTO} is not resolved here; {SET_A_NUMBER}")
        return self.requested_parallel

    @property
    def is_auto(self) -> bool:
        """Return whether the layout or the micro batch is still to be chosen for the devices."""
        return AUTO in (self.requested_parallel, self.train.requested_micro_batch_size)

    def check_resolved(self) -> None:
        """Raise ValueError if the layout or the micro batch is still to be chosen."""
        _ = self.parallel, self.train.micro_batch_size

    def with_choice(self, parallel: ParallelConfig, micro_batch_size: int) -> "RunConfig":
        """Return a copy with this layout and micro batch. Raises ValueError if they do not divide the batch evenly."""
        train = self.train.model_copy(update={"requested_micro_batch_size": micro_batch_size})
        copy = self.model_copy(update={"requested_parallel": parallel, "train": train})
        check_layout(copy.model, copy.resolved_train, parallel, copy.corpus.seq_length)
        return copy

    @property
    def resolved_train(self) -> TrainConfig:
        """Return `train` with its batch size in samples and its learning rates as numbers."""
        return self.train.resolve(self.corpus.seq_length)

    def train_of(self, round_number: int) -> TrainConfig:
        """Return `resolved_train` with the learning rates of a round.

        Raises ValueError if `rounds.lr_factor` brings the peak below `train.min_lr`, or to 10 or more.
        """
        train, factor = self.resolved_train, self.rounds.lr_factor ** (round_number - 1)
        if factor == 1:
            return train
        lr = float(train.lr) * factor  # type: ignore[arg-type]
        min_lr = lr / 10 if self.train.min_lr is None else self.train.min_lr
        if not min_lr <= lr < 10:
            raise ValueError(
                f"rounds.lr_factor: {self.rounds.lr_factor:g} gives round {round_number} a peak learning rate of "
                f"{lr:.3g}, which is not between train.min_lr {min_lr:.3g} and 10; change one of them"
            )
        return train.model_copy(update={"lr": lr, "min_lr": min_lr})

    @property
    def resolved_refine(self) -> RefineConfig:
        """Return `refine` with the number of samples per batch."""
        return self.refine.resolve(self.resolved_train.global_batch_size)

    @property
    def run_name(self) -> str:
        """Return `name`, or else a name derived from all fields that decide results."""
        if self.name is not None:
            return self.name
        values = flatten({**self.model_dump(), "refine": self.resolved_refine.model_dump()})
        return f"run-{fingerprint({field: value for field, value in values.items() if is_in_name(self, field)})}"

    @property
    def base(self) -> Path:
        """Return the folder that relative paths count from: that in which the run was started."""
        return self._base or Path.cwd()

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return Path(self.output) / self.run_name


def read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Return the configuration in the YAML file `path` with `overrides`, such as refine.sampling_rate=0.3, applied.

    Raises ValueError, in one line that names file and field.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {_other_file(path)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a configuration; write fields such as name: and corpus:")
    for override in overrides:
        apply_override(values, override, RunConfig)
    for field in ("name", "corpus"):
        # The defaults of these fields are only for trying out the deployment.
        if field not in values:
            raise ValueError(f"{path}: {field}: field required; add it")
    return parse_config(values, str(path))


def _other_file(path: Path) -> str:
    """Return what to give in place of a file that does not exist: one with a similar name, if there is one."""
    beside = [file.name for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)]
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "give a YAML configuration"


def override(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return `config` with `overrides`, such as refine.policy=top, applied. Raises ValueError for invalid ones."""
    values = with_lists(config.model_dump())
    for each in overrides:
        apply_override(values, each, RunConfig)
    return parse_config(values, "--set", config.base)


def parse_config(values: dict[str, Any], origin: str, base: Path | None = None) -> RunConfig:
    """Return the configuration in `values`. Raises ValueError for invalid values; the message starts with `origin`.

    base: the folder that relative paths count from, of a stored configuration; None: the working directory. A stored
    name is the run folder's, which may have been renamed to anything.
    """
    stored_name = {} if base is None else {"name": values.get("name")}
    config = validated(RunConfig, {**values, **dict.fromkeys(stored_name)}, origin, context={BASE: base})
    return config.model_copy(update=stored_name)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Return a line for each field that decides results in `old` or `new` and differs between them."""
    before, after = (
        flatten(
            {
                **config.model_dump(),
                "train": config.resolved_train.model_dump(),
                "refine": config.resolved_refine.model_dump(),
            }
        )
        for config in (old, new)
    )
    return [
        f"{name}: {_as_in_yaml(before.get(name))} there, {_as_in_yaml(after.get(name))} here"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not (is_free(old, name) and is_free(new, name))
    ]


def _as_in_yaml(value: Any) -> str:
    """Return a value as a configuration or --set gives it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


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
