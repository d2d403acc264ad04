"""The table of evaluation tasks. Each task is defined by its row alone; the columns are those of the paper's table.

To add a task, add a row: `TASKS[mine.name] = mine`. docs/evaluation.md describes the tasks.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError

from data_scoring.base.user_paths import UserPath
from data_scoring.evaluation import opencompass, rows
from data_scoring.evaluation.rows import Schema
from data_scoring.evaluation.task_files import is_task_path

AVERAGE = "average"
ABLATION_AVERAGE = "ablation_average"
# The group of the columns of tasks that are not in the table of tasks.
OTHER = "Other"


@dataclass(frozen=True)
class Files:
    """The files of a task's items in a folder: by name, or else a release's folder with one file per subject."""

    names: tuple[str, ...]
    release: str = ""  # pattern below the task's folder; `*` matches the subject
    header: tuple[str, ...] = ()  # the columns of CSV files without a header line
    labels: str = ""  # file next to it whose lines are the items' field `label`


@dataclass(frozen=True)
class Task:
    """An evaluation task: its files, their schema, the prompts, and the scoring.

    The prompts come from an lm-eval definition: one of its own, in `folder` below lm_eval/tasks, or the dictionary
    `definition`, with the keys of lm-eval's YAML files.
    """

    name: str
    title: str  # in tables
    group: str  # of the table's columns
    schema: Schema
    files: Files
    examples: Files | None = None  # few-shot examples
    folder: str = ""
    definition: dict[str, Any] = field(default_factory=dict)
    scoring: Literal["harness", "whole_text", "summary"] = "harness"  # as lm-eval does, or as OpenCompass
    metric: str = "acc"  # the one that tables show, by lm-eval's name
    num_fewshot: int = 0
    prefix: str = ""  # prefix of lm-eval's names of the task's subjects; empty for a task without subjects
    hub_limit: int | None = None  # largest number of items read from the hub

    def __post_init__(self) -> None:
        if bool(self.folder) == bool(self.definition):
            raise ValueError(f"{self.name}: needs either folder or definition; give one of them")


@dataclass(frozen=True)
class Column:
    """A column of the table: a task or one of `AVERAGES`, with its title and its group."""

    name: str
    title: str
    group: str
    is_share: bool = True  # whether scores are shares, 0 to 1, which are shown in percent
    higher_is_better: bool = True


_MMLU_HEADER = ("question", "A", "B", "C", "D", "answer")

_PAPER = (
    Task(
        "ceval", "C-Eval", "Examination", rows.CEVAL, Files(("ceval.jsonl",), "val/*_val.csv"),
        Files(("ceval_dev.jsonl",), "dev/*_dev.csv"), folder="ceval", num_fewshot=5, prefix="ceval-valid_",
    ),
    Task(
        "cmmlu", "CMMLU", "Examination", rows.CMMLU, Files(("cmmlu.jsonl",), "test/*.csv"),
        Files(("cmmlu_dev.jsonl",), "dev/*.csv"), folder="cmmlu", num_fewshot=5, prefix="cmmlu_",
    ),
    Task(
        "mmlu", "MMLU", "Examination", rows.MMLU, Files(("mmlu.jsonl",), "test/*_test.csv", header=_MMLU_HEADER),
        Files(("mmlu_dev.jsonl", "mmlu_dev_hf.jsonl"), "dev/*_dev.csv", header=_MMLU_HEADER), folder="mmlu/default",
        num_fewshot=5, prefix="mmlu_",
    ),
    Task(
        "agieval", "AGI-Eval", "Examination", rows.AGIEVAL, Files(("agieval.jsonl",), "v1/*.jsonl"), folder="agieval",
        prefix="agieval_",
    ),
    Task("boolq", "BoolQ", "Knowledge", rows.BOOLQ, Files(("boolq.jsonl",)), folder="super_glue/boolq"),
    Task(
        "axb", "AX-b", "Reasoning", rows.AXB, Files(("axb.jsonl",)), definition=opencompass.AXB,
        scoring="whole_text", metric="acc_text",
    ),
    Task(
        "piqa", "PIQA", "Reasoning", rows.PIQA, Files(("piqa.jsonl",), labels="piqa-labels.lst"), folder="piqa",
    ),
    Task(
        "eprstmt", "EPRSTMT", "Understanding", rows.EPRSTMT, Files(("eprstmt.jsonl",)), definition=opencompass.EPRSTMT,
        scoring="whole_text", metric="acc_text",
    ),
    Task(
        "xsum", "XSum", "Understanding", rows.XSUM, Files(("xsum.jsonl",)), definition=opencompass.XSUM,
        # OpenCompass scores the first thousand documents of the validation split.
        scoring="summary", metric="rouge1", hub_limit=1000,
    ),
    Task(
        "c3", "C3", "Understanding", rows.C3, Files(("c3.jsonl",)), definition=opencompass.C3,
        scoring="whole_text", metric="acc_text",
    ),
)  # fmt: skip
_ABLATION = (
    Task(
        "arc_easy_opencompass", "ARC-Easy (OpenCompass)", "Ablation", rows.ARC_EASY_OF_FOUR,
        Files(("arc_easy_dev.jsonl",)), definition=opencompass.ARC_EASY, scoring="whole_text", metric="acc_text",
    ),
    Task(
        "hellaswag_opencompass", "HellaSwag (OpenCompass)", "Ablation", rows.HELLASWAG, Files(("hellaswag.jsonl",)),
        definition=opencompass.HELLASWAG, scoring="whole_text", metric="acc_text",
    ),
)  # fmt: skip
_OTHERS = (
    Task(
        "hellaswag", "HellaSwag", "lm-eval", rows.HELLASWAG, Files(("hellaswag.jsonl",)), folder="hellaswag",
        metric="acc_norm",
    ),
    Task("arc_easy", "ARC-Easy", "lm-eval", rows.ARC_EASY, Files(("arc_easy.jsonl",)), folder="arc"),
)  # fmt: skip
TASKS = {task.name: task for task in (*_PAPER, *_ABLATION, *_OTHERS)}
PAPER = tuple(task.name for task in _PAPER)
# The tasks by which the paper compares inheritance strategies.
ABLATION = (*(task.name for task in _ABLATION), "c3")
# The tasks of each average, in the order of the paper's tables.
AVERAGES = {AVERAGE: PAPER, ABLATION_AVERAGE: ABLATION}
_SETS = {"paper": PAPER, "ablation": ABLATION}


def columns() -> list[Column]:
    """Return the table's columns: the paper's tasks, their average, those of its ablations, and the other tasks."""
    found = [Column(task.name, task.title, task.group) for task in TASKS.values()]
    first, second = len(PAPER), len(PAPER) + len(_ABLATION)
    average = Column(ABLATION_AVERAGE, "Average with C3", "Ablation")
    return [*found[:first], Column(AVERAGE, "Average", ""), *found[first:second], average, *found[second:]]


def task_title(name: str) -> str:
    """Return a task's title in tables: that of its row, or its name."""
    return TASKS[name].title if name in TASKS else name


