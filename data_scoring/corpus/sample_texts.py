"""The text of samples and where it comes from, decoded when asked for, in Python and in SQL."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from data_scoring.base.sql import literal
from data_scoring.corpus.corpus import VALIDATION, Corpus
from data_scoring.corpus.documents import DocumentTable, Origin
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.tokenizer.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    import duckdb

_TOKENS_AT_ONCE = 1 << 20
_ORIGIN = "struct(file varchar, document bigint, first_token bigint, num_documents bigint)"
COMMENT = (
    "The text of every training sample and where it comes from, decoded when read. A query that joins or sorts it "
    "decodes every sample first; select sample_text(shard, sample) from a subquery with a limit decodes only its rows."
)
COLUMNS = {
    "shard": "Shard of the sample, from 0. (integer)",
    "sample": "Number of the sample in its shard, from 0. (integer)",
    "source": "Source of the sample's text. (varchar)",
    "num_tokens": "Predicted tokens of the sample: its length minus one. (integer)",
    "text": "Text of the sample, decoded when selected. (varchar)",
    "file": "File of the document in which the sample begins. (varchar)",
    "document": "Number of that document in its file, from 1. (bigint)",
    "first_token": "Token of that document with which the sample begins, from 0. (bigint)",
    "num_documents": "Documents of which the sample has a part. (bigint)",
}


class SampleTexts:
    """The texts of the samples of a corpus that was prepared with `seed`; nothing is opened before it is needed.

    end_of_document: the configured token that ends a document, or None for the usual ones.
    """

    def __init__(self, folder: Path, seed: int, end_of_document: str | None) -> None:
        self._folder, self._seed, self._end_of_document = folder, seed, end_of_document

    @cached_property
    def corpus(self) -> Corpus:
        """Return the corpus. Raises ValueError if it is not complete."""
        return Corpus(self._folder)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(Path(self.corpus.tokenizer_path), self._end_of_document)

    @cached_property
    def _order(self) -> ReadingOrder:
        return ReadingOrder(self.corpus, self._seed)

    @cached_property
    def _documents(self) -> DocumentTable | None:
        path = self.corpus.documents_path
        return DocumentTable(path) if path.exists() else None

    @property
    def has_origins(self) -> bool:
        """Return whether the corpus says where samples come from; corpora before version 0.12 do not."""
        return self._documents is not None

    def texts(self, shards: Sequence[int], samples: Sequence[int]) -> list[str]:
        """Return the text of each sample; characters that it has only a part of are replaced by U+FFFD.

        The shard of validation samples is -1. Raises ValueError if there is no such sample.
        """
        self._check(shards, samples)
        texts: list[str] = []
        step = max(1, _TOKENS_AT_ONCE // (self.corpus.seq_length + 1))
        for start in range(0, len(shards), step):
            chosen = slice(start, start + step)
            batch = self.corpus.read(np.array(shards[chosen], np.int64), np.array(samples[chosen], np.int64))
            texts += self._tokenizer.decode_batch(
                [row[: count + 1].tolist() for row, count in zip(batch.tokens, batch.num_tokens, strict=True)]
            )
        return texts

    def origins(self, shards: Sequence[int], samples: Sequence[int]) -> list[Origin | None]:
        """Return where each sample comes from; None for validation samples and if the corpus does not say it.

        Raises ValueError if there is no such sample.
        """
        self._check(shards, samples)
        origins: list[Origin | None] = [None] * len(shards)
        rows = [row for row, shard in enumerate(shards) if shard != VALIDATION]
        if self._documents is None or not rows:
            return origins
        found = [shards[row] for row in rows], [samples[row] for row in rows]
        sources, starts = self._order.find(np.array(found[0], np.int64), np.array(found[1], np.int64))
        for row, source, start in zip(rows, sources.tolist(), starts.tolist(), strict=True):
            end = min(start + self._order.sample_length, self._order.num_source_tokens(source))
            origins[row] = self._documents.find(self._order.sources[source], start, end - 1)
        return origins

    def _check(self, shards: Sequence[int], samples: Sequence[int]) -> None:
        for shard, sample in zip(shards, samples, strict=True):
            if not (VALIDATION <= shard < self.corpus.num_shards and 0 <= sample < self.corpus.num_samples(shard)):
                raise ValueError(f"shard {shard} has no sample {sample}; the view samples lists those that there are")

    def register(self, connection: "duckdb.DuckDBPyConnection") -> None:
        """Create the functions sample_text and sample_origin of (shard, sample), and the view sample_texts.

        The view `samples` must exist.
        """
        arrow: Any = "arrow"
        for name, function, result in (
            ("sample_text", self._sql_texts, "varchar"),
            ("sample_origin", self._sql_origins, _ORIGIN),
        ):
            # Strings stand for types at runtime, which the library's annotations leave out.
            kinds: Any = (["bigint", "bigint"], result)
            connection.create_function(name, function, *kinds, type=arrow)
        connection.execute(
            """create view sample_texts as select shard, sample, source, num_tokens,
                sample_text(shard, sample) as text, origin.file, origin.document, origin.first_token,
                origin.num_documents
            from (select *, sample_origin(shard, sample) as origin from samples)"""
        )
        connection.execute(f"comment on view sample_texts is {literal(COMMENT)}")
        for column, meaning in COLUMNS.items():
            connection.execute(f"comment on column sample_texts.{column} is {literal(meaning)}")

    def _sql_texts(self, shards: pa.Array, samples: pa.Array) -> pa.Array:
        return pa.array(self.texts(shards.to_pylist(), samples.to_pylist()), pa.string())

    def _sql_origins(self, shards: pa.Array, samples: pa.Array) -> pa.Array:
        kinds = {"file": pa.string(), **dict.fromkeys(("document", "first_token", "num_documents"), pa.int64())}
        rows: list[dict[str, Any]] = [
            dict.fromkeys(kinds) if origin is None else origin._asdict()
            for origin in self.origins(shards.to_pylist(), samples.to_pylist())
        ]
        return pa.array(rows, pa.struct(kinds.items()))
