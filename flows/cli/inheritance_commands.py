"""`reprise inherit …`: commands about what a model takes over from a larger one."""

import argparse
from pathlib import Path
from typing import Any

from data_scoring.base.progress import Progress
from data_scoring.config import EvalConfig
from flows.cli.options import add_config, count, read_trial_config
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run
from flows.run.stored_model import StoredModel

_NUM_SAMPLES = 256


def add_inherit(commands: Any) -> None:
    """Add the commands about inheritance to the parser's `commands`."""
    parser = commands.add_parser("inherit", help="find out what a smaller model takes over from a larger one")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    importance = actions.add_parser("importance", help="measure what each layer is worth, and say which ones stay")
    importance.add_argument(
        "teacher", type=Path, metavar="TEACHER", help="run folder, or model folder of `reprise import hf`"
    )
    importance.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG.yaml",
        help="configuration whose corpus is measured on (default: TEACHER's)",
    )
    importance.add_argument("--round", type=int, help="round of the run whose model is meant (default: the last)")
    importance.add_argument(
        "--layers", metavar="4,6,8", help="depths to choose layers for (default: three quarters, half, a quarter)"
    )
    importance.add_argument(
        "--samples", type=int, help=f"samples, drawn at random, to measure on (default: {_NUM_SAMPLES}, or all)"
    )
    importance.add_argument(
        "--tasks",
        metavar="NAMES",
        help="evaluation tasks that are asked without each block, such as hellaswag,piqa",
    )
    importance.add_argument("--data", metavar="DIR", help="folder with the tasks' files (default: the hub)")
    importance.add_argument("--limit", type=int, help="items of each task or subject, the first (default: all)")
    importance.add_argument("--output", type=Path, metavar="FOLDER", help="where it goes (default: TEACHER/importance)")
    importance.set_defaults(command=_importance)
    compare = actions.add_parser("compare", help="train a model from random weights and from each choice of neurons")
    add_config(compare)
    compare.add_argument(
        "--methods", default="base,l1,l2,taylor,learned", help="model.inherit.method of the arms (default: all)"
    )
    compare.add_argument("--seeds", type=int, default=1, help="seeds, from the configuration's on (default: 1)")
    compare.add_argument("--tokens", type=count, help="tokens that each trains on (default: train.max_tokens)")
    compare.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.experiments.compare import compare, inherit_sweep

    config = read_trial_config(options)
    sweep = inherit_sweep(options.methods, config.model.inherit)
    with TerminalProgress() as progress:
        page = compare(config, sweep, options.seeds, options.tokens, progress)
    print(f"{page.text}\ncomparison: {page.page}")


def _importance(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.inheritance.layer_importance import measure_importance
    from flows.inheritance.layer_importance_report import write_importance_report
    from flows.inheritance.layer_scores import measure_scores
    from flows.run.locks import locked
    from flows.run.stored_model import find_model

    if options.samples is not None and options.samples < 1:
        raise ValueError(f"--samples: {options.samples} is less than 1; give more")
    asked = _asked(options)
    teacher = find_model(options.teacher, options.round)
    depths = _depths(options.layers, teacher.config.num_layers)
    folder = options.output or teacher.place / "importance"
    with TerminalProgress() as progress:
        run = _calibration_run(teacher, options.config, folder, progress)
        num_samples = _num_samples(run, options.samples)
        with locked(run.folder):
            skips = measure_importance(run, teacher, folder, num_samples, progress)
            scores = None
            if asked is not None:
                scores = measure_scores(run, teacher, folder, asked, progress)
            measured_on = f"{num_samples:,} random samples of {run.corpus_folder}"
            name = teacher.place.absolute().name
            page = write_importance_report(folder / "report.html", name, skips, depths, measured_on, scores)
    print(f"{page.text}\n\nmeasured: {skips}\nreport: {page.page}")


def _asked(options: argparse.Namespace) -> EvalConfig | None:
    """Return what the command line says of evaluation tasks, or None where it names none."""
    if options.tasks is None:
        return None
    names = [name.strip() for name in options.tasks.split(",")]
    values = {**RunConfig().model_dump(), "eval": {"tasks": names, "data": options.data, "limit": options.limit}}
    return parse_config(values, "inherit importance").eval


def _depths(text: str | None, num_layers: int) -> list[int]:
    """Return the target depths, each once, the largest first."""
    if text is None:
        return sorted({num_layers * quarters // 4 for quarters in (1, 2, 3)} - {0}, reverse=True)
    depths = set()
    for entry in text.split(","):
        if not entry.strip().isdecimal() or not 1 <= int(entry) <= num_layers:
            raise ValueError(
                f"--layers: {entry.strip()!r} is no number of layers from 1 to the teacher's {num_layers}; give some "
                "with commas between them"
            )
        depths.add(int(entry))
    return sorted(depths, reverse=True)


def _calibration_run(teacher: StoredModel, config: Path | None, folder: Path, progress: Progress) -> Run:
    """Return the run whose corpus and layout are measured with: the teacher, or one made in `folder` of `config`."""
    from flows.experiments.trials import prepare_corpus
    from flows.run.config import read_config
    from flows.run.folder import read_run

    if config is not None:
        read = read_config(config, [])
        _check_tokenizer(read, teacher)
        return prepare_corpus(read, folder, "corpus", read.seed, progress)
    if not (teacher.place / "run.yaml").is_file():
        raise ValueError(f"--config: {teacher.place} is no run and has no corpus; give the configuration of one")
    return read_run(teacher.place)


def _check_tokenizer(config: RunConfig, teacher: StoredModel) -> None:
    """Raise ValueError unless the configuration's tokenizer is the teacher's, byte by byte and in its end."""
    from data_scoring.tokenizer.tokenizer import read_tokenizer
    from flows.inheritance.teacher import check_end

    path = config.tokenizer.path
    is_there = path is not None and Path(path).is_file()
    if not is_there or read_tokenizer(Path(str(path))) != teacher.tokenizer.read_bytes():
        raise ValueError(
            f"tokenizer.path: {path or 'null'} is not the tokenizer of the teacher; set it to {teacher.tokenizer}"
        )
    check_end(config, teacher, None)


def _num_samples(run: Run, wanted: int | None) -> int:
    corpus = run.corpus()
    total = sum(corpus.num_samples(shard) for shard in range(corpus.num_shards))
    if wanted is not None and wanted > total:
        raise ValueError(f"--samples: {wanted} is more than the {total} of {run.corpus_folder}; give fewer")
    return min(wanted or _NUM_SAMPLES, total)
