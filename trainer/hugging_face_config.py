"""Hugging Face's description of a model, `config.json`, as ours, and ours as theirs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import ModelConfig
from trainer.hugging_face_files import read_object

# The last is ours: `trainer/modeling_reprise.py` goes with it.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "reprise": "RepriseForCausalLM",
}
# Fields of PanGu-π's additions, which have one name on both sides.
ADDITIONS = ("activation_terms", "activation_scales", "shortcut_reduction", "shortcut_input")
MODELLING = "modeling_reprise"
# What Megatron-Core's Llama 3 positions have fixed.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What fields of ours that errors name are called there.
_THEIR_NAMES = {
    "num_layers": "num_hidden_layers",
    "head_size": "head_dim",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "rotary_base": "rope_theta",
    "rotary_scaling": "factor",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
# The window of a Mistral that names none.
_MISTRAL_WINDOW = 4096
# Of an original description: what its weights were stored in, code of others, and what is written in another form.
_NOT_KEPT = ("dtype", "torch_dtype", "auto_map", "rope_parameters", "transformers_version", "_name_or_path")
# What of an original description holds for a model of another family too.
_OF_ANY_FAMILY = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def read_description(path: Path) -> tuple[ModelConfig, list[str]]:
    """Return the model that the `config.json` in `path` describes, and what there is to say about it, in sentences.

    Raises ValueError, naming the field, where it describes what our model cannot be.
    """
    fields = _Fields(path)
    family = fields.values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise fields.refuse("model_type", f"one of {', '.join(FAMILIES)} can be imported")
    for name, value in (("hidden_act", "silu"), ("quantization_config", None)):
        if fields.values.get(name, value) != value:
            raise fields.refuse(name, f"only {value} can be imported" if value else "only plain weights can")
    rotary_base, rotary_scaling = _read_rotary(fields)
    heads, width = fields.number("num_attention_heads"), fields.number("hidden_size")
    channels = fields.number("head_dim", 0)
    described = {
        "num_layers": fields.number("num_hidden_layers"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_size": None if channels * heads == width else channels or None,
        # Without it, Llama has a key-value head a query head; others have numbers of their own, which nobody means.
        "num_query_groups": fields.number("num_key_value_heads", heads if family == "llama" else None),
        "ffn_hidden_size": fields.number("intermediate_size"),
        "vocab_size": fields.number("vocab_size"),
        "tied_embeddings": fields.flag("tie_word_embeddings"),
        "attention_bias": _read_attention_bias(fields, family),
        "ffn_bias": family in ("llama", "reprise") and fields.flag("mlp_bias"),
        "rotary_base": rotary_base,
        "rotary_scaling": rotary_scaling,
        "norm_epsilon": 1e-6 if fields.values.get("rms_norm_eps") is None else fields.values["rms_norm_eps"],
        "init_std": fields.values.get("initializer_range") or 0.02,
    }
    if family == "reprise":
        described |= {name: fields.values[name] for name in ADDITIONS if name in fields.values}
    try:
        model = ModelConfig.model_validate(described)
    except ValidationError as error:
        raise ValueError(f"{path}: {_in_their_words(error)}") from None
    return model, _notes(fields, family)


def _in_their_words(error: ValidationError) -> str:
    """Return what is wrong with our description of a model, in the names that `config.json` has for its fields."""
    detail, *_ = error.errors()
    message = detail["msg"].removeprefix("Value error, ")
    if detail["loc"]:
        message = f"{detail['loc'][0]} is {detail['input']!r}; {message.replace('Input should be', 'give one that is')}"
    for ours, theirs in _THEIR_NAMES.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message


class _Fields:
    """The fields of a `config.json`, and errors that name them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_object(path)

    def refuse(self, name: str, remedy: str, values: dict[str, Any] | None = None) -> ValueError:
        """Return the error that the field `name`, of the file or of a part of it, cannot be what it is."""
        return ValueError(f"{self.path}: {name} is {(values or self.values).get(name)!r}; {remedy}")

    def number(self, name: str, default: int | None = None) -> int:
        """Return a whole number; where the field is missing or null, `default`, None for an error."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int:
            raise self.refuse(name, "give a whole number")
        return value

    def flag(self, name: str) -> bool:
        """Return whether the field is set."""
        value = self.values.get(name) or False
        if type(value) is not bool:
            raise self.refuse(name, "give true or false")
        return value


def _read_attention_bias(fields: _Fields, family: str) -> str:
    """Return which matrices of attention have biases, in our words."""
    if family == "qwen2":
        return "qkv"
    if family == "mistral" or not fields.flag("attention_bias"):
        return "none"
    return "qkv" if fields.values.get("attention_output_bias") is False else "all"


def _read_rotary(fields: _Fields) -> tuple[int, float | None]:
    """Return base and factor of the positions, as transformers 5 (`rope_parameters`) or 4 writes them."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    rope = fields.values.get(name) or {}
    if not isinstance(rope, dict):
        raise fields.refuse(name, "give what transformers writes there")
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.refuse(name, "only positions that are alike in all layers can be imported")
    every = {**fields.values, **rope}
    base = every.get("rope_theta", 10_000)
    # What is no number at all, such as NaN, is not between them either.
    if type(base) not in (int, float) or not 1 <= base < 2**63 or base != int(base):
        raise fields.refuse("rope_theta", "only whole numbers can be imported", every)
    if every.get("partial_rotary_factor") not in (None, 1):
        raise fields.refuse("partial_rotary_factor", "only 1, all channels turned, can be imported", every)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return int(base), None
    if kind != "llama3":
        raise ValueError(f"{fields.path}: {name} is of type {kind!r}; only default and llama3 can be imported")
    for field, value in _LLAMA3.items():
        if rope.get(field) != value:
            raise fields.refuse(field, f"only {value:g} can be imported", rope)
    factor: Any = rope.get("factor")
    if type(factor) not in (int, float) or not 1 < factor < 2**63:
        raise fields.refuse("factor", "give the number, more than 1, by which llama3 stretches positions", rope)
    return int(base), float(factor)


