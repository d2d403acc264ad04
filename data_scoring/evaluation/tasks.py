"""The evaluation tasks: their names, groups and titles, in the order of the paper's table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AVERAGE = "average"


@dataclass(frozen=True)
class Column:
    """A task, with its title and its group; the average has the name `AVERAGE` and no group."""

    name: str
    title: str
    group: str


COLUMNS = (
    Column("ceval", "C-Eval", "Examination"),
    Column("cmmlu", "CMMLU", "Examination"),
    Column("mmlu", "MMLU", "Examination"),
    Column("agieval", "AGI-Eval", "Examination"),
    Column("boolq", "BoolQ", "Knowledge"),
    Column("axb", "AX-b", "Reasoning"),
    Column("piqa", "PIQA", "Reasoning"),
    Column("eprstmt", "EPRSTMT", "Understanding"),
    Column("xsum", "XSum", "Understanding"),
    Column("c3", "C3", "Understanding"),
    Column(AVERAGE, "Average", ""),
    Column("hellaswag", "HellaSwag", "Ablation"),
    Column("arc_easy", "ARC-Easy", "Ablation"),
)
ABLATION = ("hellaswag", "arc_easy")
# What the average is of.
PAPER = tuple(column.name for column in COLUMNS if column.group not in ("", "Ablation"))
_NAMES = (*PAPER, *ABLATION)


def resolve_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return task names, each once, `paper` and `ablation` standing for theirs. Raises ValueError for unknown ones."""
    groups = {"paper": PAPER, "ablation": ABLATION}
    resolved = [task for name in names for task in groups.get(name, (name,))]
    unknown = [name for name in resolved if name not in _NAMES]
    if unknown:
        raise ValueError(f"eval.tasks: unknown task {unknown[0]!r}; choose from paper, ablation, {', '.join(_NAMES)}")
    return tuple(dict.fromkeys(resolved))


# What models are evaluated on; `flows.evaluation.task_loading` defines them, docs/evaluation.md describes them.
EvaluationName = Literal[
    "paper", "ablation", "ceval", "cmmlu", "mmlu", "agieval", "boolq", "axb", "piqa", "eprstmt", "xsum", "c3",
    "hellaswag", "arc_easy",
]  # fmt: skip
