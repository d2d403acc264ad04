"""The arms of a comparison: what `reprise compare` varies, parsed from its options."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from re import fullmatch
from typing import Any, Literal, get_args

from data_scoring.base.messages import shown
from data_scoring.base.validation import validated
from data_scoring.base.yaml_text import read_yaml
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig
from flows.experiments.compare_results import BASE
from trainer.config import InheritConfig, InheritMethod, ModelConfig
from trainer.presets import fill_from_preset

# An arm that does not use losses does not exclude outliers either.
_BLIND = {"outlier_z": None}
# An arm's name is part of its folder's.
_ARM_NAME = r"[A-Za-z][A-Za-z0-9._-]*"
# The stems of the results of other comparisons, without `compare-`.
_TAKEN_STEMS = ("sampling-rates", "rounds", "inits", "vocab-sizes", "inherit")

# What a step of a ladder may set: the others decide no result, or what results are compared by.
_STEP_SECTIONS = ("corpus", "tokenizer", "model", "parallel", "train", "score", "refine", "rounds")
_SAME_TEXT = "decides which text is held out, which must be the same for all steps; set it in the configuration"
_SAME_TOKENS = "all steps train on as many tokens; leave it out, and give --tokens"
_COMMON = {
    ("corpus", "sources"): _SAME_TEXT,
    ("corpus", "validation_fraction"): _SAME_TEXT,
    ("corpus", "on_bad_record"): _SAME_TEXT,
    ("train", "max_tokens"): _SAME_TOKENS,
    ("refine", "max_tokens"): _SAME_TOKENS,
}


@dataclass(frozen=True)
class Arm:
    """An arm: its name, its folder's name, the fields that it sets, by section, and its last round."""

    name: str
    folder: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_rounds: int = 2

    @property
    def refine(self) -> dict[str, Any]:
        """Return the fields of `refine` that the arm sets."""
        return self.values.get("refine", {})


@dataclass(frozen=True)
class Comparison:
    """Arms that differ only in the option `option`; `stem` is the stem of the result files' names.

    shares_round: whether the arms continue from the same first round; if not, each trains its own.
    equal: what arms of one round 2 have in common: the tokens that they train on, the cost of these together with
    scoring, or nothing. origin: the option or the file that the arms come from, for messages.
    """

    option: str
    stem: str
    arms: tuple[Arm, ...]
    shares_round: bool = True
    equal: Literal["tokens", "cost"] | None = None
    origin: str = ""


BASE_ARM = Arm(BASE, "base", num_rounds=1)


def policy_comparison(text: str) -> Comparison:
    """Return the arms of a list of policies, such as loss,random. Raises ValueError for an unknown policy."""
    names = entries("--policies", text)
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"--policies: {name!r} is not a policy; choose from {', '.join(POLICIES)}")
    return Comparison("--policies", "compare", tuple(_policy_arm(name) for name in names), equal="tokens")


def _policy_arm(name: str) -> Arm:
    return Arm(name, name, {"refine": {"policy": name, **({} if POLICIES[name].needs_losses else _BLIND)}})


def arm_comparison(path: Path, refine: RefineConfig) -> Comparison:
    """Return the arms of a YAML file: names, and the fields of `refine` in which each differs from `refine`.

    Raises ValueError, naming the file and the arm, if a name or a field is invalid.
    """
    try:
        found = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a YAML file of arms, such as `name: {{policy: loss}}`") from None
    if path.stem in _TAKEN_STEMS:
        raise ValueError(
            f"{path}: its results, compare-{path.stem}, would replace those of another comparison; rename the file"
        )
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: no arms; write `name: {{policy: loss}}`, with fields of refine, for each")
    arms = []
    for name, fields in found.items():
        if not fullmatch(_ARM_NAME, str(name)) or name == BASE_ARM.folder:
            raise ValueError(
                f"{path}: {shown(name)} cannot name an arm; start with a letter, go on with letters, digits, '.', '_' "
                f"or '-', and use another name than {BASE_ARM.folder}"
            )
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: {name}: {shown(fields)} is not a section; give fields of refine: {{policy: loss}}"
            )
        if "max_tokens" in fields:
            raise ValueError(
                f"{path}: {name}: max_tokens: {shown(fields['max_tokens'])} would be replaced, since arms have equal "
                "tokens or cost; remove it, and give --tokens"
            )
        chosen = validated(RefineConfig, {**dict(refine), **fields}, f"{path}: {name}")
        blind = {} if chosen.policy_row.needs_losses or "outlier_z" in fields else _BLIND
        arms.append(Arm(name, name, {"refine": {**fields, **blind}}))
    return Comparison("--arms", f"compare-{path.stem}", tuple(arms), equal="tokens")


def rate_comparison(text: str) -> Comparison:
    """Return the arms of a list of sampling rates, from 0 (no second round) to 1 (everything)."""
    rates = sorted(numbers("--sampling-rates", text, 0, 1))
    arms = [Arm(f"{rate:g}", f"rate-{rate:g}", {"refine": {"sampling_rate": rate}}) for rate in rates]
    for place, rate in enumerate(rates):
        if rate == 0:
            arms[place] = Arm("0", BASE_ARM.folder, num_rounds=1)
        elif rate == 1:
            arms[place].refine.update(_BLIND)
    return Comparison("--sampling-rates", "compare-sampling-rates", tuple(arms))


def round_comparison(text: str) -> Comparison:
    """Return the arms of a list of numbers of rounds; each arm continues from the end of the previous one."""
    rounds = sorted(numbers("--rounds", text, 1, 100))
    if any(number % 1 for number in rounds):
        raise ValueError(f"--rounds: {text!r} contains a fraction; give integers")
    arms = tuple(Arm(f"{number:g}", f"rounds-{number:g}", {}, int(number)) for number in rounds)
    return Comparison("--rounds", "compare-rounds", arms)


