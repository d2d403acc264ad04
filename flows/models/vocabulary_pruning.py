"""Vocabulary pruning: from counting tokens to a folder with the smaller tokenizer, tables, a page and a checkpoint."""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.files import making
from data_scoring.base.progress import Progress
from data_scoring.corpus.token_counts import SourceCounts, SourceLength, measure_length
from data_scoring.corpus.tokenise import TokenizerFile
from data_scoring.tokenizer.pieces import Vocabulary
from data_scoring.tokenizer.token_coverage import (
    Curve,
    cheapest_size,
    choose_tokens,
    measure_curve,
    size_for_coverage,
    sizes_within,
)
from data_scoring.tokenizer.tokenizer import open_tokenizer, read_tokenizer
from data_scoring.tokenizer.vocabulary import open_vocabulary
from flows.models.counted_text import CountedText, end_of_document, open_text
from flows.models.vocabulary_pruning_result import (
    PAPER_COVERAGE,
    RULE,
    RULE_COVERAGE,
    RULE_SHARE,
    PrunedVocabulary,
    Request,
    dropped_tokens,
    parameters_at,
)
from trainer.config import ModelConfig

# The shape of PanGu-π-1B.
_PAPER_MODEL = ModelConfig(num_layers=12, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=5632)
# Size of the text of each source on which sequence lengths are measured; it is held in memory.
_MEASURED_BYTES = 16 << 20
_SEED = 0


def prune_vocabulary(request: Request, progress: Progress) -> PrunedVocabulary:
    """Return the pruned vocabulary for `request`, written to a folder of its own.

    Raises ValueError for unreadable input or impossible requests; only the token counts are kept for the next attempt.
    """
    request = replace(request, end_of_document=request.end_of_document or end_of_document(request.corpus))
    # The file is checked before its content is identified.
    open_tokenizer(request.tokenizer, request.end_of_document)
    identity = hashlib.blake2b(read_tokenizer(request.tokenizer)).hexdigest()
    file = TokenizerFile(request.tokenizer, request.end_of_document, identity)
    vocabulary = open_vocabulary(request.tokenizer)
    parent = request.output.parent if request.output is not None else request.tokenizer.parent
    _check(request, vocabulary, parent)
    text = open_text(request.corpus, file)
    sources = text.count(parent / f"{request.tokenizer.stem}-counts", progress)
    counts = np.sum([source.counts for source in sources], axis=0)
    curve = measure_curve(vocabulary, counts)
    model = request.model or text.model or _PAPER_MODEL
    parameters = parameters_at(model, curve)
    paper_size, cheapest = size_for_coverage(curve, PAPER_COVERAGE), cheapest_size(curve, parameters)
    within_rule = sizes_within(curve, 1 - model.num_parameters(0) / parameters, RULE_COVERAGE, RULE_SHARE)
    size, reason = _decide(request, curve, parameters, within_rule)
    choice = choose_tokens(vocabulary, counts, size)
    folder = request.output or parent / f"{request.tokenizer.stem}-{size}"
    _check_output(folder)
    # GPT-2's pair becomes one file.
    name = "tokenizer.model" if request.tokenizer.suffix == ".model" else "tokenizer.json"
    with making(folder) as temporary:
        vocabulary.save(choice.kept, temporary / name)
        lengths = _measure(request, text, sources, temporary, name, progress)
        made = PrunedVocabulary(
            folder, folder / name, vocabulary.pieces, counts, sources, curve, choice, lengths, model, paper_size,
            cheapest, within_rule, reason,
        )  # fmt: skip
        _write_tables(made, temporary)
        if request.checkpoint is not None:
            _cut_checkpoint(request.checkpoint, made, temporary, progress)
        # Imported here because the report module loads matplotlib.
        from flows.models.vocabulary_pruning_report import write_page

        write_page(made, request, temporary)
    return made


def _check(request: Request, vocabulary: Vocabulary, parent: Path) -> None:
    """Raise ValueError for impossible requests before anything is counted."""
    none = np.zeros(len(vocabulary.pieces), np.int64)
    with tempfile.TemporaryDirectory() as folder:
        # Some tokenizers cannot be renumbered, which already shows with the smallest vocabulary.
        vocabulary.save(sorted(vocabulary.required), Path(folder) / "smallest")
    if request.size is not None:
        choose_tokens(vocabulary, none, request.size)
    if request.coverage is not None and not 0 < request.coverage <= 1:
        raise ValueError(f"--coverage: {request.coverage} is not above 0 and at most 1; give a share such as 0.9786")
    if request.output is not None or request.size is not None:
        _check_output(request.output or parent / f"{request.tokenizer.stem}-{request.size}")
    if request.checkpoint is not None:
        from trainer.vocabulary_rows import check_rows

        check_rows(request.checkpoint, len(vocabulary.pieces))


