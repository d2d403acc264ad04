"""Token counts of sources of text: part by part, and resumed after a kill."""

import json
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_scoring.base.engine import Count, Engine, reporting
from data_scoring.base.files import fingerprint, remove_leftovers, writing
from data_scoring.base.progress import Progress
from data_scoring.base.read_ahead import read_ahead
from data_scoring.config import SourceConfig
from data_scoring.corpus.bad_records import list_records, named_by_source, skipped_records
from data_scoring.corpus.part_text import PartText
from data_scoring.corpus.source_parts import LONG_BYTES, SourcePart
from data_scoring.corpus.sources import batch_documents, cut_sources, find_source
from data_scoring.corpus.token_counts import SourceCounts
from data_scoring.corpus.tokenise import StagedPart, TokenizerFile, UnencodableDocumentError
from data_scoring.tokenizer.tokenizer import UnencodableTextError, encode_each

# The most work on a part that a kill loses.
_SAVE_SECONDS = 20.0
# Version of the saved counts; counts of another version are computed again.
_FORMAT = 1


@dataclass
class _Counts:
    """The counts of a part's tokens, [vocab_size] int64, or, until `is_complete`, of the first `read` documents.

    num_lines: see `PartText`. unencodable: the numbers of documents that cannot be encoded, with the reasons.
    """

    counts: NDArray[np.int64]
    read: int = 0
    num_lines: int = 0
    unencodable: list[tuple[int, str]] = field(default_factory=list)
    is_complete: bool = False


def count_sources(
    sources: Sequence[SourceConfig],
    tokenizer: TokenizerFile,
    folder: Path,
    skip_bad: bool,
    engine: Engine,
    progress: Progress,
) -> list[SourceCounts]:
    """Return the token counts of each source; resumes from what an interrupted call left in `folder`.

    Skipped records are listed there, a file for each source. Raises ValueError if a source cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = cut_sources([find_source(source) for source in sources])
    every = [part for source in parts for part in source]
    work = partial(count_part, folder=folder, tokenizer=tokenizer, skip_bad=skip_bad)
    is_long = sum(part.num_bytes for part in every) > LONG_BYTES
    results = engine.map(work, every, reporting(progress, "counting tokens (documents)"), is_long)
    counts = [_sum(source, results, tokenizer, folder, skip_bad) for source in parts]
    # Left by workers that were lost.
    remove_leftovers(folder)
    return counts


def _sum(
    parts: Sequence[SourcePart], results: Iterator[Path], tokenizer: TokenizerFile, folder: Path, skip_bad: bool
) -> SourceCounts:
    """Return the counts of a source, whose parts are the next ones in `results`, and list its bad records."""
    name, total, staged = parts[0].source.name, np.zeros(tokenizer.open().vocab_size, np.int64), []
    read = 0
    for part in parts:
        try:
            path = next(results)
        except UnencodableDocumentError as error:
            raise named_by_source(error, part.source, read) from None
        found = _load(path, total.shape)
        total += found.counts
        read += found.read
        staged.append(StagedPart(name, folder / part.name, {"read": found.read, "num_lines": found.num_lines}))
    if not total.any():
        raise ValueError(f"corpus.sources.{name}.path: holds no text; remove the source or correct its path")
    if skip_bad:
        list_records(skipped_records(parts, staged), folder / f"{name}.rejects.jsonl")
    return SourceCounts(name, total)


def count_part(part: SourcePart, count: Count, *, folder: Path, tokenizer: TokenizerFile, skip_bad: bool) -> Path:
    """Return the file of a part's counts, after counting its tokens; what an interrupted call has saved is used.

    Raises ValueError for a malformed record, and UnencodableDocumentError, unless bad records are skipped.
    """
    identity, opened = fingerprint(part.identity, skip_bad, tokenizer.identity, _FORMAT), tokenizer.open()
    path, staged = folder / f"{part.name}-{identity}.npz", StagedPart(part.source.name, folder / part.name)
    found, text = _load(path, (opened.vocab_size,)), PartText(part, folder, skip_bad)
    if found.is_complete:
        count(found.read)
        return path
    saved = time.monotonic()
    with writing(staged.path("rejects.jsonl")) as rejects:
        rejects.touch()
        for batch in read_ahead(batch_documents(islice(text.documents(rejects), found.read, None))):
            _add(found, encode_each(opened, [document.text for document in batch]), skip_bad)
            count(found.read)
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(path, found)
                saved = time.monotonic()
    with writing(staged.path("unencodable.jsonl")) as temporary, temporary.open("w", encoding="utf-8") as unencodable:
        for number, reason in found.unencodable:
            unencodable.write(json.dumps({"number": number, "reason": reason}) + "\n")
    found.num_lines, found.is_complete = text.num_lines, True
    _save(path, found)
    return path


def _add(found: _Counts, encoded: Sequence[list[int] | UnencodableTextError], skip_bad: bool) -> None:
    """Count the tokens of the next documents."""
    tokens = [np.empty(0, np.int64)]
    for number, ids in enumerate(encoded, start=found.read + 1):
        if not isinstance(ids, UnencodableTextError):
            tokens.append(np.asarray(ids, np.int64))
        elif skip_bad:
            found.unencodable.append((number, str(ids)))
        else:
            raise UnencodableDocumentError(number, str(ids))
    found.counts += np.bincount(np.concatenate(tokens), minlength=len(found.counts))
    found.read += len(encoded)


def _load(path: Path, shape: tuple[int, ...]) -> _Counts:
    """Return saved counts; those of nothing if there are none."""
    try:
        with np.load(path) as file:
            unencodable = [(int(number), str(reason)) for number, reason in json.loads(str(file["unencodable"]))]
            read, num_lines, is_complete = int(file["read"]), int(file["num_lines"]), bool(file["is_complete"])
            return _Counts(file["counts"], read, num_lines, unencodable, is_complete)
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        # Missing or unreadable: count from the start.
        return _Counts(np.zeros(shape, np.int64))


def _save(path: Path, found: _Counts) -> None:
    with writing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            counts=found.counts,
            read=found.read,
            num_lines=found.num_lines,
            unencodable=json.dumps(found.unencodable),
            is_complete=found.is_complete,
        )
