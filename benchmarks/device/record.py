"""Results of a part of the check, saved immediately: figures, and checks of values against limits."""

import json
import time
from pathlib import Path
from typing import Any

from data_scoring.base.files import write_json

Content = dict[str, Any]


class Record:
    """The figures and checks of one part, in a JSON file that is rewritten after each of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: Content = {"figures": {}, "checks": []}
        self._write()

    def figures(self, **values: Any) -> None:
        """Add figures by name; the unit is in the name."""
        self.content["figures"].update(values)
        self._write()

    def check(self, what: str, value: float, at_most: float) -> None:
        """Add the check that `value` is at most `at_most`; NaN fails it."""
        passed = bool(value <= at_most)
        self.content["checks"].append({"what": what, "value": value, "at_most": at_most, "passed": passed})
        self._write()

    def end(self, seconds: float) -> None:
        """Record that the part has ended after `seconds`."""
        self.content["seconds"] = round(seconds, 1)
        self._write()

    def _write(self) -> None:
        write_json(self._path, self.content)


def read_record(path: Path) -> Content:
    """Return a part's record in `path`; it has `seconds` if the part has ended."""
    if not path.exists():
        return {"figures": {}, "checks": []}
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_results(output: Path, environment: Content, parts: list[Content]) -> None:
    """Write results.json and summary.md of the completed parts to the folder `output`."""
    content = {"written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **environment, "parts": parts}
    write_json(output / "results.json", content)
    (output / "summary.md").write_text(summarise(environment, parts), encoding="utf-8")


def summarise(environment: Content, parts: list[Content]) -> str:
    """Return the results in Markdown: a table of parts, then the checks and figures of each part."""
    lines = ["# Device check", ""]
    lines += [f"- {name.replace('_', ' ')}: {_show(value)}" for name, value in environment.items()]
    lines += ["", "| part | result | checks passed | seconds |", "|---|---|---:|---:|"]
    for part in parts:
        passed = sum(check["passed"] for check in part["checks"])
        lines.append(f"| {part['name']} | {part['status']} | {passed} of {len(part['checks'])} | {part['seconds']} |")
    for part in parts:
        lines += ["", f"## {part['name']}: {part['status']}", ""]
        if part["error"] is not None:
            lines += [f"Error (log: {part['log']}): `{part['error']}`", ""]
        for check in part["checks"]:
            mark = "passed" if check["passed"] else "**failed**"
            lines.append(f"- {mark}: {check['what']}: {_show(check['value'])} (at most {_show(check['at_most'])})")
        for name, value in part["figures"].items():
            lines += _figure(name.replace("_", " "), value)
    return "\n".join(lines) + "\n"


def _figure(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return [f"- {name}: {_show(value)}"]
    columns = list(value[0])
    rows = [[str(_show(row[column])).replace("|", "\\|") for column in columns] for row in value]
    table = [columns, ["---"] * len(columns), *rows]
    return ["", f"{name}:", "", *("| " + " | ".join(row) + " |" for row in table), ""]


def _show(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(str(_show(each)) for each in value)
    return value
