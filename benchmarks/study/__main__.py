"""Runs cells of the study, and shows what they measured.

python -m benchmarks.study run --text FOLDER [--regimes saturated,noise] [--seeds 3] [--output runs/study]
python -m benchmarks.study collect [--output runs/study]    # tables of the finished cells, and results.csv
python -m benchmarks.study repeat [--output runs/study]     # how far they are from the recorded ones
python -m benchmarks.study tables                           # the tables and the picture of the recorded ones
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import yaml

from benchmarks.study.plots import draw
from benchmarks.study.regimes import REGIMES, Regime, arms_of
from benchmarks.study.results import RECORDED, measure, repeated, tables, write_results
from benchmarks.study.texts import read_documents, write_sources

_PICTURE = Path(__file__).parents[2] / "docs" / "study.png"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("command", choices=["run", "collect", "repeat", "tables"])
    parser.add_argument("--text", type=Path, help="folder with a JSON lines file for each source")
    parser.add_argument("--regimes", default=",".join(REGIMES), help="comma-separated (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    output = options.output.absolute()
    if options.command == "tables":
        draw(RECORDED, _PICTURE)
        print(tables(RECORDED))
        return
    if options.command == "run":
        run_cells(options.text, options.regimes.split(","), options.seeds, output)
    write_results(measure(output), output / "results.csv")
    print((repeated if options.command == "repeat" else tables)(output / "results.csv"))


def run_cells(text: Path, regimes: list[str], num_seeds: int, output: Path) -> None:
    """Run every seed of the regimes, one cell on each core, seed by seed. Raises RuntimeError if a cell fails."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    documents = read_documents(text)
    cells = []
    for name in regimes:
        sources = write_sources(REGIMES[name].text(documents), output / name / "text")
        cells += [(seed, REGIMES[name], sources) for seed in range(num_seeds)]

    def run_on_a_core(cell: tuple[int, Regime, list[dict[str, str]]]) -> None:
        core = cores.get()
        try:
            # A thread's affinity is inherited by the processes that it starts.
            os.sched_setaffinity(0, {core})
            run_cell(cell[1], cell[0], cell[2], output)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        list(pool.map(run_on_a_core, sorted(cells, key=lambda cell: cell[0])))


def run_cell(regime: Regime, seed: int, sources: list[dict[str, str]], output: Path) -> None:
    """Train the arms of one seed of a regime at equal cost; complete work is not repeated."""
    folder = output / regime.name / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    values = _configuration(regime, seed, sources, folder)
    _write(folder / "study.yaml", values)
    reference = None
    if regime.reference is not None:
        other = {section: {**values.get(section, {}), **fields} for section, fields in regime.reference.items()}
        _write(folder / "reference.yaml", {**values, **other, "name": "reference"})
        run = folder / "runs" / "reference"
        _reprise(folder, "prepare", "reference.yaml")
        for stage in ("train", "score"):
            _reprise(folder, stage, str(run), "--round", "1")
        reference = str(run / "rounds" / "1")
    _write(folder / "arms.yaml", arms_of(regime, [source["name"] for source in sources], reference))
    _reprise(folder, "compare", "study.yaml", "--arms", "arms.yaml", "--equal", "cost")


def _configuration(regime: Regime, seed: int, sources: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    return {
        "name": "study",
        "output": str(folder / "runs"),
        "seed": seed,
        "device": "cpu",
        "corpus": {"sources": sources, "seq_length": 128, **regime.corpus},
        "tokenizer": {"vocab_size": 1024},
        "score": {"micro_batch_size": 32},
        # As it was by default in every regime when the study ran.
        "refine": {"within": "shard"},
        **regime.values,
        "train": {"validate_every_steps": 1_000_000, **regime.values["train"]},
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _reprise(folder: Path, *arguments: str) -> None:
    """Run a command of Reprise in a cell's folder. Raises RuntimeError, with its output, if it fails."""
    command = [sys.executable, "-m", "flows.cli.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{folder}: reprise {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


if __name__ == "__main__":
    main()
