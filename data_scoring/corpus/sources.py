"""Documents from the user's sources, read as a stream."""

import io
import json
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from data_scoring.config import SourceConfig
from data_scoring.corpus.documents import Document, name_of_file
from data_scoring.corpus.indexed import IndexedTokens, open_indexed
from data_scoring.corpus.json_records import checked_text, decode, read_lines, read_records, record_text
from data_scoring.corpus.python_text import KINDS, read_python_text
from data_scoring.corpus.source_files import ending_of, format_of, has_wildcards, match_path, open_contents, open_file
from data_scoring.corpus.source_parts import (
    STREAMS,
    Piece,
    SourcePart,
    StoredFile,
    cut_source,
    open_stretch,
    part_bytes,
    stored_file,
)

if TYPE_CHECKING:
    import datasets

_T = TypeVar("_T")
_D = TypeVar("_D", str, Document)

# Called with (file, line or row, reason); raises or records.
BadRecord = Callable[[str, int, str], None]

# A text file that is one document has to fit into memory many times while it is tokenised.
LARGEST_DOCUMENT_BYTES = 256 << 20

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20
_CHUNK = 1 << 20
_BATCH_ROWS = 64


@dataclass(frozen=True)
class FoundSource:
    """A source, its format, which is never `auto`, and the names of its files, in order: none for text without files.

    Listing files takes long where there are many: it is done once.
    """

    source: SourceConfig
    kind: str
    names: Sequence[str]


def find_source(source: SourceConfig) -> FoundSource:
    """Return the format of `source` and its files; `auto` is resolved by their endings.

    Raises ValueError if it cannot be read at all, or if the endings are ambiguous or unknown.
    """
    kind: str = source.format
    names: list[str] = []
    if kind == "auto" and Path(f"{source.path}.idx").exists():
        kind = "megatron"
    # Files on a hub are not checked.
    is_on_hub = kind == "datasets" and not Path(source.path).exists()
    if kind not in ("megatron", "python") and not is_on_hub:
        names = matching_files(source)
    if kind == "auto":
        kind = _format_of_files(source, names)
    if kind == "megatron":
        open_megatron(source)
    if kind == "python" and source.path not in KINDS:
        raise ValueError(
            f"corpus.sources.{source.name}.path: {source.path!r} is not Python text; use one of {', '.join(KINDS)}"
        )
    return FoundSource(source, kind, names)


def _format_of_files(source: SourceConfig, names: Sequence[str]) -> str:
    formats = {kind for name in names if (kind := format_of(name)) is not None}
    if len(formats) == 1:
        return formats.pop()
    raise ValueError(
        f"corpus.sources.{source.name}.format: cannot tell the format of {source.path!r} from the endings "
        f"{sorted({ending_of(name) for name in names})}; set format to jsonl, text, parquet, datasets or megatron"
    )


def resolve_format(source: SourceConfig) -> str:
    """Return the format of `source`, with `auto` resolved. Raises ValueError as `find_source` does."""
    return find_source(source).kind if source.format == "auto" else source.format


def is_in_place(sources: Iterable[FoundSource]) -> bool:
    """Return whether all sources are in Megatron's format, which is used in place."""
    return all(found.kind == "megatron" for found in sources)


