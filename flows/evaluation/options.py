"""Options as the model sees them: those of which nothing is left once they are tokens cannot be scored."""

import hashlib
from collections.abc import Mapping
from itertools import takewhile

import numpy as np
from lm_eval.api.instance import Instance

from data_scoring.evaluation.rows import LETTERS
from data_scoring.tokenizer.tokenizer import Tokenizer
from flows.evaluation.harness_task import WholeTextInstance

# What stands for a space in vocabularies; it remains in decoded text if a tokenizer.json has no decoder.
_SPACES = str.maketrans("▁Ġ", "  ")
UNENCODABLE = "the tokenizer cannot encode it"


class Options:
    """Compares the options of each item; one object must see all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # By item and tokens: the first option with these tokens, and its text.
        self._seen: dict[bytes, tuple[str, str]] = {}

    def find_defect(self, instance: Instance, tokens: Mapping[str, list[int]]) -> str | None:
        """Return why an item cannot be scored by a likelihood, given the tokens of its texts; None if it can.

        An option without a token of its own would be scored by the question's last token, and options with the same
        tokens would tie, so that the first one would win.
        """
        text, question = "".join(instance.args), question_of(instance)
        name, whole = _name(instance.idx), tokens[text]
        if question.strip() and not tokens[question.rstrip()]:
            return "the tokenizer makes nothing of the question"
        if self._adds_nothing(tokens[question.rstrip()], whole):
            return f"the tokenizer makes nothing of option {name}"
        context = instance.args[0].rstrip()
        identity = (instance.task_name, instance.doc_id, len(tokens[context]) if context else 0)
        key = hashlib.blake2b(repr(identity).encode() + np.array(whole, np.int32).tobytes(), digest_size=16).digest()
        # White space between words is no difference.
        other, other_text = self._seen.setdefault(key, (name, " ".join(text.split())))
        if other_text != " ".join(text.split()):
            return f"the tokenizer makes the same of options {other} and {name}"
        return None

    def _adds_nothing(self, question: list[int], whole: list[int]) -> bool:
        """Return whether the tokens `whole` say no more than `question`, except white space."""
        start = len(question)
        if whole[:start] != question:
            # The tokenizer merged the end of the question with what follows.
            start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(question, whole, strict=False)))
        before, after = (self._tokenizer.decode(ids[start:]) for ids in (question, whole))
        return before.translate(_SPACES).split() == after.translate(_SPACES).split()


def question_of(instance: Instance) -> str:
    """Return the text of a likelihood's instance before its option."""
    return instance.question if isinstance(instance, WholeTextInstance) else str(instance.args[0])


def _name(index: int) -> str:
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)
