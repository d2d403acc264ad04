"""A smaller vocabulary, from counting tokens to the folder with the tokenizer, its tables, its page and checkpoint."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.compact import Choice, Curve, cheapest_size, choose_tokens, measure_curve, size_for_coverage
from data_scoring.files import commit
from data_scoring.progress import Progress
from data_scoring.token_counts import SourceCounts, SourceLength, measure_length
from data_scoring.tokenizer import open_tokenizer
from data_scoring.vocabulary import Vocabulary, open_vocabulary
from flows.counted_text import CountedText, end_of_document, open_text
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import ModelConfig

# What the paper's vocabulary of 48,000 covers of its corpus (section 3.1).
PAPER_COVERAGE = 0.9786
# PanGu-π-1B, in which the paper counts the shares.
_PAPER_MODEL = ModelConfig(num_layers=12, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=5632)
# Text of each source that sequence lengths are measured on; it is held in memory.
_MEASURED_BYTES = 16 << 20
_SEED = 0


@dataclass(frozen=True)
class Request:
    """What is asked for: of `size` and `coverage` at most one is given; neither asks for a recommendation."""

    tokenizer: Path
    corpus: Path
    size: int | None = None
    coverage: float | None = None
    output: Path | None = None
    model: ModelConfig | None = None
    checkpoint: Path | None = None
    end_of_document: str | None = None


@dataclass(frozen=True)
class Compaction:
    """A vocabulary cut down: what it was and is, what that costs and saves, and where it lies."""

    folder: Path
    tokenizer: Path
    pieces: list[str | None]
    counts: NDArray[np.int64]
    sources: list[SourceCounts]
    curve: Curve
    choice: Choice
    lengths: list[SourceLength]
    model: ModelConfig
    paper_size: int
    cheapest: int
    reason: str

    def share(self, size: int) -> float:
        """Return the share of the model's parameters in embedding and head at a vocabulary of `size`."""
        return self.model.embedding_share(size)

    def parameters(self) -> NDArray[np.float64]:
        """Return the model's parameters at each size of the curve."""
        return parameters_at(self.model, self.curve)

    def coverage(self, size: int) -> float:
        """Return the share of the corpus' tokens that are among those of a vocabulary of `size`."""
        if size == len(self.choice.tokens):
            return float(self.counts[self.choice.tokens].sum() / self.counts.sum())
        return float(self.curve.coverage[size - self.curve.sizes[0]])

    def length(self, size: int) -> float:
        """Return the tokens of the corpus at a vocabulary of `size`, estimated, as a multiple of before."""
        return float(self.curve.lengths[size - self.curve.sizes[0]])


