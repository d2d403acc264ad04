"""Preparing a corpus: speed against the tokenizer alone, cost of more processes and more text, and memory.

Every contender runs in a process of its own, on the same JSON lines and with the same tokenizer. Set MEGATRON_LM to a
checkout of Megatron-LM to compare with its tools/preprocess_data.py.
"""

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data_scoring.base.engine import LocalEngine
from data_scoring.config import CorpusConfig, TokenizerConfig
from data_scoring.corpus.indexed import token_dtype
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.tokenizer.tokenizer import install_tokenizer

SIZE = 100_000_000
LARGE = 10 * SIZE
TURNS = 3
VOCAB_SIZE = 8192
_BATCH = 1024
_BATCH_CHARACTERS = 4 << 20


def prepare(folder: Path) -> list[dict[str, Any]]:
    """Return the cost of preparing Python's source, as JSON lines, against the tokenizer alone and against itself."""
    text = folder / f"{SIZE}.jsonl"
    _write_text(text, SIZE)
    install_tokenizer(TokenizerConfig(vocab_size=VOCAB_SIZE, train_megabytes=8), _texts(text), 0, folder)
    turns = [{name: _measure(name, folder, SIZE) for name in _contenders()} for _ in range(TURNS)]
    num_cores = len(os.sched_getaffinity(0))
    ours, plain, one = "prepare", "encode_batch", "prepare, one process"
    rows = [
        _ratio(turns, "seconds", plain, ours, f"speed of prepare / {plain}, {num_cores} cores"),
        _ratio(turns, "seconds", "encode_batch_fast", ours, "speed of prepare / encode_batch_fast"),
        _ratio(turns, "cpu_seconds", ours, plain, f"CPU time of prepare / {plain}"),
        _ratio(turns, "seconds", one, ours, f"speed of prepare in {num_cores} processes / in one on one core"),
    ]
    if "preprocess_data.py" in turns[0]:
        rows.append(_ratio(turns, "seconds", "preprocess_data.py", ours, "speed of prepare / Megatron's tool"))
    for name in turns[0]:
        speeds = [SIZE / 1e6 / turn[name]["cpu_seconds"] for turn in turns]
        rows.append({"claim": f"MB of text a second and core, {name}", "median": round(statistics.median(speeds), 2)})
    for phase in turns[0][one]["phases"]:
        seconds = statistics.median(turn[one]["phases"][phase] for turn in turns)
        rows.append({"claim": f"MB of text a second and core, {phase}", "median": round(SIZE / 1e6 / seconds, 1)})
    small, large = statistics.median(turn[ours]["seconds"] for turn in turns), _large(folder)
    exponent = math.log(large["seconds"] / small) / math.log(LARGE / SIZE)
    rows.append({"claim": f"growth exponent of seconds, {SIZE:,} to {LARGE:,} bytes", "median": round(exponent, 3)})
    for size, peak in ((SIZE, max(turn[ours]["peak_mb"] for turn in turns)), (LARGE, large["peak_mb"])):
        rows.append({"claim": f"peak memory of a process in MB, {size:,} bytes of text", "median": round(peak)})
    return rows


def _contenders() -> list[str]:
    names = ["encode_batch", "encode_batch_fast", "prepare", "prepare, one process"]
    return [*names, "preprocess_data.py"] if "MEGATRON_LM" in os.environ else names


def _ratio(turns: list[dict[str, dict[str, Any]]], key: str, above: str, below: str, claim: str) -> dict[str, Any]:
    ratios = [turn[above][key] / turn[below][key] for turn in turns]
    median, least, most = statistics.median(ratios), min(ratios), max(ratios)
    return {"claim": claim, "median": round(median, 3), "min": round(least, 3), "max": round(most, 3)}


def _large(folder: Path) -> dict[str, Any]:
    path = folder / f"{LARGE}.jsonl"
    _write_text(path, LARGE)
    return _measure("prepare", folder, LARGE)


def _write_text(path: Path, size: int) -> None:
    """Write the Python source of this installation as JSON lines of `size` bytes of text, no two the same."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = sorted({file for folder in folders for file in folder.rglob("*.py")})
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for copy in count():
            for file in files:
                text = file.read_text(encoding="utf-8", errors="replace")
                if written >= size:
                    return
                if text.strip():
                    text = f"# {file.name}, {copy}\n{text}"
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    written += len(text.encode())


def _texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)


def _measure(name: str, folder: Path, size: int) -> dict[str, Any]:
    """Return the seconds, the CPU seconds and the peak memory (MB) of one contender, run in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.prepare", name, str(folder), str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _encode(folder: Path, size: int, method: str) -> None:
    """Write the ids of all texts, encoded in batches by the library, to a file."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    encode, end = getattr(tokenizer, method), tokenizer.token_to_id("<|endoftext|>")
    dtype = token_dtype(VOCAB_SIZE)
    with (folder / "ids").open("wb") as file:

        def write(batch: list[str]) -> None:
            for encoding in encode(batch, add_special_tokens=False):
                file.write(np.array([*encoding.ids, end], dtype).tobytes())

        batch: list[str] = []
        characters = 0
        for text in _texts(folder / f"{size}.jsonl"):
            batch.append(text)
            characters += len(text)
            if len(batch) == _BATCH or characters > _BATCH_CHARACTERS:
                write(batch)
                batch, characters = [], 0
        write(batch)


def _prepare(folder: Path, size: int, processes: int | None) -> dict[str, float]:
    """Return the seconds of each phase, after preparing a corpus."""
    starts: dict[str, float] = {}

    def note(what: str, done: int, total: int | None) -> None:
        starts.setdefault(what, time.perf_counter())

    sources = [{"name": "python", "path": str(folder / f"{size}.jsonl")}]
    corpus = CorpusConfig.model_validate({"sources": sources, "seq_length": 1024, "validation_fraction": 0.01})
    tokenizer = TokenizerConfig(path=str(folder / "tokenizer.json"))
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    with LocalEngine(processes) as engine:
        prepare_corpus(corpus, tokenizer, 0, folder / "corpus", "bench", note, engine)
    return {
        what: stop - start
        for (what, start), stop in zip(starts.items(), [*starts.values(), time.perf_counter()][1:], strict=True)
    }


def _preprocess(folder: Path, size: int) -> None:
    """Run Megatron's own tool with as many workers as there are cores."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "hugging_face")
    tool = Path(os.environ["MEGATRON_LM"]) / "tools" / "preprocess_data.py"
    command = [
        *(sys.executable, "-W", "ignore", str(tool), "--input", str(folder / f"{size}.jsonl"), "--append-eod"),
        *("--output-prefix", str(folder / "megatron"), "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(folder / "hugging_face"), "--workers", str(len(os.sched_getaffinity(0)))),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "TOKENIZERS_PARALLELISM": "0"})


def _run(name: str, folder: Path, size: int) -> dict[str, Any]:
    if name == "prepare, one process":
        os.environ["RAYON_NUM_THREADS"] = "1"
    works: dict[str, Callable[[], dict[str, float] | None]] = {
        "encode_batch": lambda: _encode(folder, size, "encode_batch"),
        "encode_batch_fast": lambda: _encode(folder, size, "encode_batch_fast"),
        "prepare": lambda: _prepare(folder, size, None),
        "prepare, one process": lambda: _prepare(folder, size, 1),
        "preprocess_data.py": lambda: _preprocess(folder, size),
    }
    started = time.perf_counter()
    phases = works[name]()
    seconds = time.perf_counter() - started
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": seconds,
        "phases": phases,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in usages),
        "peak_mb": max(usage.ru_maxrss for usage in usages) / 1024,
    }


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
