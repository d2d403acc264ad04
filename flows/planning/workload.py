"""The workload that a configuration describes, and the devices that it would run on."""

import re

import psutil

from data_scoring.base.messages import shown
from flows.launch.job_fields import device_kind
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.stages.prepare import vocabulary_size
from trainer.config import AUTO
from trainer.devices import list_accelerators, resolve_kernels, resolve_precision
from trainer.hardware import ACCELERATORS, Hardware, accelerators, find_accelerator
from trainer.layout_choice import with_micro_batch
from trainer.memory import Workload
from trainer.parallel_config import ParallelConfig

# Slurm's generic resource with the devices' type, such as gpu:h100:8.
_TYPED_GRES = re.compile(r"[a-z]+:([a-z0-9_-]+):([1-9][0-9]{0,3})(\(.*\))?", re.IGNORECASE)


def workload_of(config: RunConfig, kind: str) -> Workload:
    """Return the workload of training on devices of `kind`; what is `auto` is one rank, and one sample.

    Raises ValueError if the tokenizer cannot be opened, or a kernel cannot run there.
    """
    train, _ = resolve_kernels(config.resolved_train, config.score, kind)
    workload = Workload(
        config.model,
        _vocabulary_size(config),
        config.corpus.seq_length,
        train,
        ParallelConfig() if config.requested_parallel == AUTO else config.parallel,
        resolve_precision(train.precision, kind),
        kind=kind,
    )
    return with_micro_batch(workload, 1) if train.requested_micro_batch_size == AUTO else workload


def with_devices(config: RunConfig, hardware: Hardware) -> RunConfig:
    """Return `config` for ranks on `hardware`: its kind of device, and one rank for each of its devices."""
    launch = config.launch.model_copy(update={"nodes": hardware.num_nodes})
    return config.model_copy(update={"device": hardware.kind, "launch": launch})


def find_hardware(config: RunConfig) -> Hardware:
    """Return the devices of a run of `config`: those of hosts like this one, or those that Slurm is asked for.

    On CPU: one rank a host, or launch.processes_per_node, which share its memory. Raises ValueError, in one line with
    the remedy, if they cannot be seen and the configuration does not tell them.
    """
    launch = config.launch
    kind = device_kind(config)
    if kind == "cpu":
        if config.is_auto and not launch.launcher_kind.sees_devices:
            raise ValueError(
                f"parallel: auto cannot see the memory of the nodes with launch.kind {launch.kind} and device cpu; set "
                "parallel and train.micro_batch_size to numbers"
            )
        ranks = launch.processes_per_node or 1
        if config.requested_parallel != AUTO:
            ranks = config.parallel.world_size // launch.nodes
        return Hardware("cpu", launch.nodes, ranks, psutil.virtual_memory().total // ranks)
    if not launch.launcher_kind.sees_devices:
        return _asked_of_slurm(config)
    found = list_accelerators(kind)
    if not found:
        raise ValueError(f"device: this host has no {kind} devices that can be used; see `reprise doctor`")
    per_node = launch.processes_per_node or len(found)
    name, memory = min(found[:per_node], key=lambda each: each[1])
    known = find_accelerator(name)
    row = ACCELERATORS[known] if known is not None else None
    return Hardware(kind, launch.nodes, per_node, memory, known or name, row.peak_flops if row else None)


def _asked_of_slurm(config: RunConfig) -> Hardware:
    launch = config.launch
    if launch.kind == "ray":
        raise ValueError(
            "launch.kind: ray does not tell the type of the nodes' devices; set parallel and train.micro_batch_size to "
            "what `reprise plan CONFIG --assume HARDWARE` chooses"
        )
    found = _TYPED_GRES.fullmatch(launch.slurm.gres or "")
    name = None if found is None else found[1].lower()
    if found is None or name not in ACCELERATORS:
        raise ValueError(
            f"launch.slurm.gres: {shown(launch.slurm.gres)} does not name the nodes' devices, which cannot be seen "
            f"from here; set one such as gpu:h100:8 (known: {', '.join(ACCELERATORS)}), or set parallel and "
            "train.micro_batch_size to what `reprise plan CONFIG --assume HARDWARE` chooses"
        )
    return accelerators(str(name), launch.nodes, launch.processes_per_node or int(found[2]))


def _vocabulary_size(config: RunConfig) -> int:
    """Return the size of the vocabulary, by the prepared corpus if there is one."""
    run = Run(config, config.folder.absolute())
    if config.model.vocab_size is None and (run.corpus_folder / "manifest.json").exists():
        return run.corpus().vocab_size
    return vocabulary_size(config)
