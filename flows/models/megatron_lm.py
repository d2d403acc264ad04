"""Export of models as checkpoints of Megatron-LM: its layout of folders, and its arguments beside the weights."""

import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scoring.base.files import writing
from data_scoring.config import VOCABULARY_MULTIPLE, padded_vocab_size
from flows.models.hugging_face_models import Dtype, known_fields, new_folder, unfinished
from flows.models.hugging_face_tokenizers import give_tokenizer
from flows.run.stored_model import StoredModel, find_model
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.config import ModelConfig

TOKENIZER = "tokenizer"
# Of sequences, for an imported model whose own configuration gives none.
_DEFAULT_LENGTH = 2048
# Since version 3, the rows of linear_qkv are ordered as in ours.
_CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True)
class MegatronExport:
    """The exported checkpoint: its origin, its folder, options for Megatron-LM, and notes for the user."""

    checkpoint: Path
    folder: Path
    options: str
    notes: list[str]


def export_megatron(
    place: Path, round_number: int | None, output: Path | None, dtype: Dtype = "keep"
) -> MegatronExport:
    """Export a round of a run, or a model folder, to the folder `output`, which Megatron-LM's `--load` takes.

    It has iter_…/, a checkpoint of the weights in Megatron-Core's distributed format with Megatron-LM's arguments in
    common.pt, latest_checkpointed_iteration.txt, and tokenizer/ for transformers. It has no optimizer state. output:
    None: export/ in `place`. dtype: the type in which weights are stored. Raises ValueError, leaving nothing behind, if
    there is no such model or it is damaged.
    """
    stored = find_model(place, round_number)
    length = known_fields(stored).get("max_position_embeddings", _DEFAULT_LENGTH)
    output = output or _folder(stored)
    with new_folder(output) as folder:
        import torch

        from trainer.weights import Weights, write_weights

        weights = Weights(stored.checkpoint)
        kinds = weights.dtypes if dtype == "keep" else dict.fromkeys(weights.dtypes, getattr(torch, dtype))
        tensors = {name: (shape, kinds[name]) for name, shape in weights.shapes.items()}
        step = read_checkpoint_record(stored.checkpoint, "step")["step"]
        (folder / TOKENIZER).mkdir()
        give_tokenizer(stored, stored.config.vocab_size or stored.vocab_size, length, folder / TOKENIZER)
        arguments = megatron_arguments(stored.config, stored.vocab_size, length)
        common = {
            "args": Namespace(**arguments),
            "checkpoint_version": _CHECKPOINT_VERSION,
            "iteration": step,
            "num_floating_point_operations_so_far": 0,
        }
        write_weights(
            folder / f"iter_{step:07d}",
            tensors,
            lambda name, layer: weights.read(name, layer).to(kinds[name]),
            {"step": step, "vocab_size": stored.vocab_size},
            common,
        )
        with writing(folder / "latest_checkpointed_iteration.txt") as temporary:
            temporary.write_text(str(step), encoding="ascii")
    notes = [*unfinished(stored), *_beyond_megatron(stored.config)]
    return MegatronExport(stored.checkpoint, output, _options(stored.config, output), notes)


def _folder(stored: StoredModel) -> Path:
    name = "megatron" if stored.round_number is None else f"megatron-{stored.round_number}"
    return stored.place / "export" / name


def megatron_arguments(model: ModelConfig, vocab_size: int, length: int) -> dict[str, Any]:
    """Return the arguments of Megatron-LM that describe `model`, by their names in its code."""
    rows = model.vocab_size or vocab_size
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": model.num_groups != model.num_attention_heads,
        "num_query_groups": model.num_groups,
        "kv_channels": model.channels,
        "seq_length": length,
        "max_position_embeddings": length,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": model.rotary_scaling is not None,
        "rope_scaling_factor": model.rotary_scaling or 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_epsilon,
        "apply_layernorm_1p": False,
        "add_bias_linear": model.ffn_bias,
        "add_qkv_bias": model.attention_bias != "none",
        "swiglu": True,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "vocab_size": rows,
        "padded_vocab_size": padded_vocab_size(rows),
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "tokenizer_type": "HuggingFaceTokenizer",
        "ckpt_format": "torch_dist",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def _options(model: ModelConfig, folder: Path) -> str:
    """Return the options with which Megatron-LM loads the export; it takes all others from the checkpoint."""
    scaling = (
        "" if model.rotary_scaling is None else f" --use-rope-scaling --rope-scaling-factor {model.rotary_scaling}"
    )
    tokenizer = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(str(folder / TOKENIZER))}"
    epsilon = f"--norm-epsilon {model.norm_epsilon}{scaling}"
    return f"--load {shlex.quote(str(folder))} --use-checkpoint-args --finetune {epsilon} {tokenizer}"


def _beyond_megatron(model: ModelConfig) -> list[str]:
    """Return notes on the parts of the model for which Megatron-LM has no option."""
    biases = model.attention_bias == "all"
    parts = {
        f"the series informed activation (activation_terms: {model.activation_terms})": model.activation_terms > 1,
        "the augmented shortcut (shortcut_reduction)": model.shortcut_reduction is not None,
        f"attention_bias: {model.attention_bias} with ffn_bias: {model.ffn_bias}": biases != model.ffn_bias,
    }
    return [
        f"Megatron-LM has no option for {part}; give it a layer specification (--spec) that has it"
        for part, is_beyond in parts.items()
        if is_beyond
    ]
