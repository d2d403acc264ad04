"""Named models: the fields that `model.preset` fills in unless the configuration gives them."""

import math
from fractions import Fraction
from typing import Any

from data_scoring.base.field_types import whole
from data_scoring.base.messages import shown

_ADDITIONS = {"activation_terms": 2, "shortcut_reduction": 32}


# Width of the feed-forward layer / width of the model.
_EXPANSION = Fraction(8, 3)
# With 8/3, this preset would have 1.33 billion parameters, which is not its name.
_EXPANSIONS = {"pangu-pi-1.5b-pro": Fraction(27, 8)}


def _ffn_hidden_size(hidden_size: int, expansion: Fraction) -> int:
    """Return the width of the feed-forward layer: `expansion` times the model's width.

    It is rounded up to a multiple of 256, as in LLaMA and in InternEvo, with which the paper's models were trained.
    """
    return math.ceil(hidden_size * expansion / 256) * 256


def _fields(
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    vocab_size: int | None,
    expansion: Fraction = _EXPANSION,
) -> dict[str, Any]:
    """Return the fields that set a model's size."""
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "ffn_hidden_size": _ffn_hidden_size(hidden_size, expansion),
        "vocab_size": vocab_size,
    }


# The first three are those of "Rethinking Optimization and Architecture for Tiny Language Models"; llama-7b is LLaMA's.
# Models without a vocabulary take the tokenizer's.
PRESETS: dict[str, dict[str, Any]] = {
    "pangu-pi-1b": {**_fields(2048, 12, 16, 100_883), **_ADDITIONS},
    "pangu-pi-1b-pro": {**_fields(1792, 21, 14, 48_000), **_ADDITIONS},
    "pangu-pi-1.5b-pro": {**_fields(2048, 22, 16, 48_000, _EXPANSIONS["pangu-pi-1.5b-pro"]), **_ADDITIONS},
    "pangu-pi-2m": {**_fields(128, 6, 4, None), **_ADDITIONS},
    "pangu-pi-10m": {**_fields(256, 10, 4, None), **_ADDITIONS},
    "pangu-pi-30m": {**_fields(384, 14, 6, None), **_ADDITIONS},
    "llama": {},
    "llama-2m": _fields(128, 6, 4, None),
    "llama-10m": _fields(256, 10, 4, None),
    "llama-30m": _fields(384, 14, 6, None),
    "llama-150m": _fields(768, 14, 12, 32_000),
    "llama-400m": _fields(1024, 26, 16, 32_000),
    "llama-1b": _fields(1792, 22, 14, 32_000),
    "llama-3b": _fields(2560, 36, 20, 32_000),
    "llama-7b": _fields(4096, 32, 32, 32_000),
}


def fill_from_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model, completed with those of its `preset`.

    Raises ValueError if there is no preset of that name.
    """
    name = values.get("preset")
    if name is None:
        return values
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset: {shown(name)} is not a preset; choose one of {', '.join(PRESETS)}")
    fields = {**PRESETS[name], **values}
    hidden_size = whole(values.get("hidden_size"))
    if isinstance(hidden_size, int) and "ffn_hidden_size" in PRESETS[name] and "ffn_hidden_size" not in values:
        fields["ffn_hidden_size"] = _ffn_hidden_size(hidden_size, _EXPANSIONS.get(name, _EXPANSION))
    return fields
