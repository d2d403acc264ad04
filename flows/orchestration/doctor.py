"""Checks of this machine: what it has, and what a run lacks, with remedies."""

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

from data_scoring.config import padded_vocab_size
from data_scoring.corpus.sources import check_source
from flows.launch.job_fields import device_kind
from flows.launch.launcher import check, launcher_class
from flows.run.config import RunConfig
from flows.run.folder import package_versions
from flows.run.launcher_kinds import LAUNCHER_KINDS
from flows.stages.prepare import check_kernels, check_vocabulary, vocabulary_size
from trainer.devices import (
    check_layers,
    describe_devices,
    least_free_memory,
    resolve,
    resolve_precision,
)
from trainer.memory import RankMemory, Workload, checkpoint_bytes, rank_memory

_GIB = 1 << 30
# Host memory of a rank's process besides tensors: the interpreter, torch and Megatron; with an accelerator, the driver,
# too.
_PROCESS_BYTES = _GIB // 2
_DEVICE_PROCESS_BYTES = 3 * _GIB
# Memory that the C library's allocator holds in addition, as a share of what each step allocates and frees (34 % with
# 30 M parameters in float32).
_UNUSED_SHARE = 0.4
# Device memory of the driver, matrix products and collectives.
_LIBRARY_BYTES = _GIB


@dataclass(frozen=True)
class Finding:
    """The result of one check: `state` is ok, missing (the run needs it) or absent (the run does not need it)."""

    state: str
    text: str


def examine(config: RunConfig | None) -> list[Finding]:
    """Return what this machine has and, given a `config`, what its run would lack."""
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
    for exists, text in describe_devices():
        yield Finding("ok" if exists else "absent", text)


def _services() -> Iterator[Finding]:
    url = get_current_settings().api.url
    if url is None:
        yield Finding(
            "absent", "Prefect server: none configured, runs start temporary ones; `reprise serve` starts a server"
        )
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
    for kind in LAUNCHER_KINDS:
        launcher = launcher_class(kind)
        missing = launcher.missing_tools()
        if missing:
            yield Finding("absent", f"launch.kind {kind}: {', '.join(missing)} not found")
        elif launcher.tools:
            yield Finding("ok", f"launch.kind {kind}: {', '.join(launcher.tools)} found")


def _run(config: RunConfig) -> Iterator[Finding]:
    ranks = config.parallel.world_size
    here = ranks // config.launch.nodes
    yield _checked(f"{ranks} processes on {config.launch.nodes} hosts", lambda: check(config))
    yield _checked(f"model.layers {config.model.layers}", lambda: check_layers(config.model.layers))
    yield _checked(
        f"train.loss_kernel {config.train.loss_kernel}, train.activation_kernel {config.train.activation_kernel}, "
        f"score.loss_kernel {config.score.loss_kernel}",
        lambda: check_kernels(config),
    )
    yield _checked("tokenizer and vocabulary", lambda: _check_tokenizer(config))
    for source in config.corpus.sources:
        if source.format == "datasets":
            yield Finding("ok", f"source {source.name}: {source.path} is not checked before it is read")
            continue
        yield _checked(f"source {source.name}: {source.path}", partial(check_source, source))
    yield _checked(f"output: {config.output}", lambda: _check_output(config))
    yield from _space(config, here)


def _check_tokenizer(config: RunConfig) -> None:
    check_vocabulary(config)
    vocabulary_size(config)


