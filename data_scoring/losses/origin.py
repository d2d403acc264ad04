"""The origin of losses, stored in every losses file, so that losses of different origins are never mixed."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_scoring.base.messages import one_line
from data_scoring.base.validation import validated

ORIGIN_KEY = b"reprise.origin"


@dataclass(frozen=True)
class Origin:
    """What losses depend on: the model's weights, the tokens, the precision, and how much of each sample was scored.

    `checkpoint` is the fingerprint of the training that produced the weights, with the checkpoint's name; `tokenizer`
    the checksum of its file; `corpus` the corpus's fingerprint; `precision` float32 or bfloat16; `budget` full, seen or
    prefix:P.
    """

    checkpoint: str
    tokenizer: str
    corpus: str
    precision: str
    budget: str


def with_origin(table: pa.Table, origin: Origin) -> pa.Table:
    """Return `table` with `origin` in its metadata, which Parquet files preserve."""
    metadata = {**(table.schema.metadata or {}), ORIGIN_KEY: json.dumps(asdict(origin)).encode()}
    return table.replace_schema_metadata(metadata)


def read_origin(path: Path) -> Origin:
    """Return the origin of the losses in `path`. Raises ValueError if the file is missing or carries none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; score the round first with `reprise score`")
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it and score the round again") from None
    if ORIGIN_KEY not in metadata:
        raise ValueError(f"{path}: has no record of the origin of its losses; delete it and score the round again")
    remedy = "delete it and score the round again"
    try:
        content = json.loads(metadata[ORIGIN_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {ORIGIN_KEY.decode()}: not valid JSON ({one_line(error)}); {remedy}") from None
    return validated(Origin, content, f"{path}: {ORIGIN_KEY.decode()}", remedy)


def check_origins(paths: Iterable[Path], corpus_fingerprint: str) -> Origin:
    """Return the common origin of the losses in the files `paths`, at least one.

    Raises ValueError, naming the files, the field and its values, if they have different origins or are not of the
    corpus with `corpus_fingerprint`.
    """
    first, *others = paths
    origin = read_origin(first)
    if origin.corpus != corpus_fingerprint:
        raise ValueError(
            f"{first}: its losses are of another corpus: corpus is {origin.corpus!r} there and {corpus_fingerprint!r} "
            f"here; delete {first.parent} and score the round again"
        )
    for path in others:
        other = read_origin(path)
        for field in fields(Origin):
            expected, found = getattr(origin, field.name), getattr(other, field.name)
            if found != expected:
                raise ValueError(
                    f"{path}: its losses are not comparable with those in {first}: {field.name} is {found!r} here "
                    f"and {expected!r} there; delete the file that does not belong to the round and score again"
                )
    return origin
