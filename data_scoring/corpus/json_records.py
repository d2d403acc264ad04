"""Records of JSON files: one object a line, or all in one array; and the text of a record."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, Any, NamedTuple

# An array's first line may hold all of it.
_FIRST_LINE = 1 << 20
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf".decode("latin-1")
# The first element of an array is an object, an array or a string, or there is none.
_ARRAY = re.compile(rf"(?:{_BOM})?\s*\[\s*(?:$|[{{\[\]\"])")
_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OUTSIDE_STRINGS = re.compile(r'["\[\]{},]')


class Record(NamedTuple):
    """A record: the line that it begins on, its number (that of the line, or of the element of an array), its JSON."""

    line: int
    number: int
    text: str


def read_records(file: IO[str]) -> Iterator[Record]:
    """Yield the records of `file`: its lines, or the elements of its array, if it is one.

    The file is opened as latin-1, so that every byte is a character. Memory holds one record. Raises ValueError if an
    array is cut short, or something follows it.
    """
    blank_lines = 0
    while (first := file.readline(_FIRST_LINE)) and not first.strip().removeprefix(_BOM):
        blank_lines += first.endswith("\n")
    start, following = blank_lines + 1, ""
    if _ARRAY.match(first):
        if _is_complete(first):
            # A file of lines may have an array on its first line, which is a bad record.
            skipped = 0
            while (following := file.readline(_FIRST_LINE)) and not following.strip():
                skipped += 1
        if not following:
            elements = _elements(chain([first], iter(lambda: file.read(_CHUNK), "")), start)
            yield from (Record(line, number, text) for number, (line, text) in enumerate(elements, start=1))
            return
        yield Record(start, start, first.removesuffix("\n"))
        first, start = following, start + skipped + 1
    # A piece of a longer line.
    line = first if first.endswith("\n") else first + file.readline()
    for number, text in enumerate(chain([line] if line else [], file), start):
        yield Record(number, number, text.removesuffix("\n"))


def read_lines(file: IO[str]) -> Iterator[Record]:
    """Yield the lines of `file`, whatever they hold: a stretch of a file that is no array."""
    for number, text in enumerate(file, start=1):
        yield Record(number, number, text.removesuffix("\n"))


def _is_complete(line: str) -> bool:
    """Return whether the array that starts on `line` ends there, too."""
    try:
        for _ in _elements([line], 1):
            pass
    except ValueError:
        return False
    return True


def _elements(chunks: Iterable[str], line: int) -> Iterator[tuple[int, str]]:
    """Yield (line number, JSON text) of the elements of the array that starts on line number `line`."""
    depth, num_elements, is_over = 0, 0, False
    parts: list[str] = []
    for piece, bracket in _split(chunks):
        parts.append(piece)
        if depth == 1 and bracket in (",", "]"):
            text = "".join(parts)
            if text.strip() or bracket == "," or num_elements:
                yield line + text[: len(text) - len(text.lstrip())].count("\n"), text.strip()
            line += text.count("\n")
            num_elements += 1
            is_over = bracket == "]"
            depth, parts = 0 if is_over else 1, []
        elif depth > 0:
            parts.append(bracket)
            depth += (bracket in ("[", "{")) - (bracket in ("]", "}"))
            if depth == 0:
                raise ValueError(f"the JSON array that it holds ends with a wrong bracket on line {line}")
        elif is_over:
            if bracket or piece.strip():
                raise ValueError(f"text follows the JSON array that it holds, on line {line} or later")
        elif bracket:
            line += "".join(parts).count("\n")
            depth, parts = 1, []
    if not is_over:
        raise ValueError("the JSON array that it holds is cut short")


def _split(chunks: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pieces of JSON text, each with the bracket, brace or comma outside strings that follows it, or ''."""
    is_string = is_escaped = False
    for chunk in chunks:
        start = place = 0
        while place < len(chunk):
            if is_string:
                place = _end_of_string(chunk, place + is_escaped)
                # A string may continue in the next chunk, and a backslash be the last character of this one.
                is_escaped = chunk[place : place + 1] == "\\"
                is_string = chunk[place : place + 1] != '"'
                place += 1
                continue
            found = _OUTSIDE_STRINGS.search(chunk, place)
            if found is None:
                break
            place = found.end()
            if found.group() == '"':
                is_string = True
                continue
            yield chunk[start : place - 1], found.group()
            start = place
        yield chunk[start:], ""


def _end_of_string(chunk: str, place: int) -> int:
    found = _IN_STRING.match(chunk, place)
    assert found is not None, "the pattern matches the empty string"
    return found.end()


def record_text(record: bytes, field: str) -> str:
    """Return the text in the field `field` of a JSON object. Raises ValueError, with the remedy, if there is none."""
    line = decode(record)
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"not valid JSON as one object a line ({reason}); repair the line") from None
    except RecursionError:
        raise ValueError("not readable as JSON (nested too deeply); repair or remove the line") from None
    except ValueError:
        # Python converts no integers with more digits.
        limit = sys.get_int_max_str_digits()
        raise ValueError(f"not readable as JSON (a number of over {limit} digits); repair or remove the line") from None
    if isinstance(value, list):
        raise ValueError("a JSON array, where one object a line is wanted; write each of its elements on a line")
    if not isinstance(value, dict) or field not in value:
        raise ValueError(f"no field {field!r}; set text_field to the field that holds the text, in one object a line")
    return checked_text(value[field], field)


def checked_text(text: Any, field: str) -> str:
    """Return `text`, the value of `field`. Raises ValueError, with the remedy, if it is not text."""
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {type(text).__name__}, not a string; set text_field to the text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half of a surrogate pair, which is no text; repair the line") from None
    return text


def decode(line: bytes) -> str:
    """Return `line` decoded. Raises ValueError, with the remedy, if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); convert the file to UTF-8"
        ) from None