def init_comparison(text: str) -> Comparison:
    """Return the arms of a list of initialisations, such as gpt2,internlm. Raises ValueError for an unknown one."""
    names, known = entries("--inits", text), get_args(ModelConfig.model_fields["init"].annotation)
    for name in names:
        if name not in known:
            raise ValueError(f"--inits: {name!r} is not an initialisation; choose from {', '.join(known)}")
    arms = tuple(Arm(name, f"init-{name}", {"model": {"init": name}}, num_rounds=1) for name in names)
    return Comparison("--inits", "compare-inits", arms, shares_round=False)


def vocabulary_comparison(text: str) -> Comparison:
    """Return the arms of a list of vocabulary sizes: each trains a tokenizer of that size, and a model with it."""
    sizes = sorted(numbers("--vocab-sizes", text, 257, 1_000_000))
    if any(size % 1 for size in sizes):
        raise ValueError(f"--vocab-sizes: {text!r} contains a fraction; give integers")
    arms = []
    for size in sizes:
        values: dict[str, dict[str, Any]] = {
            "tokenizer": {"path": None, "vocab_size": int(size)},
            "model": {"vocab_size": None},
        }
        arms.append(Arm(f"{size:.0f}", f"vocab-{size:.0f}", values, num_rounds=1))
    return Comparison(
        "--vocab-sizes", "compare-vocab-sizes", tuple(arms), shares_round=False, equal="tokens", origin="--vocab-sizes"
    )


def ladder_comparison(path: Path) -> Comparison:
    """Return the arms of a ladder's YAML file: named steps, each with the fields that it sets on top of the last.

    Raises ValueError, naming the file and the step, if a name or a section is invalid, or a field must not differ.
    """
    try:
        found = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a YAML file of steps, such as `base: {{}}`") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{path}: no steps; write `name: {{section: {{field: value}}}}` for each, and `base: {{}}` for the first"
        )
    arms: list[Arm] = []
    values: dict[str, dict[str, Any]] = {}
    for name, sections in found.items():
        if not fullmatch(_ARM_NAME, str(name)):
            raise ValueError(
                f"{path}: {shown(name)} cannot name a step; start with a letter, go on with letters, digits, '.', '_' "
                "or '-'"
            )
        values = {**values, **_step_values(f"{path}: {name}", sections, values)}
        # One round, unless a step sets `rounds.num_rounds`.
        arms.append(Arm(name, name, values, num_rounds=1))
    return Comparison("--steps", path.stem, tuple(arms), shares_round=False, equal="tokens", origin=str(path))


def _step_values(origin: str, sections: Any, before: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the sections that a step of a ladder sets, each on top of the same section of the steps before."""
    made = {}
    for section, fields in _mapping(origin, sections).items():
        if section not in _STEP_SECTIONS:
            raise ValueError(
                f"{origin}: {section}: a step cannot set this; choose from the sections {', '.join(_STEP_SECTIONS)}"
            )
        for name in _mapping(f"{origin}: {section}", fields):
            if (section, name) in _COMMON:
                raise ValueError(f"{origin}: {section}.{name}: {_COMMON[section, name]}")
        made[section] = {**before.get(section, {}), **_completed(origin, section, fields or {})}
    return made


def _completed(origin: str, section: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with those of a preset: the configuration below has a value for each of these."""
    if section != "model":
        return fields
    try:
        return fill_from_preset(fields)
    except ValueError as error:
        raise ValueError(f"{origin}: model.{error}") from None


def _mapping(origin: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: {shown(value)} is not a mapping; write fields, such as num_layers: 8")
    return value


def inherit_comparison(text: str, inherit: InheritConfig | None, layers: Sequence[int] | None = None) -> Comparison:
    """Return the arms of a list of inheritance methods, such as base,l1,learned; `inherit` has the other fields.

    layers: the layers to keep, if already known; `base` does not use them. Raises ValueError for an unknown method, or
    if `inherit` is None.
    """
    if inherit is None:
        raise ValueError("model.inherit: not set; name a larger model to inherit from, such as {from: runs/large}")
    names = entries("--methods", text)
    for name in names:
        if name not in get_args(InheritMethod):
            raise ValueError(f"--methods: {name!r} is not a method; choose from {', '.join(get_args(InheritMethod))}")
    arms = []
    for name in names:
        pinned = {} if layers is None or name == "base" else {"layers": tuple(layers)}
        values = {"model": {"inherit": {**inherit.model_dump(), "method": name, **pinned}}}
        arms.append(Arm(name, f"inherit-{name}", values, num_rounds=1))
    return Comparison("--methods", "compare-inherit", tuple(arms), shares_round=False)


def entries(option: str, text: str) -> list[str]:
    """Return the distinct entries of a comma-separated list. Raises ValueError, naming `option`, if it is empty."""
    found = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not found:
        raise ValueError(f"{option}: the list is empty; give comma-separated values")
    return found


def numbers(option: str, text: str, least: float, most: float) -> set[float]:
    """Return the numbers of a comma-separated list. Raises ValueError for an invalid entry."""
    try:
        found = {float(entry) for entry in entries(option, text)}
    except ValueError:
        raise ValueError(f"{option}: {text!r} is not a list of numbers; give comma-separated numbers") from None
    if not all(least <= number <= most for number in found):
        raise ValueError(f"{option}: {text!r} is not between {least} and {most}; give numbers in that range")
    return found
