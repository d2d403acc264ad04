"""`reprise evaluate`: the models' task scores, as the paper's table."""

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from data_scoring.base.progress import Progress
from data_scoring.base.user_paths import expand_home
from data_scoring.config import EvalConfig
from data_scoring.evaluation.task_files import is_task_path
from data_scoring.evaluation.tasks import ABLATION_AVERAGE, TASKS, Column
from data_scoring.ledger import open_ledger
from flows.cli.options import path
from flows.cli.round_option import trained_rounds
from flows.evaluation.results_table import Row
from flows.evaluation.task_index import check_names
from flows.run.config import parse_config
from flows.run.folder import Run, read_run
from flows.run.locks import locked
from flows.stages.stage_order import complete, stages_of


def add_evaluate(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    command = commands.add_parser("evaluate", help="evaluate the models of rounds, and print the paper's table")
    command.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run folders; each model becomes a row")
    command.add_argument(
        "--round", default="last", metavar="N", help="round whose model is evaluated, or last, or all (default: last)"
    )
    command.add_argument(
        "--tasks",
        metavar="NAMES",
        help="paper, ablation, or a comma-separated list of tasks: of "
        f"{', '.join(TASKS)}, of lm-eval's by its names, or paths of task files and folders "
        "(default: the run's eval.tasks, or paper)",
    )
    command.add_argument(
        "--data", type=path, metavar="DIR", help="folder with the tasks' files (default: eval.data, or the hub)"
    )
    command.add_argument(
        "--limit", type=int, help="use the first N items of each task or subject (default: eval.limit)"
    )
    command.add_argument("--reference", choices=["paper"], help="also show the paper's published results")
    command.add_argument(
        "--format",
        choices=["terminal", "markdown", "latex", "html"],
        default="terminal",
        help="format of the table (default: terminal)",
    )
    command.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.evaluation.published import inheritance_rows, paper_rows
    from flows.evaluation.results import columns_of
    from flows.evaluation.results_table import render_table

    runs = [read_run(folder) for folder in options.runs]
    chosen = [(run, trained_rounds(run, options.round)) for run in runs]
    with TerminalProgress() as progress:
        for run, numbers in chosen:
            config = _config(run, options)
            with locked(run.folder):
                replaced = [task for number in numbers for task in _score(run, number, config, progress)]
            if replaced:
                tasks = ", ".join(dict.fromkeys(replaced))
                print(
                    f"{run.folder}: the scores of {tasks} are now for other items than the run's configuration names; "
                    f"`reprise run {quote(str(run.folder))}` restores them",
                    file=sys.stderr,
                )
    for run, numbers in chosen:
        # In the other formats, standard output holds only the table, ready to paste.
        _print_details(run, numbers, sys.stdout if options.format == "terminal" else sys.stderr)
    rows = _rows(chosen)
    if options.reference == "paper":
        has_ablation = any(ABLATION_AVERAGE in row.scores for row in rows)
        rows += [*paper_rows(), *(inheritance_rows() if has_ablation else [])]
    print(render_table(rows, columns_of(rows, _other_columns(chosen)), options.format))


def _config(run: Run, options: argparse.Namespace) -> EvalConfig:
    """Return the run's evaluation configuration, overridden by the command line."""
    tasks = options.tasks
    if tasks is None and not run.config.eval.asked:
        tasks = "paper"
    names = None if tasks is None else [_entry(name.strip(), run) for name in tasks.split(",")]
    overrides = {"tasks": names, "limit": options.limit}
    values = run.config.model_dump()
    values["eval"] |= {field: value for field, value in overrides.items() if value is not None}
    if names is not None:
        # Evaluate only these tasks.
        values["eval"]["every_steps"] = None
    if options.data is not None:
        # A relative path in the run's configuration counts from where the run was started.
        values["eval"]["data"] = str(options.data if run.config.base == Path.cwd() else options.data.absolute())
    config = parse_config(values, "evaluate", run.config.base).eval
    check_names(config.asked)
    return config


def _entry(name: str, run: Run) -> str:
    """Return an entry of `eval.tasks` that means the same for the run as here, where relative paths may differ."""
    is_other = is_task_path(name) and run.config.base != Path.cwd()
    return str(expand_home(name).absolute()) if is_other else name


def _score(run: Run, number: int, config: EvalConfig, progress: Progress) -> list[str]:
    """Evaluate a round's model; return the run's own tasks whose scores are now for other items."""
    from flows.stages.evaluate import evaluate_otherwise

    if config != run.config.eval:
        return evaluate_otherwise(stages_of(run), number, config, progress)
    complete(run, "evaluate", number, progress)
    return []


def _rows(chosen: list[tuple[Run, list[int]]]) -> list[Row]:
    """Return the table's rows: the chance scores, and the rounds of each run."""
    from flows.evaluation.results import chance_rows, read_chance, read_rows

    chances: dict[str, float] = {}
    rows = []
    for run, numbers in chosen:
        with open_ledger(run.folder) as ledger:
            chances |= read_chance(ledger)
            rows += read_rows(ledger, run.folder.name, numbers)
    return [*chance_rows(chances), *rows]


def _other_columns(chosen: list[tuple[Run, list[int]]]) -> list[Column]:
    from flows.evaluation.results import read_other_columns

    found: dict[str, Column] = {}
    for run, _ in chosen:
        with open_ledger(run.folder) as ledger:
            found |= {column.name: column for column in read_other_columns(ledger)}
    return [*found.values()]


def _print_details(run: Run, numbers: list[int], stream: TextIO) -> None:
    from rich.table import Table
    from rich.text import Text

    from flows.evaluation.results import read_details, read_other_metrics
    from flows.evaluation.results_table import print_wide

    for number in numbers:
        with open_ledger(run.folder) as ledger:
            details, metrics = read_details(ledger, number), read_other_metrics(ledger, number)
            reasons = ledger.sql(
                f"""select task, reason, count(*), min(item) from unscorable where round = {number}
                and step in (select step from scores where round = {number} and is_end)
                group by task, reason order by task, count(*) desc"""
            ).fetchall()
        title = Text(f"{run.folder.name}, round {number}")
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        for position, name in enumerate(details[0] if details else ()):
            table.add_column(name, justify="left" if position < 2 else "right")
        for row in details:
            table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
        print(print_wide(table), file=stream)
        for task, text in metrics:
            print(f"  {task}: {text}", file=stream)
        for task, reason, count, first in reasons:
            print(f"  {task}: {count} unscorable, {reason} (such as {first})", file=stream)
        print(file=stream)
