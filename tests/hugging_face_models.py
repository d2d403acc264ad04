"""Small random models of transformers, what they compute, and Reprise's copies of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from flows.models.hugging_face_models import export_model, import_model
from trainer.checkpoint_shapes import shapes_of
from trainer.config import ModelConfig
from trainer.weights import write_weights

# No multiple of 128, and more than the tokenizer's.
ROWS = 301
_SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16_384,
    # The tokenizer's.
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    # Such that channels of each of the three kinds are there: kept, stretched, and between.
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
    "llama-tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "num_key_value_heads": 4,
        "rope_parameters": _LLAMA3,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1_000_000.0},
    "mistral": {"model_type": "mistral", "head_dim": 12, "sliding_window": 64, "dtype": "bfloat16"},
}
# One with all that transformers knows only by our modelling file, and biases.
PANGU = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    vocab_size=ROWS,
    activation_terms=2,
    activation_scales="layer",
    shortcut_reduction=8,
    shortcut_input="residual",
    attention_bias="all",
    ffn_bias=True,
)
TIED = ("llama-tied", "qwen2")


def make_models(folder: Path, tokenizer: Path) -> None:
    """Leave in `folder`, by name, each model as transformers saves it, Reprise's model folder of it, and what it gives.

    The last is ours, as transformers opens its export. <name>.pt has tokens, [2, 33], logits, [2, 32, rows], losses,
    [2, 32], and the gradients of their mean; and logits of the weights rounded to bfloat16, computed in it and not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

    for number, (name, fields) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        config = AutoConfig.for_model(**{**_SIZES, **fields})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        dtype = getattr(torch, fields.get("dtype", "float32"))
        model.to(dtype).save_pretrained(folder / name)
        shutil.copy(tokenizer, folder / name / "tokenizer.json")
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        # Cast there and back, a model would keep positions of the lower precision.
        opened = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        torch.save({**_compute(opened), **_compute_rounded(folder / name)}, folder / f"{name}.pt")
        import_model(folder / name, folder / f"{name}-imported")
    make_folder(PANGU, folder / "pangu-imported", tokenizer)
    export_model(folder / "pangu-imported", None, folder / "pangu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        opened = AutoModelForCausalLM.from_pretrained(folder / "pangu", trust_remote_code=True)
        torch.save({**_compute(opened), **_compute_rounded(folder / "pangu")}, folder / "pangu.pt")


def _tokens() -> Tensor:
    return torch.randint(0, ROWS, (2, 33), generator=torch.Generator().manual_seed(1))


def _compute_rounded(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    half, single = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
        for dtype in (torch.bfloat16, torch.float32)
    )
    with torch.no_grad():
        for parameter in single.parameters():
            parameter.copy_(parameter.bfloat16())
        tokens = _tokens()[:, :-1]
        return {"in bfloat16": half(tokens).logits.float(), "of rounded weights": single(tokens).logits}


def _compute(model: Any) -> dict[str, Any]:
    tokens = _tokens()
    logits = model(tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses.mean().backward()
    return {
        "tokens": tokens,
        "logits": logits.detach(),
        "losses": losses.detach().view(2, 32),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def make_folder(model: ModelConfig, folder: Path, tokenizer: Path) -> dict[str, Tensor]:
    """Make a model folder of random weights, and return these."""
    generator = torch.Generator().manual_seed(6)
    shapes = shapes_of(model, 384)
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    described = {name: (shape, torch.float32) for name, shape in shapes.items()}

    def produce(name: str, layer: int | None) -> Tensor:
        return weights[name] if layer is None else weights[name][layer]

    write_weights(folder / "checkpoint" / "step-00000000", described, produce, {"step": 0, "vocab_size": 300})
    (folder / "model.yaml").write_text(yaml.safe_dump(model.model_dump(mode="json")))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return weights
