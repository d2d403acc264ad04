"""What this machine has, and what it lacks for a run, each lack with its remedy."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
from prefect.settings import get_current_settings

from data_scoring.sources import check_source
from flows.config import RunConfig
from flows.run_folder import package_versions
from flows.slurm import check_tools
from flows.stages import check_kernels, check_vocabulary
from flows.torchrun import local_address
from trainer.devices import check_count, check_layers, describe_devices, free_memory, resolve

_GIB = 1 << 30
# A tokenizer is trained and a table sorted in less than that; activations come on top.
_SPARE_BYTES = _GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `state` is ok, missing (the run needs it) or absent (nothing asked for it)."""

    state: str
    text: str


def examine(config: RunConfig | None) -> list[Finding]:
    """Return what this machine has and, where there is a `config`, what a run of it would lack."""
    findings = [*_machine(), *_services()]
    if config is not None:
        findings += _run(config)
    return findings


def _machine() -> Iterator[Finding]:
    versions = package_versions()
    yield Finding("ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    memory = psutil.virtual_memory()
    yield Finding(
        "ok",
        f"{platform.machine()}, {os.cpu_count()} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB "
        "memory free",
    )
    for is_there, text in describe_devices():
        yield Finding("ok" if is_there else "absent", text)


def _services() -> Iterator[Finding]:
    url = get_current_settings().api.url
    if url is None:
        yield Finding("absent", "Prefect server: none configured, runs serve themselves; `reprise serve` starts one")
    else:
        try:
            version = httpx.get(f"{url}/admin/version", timeout=10).raise_for_status().json()
            yield Finding("ok", f"Prefect server {version} at {url}")
        except httpx.HTTPError as error:
            yield Finding(
                "absent",
                f"Prefect server: {url} does not answer ({error}); start it with `reprise serve`, or correct "
                "PREFECT_API_URL",
            )
    try:
        check_tools()
        yield Finding("ok", "Slurm: its commands are here")
    except ValueError:
        yield Finding("absent", "Slurm: not here (launch.kind)")


def _run(config: RunConfig) -> Iterator[Finding]:
    ranks = config.parallel.world_size
    here = ranks // config.launch.nodes
    yield _checked(f"{ranks} processes on {config.launch.nodes} hosts", lambda: _check_ranks(config, here))
    yield _checked(f"model.layers {config.model.layers}", lambda: check_layers(config.model.layers))
    yield _checked(
        f"train.loss_kernel {config.train.loss_kernel}, train.activation_kernel {config.train.activation_kernel}, "
        f"score.loss_kernel {config.score.loss_kernel}",
        lambda: check_kernels(config),
    )
    yield _checked("tokenizer and vocabulary", lambda: check_vocabulary(config))
    for source in config.corpus.sources:
        if source.format == "datasets":
            yield Finding("ok", f"source {source.name}: {source.path} is looked up when it is read")
            continue
        yield _checked(f"source {source.name}: {source.path}", partial(check_source, source))
    yield from _space(config, here)


def _check_ranks(config: RunConfig, here: int) -> None:
    if config.launch.kind == "slurm":
        check_tools()
    else:
        check_count(resolve(config.device), here)
        if config.launch.nodes > 1 and config.launch.rendezvous is not None:
            local_address(config.launch.rendezvous, is_head=True)


def _free_memory(config: RunConfig) -> int | None:
    """Return the bytes that this host's ranks have, or None where they run elsewhere or cannot run at all."""
    if config.launch.kind == "slurm":
        return None
    try:
        kind = resolve(config.device)
    except ValueError:
        return None
    on_devices = free_memory(kind)
    return psutil.virtual_memory().available if on_devices is None else on_devices


def _checked(what: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except ValueError as error:
        return Finding("missing", str(error))
    return Finding("ok", what)


def _space(config: RunConfig, here: int) -> Iterator[Finding]:
    parameters = config.model.num_parameters(config.model.vocab_size or config.tokenizer.vocab_size)
    # Weights, gradients and AdamW's two moments in single precision; with bfloat16 a half-size copy comes on top.
    needed = parameters * 18 * here / (config.parallel.tensor * config.parallel.pipeline) + _SPARE_BYTES
    shape = f"{parameters / 1e6:,.1f} M parameters"
    memory = _free_memory(config)
    if memory is None:
        yield Finding("ok", f"{shape}; {needed / _GIB:.1f} GiB memory a host before activations")
    elif memory < needed:
        yield Finding(
            "missing",
            f"memory: {shape} need {needed / _GIB:.1f} GiB before activations and {memory / _GIB:.1f} are free; "
            "make the model smaller, or use more hosts",
        )
    else:
        yield Finding("ok", f"memory: {shape} need {needed / _GIB:.1f} GiB before activations")
    folder = Path(config.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    # One final checkpoint a round, those kept while a round trains, and the one being written.
    checkpoints = config.rounds.num_rounds + config.checkpoint.keep_last + 1
    disk = parameters * 14 * checkpoints
    state = "ok" if free > disk else "missing"
    remedy = "" if free > disk else "; free some, set another output, or lower checkpoint.keep_last"
    yield Finding(
        state,
        f"disk: {free / _GIB:.1f} GiB free at {folder}, {disk / _GIB:.1f} for {checkpoints} checkpoints, "
        f"and the tokenised corpus{remedy}",
    )
    if not os.access(folder, os.W_OK):
        yield Finding("missing", f"output: {folder} cannot be written to; give yourself access, or set another output")
