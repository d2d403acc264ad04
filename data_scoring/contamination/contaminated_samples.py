"""Contamination: which evaluation items, or parts of them, occur in the training text, found by n-grams.

The rule is GPT-3's (Brown et al. 2020, arXiv 2005.14165, its appendix on test set contamination): an item overlaps if
any of its n-grams, by default 13 units long, is in the corpus. N-grams in more than 10 documents are common phrases and
boilerplate and do not count. `ngrams.py` defines units and the normalisation of text.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_scoring.base.engine import Engine
from data_scoring.base.files import fingerprint
from data_scoring.base.parquet import is_intact, parquet_fingerprint, write_parquet
from data_scoring.base.progress import Progress
from data_scoring.contamination.item_ngrams import ItemIndex, index_items
from data_scoring.contamination.ngrams import split_units
from data_scoring.contamination.overlaps import Overlaps, find_overlaps
from data_scoring.corpus.reading_order import ReadingOrder
from data_scoring.evaluation.items import ItemText
from data_scoring.tokenizer.tokenizer import Tokenizer, encode_each

if TYPE_CHECKING:
    import duckdb

# The folder of temporary files, in the corpus's.
SCRATCH = ".contamination"
_FORMAT_VERSION = 1
# Metadata key of a digest of the overlapping samples, on which a mix without them depends.
_SAMPLES_KEY = b"reprise.samples"
_PAIRS = pa.schema(
    [
        ("task", pa.string()),
        ("item", pa.string()),
        ("shard", pa.int32()),
        ("sample", pa.int32()),
        ("source", pa.string()),
        ("num_ngrams", pa.int64()),
        ("excerpt", pa.string()),
    ]
)


def contamination_path(corpus_folder: Path) -> Path:
    """Return the path of the overlapping pairs of items and samples."""
    return corpus_folder / "contamination.parquet"


def contaminated_items_path(corpus_folder: Path) -> Path:
    """Return the path of the items with the share of each that was found."""
    return corpus_folder / "contamination-items.parquet"


def write_contamination(
    order: ReadingOrder,
    open_tokenizer: Callable[[], Tokenizer],
    items: Iterable[ItemText],
    ngram: int,
    engine: Engine,
    progress: Progress,
) -> bool:
    """Write which `items` overlap with which training samples to the corpus's folder; return whether it wrote anything.

    Two files: one row per overlapping item and sample, and one row per item with the share of its n-grams found.
    Existing files for the same corpus, items and `ngram` are kept. Each worker holds the items' n-grams in memory.
    `open_tokenizer` has to be picklable. Raises ValueError if there are no items.
    """
    import duckdb

    folder, listed = order.corpus.folder, list(items)
    if not listed:
        raise ValueError("eval.contamination: there are no items to look for; name tasks that have items, or set off")
    pairs_path, items_path = contamination_path(folder), contaminated_items_path(folder)
    identity = f"{_origin(order.corpus.fingerprint, ngram)}-{fingerprint([asdict(item) for item in listed])}"
    if is_intact(pairs_path, identity) and is_intact(items_path, identity):
        return False
    index = index_items(_as_in_corpus(listed, open_tokenizer()), ngram)
    scratch = folder / SCRATCH
    # A killed process may have left one.
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    overlaps = find_overlaps(order, open_tokenizer, index.distinct, engine, scratch, progress)
    shutil.rmtree(scratch, ignore_errors=True)
    with duckdb.connect() as connection:
        connection.register("owned", pa.table({"ngram": index.ngrams, "item": index.owners, "place": index.places}))
        connection.register("found", _found(order, overlaps))
        connection.register("common", pa.table({"ngram": np.flatnonzero(overlaps.is_common)}))
        items_table, pairs_table = _items_table(connection, index), _pairs_table(connection, index, order.sources)
    write_parquet(items_path, items_table, identity)
    write_parquet(pairs_path, pairs_table.replace_schema_metadata({_SAMPLES_KEY: _digest(pairs_table)}), identity)
    return True


def _as_in_corpus(items: list[ItemText], tokenizer: Tokenizer) -> list[ItemText]:
    """Return `items` with what the tokenizer makes of their text, as the corpus holds it.

    Characters that it drops, replaces or normalises would otherwise hide the overlaps around them.
    """
    encoded = encode_each(tokenizer, [item.text for item in items])
    return [
        replace(item, text=tokenizer.decode(ids)) if isinstance(ids, list) else item
        for item, ids in zip(items, encoded, strict=True)
    ]


def samples_fingerprint(corpus_folder: Path, corpus_fingerprint: str, ngram: int) -> str | None:
    """Return the fingerprint of the samples of a corpus that overlap with items, or None if it was not searched."""
    path = contamination_path(corpus_folder)
    if not (parquet_fingerprint(path) or "").startswith(f"{_origin(corpus_fingerprint, ngram)}-"):
        return None
    return str(pq.read_schema(path).metadata[_SAMPLES_KEY].decode())


def _origin(corpus_fingerprint: str, ngram: int) -> str:
    return f"{corpus_fingerprint}-{_FORMAT_VERSION}-{ngram}"


def _found(order: ReadingOrder, overlaps: Overlaps) -> pa.Table:
    """Return one row per n-gram and training sample that contains it: ngram, source, shard, sample."""
    shards, samples = (np.full(len(overlaps.ngrams), -1, np.int64) for _ in range(2))
    for source in range(len(order.sources)):
        mine = np.flatnonzero(overlaps.sources == source)
        places, rows = np.unique(overlaps.samples[mine], return_inverse=True)
        located = order.locate(source, places)
        shards[mine], samples[mine] = (numbers[rows] for numbers in located)
    is_trained_on = shards >= 0
    columns = {"ngram": overlaps.ngrams, "source": overlaps.sources, "shard": shards, "sample": samples}
    return pa.table({name: values[is_trained_on] for name, values in columns.items()})


def _items_table(connection: "duckdb.DuckDBPyConnection", index: ItemIndex) -> pa.Table:
    counts = connection.sql(
        f"""select range as item, count(owned.ngram) as num_ngrams, count(f.ngram) as num_found,
            count(common.ngram) as num_common
        from range({len(index.items)}) left join owned on item = range
        left join (select distinct ngram from found) as f using (ngram) left join common using (ngram)
        group by range order by range"""
    ).fetchnumpy()
    num_ngrams, num_found = counts["num_ngrams"], counts["num_found"]
    is_too_short = num_ngrams == 0
    columns = {
        "task": [item.task for item in index.items],
        "item": [item.item for item in index.items],
        "num_ngrams": num_ngrams,
        "num_found": num_found,
        "num_common": counts["num_common"],
        "share": pa.array(num_found / np.maximum(num_ngrams, 1), mask=is_too_short),
        "is_too_short": is_too_short,
    }
    return pa.table(columns)


def _pairs_table(connection: "duckdb.DuckDBPyConnection", index: ItemIndex, sources: list[str]) -> pa.Table:
    pairs = connection.sql(
        """select item, shard, sample, any_value(source) as source, count(distinct ngram) as num_ngrams,
            min(place) as place
        from found join owned using (ngram) group by item, shard, sample order by item, shard, sample"""
    ).fetchnumpy()
    excerpts: list[str] = []
    # Grouped by item, so that each item is split into units once.
    numbers, starts = np.unique(pairs["item"], return_index=True)
    for number, start, stop in zip(numbers, starts, [*starts[1:], len(pairs["item"])], strict=False):
        excerpts += _excerpts(index.items[number].text, pairs["place"][start:stop], index.distinct.longest)
    owners = [index.items[number] for number in pairs["item"].tolist()]
    columns = {
        "task": [item.task for item in owners],
        "item": [item.item for item in owners],
        "shard": pairs["shard"].astype(np.int32),
        "sample": pairs["sample"].astype(np.int32),
        "source": [sources[number] for number in pairs["source"].tolist()],
        "num_ngrams": pairs["num_ngrams"],
        "excerpt": excerpts,
    }
    return pa.table(columns, schema=_PAIRS)


def _excerpts(text: str, places: NDArray[np.int64], longest: int) -> list[str]:
    """Return the n-grams of an item that begin at the units `places`, normalised as for comparison."""
    units = split_units([text])
    lasts = np.minimum(places + longest, len(units.ends)) - 1
    spans = zip(units.starts[places].tolist(), units.ends[lasts].tolist(), strict=True)
    return [" ".join(units.text[start:end].split()) for start, end in spans]


def _digest(pairs: pa.Table) -> bytes:
    samples = np.stack([pairs["shard"].to_numpy(), pairs["sample"].to_numpy()], axis=1).astype("<i4")
    return hashlib.blake2b(np.unique(samples, axis=0).tobytes(), digest_size=8).hexdigest().encode()
