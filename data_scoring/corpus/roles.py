"""The roles of documents: training text, validation text, or a duplicate of an earlier document."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.engine import Count
from data_scoring.base.files import writing
from data_scoring.corpus.digests import read_duplicates
from data_scoring.corpus.permutation import mix_bits
from data_scoring.corpus.tokenise import StagedPart

TRAIN, VALIDATION, DUPLICATE = 0, 1, 2
_CHUNK_TOKENS = 1 << 21
_NONE = (2**64, 0, 0, 0)


@dataclass(frozen=True)
class Roles:
    """The roles of a part's documents: numbers of documents, tokens and bytes of text by role.

    first: of the document that would be held out if none else is: its key, its number, its tokens and its bytes.
    held_out: the number of the document that is held out whatever its key says.
    """

    documents: list[int] = field(default_factory=lambda: [0, 0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0, 0])
    first: tuple[int, int, int, int] = _NONE
    held_out: int | None = None


def assign_roles(
    entry: tuple[int, StagedPart],
    count: Count,
    *,
    staging: Path,
    groups: Sequence[range],
    validation_fraction: float,
    seed: int,
) -> Roles:
    """Return the roles of the documents of a part, given with its number, after writing them to disk.

    The first of equal documents is kept. Whether a document is held out depends only on its digest and the seed, not on
    its position.
    """
    number, part = entry
    duplicates = read_duplicates(staging, groups, number)
    limit = np.uint64(min(int(validation_fraction * 2**64), 2**64 - 1))
    salt = mix_bits(np.array([seed], np.uint64))[0]
    result, first, start = Roles(), _NONE, 0
    with writing(part.path("roles")) as temporary, temporary.open("wb") as file:
        for rows in part.documents():
            roles = np.full(len(rows), TRAIN, np.uint8)
            keys = mix_bits(rows["digest"] ^ salt)
            roles[keys < limit] = VALIDATION
            bounds = np.searchsorted(duplicates, [start, start + len(rows)])
            roles[duplicates[bounds[0] : bounds[1]] - start] = DUPLICATE
            kept = np.flatnonzero(roles != DUPLICATE)
            if len(kept):
                best = kept[np.argmin(keys[kept])]
                row = rows[best]
                first = min(first, (int(keys[best]), start + int(best), int(row["num_tokens"]), int(row["num_bytes"])))
            start += len(rows)
            file.write(roles.tobytes())
            for role in (TRAIN, VALIDATION, DUPLICATE):
                result.documents[role] += int((roles == role).sum())
                result.tokens[role] += int(rows["num_tokens"][roles == role].sum())
                result.bytes[role] += int(rows["num_bytes"][roles == role].sum())
    count(start)
    return replace(result, first=first)


def hold_out(sources: Sequence[Sequence[Roles]]) -> list[list[Roles]]:
    """Return the roles of the parts of each source, such that every source has validation text.

    A source of which none would be held out gives the document with the smallest key, unless it has no other. If no
    source has two documents, the one with the smallest key is held out. Raises ValueError if there are fewer than two
    distinct documents.
    """
    results = [[*parts] for parts in sources]
    counts = [[sum(part.documents[role] for part in parts) for role in (TRAIN, VALIDATION)] for parts in results]
    if sum(map(sum, counts)) < 2:
        raise ValueError(
            "corpus.sources: fewer than two distinct documents, but one must be held out for validation; "
            "add text, or for format text set document to paragraph or line"
        )
    places = [min(range(len(parts)), key=lambda number: (parts[number].first, number)) for parts in results]
    chosen = [number for number, (train, held_out) in enumerate(counts) if held_out == 0 and train > 1]
    if not chosen and not any(held_out for _, held_out in counts):
        # Every source has one document.
        chosen = [min(range(len(results)), key=lambda number: results[number][places[number]].first)]
    for source in chosen:
        results[source][places[source]] = _held_out(results[source][places[source]])
    return results


def _held_out(roles: Roles) -> Roles:
    _, row, num_tokens, num_bytes = roles.first
    amounts = (1, num_tokens, num_bytes)
    documents, tokens, sizes = (
        [counts[TRAIN] - amount, counts[VALIDATION] + amount, counts[DUPLICATE]]
        for counts, amount in zip((roles.documents, roles.tokens, roles.bytes), amounts, strict=True)
    )
    return Roles(documents, tokens, sizes, first=roles.first, held_out=row)


def documents_with_roles(part: StagedPart, held_out: int | None) -> Iterator[tuple[np.ndarray, NDArray[np.uint8]]]:
    """Yield the rows of a part's documents and their roles, in chunks of bounded size."""
    start = 0
    with part.path("roles").open("rb") as file:
        for rows in part.documents():
            roles = np.frombuffer(file.read(len(rows)), np.uint8)
            if held_out is not None and start <= held_out < start + len(rows):
                roles = roles.copy()
                roles[held_out - start] = VALIDATION
            start += len(rows)
            yield rows, roles


def blocks_with_roles(
    part: StagedPart, held_out: int | None, dtype: np.dtype
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.uint8]]]:
    """Yield the tokens of whole documents, about a few million at a time, and the role of each token."""
    with part.path("tokens").open("rb") as file:
        for rows, roles in documents_with_roles(part, held_out):
            ends = np.cumsum(rows["num_tokens"], dtype=np.int64)
            cuts = np.unique(np.searchsorted(ends, np.arange(_CHUNK_TOKENS, ends[-1], _CHUNK_TOKENS), side="right"))
            for chosen in np.split(np.arange(len(rows)), cuts):
                lengths = rows["num_tokens"][chosen]
                yield np.fromfile(file, dtype, int(lengths.sum(dtype=np.int64))), np.repeat(roles[chosen], lengths)
