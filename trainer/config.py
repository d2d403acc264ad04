"""Configuration of the model, its training and its layout over devices."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from data_scoring.base.field_effects import FREE, Decides, Neutral
from data_scoring.base.field_types import Integer, Number, PathText
from data_scoring.base.user_paths import USER_PATH
from data_scoring.config import Config, LossKernel
from trainer.presets import fill_from_preset

# Implementations of the series informed activation, in `kernels.series_activation`.
ActivationKernel = Literal["auto", "reference", "recompute", "triton"]
# Compute precision of models; with bfloat16, gradients and optimizer state are in single precision.
Precision = Literal["float32", "bfloat16"]
# What the backward pass computes again.
Recompute = Literal["none", "selective", "full"]
# How the neurons to keep are chosen; base: none are kept, weights are random.
InheritMethod = Literal["base", "l1", "l2", "taylor", "learned"]
LayerNumber = Annotated[Integer, Field(ge=0)]
_MOST_SAMPLES = 1_000_000
MOST_MICRO_BATCH_SIZE = 4096
# Value of the fields that are chosen for the devices when a run starts.
AUTO = "auto"
SET_A_NUMBER = "set what `reprise plan CONFIG` chooses"
# What weights are before training, and nothing of what a trained model computes.
BEGINNING = Decides(("inherit", "train"))


class InheritConfig(Config):
    """How round 1 inherits the most important layers and neurons of a larger model.

    Source: arXiv 2402.02791, "Parameter Inheritance".
    """

    teacher: Annotated[PathText, USER_PATH] = Field(
        alias="from", description="The larger model: a run's folder, or one of `reprise import hf`."
    )
    round: Integer | None = Field(default=None, ge=1, description="Round of that run; null: the last.")
    layers: Annotated[
        Annotated[Literal["auto"], Tag("<auto>")] | Annotated[tuple[LayerNumber, ...], Tag("<numbers>")],
        Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<numbers>"),
    ] = Field(
        default="auto",
        description="Layers of the larger model to keep, counted from 0, num_layers of them; auto: those whose removal "
        "increases the loss most.",
    )
    method: InheritMethod = Field(
        default="learned",
        description="How the neurons to keep are chosen: by weight magnitude (l1, l2), by weight times gradient "
        "(taylor) or by trained masks (learned); base: none are kept, the model is initialised at random.",
    )
    calibration_samples: Integer = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="Samples used for layer ablation and to measure gradients (taylor) or train masks (learned).",
    )
    mask_steps: Integer = Field(default=200, ge=1, le=1_000_000, description="Training steps of the masks (learned).")
    mask_lr: Number = Field(default=0.05, gt=0, le=10, description="Learning rate of the masks (learned).")

    @model_validator(mode="after")
    def _check_layers(self) -> "InheritConfig":
        if self.layers != "auto" and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers: {list(self.layers)} is not ascending; give layers of the larger model in order")
        return self


class ModelConfig(Config):
    """The model: a pre-norm decoder with RMSNorm, SwiGLU and rotary position embeddings, as in LLaMA.

    Biases, a tied embedding, and PanGu-π's series informed activation and augmented shortcut are options.
    """

    preset: Annotated[str | None, FREE] = Field(
        default=None, description="Name of a preset (`reprise model` lists them) that supplies the fields not given."
    )
    num_layers: Integer = Field(default=4, ge=1, le=1024, description="Transformer layers (depth).")
    hidden_size: Integer = Field(default=128, ge=8, le=65_536, description="Width of the residual stream.")
    num_attention_heads: Integer = Field(
        default=4, ge=1, le=1024, description="Query heads; divides hidden_size unless head_size is given."
    )
    head_size: Annotated[Integer | None, Neutral(None)] = Field(
        default=None, ge=2, le=4096, description="Channels per head; null: hidden_size / num_attention_heads."
    )
    num_query_groups: Integer | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Key-value heads, for grouped-query attention; null: num_attention_heads.",
    )
    ffn_hidden_size: Integer | None = Field(
        default=None,
        ge=8,
        le=1_048_576,
        description="Width of the feed-forward layer; null: 8/3 hidden_size, rounded to a multiple of 64.",
    )
    vocab_size: Integer | None = Field(
        default=None,
        ge=2,
        le=16_777_216,
        description="Vocabulary size of the embedding; null: the tokenizer's. Padded to a multiple of 128.",
    )
    tied_embeddings: Annotated[bool, Neutral(False)] = Field(
        default=False, description="Whether embedding and output layer share weights."
    )
    attention_bias: Annotated[Literal["none", "qkv", "all"], Neutral("none")] = Field(
        default="none",
        description="Attention projections with biases: none; qkv: queries, keys and values; all: the output "
        "projection too.",
    )
    ffn_bias: Annotated[bool, Neutral(False)] = Field(
        default=False, description="Whether the feed-forward projections have biases."
    )
    rotary_base: Integer = Field(default=10_000, ge=1, le=10**12, description="Base of the rotary position embedding.")
    rotary_scaling: Annotated[Number | None, Neutral(None)] = Field(
        default=None,
        gt=1,
        le=1e6,
        description="Factor of Llama 3's RoPE scaling beyond 8192 tokens; null: no scaling.",
    )
    norm_epsilon: Number = Field(default=1e-5, ge=1e-30, lt=1, description="Epsilon of RMSNorm.")
    init_std: Annotated[Number, BEGINNING] = Field(
        default=0.02, gt=0, lt=10, description="Standard deviation of the initial weights."
    )
    init: Annotated[Literal["constant", "gpt2", "internlm"], BEGINNING, Neutral("gpt2")] = Field(
        default="gpt2",
        description="Standard deviation of the projections onto the residual stream: constant: init_std; gpt2: "
        "init_std / √(2 num_layers); internlm: init_std / √(2 l) in layer l, counted from 1.",
    )
    activation_terms: Annotated[Integer, Neutral(1)] = Field(
        default=1, ge=1, le=16, description="Terms n of the series informed activation; 1: plain SwiGLU (PanGu-π: 2)."
    )
    activation_scales: Annotated[Literal["channel", "layer"], Neutral("channel")] = Field(
        default="channel",
        description="Granularity of the scales and offsets of the series informed activation: one pair per term and "
        "feed-forward channel, or per term and layer.",
    )
    shortcut_reduction: Annotated[Integer | None, Neutral(None)] = Field(
        default=None,
        ge=1,
        le=65_536,
        description="Reduction r of the augmented shortcut around attention, whose bottleneck has hidden_size / r "
        "channels; null: no shortcut (PanGu-π: 32).",
    )
    shortcut_input: Annotated[Literal["normalised", "residual"], Neutral("normalised")] = Field(
        default="normalised",
        description="Input of the augmented shortcut: residual: the residual stream as it is; normalised: scaled to a "
        "root mean square of 1.",
    )
    start_from: Annotated[PathText | None, USER_PATH, Decides(("train",)), Neutral(None)] = Field(
        default=None,
        description="Checkpoint (a step-… folder) of a model of the same shape from which round 1 starts; null: "
        "random weights.",
    )
    inherit: Annotated[InheritConfig | None, BEGINNING, Neutral(None)] = Field(
        default=None, description="Larger model whose layers and neurons round 1 inherits; null: none."
    )
    layers: Literal["torch", "transformer_engine"] = Field(
        default="torch", description="Implementation of the layers; transformer_engine needs CUDA and that package."
    )

    @property
    def ffn_size(self) -> int:
        """Return the effective feed-forward width."""
        return self.ffn_hidden_size or max(64, round(self.hidden_size * 8 / 3 / 64) * 64)

    @property
    def channels(self) -> int:
        """Return the effective number of channels per head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def num_groups(self) -> int:
        """Return the effective number of key-value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def inherits(self) -> bool:
        """Return whether round 1 inherits layers and neurons of a larger model."""
        return self.inherit is not None and self.inherit.method != "base"

    def layer_parameters(self, tensor: int = 1) -> int:
        """Return the number of weights per layer on each of `tensor` tensor-parallel ranks."""
        queries, keys_and_values = self.channels * self.num_attention_heads, 2 * self.channels * self.num_groups
        matrices = self.hidden_size * (2 * queries + keys_and_values) + 3 * self.hidden_size * self.ffn_size
        divided, whole = matrices, 2 * self.hidden_size
        if self.attention_bias != "none":
            divided += queries + keys_and_values
        if self.attention_bias == "all":
            whole += self.hidden_size
        if self.ffn_bias:
            divided += 2 * self.ffn_size
            whole += self.hidden_size
        # Scales and offsets of the activation, and the two matrices of the shortcut.
        if self.activation_terms > 1 and self.activation_scales == "channel":
            divided += 2 * self.activation_terms * self.ffn_size
        elif self.activation_terms > 1:
            whole += 2 * self.activation_terms
        if self.shortcut_reduction is not None:
            whole += 2 * self.hidden_size * (self.hidden_size // self.shortcut_reduction)
        return divided // tensor + whole

    def num_parameters(self, vocab_size: int) -> int:
        """Return the number of weights, including embedding and head for `vocab_size` entries without padding."""
        embeddings = (1 if self.tied_embeddings else 2) * vocab_size * self.hidden_size
        return self.num_layers * self.layer_parameters() + self.hidden_size + embeddings

    def embedding_share(self, vocab_size: int) -> float:
        """Return the share of the weights that embedding and head have, for `vocab_size` entries."""
        return 1 - self.num_parameters(0) / self.num_parameters(vocab_size)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        return fill_from_preset(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_inheritance(self) -> "ModelConfig":
        if self.inherit is None:
            return self
        if self.start_from is not None:
            raise ValueError("start_from: cannot be combined with model.inherit; leave one of them out")
        chosen = self.inherit.layers
        if chosen != "auto" and len(chosen) != self.num_layers:
            raise ValueError(
                f"inherit.layers: lists {len(chosen)} layers, but num_layers is {self.num_layers}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.head_size is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                "choose a divisor, or give head_size"
            )
        if self.channels % 2:
            field, value = (
                ("head_size", self.head_size) if self.head_size else ("num_attention_heads", self.num_attention_heads)
            )
            raise ValueError(
                f"{field}: {value} gives heads of {self.channels} channels, but rotary position embeddings need an "
                "even number; choose another value"
            )
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups: {self.num_query_groups} does not divide num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor"
            )
        if self.shortcut_reduction and self.hidden_size % self.shortcut_reduction:
            raise ValueError(
                f"shortcut_reduction: {self.shortcut_reduction} does not divide hidden_size {self.hidden_size}; "
                "choose a divisor, or null for no shortcut"
            )
        return self


class ScaledLr(Config):
    """A peak learning rate scaled by batch size: (batch / base_tokens)^increment_rate x base_lr.

    Source: arXiv 2402.02791, "Batchsize & Learning Rate".
    """

    rule: Literal["scaled"] = Field(default="scaled", description="Distinguishes this form from a plain number.")
    increment_rate: Number = Field(default=0.5, ge=0, le=2, description="Exponent r of the relative batch size.")
    base_lr: Number = Field(default=1e-4, gt=0, lt=10, description="Peak learning rate for batches of base_tokens.")
    base_tokens: Integer = Field(
        default=1_000_000, ge=1, description="Batch size, in tokens, at which base_lr applies."
    )

    def at(self, batch_tokens: int) -> float:
        """Return the peak learning rate for batches of `batch_tokens`."""
        return float(self.base_lr * (batch_tokens / self.base_tokens) ** self.increment_rate)


class TrainConfig(Config):
    """Training of a round: AdamW with linear warm-up and cosine decay over the round."""

    global_batch_size: Integer = Field(default=16, ge=1, le=_MOST_SAMPLES, description="Samples per optimizer step.")
    global_batch_tokens: Annotated[Integer | None, Neutral(None)] = Field(
        default=None,
        ge=1,
        description="Tokens per optimizer step, in place of global_batch_size; a multiple of corpus.seq_length.",
    )
    requested_micro_batch_size: Annotated[
        Annotated[Literal["auto"], Tag("<auto>")]
        | Annotated[Integer, Field(ge=1, le=MOST_MICRO_BATCH_SIZE), Tag("<number>")],
        Discriminator(lambda value: "<auto>" if value == AUTO else "<number>"),
        FREE,
    ] = Field(
        default=2,
        alias="micro_batch_size",
        description="Samples per forward pass; auto: as many as `reprise plan` chooses for the devices when the run "
        "starts.",
    )
    lr: Annotated[
        Annotated[Number, Field(gt=0, lt=10), Tag("<number>")] | Annotated[ScaledLr, Tag("<rule>")],
        Discriminator(lambda value: "<rule>" if isinstance(value, dict | ScaledLr) else "<number>"),
    ] = Field(default=2e-3, description="Peak learning rate, or {rule: scaled, …} to scale it by the batch's tokens.")
    min_lr: Number | None = Field(
        default=None, ge=0, lt=10, description="Learning rate at the end of a round; null: a tenth of the peak."
    )
    max_tokens: Annotated[Integer | None, Decides(("mix",))] = Field(
        default=None,
        ge=1,
        description="Most predicted tokens that round 1 trains on, in randomly drawn samples; null: everything. "
        "For later rounds, see refine.max_tokens.",
    )
    warmup_fraction: Number = Field(default=0.05, ge=0, lt=1, description="Share of a round's steps used for warm-up.")
    weight_decay: Number = Field(default=0.1, ge=0, lt=10, description="AdamW's decoupled weight decay.")
    adam_beta1: Number = Field(default=0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    adam_beta2: Number = Field(default=0.95, ge=0, lt=1, description="AdamW's second-moment decay.")
    clip_grad: Number = Field(default=1.0, gt=0, le=1e9, description="Gradient norm above which gradients are clipped.")
    validate_every_steps: Annotated[Integer, FREE] = Field(
        default=100, ge=1, description="Steps between validations; the end of a round is always validated."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute precision of the model; auto: bfloat16 on accelerators, float32 on CPU."
    )
    loss_kernel: Annotated[LossKernel, FREE] = Field(
        default="auto",
        description="Implementation of token losses and their gradients: reference holds all logits; chunked, on any "
        "device, holds a part of them and computes each twice; triton needs CUDA and the triton package; auto: triton "
        "where it runs, else chunked.",
    )
    activation_kernel: Annotated[ActivationKernel, FREE] = Field(
        default="auto",
        description="Implementation of the series informed activation, also used in scoring: reference keeps "
        "intermediates of every term for the backward pass; recompute, on any device, keeps only the inputs, and so "
        "does triton, which needs CUDA and the triton package; auto: triton where it runs, else recompute.",
    )
    recompute: Annotated[Recompute, FREE] = Field(
        default="none",
        description="What the backward pass computes again instead of keeping it: selective: the outputs of norms and "
        "activations, which take no matrix product (with transformer_engine, feed-forward layers); full: whole layers, "
        "of which only the inputs are kept, for about a third more computation. Results do not change.",
    )

    @model_validator(mode="after")
    def _check_rates(self) -> "TrainConfig":
        if self.min_lr is not None and isinstance(self.lr, float) and self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr {self.lr}; lower it")
        return self

    @property
    def micro_batch_size(self) -> int:
        """Return the samples per forward pass. Raises ValueError if they are `auto` and not chosen yet."""
        if isinstance(self.requested_micro_batch_size, str):
            raise ValueError(f"train.micro_batch_size: {AUTO} is not resolved here; {SET_A_NUMBER}")
        return self.requested_micro_batch_size

    def resolve(self, seq_length: int) -> "TrainConfig":
        """Return a copy with derived values filled in: batch size in samples, learning rates.

        Raises ValueError if the batch is not a whole number of samples of `seq_length` tokens.
        """
        batch_size = self.global_batch_size
        if self.global_batch_tokens is not None:
            batch_size, rest = divmod(self.global_batch_tokens, seq_length)
            if rest or not batch_size:
                raise ValueError(
                    f"train.global_batch_tokens: {self.global_batch_tokens} is not a multiple of corpus.seq_length "
                    f"{seq_length}; take {max(1, round(self.global_batch_tokens / seq_length)) * seq_length}"
                )
            if batch_size > _MOST_SAMPLES:
                raise ValueError(
                    f"train.global_batch_tokens: {self.global_batch_tokens} is {batch_size} samples of "
                    f"corpus.seq_length {seq_length}; take at most {_MOST_SAMPLES * seq_length}"
                )
        lr = self.lr.at(batch_size * seq_length) if isinstance(self.lr, ScaledLr) else self.lr
        min_lr = lr / 10 if self.min_lr is None else self.min_lr
        if not min_lr <= lr < 10:
            raise ValueError(
                f"train.lr: {lr:.3g} for batches of {batch_size * seq_length} tokens is not between min_lr "
                f"{min_lr:.3g} and 10; change increment_rate, base_lr or the batch"
            )
        return self.model_copy(
            update={"global_batch_size": batch_size, "global_batch_tokens": None, "lr": lr, "min_lr": min_lr}
        )


class CheckpointConfig(Config):
    """When and how training saves checkpoints."""

    every_minutes: Number = Field(
        default=10.0, gt=0, le=1e6, description="Minutes between checkpoints: the most training time that a kill loses."
    )
    every_steps: Integer | None = Field(default=None, ge=1, description="Steps between checkpoints, in addition.")
    keep_last: Integer = Field(default=2, ge=1, le=1000, description="Checkpoints kept while a round is training.")
    asynchronous: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether training continues while a checkpoint is written; auto: on accelerators, not on CPU.",
    )
