"""Answers of the model to requests, on any layout: likelihoods over prefix trees, and generations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from data_scoring.base.progress import Progress, silent
from data_scoring.tokenizer.tokenizer import Tokenizer
from trainer.attention import ScaledDotProductAttention
from trainer.generate import Endings, generate, greedy
from trainer.model_chunks import ModelChunks, pass_through
from trainer.prefix_trees import PrefixTree, build_prefix_trees
from trainer.requests import (
    Answer,
    Generation,
    Likelihood,
    LogLikelihood,
    Request,
    check_requests,
    has_answers,
    identify_answers,
    read_requests,
    requests_path,
    write_answers,
)
from trainer.sampling import Sampler
from trainer.score import is_writer
from trainer.stopping import StoppedError, StopRequest

if TYPE_CHECKING:
    from trainer.jobs import Evaluation

_Item = TypeVar("_Item")
# Receives the number of a generation among all, its tokens so far, and whether it goes on.
Tell = Callable[[int, list[int], bool], None]

# Trees or batches between two checks whether any rank was asked to stop.
_TURNS = 8
# Limits of a generation batch: tokens (prompts and continuations) in the key-value cache, and sequences.
_GENERATED_AT_ONCE = 16_384
_SEQUENCES_AT_ONCE = 64
# Tokens and predictions of a tree are padded to multiples of this on accelerators, for products to be aligned and their
# shapes few.
_TREE_MULTIPLE = 128
# Attributes by which Megatron's modules enable sequence parallelism.
_SHARING = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


def answer_tasks(
    model: ModelChunks,
    evaluation: "Evaluation",
    answers: Path,
    identity: str,
    tokenizer: Tokenizer,
    progress: Progress = silent,
    stop: StopRequest | None = None,
) -> None:
    """Write the answers of `model` to the requests of each task to the folder `answers`, unless already there.

    Every rank calls this; one of them writes. identity: identifies the model's weights. Leaves the model unchanged.
    Raises ValueError if requests are missing or cannot be answered, and StoppedError, keeping all completed answers, if
    any rank was asked to stop.
    """
    for task in evaluation.tasks:
        asked, target = requests_path(evaluation.requests, task), requests_path(answers, task)
        answers_identity = identify_answers(identity, asked)
        # Only the writer checks: other ranks might see files that it has written since.
        if _any_rank(is_writer() and has_answers(target, answers_identity), model):
            continue
        requests = read_requests(asked)
        check_requests(asked, requests, model.max_sequence_length, tokenizer.vocab_size)

        def note(_: str, done: int, total: int | None, task: str = task) -> None:
            progress(f"evaluating {task} (requests)", done, total)

        found = answer_requests(model, requests, tokenizer, note, stop)
        if found is not None:
            write_answers(target, found, answers_identity)


def answer_requests(
    model: ModelChunks,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    progress: Progress = silent,
    stop: StopRequest | None = None,
    samplers: Sequence[Sampler] = (),
    tell: Tell | None = None,
) -> list[Answer] | None:
    """Return the answers of `model` to `requests`, in their order, on the rank that `is_writer`; None on others.

    Every rank calls this with the same requests, which have passed `check_requests`; they are divided among
    data-parallel ranks. samplers: draw the tokens of the generations, one each; without them, generation is greedy.
    tell: called after each token of the generations that this rank's replica answers. The model is left unchanged,
    including its training mode. Raises StoppedError if any rank was asked to stop.
    """
    likelihoods = [request for request in requests if isinstance(request, Likelihood)]
    generations = [request for request in requests if isinstance(request, Generation)]

    def note(done: int) -> None:
        if is_writer():
            progress("evaluating (requests)", done, len(requests))

    with _evaluating(model), torch.no_grad():
        log_likelihoods = iter(_answer_likelihoods(model, likelihoods, note, stop))
        generated = iter(
            _answer_generations(
                model, generations, tokenizer, lambda done: note(len(likelihoods) + done), stop, samplers, tell
            )
        )
    if not is_writer():
        return None
    return [next(log_likelihoods) if isinstance(request, Likelihood) else next(generated) for request in requests]


@contextmanager
def _evaluating(model: ModelChunks) -> Iterator[None]:
    """Set the model to evaluation mode, without sequence parallelism and with maskable attention; then restore it."""
    was_training, input_tensors = model.training, [decoder.decoder.input_tensor for decoder in model.decoders]
    # Trees have any length, and decoding takes one token at a time: neither can be split along the sequence.
    sharing = [
        (owner, name) for owner in (model.config, *model.modules()) for name in _SHARING if getattr(owner, name, False)
    ]
    attention = [layer.self_attention for layer in model.layers]
    cores = [each.core_attention for each in attention]
    model.eval()
    try:
        for owner, name in sharing:
            setattr(owner, name, False)
        for each in attention:
            # Core attention has no weights, in Transformer Engine either, so it can be replaced.
            if not isinstance(each.core_attention, ScaledDotProductAttention):
                each.core_attention = ScaledDotProductAttention(model.config, model.config.softmax_scale)
        yield
    finally:
        for each, core in zip(attention, cores, strict=True):
            each.core_attention = core
        for owner, name in sharing:
            setattr(owner, name, True)
        for decoder, input_tensor in zip(model.decoders, input_tensors, strict=True):
            decoder.decoder.set_input_tensor(input_tensor)
        model.train(was_training)


def _answer_likelihoods(
    model: ModelChunks, requests: Sequence[Likelihood], note: Callable[[int], None], stop: StopRequest | None
) -> list[LogLikelihood]:
    """Return the answers, on the last pipeline stage; on others an empty list."""
    if not requests:
        return []
    counts = [len(request.continuation) for request in requests]
    # Rows: each predicted token's negative log-likelihood, and 1 if it is the most probable one.
    found = torch.zeros(2, sum(counts), device=model.device)
    for tree in _own_items(
        model, build_prefix_trees(requests, model.config.hidden_size), lambda tree: tree.num_requests, note, stop
    ):
        scores = _score_tree(model, tree)
        if scores is not None:
            found[:, torch.from_numpy(tree.places).to(found.device)] = scores
    if not parallel_state.is_pipeline_last_stage():
        return []
    torch.distributed.all_reduce(found, group=parallel_state.get_data_parallel_group())
    losses, greatest = found.cpu().double().numpy()
    starts = np.cumsum([0, *counts[:-1]])
    sums, are_greedy = np.add.reduceat(losses, starts), np.minimum.reduceat(greatest, starts)
    return [
        LogLikelihood(-total, is_greedy == 1)
        for total, is_greedy in zip(sums.tolist(), are_greedy.tolist(), strict=True)
    ]


def _score_tree(model: ModelChunks, tree: PrefixTree) -> Tensor | None:
    """Return, on the last pipeline stage, the result of `score_labels` for a tree's targets, [2, p] float32."""
    device = model.device
    tree = tree.padded(1 if device.type == "cpu" else _TREE_MULTIPLE)
    num_predictions = len(tree.places)
    tokens_n, depths_n, ends_n, nodes_p, targets_p = (
        torch.from_numpy(column).to(device)
        for column in (tree.tokens, tree.depths, tree.ends, tree.nodes, tree.targets)
    )
    mask_nn = torch.zeros(len(ends_n), len(ends_n), dtype=model.config.params_dtype, device=device)
    number_n = torch.arange(len(ends_n), device=device)
    mask_nn.masked_fill_((number_n[None, :] > number_n[:, None]) | (number_n[:, None] > ends_n[None, :]), -torch.inf)

    def compute(gpt: Any, hidden_nbh: Tensor | None) -> Tensor:
        if hidden_nbh is None:
            hidden_nbh = gpt.embedding(input_ids=tokens_n[None], position_ids=None)
        else:
            gpt.decoder.set_input_tensor(hidden_nbh)
        rotary = gpt.rotary_pos_emb(gpt.max_sequence_length)[depths_n]
        hidden_nbh = gpt.decoder(hidden_states=hidden_nbh, attention_mask=mask_nn[None, None], rotary_pos_emb=rotary)
        if not gpt.post_process:
            return hidden_nbh
        losses_p, are_greatest_p = gpt.judge(hidden_nbh[nodes_p, 0], targets_p)
        return torch.stack([losses_p, are_greatest_p.float()])[:, :num_predictions]

    return pass_through(model, lambda _: (len(tokens_n), 1, model.config.hidden_size), compute)