def _notes(fields: _Fields, family: str) -> list[str]:
    notes, values = [], fields.values
    window = values.get("sliding_window", _MISTRAL_WINDOW if family == "mistral" else None)
    if family == "qwen2" and not values.get("use_sliding_window"):
        window = None
    if window:
        notes.append(
            f"sliding_window is {window}: beyond so many tokens this model attends to all of a sequence, which the "
            "original does not"
        )
    if "auto_map" in values and family != "reprise":
        notes.append("auto_map is left out: no code that comes with a model is ever run")
    return notes


def family_of(model: ModelConfig, preferred: str | None = None, barred: Sequence[str] = ()) -> str:
    """Return the family that `model` is written as: `preferred` where it can be, else the plainest that it fits.

    barred: families that it must not be of, for its tokenizer's sake.
    """
    bias, is_plain = model.attention_bias, model.activation_terms == 1 and model.shortcut_reduction is None
    fitting = {
        "qwen2": bias == "qkv" and not model.ffn_bias,
        # transformers refuses a Llama whose heads do not divide the width, whatever their size.
        "llama": model.hidden_size % model.num_attention_heads == 0,
        "mistral": bias == "none" and not model.ffn_bias,
    }
    names = [name for name, fits in fitting.items() if fits and is_plain and name not in barred]
    return preferred if preferred in names else [*names, "reprise"][0]


def has_zero_bias(model: ModelConfig, family: str) -> bool:
    """Return whether attention's output has a bias of zeros in `family`, which has biases on all of it or none."""
    return model.attention_bias == "qkv" and family in ("llama", "reprise")


def describe(model: ModelConfig, family: str, rows: int, dtype: str, original: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of `model` in a `family`, with an embedding of `rows`.

    original: that which it was imported with, or what else is known, such as ids of special tokens and the positions
    that it was trained for. All of it is kept where the family stays the same. Written as transformers 4 and 5 read it.
    """
    is_same = family == original.get("model_type")
    kept = {name: value for name, value in original.items() if is_same or name in _OF_ANY_FAMILY}
    scaling = {"rope_type": "llama3", "factor": model.rotary_scaling, **_LLAMA3} if model.rotary_scaling else None
    base = float(model.rotary_base)
    described = {
        "model_type": family,
        "architectures": [FAMILIES[family]],
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_groups,
        "head_dim": model.channels,
        "intermediate_size": model.ffn_size,
        "hidden_act": "silu",
        "vocab_size": rows,
        "tie_word_embeddings": model.tied_embeddings,
        # The first two for transformers 4, the third for 5.
        "rope_theta": base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": base, **(scaling or {"rope_type": "default"})},
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "torch_dtype": dtype,
    }
    if family in ("llama", "reprise"):
        described |= {"attention_bias": model.attention_bias != "none", "mlp_bias": model.ffn_bias}
    if family == "mistral" and not is_same:
        described["sliding_window"] = None
    if has_zero_bias(model, family):
        # No field of transformers, but one by which `read_description` knows.
        described["attention_output_bias"] = False
    if family == "reprise":
        described |= {name: getattr(model, name) for name in ADDITIONS}
        described["auto_map"] = {
            "AutoConfig": f"{MODELLING}.RepriseConfig",
            "AutoModelForCausalLM": f"{MODELLING}.RepriseForCausalLM",
        }
    return {**{name: value for name, value in kept.items() if name not in _NOT_KEPT}, **described}
