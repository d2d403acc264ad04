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

from data_scoring.corpus.sources import find_source
from flows.cluster.engines import check_cluster
from flows.launch.job_fields import device_kind
from flows.launch.launcher import check, launcher_class
from flows.planning.plan import num_checkpoints
from flows.planning.workload import workload_of
from flows.run.config import RunConfig
from flows.run.launcher_kinds import LAUNCHER_KINDS
from flows.run.versions import package_versions
from flows.stages.prepare import check_vocabulary, vocabulary_size
from trainer.devices import (
    check_layers,
    describe_devices,
    least_free_memory,
    resolve,
    resolve_kernels,
)
from trainer.hardware import LIBRARY_BYTES, Hardware
from trainer.memory import (
    PROCESS_BYTES,
    RankMemory,
    Workload,
    checkpoint_bytes,
    needed_bytes,
    rank_memory,
    unused_bytes,
)

_GIB = 1 << 30
# Host memory of a rank's process besides tensors, with the driver of an accelerator.
_DEVICE_PROCESS_BYTES = 3 * _GIB


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    check: its name. state: ok, missing (the run needs it) or absent (the run does not need it). needed_bytes and
    free_bytes: of a check of memory or disk; None if they are unknown.
    """

    check: str
    state: str
    text: str
    needed_bytes: int | None = None
    free_bytes: int | None = None


def examine(config: RunConfig | None, assumed: Hardware | None = None) -> list[Finding]:
    """Return what this machine has and, given a `config`, what its run would lack.

    assumed: devices in place of those of this machine; the memory of their hosts is not known, and not checked.
    """
    findings = [*_machine(), *_services()]
    if config is not None:
        findings += _run(config, assumed)
    return findings


def _machine() -> Iterator[Finding]:
    versions = package_versions()
    yield Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    memory = psutil.virtual_memory()
    yield Finding(
        "machine",
        "ok",
        f"{platform.machine()}, {os.cpu_count()} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB "
        "memory free",
        free_bytes=memory.available,
    )
    for exists, text in describe_devices():
        yield Finding("devices", "ok" if exists else "absent", text)


def _services() -> Iterator[Finding]:
    url = get_current_settings().api.url
    if url is None:
        yield Finding(
            "prefect_server",
            "absent",
            "Prefect server: none configured, runs start temporary ones; `reprise serve` starts a server",
        )
    else:
        try:
            version = httpx.get(f"{url}/admin/version", timeout=10).raise_for_status().json()
            yield Finding("prefect_server", "ok", f"Prefect server {version} at {url}")
        except httpx.HTTPError as error:
            yield Finding(
                "prefect_server",
                "absent",
                f"Prefect server: {url} does not answer ({error}); start it with `reprise serve`, or correct "
                "PREFECT_API_URL",
            )
    for kind in LAUNCHER_KINDS:
        launcher = launcher_class(kind)
        missing = launcher.missing_tools()
        if missing:
            yield Finding("launcher", "absent", f"launch.kind {kind}: {', '.join(missing)} not found")
        elif launcher.tools:
            yield Finding("launcher", "ok", f"launch.kind {kind}: {', '.join(launcher.tools)} found")


def _run(config: RunConfig, assumed: Hardware | None) -> Iterator[Finding]:
    ranks = config.parallel.world_size
    here = ranks // config.launch.nodes
    hosts = f"{ranks} processes on {config.launch.nodes} hosts"
    if assumed is None:
        yield _checked("processes", hosts, lambda: check(config))
    else:
        devices = f"{hosts}: {assumed.describe()}, assumed"
        yield _checked("processes", devices, lambda: _check_assumed(config, assumed))
    if config.engine.kind == "ray":
        yield _checked("engine", f"engine.kind ray: {config.engine.address}", lambda: check_cluster(config.engine))
    yield _checked("layers", f"model.layers {config.model.layers}", lambda: check_layers(config.model.layers))
    yield _kernels(config, _kind(config) if assumed is None else assumed.kind)
    yield _checked("tokenizer", "tokenizer and vocabulary", lambda: _check_tokenizer(config))
    for source in config.corpus.sources:
        if source.format == "datasets":
            unread = f"source {source.name}: {source.path} is not checked before it is read"
            yield Finding("source", "ok", unread)
            continue
        yield _checked("source", f"source {source.name}: {source.path}", partial(find_source, source))
    yield _checked("output", f"output: {config.output}", lambda: _check_output(config))
    yield from _space(config, here, assumed)


def _check_assumed(config: RunConfig, assumed: Hardware) -> None:
    """Raise ValueError if a run of `config` does not have a rank for each device, or cannot be launched there."""
    ranks = config.parallel.world_size
    config.launch.check(ranks)
    if ranks > assumed.count:
        raise ValueError(
            f"parallel: tensor x pipeline x data is {ranks} processes, but {assumed.describe()} are assumed; "
            "lower one of them"
        )


def _kernels(config: RunConfig, kind: str) -> Finding:
    """Return the kernels, with what `auto` selects on devices of `kind`."""
    try:
        train, score = resolve_kernels(config.train, config.score, kind)
    except ValueError as error:
        return Finding("kernels", "missing", str(error))
    rows = (
        ("train.loss_kernel", config.train.loss_kernel, train.loss_kernel),
        ("train.activation_kernel", config.train.activation_kernel, train.activation_kernel),
        ("score.loss_kernel", config.score.loss_kernel, score.loss_kernel),
    )
    return Finding(
        "kernels",
        "ok",
        ", ".join(f"{name} {asked}{f' ({found})' if asked != found else ''}" for name, asked, found in rows),
    )


def _check_tokenizer(config: RunConfig) -> None:
    check_vocabulary(config)
    vocabulary_size(config)


def _checked(name: str, what: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except ValueError as error:
        return Finding(name, "missing", str(error))
    return Finding(name, "ok", what)


def _space(config: RunConfig, here: int, assumed: Hardware | None) -> Iterator[Finding]:
    kind = _kind(config) if assumed is None else assumed.kind
    try:
        workload = workload_of(config, kind)
    except ValueError:
        # Their own checks report why the tokenizer cannot be opened, or a kernel cannot run.
        return
    if kind == "cpu":
        yield _on_host(config, workload, here)
    elif assumed is not None:
        yield _on_device(workload, assumed.memory)
    else:
        sees_devices = config.launch.launcher_kind.sees_devices
        yield _on_device(workload, _free_on_device(config, here) if sees_devices else None)
        yield _beside_devices(config, workload, here)
    yield _disk(config, workload, assumed is not None)


def _on_host(config: RunConfig, workload: Workload, here: int) -> Finding:
    """Return whether a host has memory for its ranks, which compute on the CPU."""
    memory = rank_memory(workload)
    unused = unused_bytes(memory)
    needed = here * needed_bytes(workload, on_host=True)
    parts = {**_parts(memory), "allocator": unused, "process": PROCESS_BYTES}
    text = (
        f"memory of a host: {_shape(workload)} take {_gib(needed)} GiB; {here} on this host, each with {_listed(parts)}"
    )
    remedies = _remedies(workload, "put fewer ranks on a host")
    return _compare("host_memory", text, needed, _free_on_host(config), remedies)


def _on_device(workload: Workload, free: int | None) -> Finding:
    """Return whether a device, with `free` bytes if known, has memory for its rank."""
    memory = rank_memory(workload)
    needed = memory.total + LIBRARY_BYTES
    text = f"memory of a device: {_shape(workload)} take {_gib(needed)} GiB; "
    text += _listed({**_parts(memory), "libraries": LIBRARY_BYTES})
    remedies = _remedies(workload, "raise parallel.tensor or parallel.data")
    return _compare("device_memory", text, needed, free, remedies)


def _beside_devices(config: RunConfig, workload: Workload, here: int) -> Finding:
    """Return whether a host has memory for its ranks' processes, and for the checkpoints that they save."""
    saved = _checkpoint_bytes(workload) * here // config.parallel.world_size
    needed = here * _DEVICE_PROCESS_BYTES + saved
    text = f"memory of a host: {here} ranks take {_gib(needed)} GiB, {_gib(saved)} of it for saving checkpoints"
    remedy = "put fewer ranks on a host (launch.nodes)"
    return _compare("host_memory", text, needed, _free_on_host(config), remedy)