def _answer_generations(
    model: ModelChunks,
    requests: Sequence[Generation],
    tokenizer: Tokenizer,
    note: Callable[[int], None],
    stop: StopRequest | None,
    samplers: Sequence[Sampler],
    tell: Tell | None,
) -> list[list[int]]:
    """Return the generated token ids of each request, on every rank."""
    if not requests:
        return []
    local: dict[int, list[int]] = {}
    for batch in _own_items(model, _cut_batches(requests, model.max_sequence_length), len, note, stop):
        chosen = [samplers[number] for number in batch] if samplers else []

        def tell_row(row: int, tokens: list[int], is_open: bool, batch: list[int] = batch) -> None:
            if tell is not None:
                tell(batch[row], tokens, is_open)

        found = _generate(model, [requests[number] for number in batch], tokenizer, chosen, tell_row)
        local |= zip(batch, found, strict=True)
    replicas: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    torch.distributed.all_gather_object(replicas, local, parallel_state.get_data_parallel_group())
    gathered = {number: tokens for part in replicas for number, tokens in part.items()}
    return [gathered[number] for number in range(len(requests))]


def _cut_batches(requests: Sequence[Generation], seq_length: int) -> list[list[int]]:
    """Return the indices of the requests in batches with prompts of similar length, the longest first."""
    batches: list[list[int]] = []
    for number in sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt)):
        batch = [*batches[-1], number] if batches else [number]
        longest = len(requests[batch[0]].prompt) + max(
            min(request.max_new_tokens, seq_length + 1 - len(request.prompt))
            for request in (requests[each] for each in batch)
        )
        if batches and len(batch) <= _SEQUENCES_AT_ONCE and len(batch) * longest <= _GENERATED_AT_ONCE:
            batches[-1] = batch
        else:
            batches.append([number])
    return batches


