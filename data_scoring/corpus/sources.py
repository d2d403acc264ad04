"""Documents from the user's sources, read as a stream through the `datasets` library."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from fsspec.core import get_fs_token_paths

from data_scoring.config import SourceConfig
from data_scoring.corpus.indexed import IndexedTokens, open_indexed
from data_scoring.corpus.python_text import KINDS, read_python_text

if TYPE_CHECKING:
    import datasets

# Called with (file, line or row, reason); raises or records.
BadRecord = Callable[[str, int, str], None]

# A text file that is one document has to fit into memory several times while it is tokenised.
LARGEST_DOCUMENT_BYTES = 256 << 20

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20
# Size of a read; it takes several times that in memory.
_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 64

_FORMAT_OF_ENDING = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".bin": "megatron", ".idx": "megatron",
}  # fmt: skip


def resolve_format(source: SourceConfig) -> str:
    """Return the format of `source`; `auto` is resolved by the path's extension.

    Raises ValueError if the extension is ambiguous or unknown.
    """
    if source.format != "auto":
        return source.format
    if Path(f"{source.path}.idx").exists():
        return "megatron"
    endings = {_ending(name) for name in matching_files(source)}
    formats = {_FORMAT_OF_ENDING[ending] for ending in endings if ending in _FORMAT_OF_ENDING}
    if len(formats) == 1:
        return formats.pop()
    raise ValueError(
        f"corpus.sources.{source.name}.format: cannot tell the format of {source.path!r} from the endings "
        f"{sorted(endings)}; set format to jsonl, text, parquet, datasets or megatron"
    )


def open_megatron(source: SourceConfig) -> IndexedTokens:
    """Return the indexed tokens of a source in Megatron's format, of at most `max_documents` documents."""
    path = Path(source.path)
    indexed = open_indexed(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    return indexed if source.max_documents is None else indexed.first_documents(source.max_documents)


def check_source(source: SourceConfig) -> None:
    """Raise ValueError if `source` cannot be read at all."""
    kind = resolve_format(source)
    if kind == "megatron":
        open_megatron(source)
    elif kind == "python":
        if source.path not in KINDS:
            raise ValueError(
                f"corpus.sources.{source.name}.path: {source.path!r} is not Python text; use one of {', '.join(KINDS)}"
            )
    elif kind != "datasets":
        matching_files(source)


def read_documents(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[str]:
    """Yield the texts of a source's documents, in order, with one file block in memory at a time.

    A malformed record is passed to `on_bad_record` with its file and line (row, for Parquet), and skipped.
    """
    kind = resolve_format(source)
    readers = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_rows, "datasets": _read_rows}
    if kind == "python":
        texts: Iterator[str] = read_python_text(source.path)
    else:
        texts = readers[kind](source, on_bad_record)
    with _naming(source):
        for number, text in enumerate(texts):
            if source.max_documents is not None and number >= source.max_documents:
                return
            yield text


def batch_documents(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of documents, large enough to tokenise efficiently and bounded in memory."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
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
        with self._path.open("a", encoding="utf-8") as rejects:
            rejects.write(json.dumps({"file": file, "line": line, "reason": reason}, ensure_ascii=False) + "\n")


@contextmanager
def _naming(source: SourceConfig) -> Iterator[None]:
    """Convert library errors about a file's format into a ValueError that names the source."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, pa.ArrowInvalid, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"corpus.sources.{source.name}.path: {source.path!r} cannot be read ({reason}); "
            "repair or replace the file, or set another format"
        ) from None


def matching_files(source: SourceConfig) -> list[str]:
    """Return the names of the files that match a source's path. Raises ValueError if there are none."""
    with _naming(source):
        names = _match(source.path)
    if not names:
        raise ValueError(
            f"corpus.sources.{source.name}.path: no file matches {source.path!r}; "
            "check the path, or set format: datasets for a hub name"
        )
    return names


def _match(path: str) -> list[str]:
    if Path(path).is_dir():
        names = sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and file.name[0] != ".")
    else:
        fs, _, names = get_fs_token_paths(path)
        names = sorted(name for name in names if fs.exists(name))
        if "://" in path:
            names = [fs.unstrip_protocol(name) for name in names]
    return names


def _ending(name: str) -> str:
    endings = [ending for ending in Path(name).suffixes if ending not in (".gz", ".zst", ".bz2", ".xz")]
    return endings[-1].lower() if endings else ""


def _raw_rows(files: list[str], sample_by: str) -> Iterator[bytes]:
    import datasets

    # Latin-1 maps bytes to characters and back without loss, so that errors can name lines that are not UTF-8.
    rows = datasets.load_dataset(
        "text",
        data_files=files,
        split="train",
        streaming=True,
        sample_by=sample_by,
        encoding="latin-1",
        chunksize=_CHUNK_BYTES,
    )
    # A batch is held in memory: one document at a time if files are documents, else at most the lines of one read.
    for batch in rows.iter(batch_size=1 if sample_by == "document" else _BATCH_ROWS):
        for text in batch["text"]:
            yield text.encode("latin-1")


def _read_jsonl(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[str]:
    for file in matching_files(source):
        for number, line in enumerate(_raw_rows([file], "line"), start=1):
            if not line.strip():
                continue
            try:
                yield _json_text(line, source.text_field)
            except ValueError as error:
                on_bad_record(file, number, str(error))


def _json_text(line: bytes, field: str) -> str:
    try:
        record = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno}); repair the line") from None
    if not isinstance(record, dict) or field not in record:
        raise ValueError(f"no field {field!r}; set text_field to the field that holds the text")
    return _checked_text(record[field], field)