def _checkpoint_bytes(workload: Workload) -> int:
    return checkpoint_bytes(workload.num_parameters, workload.precision)


def _shape(workload: Workload) -> str:
    ranks = workload.parallel.world_size
    return f"{workload.num_parameters / 1e6:,.1f} M parameters on {ranks} rank{'s' if ranks > 1 else ''}"


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


def _compare(check: str, text: str, needed: int, free: int | None, remedy: str) -> Finding:
    """Return `text` with the free bytes, if known, and with the remedy if they are fewer than needed."""
    state = "ok"
    if free is not None:
        text = f"{text}; {_gib(free)} GiB free"
        if needed > free:
            state, text = "missing", f"{text}; {remedy}"
    return Finding(check, state, text, needed, free)


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


def _disk(config: RunConfig, workload: Workload, is_elsewhere: bool) -> Finding:
    folder = _output_folder(config)
    # The disk of assumed devices' hosts is not known.
    free = None if is_elsewhere else shutil.disk_usage(folder).free
    checkpoints = num_checkpoints(config)
    disk = _checkpoint_bytes(workload) * checkpoints
    text = f"disk: {_gib(disk)} GiB for {checkpoints} checkpoints, and the tokenised corpus, at {folder}"
    return _compare("disk", text, disk, free, "free some, set another output, or lower checkpoint.keep_last")
