"""YAML that users write: read with limits, so that whatever is wrong in it is one error that names file and line."""

from pathlib import Path
from typing import Any

import yaml

from data_scoring.base.messages import one_line, shown

_MOST_BYTES = 1 << 22
_MOST_LEVELS = 64
# Values after aliases are replaced by what they stand for.
_MOST_VALUES = 200_000
_MOST_CHARACTERS = 65_536
_INT64 = range(-(2**63), 2**63)
# libyaml's loader is ten times as fast, but some builds of PyYAML lack it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STR, _INT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "merge"))


class _MistakeError(Exception):
    """What is wrong with a YAML text, where, and the remedy."""

    def __init__(self, mark: Any, problem: str, remedy: str) -> None:
        super().__init__(f"line {mark.line + 1}: {problem}; {remedy}")


def read_yaml(path: Path) -> Any:
    """Return the value in the YAML file `path`.

    Raises FileNotFoundError, and ValueError, naming file and line, if the file is not valid YAML, has a mapping with
    the same key twice, tags, values beyond 64 bits, or more than 4 MiB, 64 levels or 200,000 values, aliases included.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give a YAML file") from None
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path}: larger than {_MOST_BYTES:,} bytes; give a YAML file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: not valid YAML (not UTF-8); save it as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value in the YAML `text`. Raises ValueError as `read_yaml`; the message starts with `origin`."""
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(loader, node, {})
            return _unshared(loader.construct_document(node))
        finally:
            loader.dispose()
    except _MistakeError as mistake:
        raise ValueError(f"{origin}: {mistake}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = one_line(error.problem or error.context)
        raise ValueError(
            f"{origin}: not valid YAML ({place}{problem}); correct it, or put the text in quotes"
        ) from None
    except yaml.reader.ReaderError as error:
        # Its position is in bytes or, from the loader in Python, in characters, of which none before it take several.
        line = text.encode(errors="replace").count(b"\n", 0, error.position) + 1
        raise ValueError(
            f"{origin}: not valid YAML (line {line}: {one_line(error.reason)}); remove the character, or write it as "
            '"\\x07" in quotes'
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        # ValueErrors are of texts that cannot be encoded, and of impossible numbers and dates.
        raise ValueError(f"{origin}: not valid YAML ({one_line(error)}); repair it") from None


def _check_events(text: str) -> None:
    """Check nesting, tags and lengths, before recursive functions see the text."""
    level = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
            if level > _MOST_LEVELS:
                raise _MistakeError(event.start_mark, f"more than {_MOST_LEVELS} levels of nesting", "write fewer")
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", _STR):
            raise _MistakeError(event.start_mark, f"the tag {shown(tag)} is not supported", "remove it")
        if isinstance(event, yaml.ScalarEvent):
            _check_scalar(event)


def _check_scalar(event: Any) -> None:
    if len(event.value) > _MOST_CHARACTERS:
        raise _MistakeError(event.start_mark, f"a text of more than {_MOST_CHARACTERS:,} characters", "shorten it")
    if "\0" in event.value:
        raise _MistakeError(event.start_mark, "the control character '\\x00' in a text", "remove it")


def _check_node(loader: Any, node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values and levels of `node` and all in it; `known` has those of nodes seen before."""
    if id(node) in known:
        count, height = known[id(node)]
        if not count:
            raise _MistakeError(node.start_mark, "an alias stands for what contains it", "write the value out")
        return count, height
    known[id(node)] = (0, 0)
    children: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif node.tag == _INT and loader.construct_yaml_int(node) not in _INT64:
        raise _MistakeError(node.start_mark, f"{one_line(node.value)} does not fit into 64 bits", "correct it")
    count, height = 1, 1
    for child in children:
        more, levels = _check_node(loader, child, known)
        count, height = count + more, max(height, levels + 1)
        if count > _MOST_VALUES:
            raise _MistakeError(node.start_mark, f"more than {_MOST_VALUES:,} values, aliases included", "write fewer")
        if height > _MOST_LEVELS:
            raise _MistakeError(node.start_mark, f"more than {_MOST_LEVELS} levels, aliases included", "write fewer")
    known[id(node)] = (count, height)
    return count, height


def _check_keys(node: Any) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag not in (_STR, _MERGE):
            name = one_line(key.value) if isinstance(key, yaml.ScalarNode) else "of several values"
            raise _MistakeError(key.start_mark, f"the key {name} is not a name", "put it in quotes")
        if key.value in lines and key.tag == _STR:
            first = f"{one_line(key.value)} is already in line {lines[key.value]}"
            raise _MistakeError(key.start_mark, first, "delete one of the two")
        lines[key.value] = key.start_mark.line + 1


def _unshared(value: Any) -> Any:
    """Return `value` with copies of what aliases share, so that a change of one place changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unshared(entry) for entry in value]
    return value
