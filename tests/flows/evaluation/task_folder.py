"""A folder of tasks in lm-eval's format, of every type, with their data."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import WORDS, make_documents

CHOICES = {
    "task": "next_word", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "num_fewshot": 1, "fewshot_split": "shots",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}  # fmt: skip
ROLLING = {
    "task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}  # fmt: skip
LAST = {
    "task": "last_word", "output_type": "loglikelihood", "doc_to_text": "{{question}}",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                    {"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
GENERATED = {
    "task": "copy", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "word",
    "process_docs": "utils.shorten",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True},
                    {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
}  # fmt: skip
UTILS = 'def shorten(docs):\n    return docs.map(lambda doc: {"question": " ".join(doc["question"].split()[:4])})\n'


def write_task(folder: Path, task: dict[str, Any], /, **more: Any) -> Path:
    """Write a task whose data lie beside it, and return its file."""
    files = {"test": "items.jsonl", **({"shots": "shots.jsonl"} if "fewshot_split" in task else {})}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    text = yaml.safe_dump({**data, **task, **more}, sort_keys=False).replace("utils.shorten", "!function utils.shorten")
    path = folder / f"{task['task']}.yaml"
    path.write_text(text)
    return path


def write_tasks(folder: Path) -> Path:
    """Write items, and tasks of every type that ask about them."""
    generator = random.Random(0)
    rows = []
    for number in range(24):
        words = generator.choices(WORDS, k=9)
        others = generator.choices(WORDS, k=3)
        choices = list(dict.fromkeys([words[-1], *others]))
        generator.shuffle(choices)
        question = " ".join(words[:-1])
        rows.append({"question": question, "word": words[-1], "choices": choices, "answer": choices.index(words[-1]),
                     "text": make_documents(1, number)[0]})  # fmt: skip
    for name, part in (("items", rows[:16]), ("shots", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "utils.py").write_text(UTILS)
    for task in (CHOICES, ROLLING, LAST, GENERATED):
        write_task(folder, task)
    return folder