def _generate(
    model: ModelChunks,
    requests: Sequence[Generation],
    tokenizer: Tokenizer,
    samplers: Sequence[Sampler],
    tell_row: Tell,
) -> list[list[int]]:
    """Return the continuations, token ids, of a batch of prompts."""
    longest = max(len(request.prompt) for request in requests)
    prompts = np.zeros((len(requests), longest), np.int64)
    num_pads = np.array([longest - len(request.prompt) for request in requests])
    for row, request in enumerate(requests):
        prompts[row, num_pads[row] :] = request.prompt
    endings = Endings(requests, model.max_sequence_length, tokenizer)

    def take(next_b: Tensor) -> bool:
        are_over = endings.take(next_b)
        for row, tokens in enumerate(endings.tokens):
            tell_row(row, tokens, endings.is_open(row))
        return are_over

    def draw(logits_bv: Tensor) -> Tensor:
        rows = logits_bv.double().cpu().numpy()
        # The same on tensor-parallel ranks: they have the same logits, and samplers draw the same numbers.
        drawn = [
            sampler.choose(row) if endings.is_open(number) else 0
            for number, (sampler, row) in enumerate(zip(samplers, rows, strict=True))
        ]
        return torch.tensor(drawn, device=logits_bv.device)

    if endings.num_new_tokens:
        prompts_bs, num_pads_b = (torch.from_numpy(each).to(model.device) for each in (prompts, num_pads))
        choose = draw if samplers else greedy
        generate(model, prompts_bs, endings.num_new_tokens, tokenizer.vocab_size, num_pads_b, take, choose)
    return endings.tokens


def _own_items(
    model: ModelChunks,
    items: Sequence[_Item],
    count: Callable[[_Item], int],
    note: Callable[[int], None],
    stop: StopRequest | None,
) -> Iterator[_Item]:
    """Yield the items assigned to this rank's replica, reporting how many requests all replicas have done."""
    replicas = int(parallel_state.get_data_parallel_world_size())
    replica = int(parallel_state.get_data_parallel_rank())
    done = 0
    for turn, start in enumerate(range(0, len(items), replicas)):
        if stop is not None and turn % _TURNS == 0 and _any_rank(stop.is_made, model):
            raise StoppedError
        if start + replica < len(items):
            yield items[start + replica]
        done += sum(map(count, items[start : start + replicas]))
        note(done)


def _any_rank(condition: bool, model: ModelChunks) -> bool:
    """Return, on all ranks, whether `condition` holds on any rank."""
    count = torch.tensor([int(condition)], device=model.device)
    torch.distributed.all_reduce(count)
    return bool(count.item())