def _checked_text(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {type(text).__name__}, not a string; set text_field to the text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half of a surrogate pair, which is no text; repair the line") from None
    return text


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); convert the file to UTF-8"
        ) from None


def _read_text(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[str]:
    files = matching_files(source)
    if source.document == "file":
        for file in files:
            if Path(file).exists() and Path(file).stat().st_size > LARGEST_DOCUMENT_BYTES:
                raise ValueError(
                    f"{file}: {Path(file).stat().st_size >> 20} MB in one document; "
                    f"set corpus.sources.{source.name}.document to paragraph or line"
                )
        numbered = ((file, 1, text) for file, text in zip(files, _raw_rows(files, "document"), strict=True))
    else:
        numbered = (
            (file, number, text)
            for file in files
            for number, text in enumerate(_raw_rows([file], source.document), start=1)
        )
    for file, number, raw in numbered:
        try:
            text = _decode(raw)
        except ValueError as error:
            # For whole files, report the line of the error; otherwise, the number of the line or paragraph.
            line = number if source.document != "file" else _line_of_first_bad_byte(raw)
            on_bad_record(file, line, str(error))
        else:
            yield text


def _line_of_first_bad_byte(raw: bytes) -> int:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    raise AssertionError("every line is UTF-8")


def _read_rows(source: SourceConfig, on_bad_record: BadRecord) -> Iterator[str]:
    row_number = 0
    for batch in _open_rows(source).iter(batch_size=_BATCH_ROWS):
        if source.text_field not in batch:
            raise ValueError(
                f"{source.path}: no column {source.text_field!r} among {sorted(batch)}; "
                f"set corpus.sources.{source.name}.text_field to the column that holds the text"
            )
        for value in batch[source.text_field]:
            row_number += 1
            try:
                yield _checked_text(value, source.text_field)
            except ValueError as error:
                on_bad_record(source.path, row_number, str(error))


def _open_rows(source: SourceConfig) -> "datasets.IterableDataset | datasets.Dataset":
    import datasets

    if resolve_format(source) == "parquet":
        return datasets.load_dataset("parquet", data_files=matching_files(source), split="train", streaming=True)
    if (Path(source.path) / "state.json").exists():
        return datasets.load_from_disk(source.path)
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"corpus.sources.{source.name}.path: datasets cannot load {source.path!r} ({reason}); "
            "check the name, subset and split"
        ) from None


def stamp_files(source: SourceConfig) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of each local file of a source, to detect changes."""
    kind = resolve_format(source)
    if kind == "python":
        return []
    # Files on a hub are not checked.
    names = sorted(map(str, Path(source.path).rglob("*"))) if kind == "datasets" else matching_files(source)
    stats = [(name, Path(name).stat()) for name in names if Path(name).exists()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
