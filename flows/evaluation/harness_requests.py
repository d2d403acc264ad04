"""Conversion of lm-eval's text requests to requests in token ids, and of the answers to lm-eval's responses.

The tokens are the same as those of lm-eval's own transformers backend with the model that `reprise export hf` writes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data_scoring.evaluation.items import TOO_LONG
from data_scoring.tokenizer.tokenizer import Tokenizer, encode_each
from flows.evaluation.options import UNENCODABLE, Options, question_of
from trainer.requests import Answer, Generation, Likelihood, LogLikelihood, Request, count_inputs

# The responses that lm-eval expects: (log-likelihood, is greedy), rolling log-likelihood, or generated text.
Response = tuple[float, bool] | float | str

_INSTANCES_AT_ONCE = 1000
# What lm-eval's command line seeds the draw of examples with; the same each time, so that requests are the same.
_EXAMPLES_SEED = 1234


class HarnessTasks(Protocol):
    """The part of `EvaluationTask` (flows.evaluation.task_loading) that decides the requests: tasks and items."""

    @property
    def subtasks(self) -> Mapping[str, Any]:
        """Return lm-eval's tasks by name."""

    @property
    def samples(self) -> Mapping[str, list[int]]:
        """Return, by task, the indices of the items to evaluate."""

    @property
    def groups(self) -> Mapping[str, Any]:
        """Return lm-eval's groups, of all or some of the tasks, that have scores of their own, by name."""


@dataclass
class Asked:
    """Requests, the mapping from lm-eval's instances to them, and the items that they cannot score."""

    tokenizer: Tokenizer
    requests: list[Request] = field(default_factory=list)
    # By task and index of the item in its `eval_docs`: why an item cannot be scored.
    unscorable: dict[tuple[str, int], str] = field(default_factory=dict)
    _places: dict[bytes, slice] = field(default_factory=dict)

    def add(self, instance: Instance, requests: Iterable[Request]) -> None:
        """Add the requests of an instance, unless an equal instance was added before."""
        key = _identify(instance)
        if key not in self._places:
            start = len(self.requests)
            self.requests += requests
            self._places[key] = slice(start, len(self.requests))

    def respond(self, instances: Sequence[Instance], answers: Sequence[Answer]) -> list[Response]:
        """Return lm-eval's response for each instance, given the answers to all requests, in their order.

        Raises ValueError for an instance that has no requests.
        """
        for instance in instances:
            if _identify(instance) not in self._places:
                raise ValueError(f"{instance.task_name}: item {instance.doc_id}: {UNENCODABLE}; leave it out")
        return [self._respond(instance, answers[self._places[_identify(instance)]]) for instance in instances]

    def _respond(self, instance: Instance, answers: Sequence[Answer]) -> Response:
        if instance.request_type == "generate_until":
            [tokens] = answers
            assert isinstance(tokens, list)
            stop = _generation_arguments(instance)[1]
            return str(postprocess_generated_text(self.tokenizer.decode(tokens), stop, think_end_token=None))
        likelihoods = [answer for answer in answers if isinstance(answer, LogLikelihood)]
        if instance.request_type == "loglikelihood_rolling":
            return sum(each.log_likelihood for each in likelihoods)
        [only] = likelihoods
        return only.log_likelihood, only.is_greedy