def compact_tokenizer(request: Request, progress: Progress) -> Compaction:
    """Return the smaller vocabulary that `request` asks for, written into a folder of its own.

    Raises ValueError, leaving nothing but the counts for the next try, for what cannot be read or asked for.
    """
    request = replace(request, end_of_document=request.end_of_document or end_of_document(request.corpus))
    whole = open_tokenizer(request.tokenizer, request.end_of_document)
    vocabulary = open_vocabulary(request.tokenizer)
    parent = request.output.parent if request.output is not None else request.tokenizer.parent
    _check(request, vocabulary, parent)
    text = open_text(request.corpus, request.tokenizer, whole)
    sources = text.count(parent / f"{request.tokenizer.stem}-counts", progress)
    counts = np.sum([source.counts for source in sources], axis=0)
    curve = measure_curve(vocabulary, counts)
    model = request.model or text.model or _PAPER_MODEL
    paper_size = size_for_coverage(curve, PAPER_COVERAGE)
    cheapest = cheapest_size(curve, parameters_at(model, curve))
    size, reason = _decide(request, curve, cheapest, paper_size)
    choice = choose_tokens(vocabulary, counts, size)
    folder = request.output or parent / f"{request.tokenizer.stem}-{size}"
    _check_output(folder)
    # GPT-2's pair becomes one file.
    name = "tokenizer.model" if request.tokenizer.suffix == ".model" else "tokenizer.json"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        vocabulary.save(choice.kept, temporary / name)
        lengths = _measure(request, text, sources, temporary, name, progress)
        made = Compaction(
            folder, folder / name, vocabulary.pieces, counts, sources, curve, choice, lengths, model, paper_size,
            cheapest, reason,
        )  # fmt: skip
        _write_tables(made, temporary)
        if request.checkpoint is not None:
            _cut_checkpoint(request.checkpoint, made, temporary, progress)
        # Here, for what draws imports what is drawn.
        from flows.compaction_report import write_page

        write_page(made, request, temporary)
        commit(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return made


def parameters_at(model: ModelConfig, curve: Curve) -> NDArray[np.float64]:
    """Return the parameters of `model` at each size of `curve`."""
    fixed, per_token = model.num_parameters(0), model.num_parameters(1) - model.num_parameters(0)
    return fixed + per_token * curve.sizes.astype(np.float64)


def _check(request: Request, vocabulary: Vocabulary, parent: Path) -> None:
    """Raise ValueError for what cannot be, before anything is counted."""
    none = np.zeros(len(vocabulary.pieces), np.int64)
    with tempfile.TemporaryDirectory() as folder:
        # Some numberings cannot be kept, which shows in the smallest vocabulary too.
        vocabulary.save(sorted(vocabulary.required), Path(folder) / "smallest")
    if request.size is not None:
        choose_tokens(vocabulary, none, request.size)
    if request.coverage is not None and not 0 < request.coverage <= 1:
        raise ValueError(f"--coverage: {request.coverage} is not above 0 and at most 1; give a share such as 0.9786")
    if request.output is not None or request.size is not None:
        _check_output(request.output or parent / f"{request.tokenizer.stem}-{request.size}")
    if request.checkpoint is not None:
        from trainer.vocabulary import check_rows

        check_rows(request.checkpoint, len(vocabulary.pieces))


def _check_output(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: is there already; delete it, or name another folder with --output")


def _decide(request: Request, curve: Curve, cheapest: int, paper_size: int) -> tuple[int, str]:
    """Return the size to make, and one sentence that says why."""
    if request.size is not None:
        return request.size, f"{request.size:,} tokens, as asked for."
    if request.coverage is not None:
        size = size_for_coverage(curve, request.coverage)
        return (
            size,
            f"{size:,} tokens are the fewest, in steps of 128, that cover {request.coverage:.2%} of the corpus.",
        )
    return cheapest, (
        f"{cheapest:,} tokens make training cheapest per byte of this text: with fewer, the longer text would cost "
        "more than the parameters that are saved, with more it is the other way round "
        f"(the paper's coverage of {PAPER_COVERAGE:.2%} takes {paper_size:,})."
    )


def _measure(
    request: Request, text: CountedText, sources: list[SourceCounts], temporary: Path, name: str, progress: Progress
) -> list[SourceLength]:
    # The token that ends documents is a special one, which stays.
    pair = (text.tokenizer, open_tokenizer(temporary / name, request.end_of_document))
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


def _write_tables(made: Compaction, folder: Path) -> None:
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


def dropped_tokens(made: Compaction) -> list[int]:
    """Return the tokens that are gone, the most frequent first."""
    kept = set(made.choice.tokens)
    dropped = [token for token, piece in enumerate(made.pieces) if piece is not None and token not in kept]
    return sorted(dropped, key=lambda token: -int(made.counts[token]))


def _cut_checkpoint(checkpoint: Path, made: Compaction, folder: Path, progress: Progress) -> None:
    from trainer.vocabulary import cut_checkpoint

    progress("cutting the checkpoint", 0, 1)
    target = folder / "checkpoint" / checkpoint.name
    cut_checkpoint(checkpoint, made.choice.kept, len(made.counts), target)
    progress("cutting the checkpoint", 1, 1)


def find_checkpoint(place: Path, round_number: int | None) -> Path:
    """Return the checkpoint that is meant by `place`, which is one, or a run: the last of a round, or of the last.

    Raises ValueError where there is none.
    """
    if not (place / "run.yaml").is_file():
        if round_number is not None:
            raise ValueError(f"--round: goes with a run folder, which {place} is not; leave it out")
        return place
    rounds = sorted(int(path.name) for path in (place / "rounds").glob("[0-9]*"))
    for number in reversed(rounds) if round_number is None else [round_number]:
        checkpoints = list_checkpoints(place / "rounds" / str(number) / "checkpoint")
        if checkpoints:
            return checkpoints[-1]
    which = "no round has" if round_number is None else f"round {round_number} does not have"
    raise ValueError(f"{place}: {which} a checkpoint; train it first, or give a step-… folder")