def task_names() -> tuple[str, ...]:
    """Return the names of `eval.tasks` that are Reprise's own: `paper`, `ablation`, and the tasks of the table."""
    return (*_SETS, *TASKS)


def resolve_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct tasks, with `paper` and `ablation` expanded: of the table, of lm-eval's, or paths."""
    return tuple(dict.fromkeys(task for name in names for task in _SETS.get(name, (name,))))


def other_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Return those of `resolve_names(names)` that are not in the table: lm-eval's names, and paths of task files."""
    return tuple(name for name in resolve_names(names) if name not in TASKS)


class TaskEntry(UserPath):
    """The mark of an entry of `eval.tasks`: a name, or the path of a task file or of a folder of them."""

    def _validate(self, value: Any, handler: Callable[[Any], str | None], info: ValidationInfo) -> str | None:
        if isinstance(value, str) and not is_task_path(value):
            if not _NAME.fullmatch(value):
                raise PydanticCustomError(
                    "task_name", "Name a task, of letters, digits and _ + - . ( ), or give the path of a .yaml file"
                )
            return value
        return super()._validate(value, handler, info)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of a string, with our own names as examples."""
        return {"type": "string", "examples": list(task_names())}


# Also what names of files may consist of.
_NAME = re.compile(r"[\w.+()-]+")
# The values of the configuration field.
TaskName = Annotated[str, TaskEntry()]
