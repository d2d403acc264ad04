"""Running the check: one process per part, each with a time limit, saving the results after every part."""

import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from benchmarks.device.part import PARTS
from benchmarks.device.record import Content, read_record, write_results
from benchmarks.device.settings import REDUCED_SMALL, SMALL, Place
from trainer.config import ModelConfig
from trainer.devices import num_cores, resolve

_PACKAGES = ("torch", "triton", "megatron-core", "torch-npu", "numpy", "pyarrow", "pydantic")
# A part with less time than this is not started.
_FEWEST_SECONDS = 5.0


def check_device(prepared: Path | None, output: Path, device: str, seconds: float, only: list[str] | None) -> int:
    """Run the parts named in `only`, or all, within `seconds`, and return 0 if every check of every part passed.

    Writes to `output`: results.json and summary.md, updated after every part; parts/, the records of the parts; logs/.
    Raises ValueError if a part is unknown, the device is unavailable, or the inputs are not prepared and cannot be.
    """
    unknown = sorted(set(only or ()) - set(PARTS))
    if unknown:
        raise ValueError(f"--only: {unknown[0]!r} is not a part; choose from {', '.join(PARTS)}")
    kind = resolve(device)
    for folder in ("parts", "logs", "work"):
        shutil.rmtree(output / folder, ignore_errors=True)
        (output / folder).mkdir(parents=True)
    if prepared is None:
        prepared = _prepare(output / "prepared", REDUCED_SMALL if kind == "cpu" else SMALL)
    place = Place(prepared.absolute(), output.absolute(), kind)  # type: ignore[arg-type]
    place.recorded()
    environment = describe_environment(kind)
    deadline = time.monotonic() + seconds
    results: list[Content] = []
    write_results(output, environment, results)
    names = [name for name in PARTS if only is None or name in only]
    # A process per part frees the device's memory in between. The reduced parts are too short to be worth it.
    groups = [names] if kind == "cpu" else [[name] for name in names]
    while groups:
        group = groups.pop(0)
        settled = _run(group, place, deadline - time.monotonic())
        results += settled
        write_results(output, environment, results)
        if rest := group[len(settled) :]:
            groups.insert(0, rest)
        for result in settled:
            print(f"{result['name']}: {result['status']} in {result['seconds']} s", flush=True)
    print(f"results: {output / 'summary.md'}", flush=True)
    return int(any(result["status"] != "passed" for result in results))


def _prepare(folder: Path, model: ModelConfig) -> Path:
    try:
        from benchmarks.device.prepare import prepare

        prepare(folder, model)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed, but preparing needs it; write a folder with `python -m benchmarks.device "
            "prepare FOLDER` on a machine that has it, and give that folder"
        ) from None
    return folder


def describe_environment(kind: str) -> Content:
    """Return the environment of the results: the device, its memory, and the versions of drivers and packages."""
    found: Content = {"device": kind, "python": platform.python_version(), "cores": num_cores()}
    if kind != "cpu":
        module = getattr(torch, kind)
        found |= {
            "name": module.get_device_name(0),
            "memory_gib": module.get_device_properties(0).total_memory / (1 << 30),
        }
    if kind == "cuda":
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}  # type: ignore[no-untyped-call]
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _run(names: list[str], place: Place, left: float) -> list[Content]:
    """Run parts in one process, and return the results of those that ended and of the one that failed, if any.

    A result has the part's name, status, seconds, error, log, checks and figures.
    """
    log = place.output / "logs" / f"{names[0]}.log"
    seconds = min(sum(PARTS[name].seconds for name in names), left)
    started = time.monotonic()
    error = "no time was left for it" if seconds < _FEWEST_SECONDS else _do(names, place, seconds, log)
    taken = round(time.monotonic() - started, 1)
    place.empty_work()
    results: list[Content] = []
    for name in names:
        record = read_record(place.output / "parts" / f"{name}.json")
        has_ended = "seconds" in record
        # If the process fails after all of its parts, the last one reports the error.
        failure = error if not has_ended or name == names[-1] else None
        passed = has_ended and failure is None and all(check["passed"] for check in record["checks"])
        result = {
            "name": name,
            "status": "passed" if passed else "failed",
            "seconds": taken,
            "error": failure,
            "log": str(log.relative_to(place.output)),
        }
        results.append({**result, **record})
        if not has_ended:
            break
    return results


def _do(names: list[str], place: Place, seconds: float, log: Path) -> str | None:
    """Run parts within `seconds`, and return the error, or None."""
    arguments = [",".join(names), str(place.prepared), str(place.output), place.kind]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.device.part", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"not done in {seconds:.0f} s"
        finally:
            _end(process)
    if code == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no output"
    return last if code > 0 else f"ended by {signal.Signals(-code).name}: {last}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a part and all of its descendants, including ranks in their own sessions."""
    if process.poll() is not None:
        return
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