def open_megatron(source: SourceConfig) -> IndexedTokens:
    """Return the indexed tokens of a source in Megatron's format, of at most `max_documents` documents."""
    path = Path(source.path)
    indexed = open_indexed(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    return indexed if source.max_documents is None else indexed.first_documents(source.max_documents)


def read_documents(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[str]:
    """Yield the texts of the documents of `locate_documents`."""
    return (document.text for document in locate_documents(source, on_bad_record))


def locate_documents(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[Document]:
    """Yield a source's documents, in order, with one file block in memory at a time.

    A malformed record is passed to `on_bad_record` with its file and line (row, for Parquet), and skipped.
    """
    found = find_source(source)
    pieces = [Piece(source.path)] if found.kind in STREAMS else [Piece(name) for name in found.names]
    yield from islice(read_pieces(source, found.kind, pieces, on_bad_record), source.max_documents)


def read_pieces(
    source: SourceConfig, kind: str, pieces: Sequence[Piece], on_bad_record: BadRecord
) -> Generator[Document, None, int]:
    """Yield the documents of some pieces of a source's files, of the format `kind`, in order.

    Lines and paragraphs are numbered from the start of the piece, rows from that of the file. Returns how many lines or
    paragraphs the last piece has, or 0 for rows. `on_bad_record`: see `locate_documents`.
    """
    if kind == "python":
        yield from read_python_text(source.path)
        return 0
    if kind == "datasets":
        yield from _read_dataset(source, on_bad_record)
        return 0
    readers = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_parquet}
    last = 0
    for piece in pieces:
        last = yield from readers[kind](source, piece, on_bad_record)
    return last


def look_at_files(found: FoundSource) -> list[StoredFile]:
    """Return the files of a source, in order, as they are now. Raises ValueError if one cannot be looked at."""
    files = []
    for name in found.names:
        with _naming(found.source, name):
            files.append(stored_file(name))
    return files


def check_unchanged(part: SourcePart) -> None:
    """Raise ValueError if a file of `part` is not as it was when the source was cut: parts may be of different text."""
    for file in part.files:
        with _naming(part.source, file.name):
            found = stored_file(file.name, is_listed=False)
        if found != file:
            raise ValueError(
                f"corpus.sources.{part.source.name}.path: {file.name!r} changed while it was read; run the same "
                "command again once nothing writes to it"
            )


def unit_of(source: SourceConfig, kind: str) -> str:
    """Return what the documents of a stretch of a file are: a line or a paragraph."""
    return source.document if kind == "text" else "line"


def count_before(piece: Piece, unit: str) -> int:
    """Return the number of lines or paragraphs of a file before a stretch of it, for errors that name their place."""
    split = _paragraphs if unit == "paragraph" else _lines
    return sum(1 for _, content in _opened(Piece(piece.file, 0, piece.start), unit) for _ in split(content))


def batch_documents(documents: Iterable[_D]) -> Iterator[list[_D]]:
    """Yield lists of documents, or of their texts, large enough to tokenise efficiently and bounded in memory."""
    batch: list[_D] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document if isinstance(document, str) else document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class Rejects:
    """Bad records of one source: raises at the first, or lists them in a file."""

    def __init__(self, path: Path, skip: bool) -> None:
        self.count = 0
        self._path, self._skip = path, skip
        path.unlink(missing_ok=True)

    def __call__(self, file: str, line: int, reason: str) -> None:
        """Record one bad record. Raises ValueError unless bad records are skipped."""
        if not self._skip:
            raise ValueError(f"{file}:{line}: {reason}, or set corpus.on_bad_record: skip")
        self.count += 1
        list_reject(self._path, file, line, reason)


def list_reject(path: Path, file: str, line: int, reason: str) -> None:
    """Add a bad record to the list in `path`."""
    with path.open("a", encoding="utf-8") as rejects:
        rejects.write(json.dumps({"file": file, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


@contextmanager
def _naming(source: SourceConfig, file: str) -> Iterator[None]:
    """Convert whatever a library raises while it reads `file` into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (what libraries raise for damaged files is not documented)
        is_denied = isinstance(error, PermissionError)
        name = error.filename if isinstance(error, PermissionError) and error.filename else file
        remedy = "repair or replace the file, or set another format"
        if is_denied:
            remedy = "give yourself access to it"
        elif "://" in name:
            remedy = f"check the address and the access to it, or {remedy}"
        raise ValueError(
            f"corpus.sources.{source.name}.path: {name!r} cannot be read ({_reason(error)}); {remedy}"
        ) from None


def _reason(error: Exception) -> str:
    """Return what `error` says, on one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return reason[:200] or type(error).__name__


def _reading(source: SourceConfig, file: str, rows: Iterator[_T]) -> Iterator[_T]:
    """Yield `rows`, which a library reads from `file`; its errors name the file."""
    with _naming(source, file):
        yield from rows


def matching_files(source: SourceConfig) -> list[str]:
    """Return the names of the files that match a source's path. Raises ValueError if there are none."""
    with _naming(source, source.path):
        names = match_path(source.path)
    if not names:
        raise ValueError(
            f"corpus.sources.{source.name}.path: no file matches {source.path!r}; "
            "check the path, or set format: datasets for a hub name"
        )
    return names


def _opened(piece: Piece, unit: str) -> Iterator[tuple[str, io.TextIOWrapper]]:
    """Yield name and content of a piece, or of each member of an archive, as text whose lines end with a line feed."""
    is_whole = piece.start == 0 and piece.stop is None
    contents = open_contents(piece.file) if is_whole else iter([(piece.file, open_stretch(piece, unit))])
    for name, content in contents:
        # Latin-1 maps bytes to characters and back without loss, so that errors can name lines that are not UTF-8.
        yield name_of_file(name), io.TextIOWrapper(content, encoding="latin-1")


def _read_jsonl(source: SourceConfig, piece: Piece, on_bad_record: BadRecord) -> Generator[Document, None, int]:
    read, last = read_lines if piece.start else read_records, 0
    records = ((name, record) for name, content in _opened(piece, "line") for record in read(content))
    for name, record in _reading(source, piece.file, records):
        last = record.line
        if not record.text.strip():
            continue
        try:
            text = record_text(record.text.encode("latin-1"), source.text_field)
        except ValueError as error:
            on_bad_record(piece.file, record.line, str(error))
        else:
            yield Document(text, name, record.number)
    return last


def _read_text(source: SourceConfig, piece: Piece, on_bad_record: BadRecord) -> Generator[Document, None, int]:
    splits = {"file": _whole, "paragraph": _paragraphs, "line": _lines}
    file, number = piece.file, 0
    parts = (
        (name, place, part.encode("latin-1"))
        for name, content in _opened(piece, source.document)
        for place, part in enumerate(splits[source.document](content), start=1)
    )
    for number, (name, place, raw) in enumerate(_reading(source, file, parts), start=1):
        if len(raw) > LARGEST_DOCUMENT_BYTES and source.document == "file":
            raise ValueError(
                f"{file}: over {LARGEST_DOCUMENT_BYTES >> 20} MB in one document; "
                f"set corpus.sources.{source.name}.document to paragraph or line"
            )
        try:
            text = decode(raw)
        except ValueError as error:
            # For whole files, report the line of the error; otherwise, the number of the line or paragraph.
            line = number if source.document != "file" else _line_of_first_bad_byte(raw)
            on_bad_record(file, line, str(error))
        else:
            yield Document(text, name, place)
    return number


def _whole(content: io.TextIOWrapper) -> Iterator[str]:
    yield content.read(LARGEST_DOCUMENT_BYTES + 1)


def _lines(content: io.TextIOWrapper) -> Iterator[str]:
    for line in content:
        yield line.removesuffix("\n")


def _paragraphs(content: io.TextIOWrapper) -> Iterator[str]:
    """Yield what blank lines separate."""
    rest = ""
    while block := content.read(_CHUNK):
        *paragraphs, rest = (rest + block + content.readline()).split("\n\n")
        yield from filter(None, paragraphs)
    if rest:
        yield rest


def _line_of_first_bad_byte(raw: bytes) -> int:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    raise AssertionError("every line is UTF-8")


def _read_parquet(source: SourceConfig, piece: Piece, on_bad_record: BadRecord) -> Generator[Document, None, int]:
    field, file = source.text_field, piece.file
    with ExitStack() as stack:
        with _naming(source, file):
            opened = stack.enter_context(open_file(file))
            # With a buffer, and nothing read ahead, memory does not depend on the size of row groups.
            parquet = pq.ParquetFile(opened, buffer_size=_CHUNK, pre_buffer=False, page_checksum_verification=True)
            num_rows, names = parquet.metadata.num_rows, parquet.schema_arrow.names
        if num_rows == 0:
            return 0
        if names.count(field) != 1:
            raise _wrong_column(source, file, names)
        with _naming(source, file):
            groups = _row_groups(parquet.metadata, piece)
        first = sum(parquet.metadata.row_group(number).num_rows for number in range(groups.start))
        rows = _reading(source, file, _parquet_values(parquet, groups, field))
        yield from _texts(file, rows, field, on_bad_record, first + 1)
    return 0


def _row_groups(metadata: pq.FileMetaData, piece: Piece) -> range:
    """Return the row groups that begin in the bytes of `piece`."""
    starts = []
    for number in range(metadata.num_row_groups):
        columns = [metadata.row_group(number).column(each) for each in range(metadata.num_columns)]
        offsets = [
            min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0) for column in columns
        ]
        starts.append(min(offsets))
    # The first group begins after the magic number, or wherever a damaged footer says.
    starts[:1] = [0]
    starts = np.maximum.accumulate(starts).tolist()
    stop = metadata.num_row_groups if piece.stop is None else bisect_left(starts, piece.stop)
    return range(bisect_left(starts, piece.start), stop)


def _parquet_values(parquet: pq.ParquetFile, groups: range, field: str) -> Iterator[Any]:
    """Yield the values of the column `field` in some row groups; for one that is not UTF-8, the error."""
    num_rows = 0
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[*groups], columns=[field], use_threads=False):
        for scalar in batch.column(batch.schema.names.index(field)):
            try:
                yield scalar.as_py()
            except UnicodeDecodeError as error:
                yield error
        num_rows += len(batch)
    listed = sum(parquet.metadata.row_group(number).num_rows for number in groups)
    if len(groups) == parquet.metadata.num_row_groups:
        listed = parquet.metadata.num_rows
    if num_rows != listed:
        raise ValueError(f"it has {num_rows} rows, but its footer says {listed}")


def _read_dataset(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[Document]:
    field = source.text_field
    batches = _reading(source, source.path, iter(_open_dataset(source).iter(batch_size=_BATCH_ROWS)))

    def rows() -> Iterator[Any]:
        for batch in batches:
            if field not in batch:
                raise _wrong_column(source, source.path, list(batch))
            yield from batch[field]

    yield from _texts(source.path, rows(), field, on_bad_record)


def _wrong_column(source: SourceConfig, file: str, names: list[str]) -> ValueError:
    count = names.count(source.text_field)
    return ValueError(
        f"{file}: {f'{count} columns' if count else 'no column'} {source.text_field!r} among {sorted(names)}; "
        f"set corpus.sources.{source.name}.text_field to the column that holds the text"
    )


def _texts(file: str, rows: Iterable[Any], field: str, on_bad_record: BadRecord, first: int = 1) -> Iterator[Document]:
    """Yield the values of `rows` that are text; the first row has the number `first`."""
    name = name_of_file(file)
    for number, value in enumerate(rows, start=first):
        try:
            if isinstance(value, UnicodeDecodeError):
                raise ValueError(f"field {field!r} is not UTF-8; convert it to UTF-8")
            yield Document(checked_text(value, field), name, number)
        except ValueError as error:
            on_bad_record(file, number, str(error))


def _open_dataset(source: SourceConfig) -> "datasets.IterableDataset | datasets.Dataset":
    import datasets

    path = Path(source.path)
    is_saved = (path / "state.json").exists()
    if path.is_dir() and not is_saved and has_wildcards(str(path.resolve())):
        # It reads another folder, whose name matches, or none.
        raise ValueError(
            f"corpus.sources.{source.name}.path: datasets takes the brackets, asterisks or question marks of "
            f"{str(path.resolve())!r} for a pattern; rename the folder, or set format to jsonl, text or parquet"
        )
    try:
        if is_saved:
            return datasets.load_from_disk(source.path)
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
    except Exception as error:  # noqa: BLE001 (what the library raises depends on the hub and the data set's files)
        raise ValueError(
            f"corpus.sources.{source.name}.path: datasets cannot load {source.path!r} ({_reason(error)}); "
            "check the name, subset and split"
        ) from None


def cut_sources(sources: Sequence[FoundSource]) -> list[list[SourcePart]]:
    """Return the parts of each source of text. Raises ValueError if a file cannot be looked at."""
    files = [look_at_files(found) for found in sources]
    size = part_bytes(sum(file.num_bytes for each in files for file in each))
    parts = []
    for found, each in zip(sources, files, strict=True):
        with _naming(found.source, found.source.path):
            parts.append(cut_source(found.source, found.kind, each, size))
    return parts