def _checked(what: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except ValueError as error:
        return Finding("missing", str(error))
    return Finding("ok", what)


def _space(config: RunConfig, here: int) -> Iterator[Finding]:
    try:
        workload = _workload(config)
    except ValueError:
        # The tokenizer's own check reports why it cannot be opened.
        return
    yield from (_on_host if _kind(config) == "cpu" else _on_devices)(config, workload, here)
    yield _disk(config, workload)


def _on_host(config: RunConfig, workload: Workload, here: int) -> Iterator[Finding]:
    """Yield whether a host has memory for its ranks, which compute on the CPU."""
    memory = rank_memory(workload)
    unused = round((memory.activations + memory.logits + memory.workspace) * _UNUSED_SHARE)
    needed = here * (memory.total + unused + _PROCESS_BYTES)
    parts = {**_parts(memory), "allocator": unused, "process": _PROCESS_BYTES}
    text = (
        f"memory of a host: {_shape(workload)} take {_gib(needed)} GiB; {here} on this host, each with {_listed(parts)}"
    )
    yield _compare(text, needed, _free_on_host(config), _remedies(workload, "put fewer ranks on a host"))


def _on_devices(config: RunConfig, workload: Workload, here: int) -> Iterator[Finding]:
    """Yield whether a device has memory for its rank, and a host for its ranks' processes and their checkpoints."""
    memory = rank_memory(workload)
    needed = memory.total + _LIBRARY_BYTES
    text = f"memory of a device: {_shape(workload)} take {_gib(needed)} GiB; "
    text += _listed({**_parts(memory), "libraries": _LIBRARY_BYTES})
    free = _free_on_device(config, here) if config.launch.launcher_kind.sees_devices else None
    yield _compare(text, needed, free, _remedies(workload, "raise parallel.tensor or parallel.data"))
    saved = _checkpoint_bytes(workload) * here // config.parallel.world_size
    needed = here * _DEVICE_PROCESS_BYTES + saved
    text = f"memory of a host: {here} ranks take {_gib(needed)} GiB, {_gib(saved)} of it for saving checkpoints"
    yield _compare(text, needed, _free_on_host(config), "put fewer ranks on a host (launch.nodes)")


def _checkpoint_bytes(workload: Workload) -> int:
    return checkpoint_bytes(_parameters(workload), workload.precision)


def _shape(workload: Workload) -> str:
    ranks = workload.parallel.world_size
    return f"{_parameters(workload) / 1e6:,.1f} M parameters on {ranks} rank{'s' if ranks > 1 else ''}"


def _parameters(workload: Workload) -> int:
    return workload.model.num_parameters(padded_vocab_size(workload.vocab_size))


def _workload(config: RunConfig) -> Workload:
    """Return the workload of training. Raises ValueError if the tokenizer cannot be opened."""
    kind = _kind(config)
    precision = resolve_precision(config.train.precision, kind)
    return Workload(
        config.model,
        vocabulary_size(config),
        config.corpus.seq_length,
        config.resolved_train,
        config.parallel,
        precision,
        has_fused_step=kind != "cpu",
    )


def _kind(config: RunConfig) -> str:
    """Return the kind of the ranks' device, whether or not it is available here."""
    try:
        return device_kind(config)
    except ValueError:
        return config.device


def _free_on_device(config: RunConfig, here: int) -> int | None:
    """Return the free bytes of the device of each of this host's ranks, or None if they cannot run here."""
    try:
        return least_free_memory(resolve(config.device), here)
    except ValueError:
        return None


def _free_on_host(config: RunConfig) -> int | None:
    """Return this host's free bytes, or None if the ranks run on other hosts."""
    return psutil.virtual_memory().available if config.launch.launcher_kind.sees_devices else None


def _compare(text: str, needed: int, free: int | None, remedy: str) -> Finding:
    """Return `text` with the free bytes, if known, and with the remedy if they are fewer than needed."""
    if free is None:
        return Finding("ok", text)
    text = f"{text}; {_gib(free)} GiB free"
    return Finding("ok", text) if needed <= free else Finding("missing", f"{text}; {remedy}")


def _gib(size: int) -> str:
    # Parts of small models take only megabytes.
    return f"{size / _GIB:.1f}" if size >= _GIB // 10 else f"{size / _GIB:.3f}"


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _parts(memory: RankMemory) -> dict[str, int]:
    """Return the parts of a rank's memory, in bytes."""
    return {
        "model states": memory.states,
        "activations": memory.activations,
        "logits": memory.logits,
        "workspace": memory.workspace,
    }


def _remedies(workload: Workload, more_room: str) -> str:
    remedies = []
    if workload.train.micro_batch_size > 1:
        remedies.append("lower train.micro_batch_size")
    if workload.train.loss_kernel == "reference":
        remedies.append("set train.loss_kernel: chunked")
    return ", ".join([*remedies, f"{more_room}, or make the model smaller"])


def _output_folder(config: RunConfig) -> Path:
    """Return the folder of run folders, or its nearest existing parent."""
    folder = Path(config.output).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _check_output(config: RunConfig) -> None:
    folder = _output_folder(config)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"output: {folder} is not writable; change its permissions, or set another output")


def _disk(config: RunConfig, workload: Workload) -> Finding:
    folder = _output_folder(config)
    free = shutil.disk_usage(folder).free
    # One final checkpoint per round, those kept while a round trains, and the one being written.
    checkpoints = config.rounds.num_rounds + config.checkpoint.keep_last + 1
    disk = _checkpoint_bytes(workload) * checkpoints
    text = f"disk: {_gib(disk)} GiB for {checkpoints} checkpoints, and the tokenised corpus, at {folder}"
    return _compare(text, disk, free, "free some, set another output, or lower checkpoint.keep_last")