@dataclass(frozen=True)
class Reader:
    """Converts text to a model's inputs: with its tokenizer, and at most `seq_length` tokens."""

    tokenizer: Tokenizer
    seq_length: int

    def fits(self, context: str, continuations: Sequence[str]) -> bool:
        """Return whether a prompt with each of its continuations fits into the model.

        The model reads all tokens except the last one. For generation, pass a continuation with the largest number of
        new tokens.
        """
        # Every token has at least one byte, except one that some tokenizers put before a text.
        texts = [context + each for each in continuations or [""]]
        texts = [text for text in texts if len(text.encode()) > self.seq_length]
        # Without a context, the model reads the end-of-document token first.
        extra = 0 if context else 1
        # Texts that cannot be encoded have no length; `read` lists them.
        lengths = [len(ids) for ids in encode_each(self.tokenizer, texts) if isinstance(ids, list)]
        return all(length + extra <= self.seq_length + 1 for length in lengths)

    def read(self, instances: Sequence[Instance]) -> Asked:
        """Return the requests of lm-eval's instances, in token ids.

        Raises ValueError if an instance is neither a likelihood nor greedy generation.
        """
        asked, options = Asked(self.tokenizer), Options(self.tokenizer)
        for start in range(0, len(instances), _INSTANCES_AT_ONCE):
            chunk = instances[start : start + _INSTANCES_AT_ONCE]
            texts = list(dict.fromkeys(text for instance in chunk for text in _texts(instance)))
            encoded = dict(zip(texts, encode_each(self.tokenizer, texts), strict=True))
            tokens = {text: ids for text, ids in encoded.items() if isinstance(ids, list)}
            for instance in chunk:
                item = (str(instance.task_name), int(instance.doc_id or 0))
                if any(text not in tokens for text in _texts(instance)):
                    asked.unscorable[item] = UNENCODABLE
                    continue
                requests = [*self._make_requests(instance, tokens)]
                if any(count_inputs(request) > self.seq_length for request in requests):
                    asked.unscorable[item] = TOO_LONG
                    continue
                asked.add(instance, requests)
                if instance.request_type == "loglikelihood" and (reason := options.find_defect(instance, tokens)):
                    asked.unscorable.setdefault(item, reason)
        return asked

    def _make_requests(self, instance: Instance, tokens: Mapping[str, list[int]]) -> Iterator[Request]:
        """Yield an instance's requests, given the tokens of its `_texts`."""
        texts, end = _texts(instance), self.tokenizer.end_of_document
        if instance.request_type == "generate_until":
            max_new_tokens, stop = _generation_arguments(instance)
            yield Generation(_ids(tokens[texts[0]] or [end]), max_new_tokens, tuple(stop))
        elif instance.request_type == "loglikelihood_rolling":
            for window in get_rolling_token_windows(tokens[texts[0]], end, self.seq_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                yield Likelihood(_ids(context), _ids(continuation))
        else:
            context, whole = (tokens[text] for text in texts[:2])
            if len(whole) == 1 or (not context and whole[:1] != [end]):
                context, whole = [end], [end, *whole]
            # If the tokenizer merges the continuation with the context, the continuation is the last token.
            start = min(max(1, len(context)), len(whole) - 1)
            yield Likelihood(_ids(whole[:start]), _ids(whole[start:]))


def ask(task: HarnessTasks, reader: Reader) -> Asked:
    """Return the requests of all items of a task. Needs no model; tokenisation dominates the time."""
    instances: list[Instance] = []
    seed_examples(task)
    for name, subtask in task.subtasks.items():
        subtask.build_all_requests(samples=task.samples[name], rank=0, world_size=1)
        instances += subtask.instances
    asked = reader.read(instances)
    # lm-eval numbers the items that are asked, not those of the data set.
    asked.unscorable = {(name, task.samples[name][number]): why for (name, number), why in asked.unscorable.items()}
    return asked


def seed_examples(task: HarnessTasks) -> None:
    """Make lm-eval draw the same few-shot examples whenever it builds a task's requests."""
    for subtask in task.subtasks.values():
        subtask.set_fewshot_seed(_EXAMPLES_SEED)


def _texts(instance: Instance) -> tuple[str, ...]:
    """Return the texts of an instance to tokenise: for a likelihood, context, whole text, and the question in it."""
    if instance.request_type != "loglikelihood":
        return (instance.args[0],)
    context, continuation = instance.args
    # Spaces in between belong to the continuation, as in most vocabularies (`TemplateLM._encode_pair`).
    return context.rstrip(), context + continuation, question_of(instance).rstrip()


def _generation_arguments(instance: Instance) -> tuple[int, list[str]]:
    """Return the largest number of new tokens, and the stop strings."""
    arguments = normalize_gen_kwargs(instance.args[1])
    if arguments["do_sample"]:
        raise ValueError(
            f"{instance.task_name}: requests sampling ({instance.args[1]}), but only greedy generation is supported; "
            "set do_sample: false in its generation_kwargs"
        )
    return arguments["max_gen_toks"], handle_stop_sequences(arguments.get("until"), eos=None)


def _identify(instance: Instance) -> bytes:
    return hashlib.blake2b(repr((instance.request_type, instance.args)).encode(), digest_size=16).digest()


def _ids(tokens: Sequence[int]) -> Any:
    return np.array(tokens, np.int32)
