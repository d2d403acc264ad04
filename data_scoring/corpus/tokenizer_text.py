"""The tokenizer of a corpus: a copy of the given one, or one trained on a sample of all parts of the sources."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from typing_extensions import TypedDict

from data_scoring.base.engine import Count
from data_scoring.base.files import checksum, fingerprint, write_record
from data_scoring.base.validation import read_record
from data_scoring.config import TokenizerConfig
from data_scoring.corpus.part_text import PartText
from data_scoring.corpus.preparation import Preparation
from data_scoring.corpus.source_parts import SourcePart
from data_scoring.tokenizer.tokenizer import TextSample, install_tokenizer, train_tokenizer


class _Record(TypedDict):
    fingerprint: str
    checksum: str


def make_tokenizer(config: TokenizerConfig, sources: Sequence[Sequence[SourcePart]], preparation: Preparation) -> Path:
    """Return the path of the corpus' tokenizer; a tokenizer that an earlier attempt trained is reused."""
    folder, seed = preparation.folder, preparation.seed
    if config.path is not None:
        return install_tokenizer(config, (), seed, folder)
    parts = [part for source in sources for part in source]
    # Names of sources do not start with an underscore.
    record_path, path = preparation.staging / "_tokenizer.json", folder / "tokenizer.json"
    identity = fingerprint(config.model_dump(), seed, [part.identity for part in parts], preparation.skip_bad)
    record = read_record(record_path, _Record)
    if record is None or record["fingerprint"] != identity or not path.exists() or record["checksum"] != checksum(path):
        path = train_tokenizer(config, _sample(config, parts, preparation), folder)
        write_record(record_path, {"fingerprint": identity, "checksum": checksum(path)})
    return path


def _sample(config: TokenizerConfig, parts: Sequence[SourcePart], preparation: Preparation) -> Iterator[str]:
    """Yield a random sample of all documents, after reading and keeping them."""
    staging, skip_bad = preparation.staging, preparation.skip_bad
    num_bytes, total = int(config.train_megabytes * 1e6), sum(part.num_bytes for part in parts)
    work = partial(
        keep_part,
        staging=staging,
        skip_bad=skip_bad,
        num_bytes=num_bytes,
        total_bytes=total,
        seed=preparation.seed,
    )
    sample = TextSample(num_bytes)
    results = preparation.map(work, parts, "sampling text for the tokenizer (documents)")
    for part, _ in zip(parts, results, strict=True):
        for key, text in PartText(part, staging, skip_bad).sampled():
            sample.add(key, text)
    return (text for _, text in sample.entries())


def keep_part(
    part: SourcePart, count: Count, *, staging: Path, skip_bad: bool, num_bytes: int, total_bytes: int, seed: int
) -> None:
    """Keep the text of a part, and its sample of the text that a tokenizer is trained on: see `PartText.keep`."""
    PartText(part, staging, skip_bad).keep(num_bytes, total_bytes, seed, count)