def _check_output(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: already exists; delete it, or name another folder with --output")


def _decide(
    request: Request, curve: Curve, parameters: NDArray[np.float64], within_rule: tuple[int, int] | None
) -> tuple[int, str]:
    """Return the vocabulary size to use, and the reason in one sentence."""
    if request.size is not None:
        return request.size, f"{request.size:,} tokens, as requested."
    if request.coverage is not None:
        size = size_for_coverage(curve, request.coverage)
        return (
            size,
            f"{size:,} tokens are the fewest, in steps of 128, that cover {request.coverage:.2%} of the corpus.",
        )
    cheapest = cheapest_size(curve, parameters)
    if within_rule is None:
        size = size_for_coverage(curve, RULE_COVERAGE)
        return size, (
            f"{size:,} tokens are the fewest, in steps of 128, that cover {RULE_COVERAGE:.0%} of the corpus. No size "
            f"keeps the paper's rule ({RULE}) for this model; training would be cheapest with {cheapest:,}."
        )
    size = cheapest_size(curve, parameters, *within_rule)
    if size != cheapest:
        return size, (
            f"{size:,} tokens make training cheapest per byte of this text within the paper's rule ({RULE}); outside "
            f"of it, {cheapest:,} would be cheaper."
        )
    return size, (
        f"{size:,} tokens make training cheapest per byte of this text: with fewer, the longer text costs more "
        "than the saved parameters; with more, the parameters cost more than the shorter text saves. "
        f"They keep the paper's rule ({RULE})."
    )


def _measure(
    request: Request, text: CountedText, sources: list[SourceCounts], temporary: Path, name: str, progress: Progress
) -> list[SourceLength]:
    # The end-of-document token is a special token, which is always kept.
    pair = (text.tokenizer_file.open(), open_tokenizer(temporary / name, request.end_of_document))
    lengths = []
    for source in sources:
        texts = _counted(
            text.texts(source.name, temporary / f"{source.name}.rejects.jsonl", _MEASURED_BYTES, _SEED),
            f"drawing text of {source.name} (documents)",
            progress,
        )
        lengths.append(measure_length(source.name, texts, pair, _MEASURED_BYTES, _SEED))
        (temporary / f"{source.name}.rejects.jsonl").unlink(missing_ok=True)
    return lengths


def _counted(texts: Iterator[str], what: str, progress: Progress) -> Iterator[str]:
    for number, text in enumerate(texts, start=1):
        if number % 1000 == 1:
            progress(what, number, None)
        yield text


def _write_tables(made: PrunedVocabulary, folder: Path) -> None:
    tokens = [token for token, piece in enumerate(made.pieces) if piece is not None]
    by_source = [
        dict(zip((source.name for source in made.sources), values, strict=True))
        for values in zip(*(source.counts[tokens].tolist() for source in made.sources), strict=True)
    ]
    columns = {
        "id": tokens,
        "piece": [made.pieces[token] for token in tokens],
        "count": made.counts[tokens].tolist(),
    }
    pq.write_table(pa.table({**columns, "by_source": by_source}), folder / "counts.parquet")
    new = {token: number for number, token in enumerate(made.choice.kept)}
    vocabulary = {
        **columns,
        "kept": [token in new for token in tokens],
        "new_id": pa.array([new.get(token) for token in tokens], pa.int64()),
        "reason": [made.choice.reasons.get(token, "dropped") for token in tokens],
    }
    pq.write_table(pa.table(vocabulary), folder / "vocabulary.parquet")
    curve = made.curve
    parameters = made.parameters()
    columns_of_curve = {
        "vocab_size": curve.sizes,
        "coverage": curve.coverage,
        "relative_length": curve.lengths,
        "parameters": parameters,
        "embedding_and_head_share": 1 - made.model.num_parameters(0) / parameters,
        "relative_cost": curve.lengths * parameters / parameters[-1],
    }
    pq.write_table(pa.table(columns_of_curve), folder / "curve.parquet")
    dropped = dropped_tokens(made)
    lines = [f"{token}\t{made.counts[token]}\t{made.pieces[token]!r}" for token in dropped]
    (folder / "dropped.tsv").write_text("\n".join(["id\tcount\tpiece", *lines]) + "\n", encoding="utf-8")


def _cut_checkpoint(checkpoint: Path, made: PrunedVocabulary, folder: Path, progress: Progress) -> None:
    from trainer.vocabulary_rows import cut_checkpoint

    progress("cutting the checkpoint", 0, 1)
    target = folder / "checkpoint" / checkpoint.name
    cut_checkpoint(checkpoint, made.choice.kept, len(made.counts), target)
    progress("cutting the checkpoint", 1, 1)
