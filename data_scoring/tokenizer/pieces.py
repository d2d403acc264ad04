"""A tokenizer's vocabulary, taken apart: what has to stay, what a token needs, and the tokenizer without the rest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

# Called with the two sides of a merge; the lower, the earlier it is made; None where there is no such merge.
Priority = Callable[[str, str], float | None]


class Vocabulary(Protocol):
    """What compacting has to know of a tokenizer, whatever its kind.

    pieces: each id's piece, None for ids that no token has. required: the ids that stay, each with the reason.
    needs: for each id, those that have to stay if it does, so that encoding still arrives at it.
    """

    pieces: list[str | None]
    required: dict[int, str]
    needs: list[tuple[int, ...]]

    def parts(self, token: int, rank: Sequence[int]) -> Sequence[int]:
        """Return the tokens that `token` falls into where it and all of a higher `rank` are gone."""
        ...

    def save(self, kept: Sequence[int], path: Path) -> None:
        """Write to `path` the tokenizer that has the tokens `kept`, ascending, alone, numbered in this order."""
        ...


def merge(symbols: list[str], priority: Priority) -> tuple[list[str], tuple[str, str] | None]:
    """Return what byte-pair encoding makes of `symbols`, and the pair that it merged last.

    At each step the pair of the lowest priority is merged, of equal ones the leftmost.
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
    """Return what `piece` is made of: the two that its last merge joins, or, where no merge leads to it, what is left.

    Both sides of the last merge are themselves arrived at by the same merges, so a vocabulary that holds, with each
    piece, its parts still arrives at each: of the merges it has left, those that lead there are the first as before.
    """
    merged, last = merge(symbols, priority)
    return list(last) if merged == [piece] and last is not None else merged if merged != [piece] else []


# What stands for text that no other piece is made for, where a tokenizer falls back to bytes.
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_pieces(character: str) -> list[str]:
    """Return the byte-fallback pieces of a character."""
    return [BYTES[byte] for byte in character.encode("utf-8", "surrogatepass")]
