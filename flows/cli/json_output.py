"""JSON for other programs: one document on standard output, strict, in UTF-8."""

import argparse
import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def add_json(command: "argparse._ActionsContainer") -> None:
    """Add `--json` to `command`."""
    command.add_argument(
        "--json", action="store_true", help="print one JSON document instead; its fields are in docs/python.md"
    )


def print_json(value: Any) -> None:
    """Print `value`, of dataclasses, mappings, sequences, paths and plain values, as JSON."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whatever the terminal's encoding is; half of a surrogate pair, as in a file's name, is escaped.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=2))


def plain(value: Any) -> Any:
    """Return `value` in JSON's types; numbers that JSON lacks, such as NaN, are None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
