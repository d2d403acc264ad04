"""Generation with a key-value cache, on any layout, and its throughput."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from data_scoring.tokenizer.tokenizer import Tokenizer
from trainer.model_chunks import ModelChunks, pass_through
from trainer.requests import Generation


def greedy(logits_bv: Tensor) -> Tensor:
    """Return the most probable tokens, [batch], given logits, [batch, vocabulary]."""
    return logits_bv.argmax(dim=-1)


def generate(
    model: ModelChunks,
    prompts_bs: Tensor,
    num_new_tokens: int,
    vocab_size: int,
    num_pads_b: Tensor | None = None,
    take: Callable[[Tensor], bool] | None = None,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> Tensor:
    """Return the continuations, [batch, at most num_new_tokens] int64, on every rank of the replica.

    prompts_bs: [batch, prompt] int64, on the model's device, the same on all ranks. Ids from `vocab_size` on, which pad
    the embedding, are never generated. num_pads_b: [batch] int64, the number of padding tokens before each prompt.
    take: receives each prompt's next token, [batch], and returns whether to stop. choose: returns each prompt's next
    token, [batch], given the logits, [batch, vocab_size]; tensor-parallel ranks, which get the same logits, must agree.
    The caller must disable gradients.
    """
    batch_size, num_prompt_tokens = prompts_bs.shape
    context = StaticInferenceContext(batch_size, num_prompt_tokens + num_new_tokens)
    tokens_bs = prompts_bs
    new_b: list[Tensor] = []
    for _ in range(num_new_tokens):
        logits_bv = _next_logits(model, tokens_bs, context, num_pads_b)
        next_b = prompts_bs.new_empty(batch_size)
        if logits_bv is not None:
            next_b = choose(logits_bv[:, :vocab_size])
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(next_b, last, parallel_state.get_pipeline_model_parallel_group())
        new_b.append(next_b)
        if take is not None and take(next_b):
            break
        context.sequence_len_offset += tokens_bs.shape[1]
        context.enable_decode_mode()
        tokens_bs = next_b[:, None]
    return torch.stack(new_b, dim=1)


def _next_logits(
    model: ModelChunks, tokens_bs: Tensor, context: StaticInferenceContext, num_pads_b: Tensor | None
) -> Tensor | None:
    """Return the next token's logits, [batch, padded vocabulary], on the last pipeline stage; None on others."""
    start, length = context.sequence_len_offset, tokens_bs.shape[1]
    position_bs = torch.arange(start, start + length, device=tokens_bs.device).expand(len(tokens_bs), -1)
    mask = None if num_pads_b is None else _mask_padding(num_pads_b, start, length)

    def compute(gpt: Any, hidden_sbh: Tensor | None) -> Tensor:
        gpt.set_input_tensor(hidden_sbh)
        output: Tensor = gpt(tokens_bs, position_bs, mask, inference_context=context, runtime_gather_output=True)
        return output

    logits_bsv = pass_through(model, lambda _: (length, len(tokens_bs), model.config.hidden_size), compute)
    return None if logits_bsv is None else logits_bsv[:, -1]


def _mask_padding(num_pads_b: Tensor, start: int, length: int) -> Tensor:
    """Return the attention mask of `length` queries from position `start`, [batch, 1, length, start + length] bool.

    Padding attends to itself, because a fully masked row gives NaN.
    """
    key_s = torch.arange(start + length, device=num_pads_b.device)
    query_s = key_s[start:, None]
    mask_bqk = (key_s <= query_s) & ((key_s >= num_pads_b[:, None, None]) | (key_s == query_s))
    return mask_bqk[:, None]


class Endings:
    """The tokens generated for each request of a batch, and whether each has ended."""

    def __init__(self, requests: Sequence[Generation], seq_length: int, tokenizer: Tokenizer) -> None:
        self.tokens: list[list[int]] = [[] for _ in requests]
        self._requests, self._tokenizer = requests, tokenizer
        self._limits = [min(request.max_new_tokens, seq_length + 1 - len(request.prompt)) for request in requests]
        self._is_open = [limit > 0 for limit in self._limits]
        self.num_new_tokens = max(0, *self._limits)

    def take(self, next_b: Tensor) -> bool:
        """Append each request's next token, [batch], and return whether all requests have ended."""
        for row, token in enumerate(next_b.tolist()):
            if not self._is_open[row]:
                continue
            if token != self._tokenizer.end_of_document:
                self.tokens[row].append(token)
            is_full = len(self.tokens[row]) == self._limits[row]
            if token == self._tokenizer.end_of_document or is_full or self._is_stopped(row):
                self._is_open[row] = False
        return not any(self._is_open)

    def is_open(self, row: int) -> bool:
        """Return whether a request's continuation goes on."""
        return self._is_open[row]

    def _is_stopped(self, row: int) -> bool:
        """Return whether a stop string has just been completed."""
        stop = [text for text in self._requests[row].stop if text]
        if not stop:
            return False
        # A token has at least one byte; the first ones of a slice may decode differently than in context.
        num_last = max(len(text.encode()) for text in stop) + 4
        tail = self._tokenizer.decode(self.tokens[row][-num_last:])
        return any(text in tail for text in stop)


@torch.inference_mode()
def measure_generation(
    model: ModelChunks, batch_size: int, num_prompt_tokens: int, num_new_tokens: int, vocab_size: int, seed: int
) -> dict[str, Any]:
    """Return one replica's new tokens per second, over all sequences of the batch, and the first sequence.

    Prompts are random; a short generation before the measured one serves as warm-up. The first sequence is its prompt
    followed by its continuation, token ids.
    """
    prompts = np.random.default_rng(seed).integers(0, vocab_size, (batch_size, num_prompt_tokens))
    prompts_bs = torch.from_numpy(prompts).to(model.device)
    generate(model, prompts_bs, min(8, num_new_tokens), vocab_size).cpu()
    started = time.perf_counter()
    # Copying the result synchronises with the device.
    new_bs = generate(model, prompts_bs, num_new_tokens, vocab_size).cpu()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": batch_size * num_new_tokens / seconds,
        "first_sequence": prompts[0].tolist() + new_bs[0].tolist(),
    }
