"""`reprise completion`: a script for the shell that completes commands, options, fields, run folders and files.

The script is static: a TAB starts no Python.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from flows.cli.options import path

SHELLS = ("bash", "zsh", "fish")

# Run folders in runs/ of the current folder, also by their names alone, and other folders. In bash, the names of
# functions that complete paths contain `_dir` or `_file`.
_RUNS = {
    "bash": """
_reprise_run_dirs() {
  local file
  [[ $1 == */* ]] || for file in runs/"$1"*/run.yaml; do
    [[ -e $file ]] && echo "${file%/run.yaml}"
  done
  compgen -d -- "$1"
}""",
    "zsh": """
_reprise_run_dirs() {
  local -a runs
  [[ $PREFIX == */* ]] || runs=(runs/${PREFIX}*/run.yaml(N:h))
  (( $#runs )) && compadd -U -f -- $runs
  _files -/
}""",
    "fish": """
function _reprise_run_dirs
    set -l word (commandline -ct)
    if not string match -q '*/*' -- "$word"
        for file in runs/*/run.yaml
            string replace -r '/run.yaml$' '' -- $file
        end
    end
    __fish_complete_directories "$word"
end""",
}
_CONFIG_PATTERN = ("*.yaml", "*.yml")
_CONFIGS_OR_RUNS = {
    "bash": """
_reprise_config_files() {
  _reprise_run_dirs "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -f -X '!*.yml' -- "$1"
}""",
    "zsh": """
_reprise_config_files() {
  _reprise_run_dirs
  _files -g '*.(yaml|yml)'
}""",
    "fish": """
function _reprise_config_files
    _reprise_run_dirs
    __fish_complete_suffix .yaml
    __fish_complete_suffix .yml
end""",
}
_FIELDS = {
    "bash": '\n_reprise_fields() {{\n  compgen -W "{}" -- "$1"\n}}',
    "zsh": "\n_reprise_fields() {{\n  compadd -S '' -- {}\n}}",
    "fish": "\nfunction _reprise_fields\n    printf '%s\\n' {}\nend",
}


def add_completion(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the command to the `commands` of `parser`, which must have all others."""
    completion = commands.add_parser("completion", help="print a script that completes commands in bash, zsh or fish")
    completion.add_argument("shell", choices=SHELLS, help="docs/operation.md says how each reads it")
    completion.set_defaults(command=partial(_print_script, parser))


def _print_script(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    import shtab

    from flows.run.config_docs import field_names

    shell: str = options.shell
    fields = _FIELDS[shell].format(" ".join(f"{name}=" for name in field_names()))
    functions = {
        "run": "_reprise_run_dirs",
        "config_or_run": "_reprise_config_files",
        "field": "_reprise_fields",
    }
    if shell == "fish":
        functions = {kind: f"({function})" for kind, function in functions.items()}
    kinds: dict[str, Any] = {
        **{kind: {shell: function} for kind, function in functions.items()},
        "config": shtab.glob(*_CONFIG_PATTERN),
        "file": shtab.FILE,
    }
    for action in _actions(parser):
        kind = _kind(action)
        if kind is not None:
            # Where shtab looks for it.
            vars(action)["complete"] = kinds[kind]
    preamble = f"{_RUNS[shell]}\n{_CONFIGS_OR_RUNS[shell]}\n{fields}\n"
    print(shtab.complete(parser, shell, preamble={shell: preamble}))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments and options of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _actions(each)
        else:
            yield action


def _kind(action: argparse.Action) -> str | None:
    """Return what an argument or option names, or None if it has choices, or can be anything."""
    if action.dest == "set":
        return "field"
    if action.type is not path:
        return None
    return {"RUN": "run", "CONFIG": "config", "CONFIG_OR_RUN": "config_or_run"}.get(str(action.metavar), "file")
