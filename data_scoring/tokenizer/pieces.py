"""A tokenizer's vocabulary for pruning: required tokens, the tokens that a token needs, and saving a subset."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

# Maps the two sides of a merge to its priority; lower is merged earlier; None if there is no such merge.
Priority = Callable[[str, str], float | None]


class Vocabulary(Protocol):
    """A vocabulary as vocabulary pruning sees it, for any kind of tokenizer.

    pieces: the piece of each id, None for unused ids. required: the ids that must stay, each with the reason. needs:
    for each id, the ids that must stay with it so that encoding can still produce it.
    """

    pieces: list[str | None]
    required: dict[int, str]
    needs: list[tuple[int, ...]]

    def parts(self, token: int, rank: Sequence[int]) -> Sequence[int]:
        """Return the tokens that replace `token` once it and all tokens of a higher `rank` are removed."""
        ...

    def save(self, kept: Sequence[int], path: Path) -> None:
        """Write to `path` the tokenizer that has only the tokens `kept`, ascending, renumbered in this order."""
        ...


def merge(symbols: list[str], priority: Priority) -> tuple[list[str], tuple[str, str] | None]:
    """Return the byte-pair encoding of `symbols`, and the pair that was merged last.

    Each step merges the pair with the lowest priority value, the leftmost of equal ones.
    """
    symbols, last = list(symbols), None
    while len(symbols) > 1:
        best: tuple[float, int] | None = None
        for place in range(len(symbols) - 1):
            value = priority(symbols[place], symbols[place + 1])
            if value is not None and (best is None or value < best[0]):
                best = (value, place)
        if best is None:
            break
        place = best[1]
        last = (symbols[place], symbols[place + 1])
        symbols[place : place + 2] = ["".join(last)]
    return symbols, last


def parts_of(piece: str, symbols: list[str], priority: Priority) -> list[str]:
    """Return the parts of `piece`: the two sides of its last merge, or the symbols that remain if no merge yields it.

    The same merges also produce both sides of the last merge. So a vocabulary that contains the parts of each of its
    pieces still produces all of them: the remaining merges keep their relative order.
    """
    merged, last = merge(symbols, priority)
    return list(last) if merged == [piece] and last is not None else merged if merged != [piece] else []


# The pieces of tokenizers with byte fallback, for text that no other piece covers.
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_pieces(character: str) -> list[str]:
    """Return the byte-fallback pieces of a character."""
    return [BYTES[byte] for byte in character.encode("utf-8", "surrogatepass")]
