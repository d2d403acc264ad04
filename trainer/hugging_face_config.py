"""Conversion between Hugging Face's `config.json` and our `ModelConfig`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_scoring.base.messages import one_line, shown
from trainer.config import ModelConfig
from trainer.hugging_face_files import read_object

# The last is ours, implemented in `trainer/modeling_reprise.py`.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "reprise": "RepriseForCausalLM",
}
# Fields of PanGu-π's additions, which have the same names in both.
ADDITIONS = ("activation_terms", "activation_scales", "shortcut_reduction", "shortcut_input")
MODELLING = "modeling_reprise"
# Constants of Llama 3's RoPE scaling in Megatron-Core.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Hugging Face's names of our fields, for error messages.
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
# transformers' default for a Mistral that does not set it.
_MISTRAL_WINDOW = 4096
# Original fields that are dropped: the stored dtype, third-party code, and fields written in another form.
_NOT_KEPT = ("dtype", "torch_dtype", "auto_map", "rope_parameters", "transformers_version", "_name_or_path")
# Original fields that are kept when the family changes.
_OF_ANY_FAMILY = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def read_description(path: Path) -> tuple[ModelConfig, list[str]]:
    """Return the model that the `config.json` at `path` describes, and notes on differences, in sentences.

    Raises ValueError, naming the field, if it describes a model that ours cannot represent.
    """
    fields = _Fields(path)
    family = fields.values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise fields.refuse("model_type", f"only {', '.join(FAMILIES)} can be imported")
    for name, value in (("hidden_act", "silu"), ("quantization_config", None)):
        if fields.values.get(name, value) != value:
            raise fields.refuse(name, f"only {value} can be imported" if value else "only unquantised weights can be")
    rotary_base, rotary_scaling = _read_rotary(fields)
    heads, width = fields.number("num_attention_heads"), fields.number("hidden_size")
    channels = fields.number("head_dim", 0)
    described = {
        "num_layers": fields.number("num_hidden_layers"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_size": None if channels * heads == width else channels or None,
        # Without it, Llama has as many key-value heads as query heads; the other families' defaults are arbitrary.
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
    """Return the validation error of a `ModelConfig` in terms of the field names of `config.json`."""
    detail, *_ = error.errors()
    message = one_line(detail["msg"].removeprefix("Value error, "), 600)
    if detail["loc"]:
        remedy = re.sub("^(input|integer) should (be|fit)", r"give one that should \2", message, flags=re.IGNORECASE)
        remedy = remedy.replace("that should be", "that is").replace("that should fit", "that fits")
        message = f"{detail['loc'][0]} is {shown(detail['input'])}; {remedy}"
    for ours, theirs in _THEIR_NAMES.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return message


class _Fields:
    """The fields of a `config.json`, with errors that name them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_object(path)

    def refuse(self, name: str, remedy: str, values: dict[str, Any] | None = None) -> ValueError:
        """Return the error that the value of field `name`, in the file or in `values`, is not supported."""
        return ValueError(f"{self.path}: {name} is {(values or self.values).get(name)!r}; {remedy}")

    def number(self, name: str, default: int | None = None) -> int:
        """Return an integer field; `default` if it is missing or null. Raises ValueError if that is None too."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int:
            raise self.refuse(name, "give a whole number")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean field; False if it is missing or null."""
        value = self.values.get(name) or False
        if type(value) is not bool:
            raise self.refuse(name, "give true or false")
        return value


def _read_attention_bias(fields: _Fields, family: str) -> str:
    """Return the value of our `attention_bias`."""
    if family == "qwen2":
        return "qkv"
    if family == "mistral" or not fields.flag("attention_bias"):
        return "none"
    return "qkv" if fields.values.get("attention_output_bias") is False else "all"


def _read_rotary(fields: _Fields) -> tuple[int, float | None]:
    """Return RoPE's base and scaling factor, from the fields of transformers 5 (`rope_parameters`) or 4."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    rope = fields.values.get(name) or {}
    if not isinstance(rope, dict):
        raise fields.refuse(name, "give an object, as transformers writes it")
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.refuse(name, "only the same positions in all layers can be imported")
    every = {**fields.values, **rope}
    base = every.get("rope_theta", 10_000)
    # The comparison is also false for NaN.
    if type(base) not in (int, float) or not 1 <= base < 2**63 or base != int(base):
        raise fields.refuse("rope_theta", "only whole numbers can be imported", every)
    if every.get("partial_rotary_factor") not in (None, 1):
        raise fields.refuse("partial_rotary_factor", "only 1, rotating all channels, can be imported", every)
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
        raise fields.refuse("factor", "give llama3's scaling factor, a number greater than 1", rope)
    return int(base), float(factor)


def _notes(fields: _Fields, family: str) -> list[str]:
    notes, values = [], fields.values
    window = values.get("sliding_window", _MISTRAL_WINDOW if family == "mistral" else None)
    if family == "qwen2" and not values.get("use_sliding_window"):
        window = None
    if window:
        notes.append(
            f"sliding_window is {window}: beyond that many tokens, this model attends to the whole sequence, but the "
            "original does not"
        )
    if "auto_map" in values and family != "reprise":
        notes.append("auto_map is ignored: code that comes with a model is never run")
    return notes


def family_of(model: ModelConfig, preferred: str | None = None, barred: Sequence[str] = ()) -> str:
    """Return the family to export `model` as: `preferred` if it can represent the model, else the first that can.

    barred: families that cannot be used because of the tokenizer.
    """
    bias, is_plain = model.attention_bias, model.activation_terms == 1 and model.shortcut_reduction is None
    fitting = {
        "qwen2": bias == "qkv" and not model.ffn_bias,
        # transformers rejects a Llama whose num_attention_heads does not divide hidden_size, whatever head_dim is.
        "llama": model.hidden_size % model.num_attention_heads == 0,
        "mistral": bias == "none" and not model.ffn_bias,
    }
    names = [name for name, fits in fitting.items() if fits and is_plain and name not in barred]
    return preferred if preferred in names else [*names, "reprise"][0]


def has_zero_bias(model: ModelConfig, family: str) -> bool:
    """Return whether the output projection needs a zero bias in `family`, whose attention has all biases or none."""
    return model.attention_bias == "qkv" and family in ("llama", "reprise")


def describe(model: ModelConfig, family: str, rows: int, dtype: str, original: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of `model` as a member of `family`, with `rows` rows in the embedding.

    original: the config.json that it was imported with, or other known fields, such as the ids of special tokens and
    the context length. All of it is kept if the family stays the same. Readable by transformers 4 and 5.
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
        # The first two are for transformers 4, the third for 5.
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
        # Not a field of transformers; `read_description` reads it.
        described["attention_output_bias"] = False
    if family == "reprise":
        described |= {name: getattr(model, name) for name in ADDITIONS}
        described["auto_map"] = {
            "AutoConfig": f"{MODELLING}.RepriseConfig",
            "AutoModelForCausalLM": f"{MODELLING}.RepriseForCausalLM",
        }
    return {**{name: value for name, value in kept.items() if name not in _NOT_KEPT}, **described}
