"""Preparing text: tokenised part by part, duplicates dropped, validation text held out, samples moved to shards."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from data_scoring.base.engine import finish
from data_scoring.base.files import fingerprint, write_record
from data_scoring.base.validation import read_record
from data_scoring.config import CorpusConfig
from data_scoring.corpus.bad_records import lines_before, list_records, named_by_source, skipped_records
from data_scoring.corpus.digests import find_duplicates, groups_of_buckets
from data_scoring.corpus.documents import NAME as DOCUMENTS
from data_scoring.corpus.documents import join_documents
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.packing import ShardAssignment, Stream, join_samples, pack_validation
from data_scoring.corpus.preparation import Preparation
from data_scoring.corpus.roles import DUPLICATE, TRAIN, VALIDATION, Roles, assign_roles, hold_out
from data_scoring.corpus.shuffle import (
    PlacedPart,
    assemble_shard,
    samples_path,
    scatter_part,
    scattered_checksums,
)
from data_scoring.corpus.source_parts import SourcePart
from data_scoring.corpus.tokenise import (
    NUM_EXAMPLES,
    STAGING_FORMAT,
    StagedPart,
    TokenizerFile,
    UnencodableDocumentError,
    tokenise_part,
)

# More than this is the wrong tokenizer for the text.
_LARGEST_LOST_SHARE = 0.1
_ADDED = ("documents", "empty", "rejected", "bytes", "characters", "lost_characters")


class _Scattered(TypedDict):
    """The record of all parts, scattered: checksums of their files, and of each source the counts and the roles."""

    fingerprint: str
    checksums: list[list[str]]
    totals: list[dict[str, Any]]
    roles: list[dict[str, list[int]]]


def prepare_text(
    corpus: CorpusConfig,
    sources: Sequence[Sequence[SourcePart]],
    tokenizer: TokenizerFile,
    preparation: Preparation,
) -> dict[str, Any]:
    """Return the manifest's entries of sources, validation set and shards, after writing them.

    `sources`: the parts of each source. Raises ValueError, naming file and line or field, for unusable input. Takes
    temporary disk space for twice the tokens of the text, or once while shards are written, and about 60 bytes for each
    document.
    """
    folder, names = preparation.folder, [source.name for source in corpus.sources]
    parts = [StagedPart(part.source.name, preparation.staging / part.name) for source in sources for part in source]
    dtype = token_dtype(tokenizer.open().vocab_size)
    record = _scatter(corpus, sources, tokenizer, dtype, preparation)
    roles = [Roles(each["documents"], each["tokens"], each["bytes"]) for each in record["roles"]]
    streams = _streams(corpus, roles, TRAIN)
    # What follows reads what was scattered.
    for part in parts:
        part.path("tokens").unlink(missing_ok=True)
    shards = _assemble(parts, ShardAssignment(streams, corpus.num_shards, preparation.seed), dtype, preparation)
    join_documents([part.path("located.parquet") for part in parts], folder / DOCUMENTS)
    validation = [part.path("validation") for part in parts]
    return {
        "sources": [_source_entry(*each) for each in zip(names, record["totals"], roles, strict=True)],
        "validation_bytes": {name: each.bytes[VALIDATION] for name, each in zip(names, roles, strict=True)},
        "validation": pack_validation(validation, _streams(corpus, roles, VALIDATION), dtype, folder),
        "shards": shards,
    }


def _streams(corpus: CorpusConfig, roles: Sequence[Roles], role: int) -> list[Stream]:
    return [
        Stream(source.name, each.tokens[role], corpus.seq_length + 1)
        for source, each in zip(corpus.sources, roles, strict=True)
    ]


def _scatter(
    corpus: CorpusConfig,
    sources: Sequence[Sequence[SourcePart]],
    tokenizer: TokenizerFile,
    dtype: np.dtype,
    preparation: Preparation,
) -> _Scattered:
    """Return the record of all parts, after scattering them, unless an earlier attempt has."""
    # Names of sources do not start with an underscore.
    path, names = preparation.staging / "_scattered.json", [source.name for source in corpus.sources]
    identities = [[part.identity for part in source] for source in sources]
    identity = fingerprint(identities, tokenizer.identity, corpus.model_dump(), preparation.seed, STAGING_FORMAT)
    known = read_record(path, _Scattered)
    if known is not None and known["fingerprint"] == identity and _is_intact(sources, known, preparation):
        return known
    # What follows replaces its files, the list of bad records first.
    path.unlink(missing_ok=True)
    staged: list[list[StagedPart]] = []
    totals: list[dict[str, Any]] = []
    for name, parts in zip(names, _tokenise(sources, tokenizer, preparation), strict=True):
        # Before the next source is tokenised with the wrong tokenizer, too.
        totals.append(_total(name, parts))
        staged.append(parts)
    for source, parts, total in zip(sources, staged, totals, strict=True):
        _check_text(source, parts, total)
    _collect_rejects(sources, staged, preparation.folder / "rejects.jsonl")
    roles = _assign_roles(staged, corpus.validation_fraction, preparation)
    sums = [_sum(parts) for parts in roles]
    streams = _streams(corpus, sums, TRAIN)
    assignment = ShardAssignment(streams, corpus.num_shards, preparation.seed)
    work = partial(scatter_part, assignment=assignment, dtype=dtype)
    num_tokens = sum(stream.num_tokens for stream in streams)
    checksums = [*preparation.map(work, [*_place(sources, staged, roles)], "packing samples (tokens)", num_tokens)]
    counts = [{"documents": each.documents, "tokens": each.tokens, "bytes": each.bytes} for each in sums]
    record = _Scattered(fingerprint=identity, checksums=checksums, totals=totals, roles=counts)
    write_record(path, record)
    return record


def _is_intact(sources: Sequence[Sequence[SourcePart]], record: _Scattered, preparation: Preparation) -> bool:
    """Return whether the files of all parts are as they were scattered."""
    parts = [StagedPart(part.source.name, preparation.staging / part.name) for source in sources for part in source]
    return [*preparation.map(scattered_checksums, parts, "checking packed samples (parts)")] == record["checksums"]


def _tokenise(
    sources: Sequence[Sequence[SourcePart]], tokenizer: TokenizerFile, preparation: Preparation
) -> Iterator[list[StagedPart]]:
    """Yield the parts of each source, tokenised."""
    staging = preparation.staging
    work = partial(tokenise_part, staging=staging, tokenizer=tokenizer, skip_bad=preparation.skip_bad)
    results = preparation.map(work, [part for source in sources for part in source], "tokenising (documents)")
    for source in sources:
        read, mine = 0, []
        for part in source:
            try:
                counts = next(results)
            except UnencodableDocumentError as error:
                raise named_by_source(error, part.source, read) from None
            read += counts["read"]
            mine.append(StagedPart(part.source.name, staging / part.name, counts))
        yield mine


def _total(source: str, parts: Sequence[StagedPart]) -> dict[str, Any]:
    """Return the counts of a source. Raises ValueError if the tokenizer loses too many of its characters."""
    total: dict[str, Any] = {name: sum(part.counts[name] for part in parts) for name in _ADDED}
    examples = dict.fromkeys("".join(part.counts["lost_examples"] for part in parts))
    total["lost_examples"] = "".join([*examples][:NUM_EXAMPLES])
    lost, characters = total["lost_characters"], total["characters"]
    if lost > _LARGEST_LOST_SHARE * characters:
        raise ValueError(
            f"corpus.sources.{source}: the tokenizer cannot represent {lost:,} of its {characters:,} "
            f"characters, more than {_LARGEST_LOST_SHARE:.0%}, such as {total['lost_examples']!r}; "
            "give a tokenizer for this text (tokenizer.path), or none to train one"
        )
    return total


def _collect_rejects(
    sources: Sequence[Sequence[SourcePart]], staged: Sequence[Sequence[StagedPart]], target: Path
) -> None:
    """List the bad records of all sources in `target`, if there are any."""
    # An attempt with another configuration may have had some.
    target.unlink(missing_ok=True)
    if any(part.counts["rejected"] for parts in staged for part in parts):
        every = zip(sources, staged, strict=True)
        list_records((record for source, parts in every for record in skipped_records(source, parts)), target)


def _check_text(source: Sequence[SourcePart], staged: Sequence[StagedPart], total: dict[str, Any]) -> None:
    """Raise ValueError if a source has no text."""
    if total["documents"]:
        return
    first = next(skipped_records(source, staged), None)
    skipped = ""
    if first is not None:
        where = f"{first['file']}:{first['line']}: {first['reason']}"
        skipped = f" ({total['rejected']} bad records were skipped, first {where})"
    raise ValueError(
        f"corpus.sources.{source[0].source.name}.path: has no text{skipped}; remove the source or correct its path"
    )


def _assign_roles(
    staged: Sequence[Sequence[StagedPart]],
    validation_fraction: float,
    preparation: Preparation,
) -> list[list[Roles]]:
    """Return the roles of the documents of the parts of each source, written to their files."""
    parts = [part for source in staged for part in source]
    num_documents = sum(part.counts["documents"] for part in parts)
    groups = groups_of_buckets(num_documents)
    find = partial(find_duplicates, staging=preparation.staging, parts=[part.prefix for part in parts])
    finish(preparation.map(find, groups, "looking for duplicates (documents)", num_documents))
    assign = partial(
        assign_roles,
        staging=preparation.staging,
        groups=groups,
        validation_fraction=validation_fraction,
        seed=preparation.seed,
    )
    results = preparation.map(assign, [*enumerate(parts)], "choosing validation text (documents)", num_documents)
    return hold_out([[next(results) for _ in source] for source in staged])


def _sum(parts: Sequence[Roles]) -> Roles:
    documents, tokens, sizes = (
        [sum(each) for each in zip(*counts, strict=True)]
        for counts in ([p.documents for p in parts], [p.tokens for p in parts], [p.bytes for p in parts])
    )
    return Roles(documents, tokens, sizes)


def _place(
    sources: Sequence[Sequence[SourcePart]],
    staged: Sequence[Sequence[StagedPart]],
    roles: Sequence[Sequence[Roles]],
) -> Iterator[PlacedPart]:
    for number, (source, parts, mine) in enumerate(zip(sources, staged, roles, strict=True)):
        tokens = 0
        for part, role, lines in zip(parts, mine, lines_before(source, parts), strict=True):
            yield PlacedPart(part, number, role.held_out, tokens, lines)
            tokens += role.tokens[TRAIN]


def _assemble(
    parts: Sequence[StagedPart], assignment: ShardAssignment, dtype: np.dtype, preparation: Preparation
) -> list[dict[str, Any]]:
    """Return the manifest's entries of the shards, after writing them and the table of all samples."""
    folder, shards = preparation.folder, range(assignment.num_shards)
    work = partial(assemble_shard, parts=parts, assignment=assignment, dtype=dtype, folder=folder)
    entries = [*preparation.map(work, shards, "writing shards (samples)", assignment.permutation.size)]
    join_samples([samples_path(preparation.staging, shard) for shard in shards], folder / "samples.parquet")
    return entries


def _source_entry(name: str, total: dict[str, Any], roles: Roles) -> dict[str, Any]:
    entry = {
        **{key: total[key] for key in ("documents", "empty", "rejected", "bytes")},
        "name": name,
        "duplicates": roles.documents[DUPLICATE],
        "validation_documents": roles.documents[VALIDATION],
        "train_tokens": roles.tokens[TRAIN],
        "validation_tokens": roles.tokens[VALIDATION],
    }
    # Nothing is said of lost characters if there are none, as in earlier versions.
    lost = ("characters", "lost_characters", "lost_examples") if total["lost_characters"] else ()
    return {**entry, **{key: total[key] for key in lost}}
