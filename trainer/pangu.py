"""PanGu-π's two additions to a layer (Wang et al. 2023, arXiv 2312.17276), each optional.

Both are initialised so that the layer computes the same as without them. Both support tensor, pipeline and sequence
parallelism.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from kernels.series_activation import ActivationKernel, initial_offsets, series_activation
from trainer.normalisation import normalise


class SeriesActivation(MegatronModule):
    """The series informed activation in the gated feed-forward layer: (Σ_i silu(a_i x + b_i)) · u.

    The scales a and the offsets b are learned: one pair per term and channel, split over the tensor-parallel ranks like
    the channels, or one pair per term, replicated on all of them. Initially a_1 = 1, all other scales are 0, and the
    silu of the offsets sums to 0, which is plain silu.
    """

    def __init__(self, config: TransformerConfig, terms: int, scales: str, kernel: ActivationKernel) -> None:
        super().__init__(config=config)
        self.is_per_channel, self.kernel = scales == "channel", kernel
        self.width = config.ffn_hidden_size // config.tensor_model_parallel_size
        shape = (terms, self.width if self.is_per_channel else 1)
        self.scale = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        self.offset = torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype))
        with torch.no_grad():
            self.scale[0] = 1
            for term, offset in enumerate(initial_offsets(terms)):
                self.offset[term] = offset
        for parameter in (self.scale, self.offset):
            # Weight decay would turn the activation off; `trainer.train.make_state` reads this attribute.
            parameter.without_weight_decay = True  # type: ignore[attr-defined]
            if self.is_per_channel:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=1, stride=1)

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Return the activated product, [seq, batch, f], of this rank's f channels of gate and up, [..., 2 f]."""
        scale, offset = self.scale, self.offset
        if not self.is_per_channel:
            # Each rank has only its own channels, so the backward pass sums the gradients over ranks.
            scale, offset = (
                copy_to_tensor_model_parallel_region(each).expand(-1, self.width) for each in (scale, offset)
            )
        return series_activation(gate_and_up, scale, offset, self.kernel)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """Return the sharded state dict of the parameters."""
        axes = {"scale": 1, "offset": 1} if self.is_per_channel else {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets
        )


class AugmentedShortcut(MegatronModule):
    """The augmented shortcut around attention: MSA(Z) + Z + T(Z), with T a bottleneck with GELU.

    Replaces the module that adds the residual stream Z in Megatron's layer. T's last matrix is initialised to zero. T
    is small, 1/(6 r) of a layer's matrices, so every tensor-parallel rank computes all of it without communication;
    with sequence parallelism, each rank computes its part of the sequence, and Megatron sums the gradients over ranks,
    as for norms.
    """

    def __init__(self, config: TransformerConfig, reduction: int, reads: str) -> None:
        super().__init__(config=config)
        self.is_normalised = reads == "normalised"
        width, bottleneck = config.hidden_size, config.hidden_size // reduction
        # `trainer.initialisation.initialise` initialises the first matrix.
        self.down = torch.nn.Parameter(torch.zeros(bottleneck, width, dtype=config.params_dtype))
        self.up = torch.nn.Parameter(torch.zeros(width, bottleneck, dtype=config.params_dtype))
        for parameter in (self.down, self.up):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, training: bool, fused: bool) -> Any:
        """Return `add`: Megatron calls the module to get the function that it then applies."""
        return self.add

    def add(self, attention_and_bias: tuple[Tensor, Tensor | None], stream: Tensor, dropout: float) -> Tensor:
        """Return attention + stream + T(stream), all [seq, batch, hidden]."""
        attention, bias = attention_and_bias
        assert dropout == 0
        # Megatron enables gradients here, even in scoring, where they would retain all layers' activations.
        with torch.set_grad_enabled(attention.requires_grad):
            if bias is not None:
                attention = attention + bias
            return stream + attention + self.transform(stream)

    def transform(self, stream: Tensor) -> Tensor:
        """Return T(stream); both are [seq, batch, hidden]."""
        z = stream
        if self.is_normalised:
            z = normalise(stream, None, self.config.layernorm_epsilon)
        return F.linear(F.gelu(F.linear(z, self.down)), self.up)
