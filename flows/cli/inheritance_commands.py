"""`reprise inherit …`: commands about inheriting weights from a larger model."""

import argparse
from pathlib import Path
from typing import Any

from data_scoring.base.progress import Progress
from data_scoring.config import EvalConfig
from flows.cli.options import add_config, count, path, read_checked, read_resolved
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run
from flows.run.stored_model import StoredModel

_NUM_SAMPLES = 256


def add_inherit(commands: Any) -> None:
    """Add the commands about inheritance to the parser's `commands`."""
    parser = commands.add_parser("inherit", help="measure what a smaller model can inherit from a larger one")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    importance = actions.add_parser("importance", help="measure each layer's importance, and choose the layers to keep")
    importance.add_argument(
        "teacher", type=path, metavar="TEACHER", help="run folder, or model folder of `reprise import hf`"
    )
    importance.add_argument(
        "--config",
        type=path,
        metavar="CONFIG.yaml",
        help="configuration of the corpus to measure on (default: TEACHER's)",
    )
    importance.add_argument("--round", type=int, help="round of the run whose model is measured (default: the last)")
    importance.add_argument(
        "--layers", metavar="4,6,8", help="depths to choose layers for (default: three quarters, half, a quarter)"
    )
    importance.add_argument(
        "--samples", type=int, help=f"random samples to measure on (default: {_NUM_SAMPLES}, or all)"
    )
    importance.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks to evaluate without each block of layers, such as hellaswag,piqa",
    )
    importance.add_argument("--data", type=path, metavar="DIR", help="folder with the tasks' files (default: the hub)")
    importance.add_argument("--limit", type=int, help="use the first N items of each task or subject (default: all)")
    importance.add_argument(
        "--output", type=path, metavar="FOLDER", help="folder of the results (default: TEACHER/importance)"
    )
    importance.set_defaults(command=_importance)
    compare = actions.add_parser("compare", help="compare training from random weights with each inheritance method")
    add_config(compare)
    compare.add_argument(
        "--methods", default="base,l1,l2,taylor,learned", help="model.inherit.method of the arms (default: all)"
    )
    compare.add_argument(
        "--seeds", type=int, default=1, help="number of seeds, starting at the configuration's seed (default: 1)"
    )
    compare.add_argument("--tokens", type=count, help="training tokens of each model (default: train.max_tokens)")
    compare.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> None:
    from flows.experiments.arms import inherit_comparison

    config = read_checked(options, "-compare")
    comparison = inherit_comparison(options.methods, config.model.inherit)

    # Takes seconds to import.
    from flows.display.terminal_progress import TerminalProgress
    from flows.experiments.compare import compare

    with TerminalProgress() as progress:
        page = compare(config, comparison, options.seeds, options.tokens, progress)
    print(f"{page.text}\ncomparison: {page.page}")


def _importance(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.inheritance.layer_importance import measure_importance
    from flows.inheritance.layer_importance_report import write_importance_report
    from flows.inheritance.layer_scores import measure_scores
    from flows.run.locks import locked
    from flows.run.stored_model import find_model

    if options.samples is not None and options.samples < 1:
        raise ValueError(f"--samples: {options.samples} is less than 1; raise it")
    evaluation = _evaluation(options)
    teacher = find_model(options.teacher, options.round)
    depths = _depths(options.layers, teacher.config.num_layers)
    folder = options.output or teacher.place / "importance"
    with TerminalProgress() as progress:
        run = _calibration_run(teacher, options.config, folder, progress)
        num_samples = _num_samples(run, options.samples)
        with locked(run.folder):
            skips = measure_importance(run, teacher, folder, num_samples, progress)
            scores = None
            if evaluation is not None:
                scores = measure_scores(run, teacher, folder, evaluation, progress)
            measured_on = f"{num_samples:,} random samples of {run.corpus_folder}"
            name = teacher.place.absolute().name
            page = write_importance_report(folder / "report.html", name, skips, depths, measured_on, scores)
    print(f"{page.text}\n\nmeasured: {skips}\nreport: {page.page}")


def _evaluation(options: argparse.Namespace) -> EvalConfig | None:
    """Return the evaluation that the command line asks for, or None if it names no tasks."""
    if options.tasks is None:
        return None
    names = [name.strip() for name in options.tasks.split(",")]
    data = None if options.data is None else str(options.data)
    values = {**RunConfig().model_dump(), "eval": {"tasks": names, "data": data, "limit": options.limit}}
    return parse_config(values, "inherit importance").eval


def _depths(text: str | None, num_layers: int) -> list[int]:
    """Return the distinct target depths, largest first."""
    if text is None:
        return sorted({num_layers * quarters // 4 for quarters in (1, 2, 3)} - {0}, reverse=True)
    depths = set()
    for entry in text.split(","):
        if not entry.strip().isdecimal() or not 1 <= int(entry) <= num_layers:
            raise ValueError(
                f"--layers: {entry.strip()!r} is not a number of layers from 1 to the teacher's {num_layers}; give "
                "comma-separated integers"
            )
        depths.add(int(entry))
    return sorted(depths, reverse=True)


def _calibration_run(teacher: StoredModel, config: Path | None, folder: Path, progress: Progress) -> Run:
    """Return the run whose corpus and layout are used: the teacher, or one created in `folder` from `config`."""
    from flows.experiments.trials import prepare_corpus
    from flows.run.folder import read_run

    if config is not None:
        read = read_resolved(config, [])
        _check_tokenizer(read, teacher)
        return prepare_corpus(read, folder, "corpus", read.seed, progress)
    if not (teacher.place / "run.yaml").is_file():
        raise ValueError(f"--config: {teacher.place} is not a run and has no corpus; give a configuration that has one")
    return read_run(teacher.place)


def _check_tokenizer(config: RunConfig, teacher: StoredModel) -> None:
    """Raise ValueError unless the configuration's tokenizer is the teacher's: same bytes, same end of document."""
    from data_scoring.tokenizer.tokenizer import read_tokenizer
    from flows.inheritance.teacher import check_end

    path = config.tokenizer.path
    exists = path is not None and Path(path).is_file()
    if not exists or read_tokenizer(Path(str(path))) != teacher.tokenizer.read_bytes():
        raise ValueError(
            f"tokenizer.path: {path or 'null'} is not the teacher's tokenizer; set it to {teacher.tokenizer}"
        )
    check_end(config, teacher, None)


def _num_samples(run: Run, wanted: int | None) -> int:
    corpus = run.corpus()
    total = sum(corpus.num_samples(shard) for shard in range(corpus.num_shards))
    if wanted is not None and wanted > total:
        raise ValueError(f"--samples: {wanted} is more than the {total} of {run.corpus_folder}; lower it")
    return min(wanted or _NUM_SAMPLES, total)
