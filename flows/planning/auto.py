"""Resolving `parallel: auto` and `train.micro_batch_size: auto` for the devices of a run, once, before it starts."""

from flows.planning.workload import find_hardware, workload_of
from flows.run.config import RunConfig
from flows.run.folder import read_run
from trainer.config import AUTO
from trainer.hardware import Hardware
from trainer.layout_choice import Choice, choose_layout, choose_micro_batch, remedy


def resolve_auto(config: RunConfig, hardware: Hardware | None = None) -> tuple[RunConfig, tuple[str, ...]]:
    """Return `config` with numbers in place of `auto`, and one sentence for each decision.

    A run that has prepared its corpus keeps the numbers in its run.yaml. hardware: the devices; None: those that
    `find_hardware` finds. Raises ValueError if they cannot be found, or if nothing fits.
    """
    if not config.is_auto:
        return config, ()
    resolved, reasons = _resolve(config, hardware)
    if hardware is None:
        resolved.launch.check(resolved.parallel.world_size)
    return resolved, reasons


def _resolve(config: RunConfig, hardware: Hardware | None) -> tuple[RunConfig, tuple[str, ...]]:
    folder = config.folder.absolute()
    if hardware is None and (folder / "corpus" / "manifest.json").exists() and (folder / "run.yaml").exists():
        stored = read_run(folder).config
        parallel = stored.parallel if config.requested_parallel == AUTO else config.parallel
        train = stored.train if config.train.requested_micro_batch_size == AUTO else config.train
        kept = f"the numbers that {folder / 'run.yaml'} has: the run has begun with them"
        return config.with_choice(parallel, train.micro_batch_size), (kept,)
    hardware = hardware or find_hardware(config)
    choice = _choose(config, hardware)
    return config.with_choice(choice.parallel, choice.micro_batch_size), choice.reasons


def _choose(config: RunConfig, hardware: Hardware) -> Choice:
    """Return the layout and the micro batch for `config` on `hardware`, chosen where it has `auto`.

    Raises ValueError, with the smallest change that would fit, if nothing does.
    """
    workload = workload_of(config, hardware.kind)
    asked = config.train.requested_micro_batch_size
    if config.requested_parallel == AUTO:
        choice = choose_layout(workload, hardware, None if isinstance(asked, str) else asked)
        if choice is not None:
            return choice
        raise ValueError(
            f"parallel: auto: no layout of the model fits on {hardware.describe()}; {remedy(workload, hardware)}"
        )
    size = choose_micro_batch(workload, hardware)
    if size is None:
        raise ValueError(
            f"train.micro_batch_size: auto: not even one sample fits on {hardware.describe()}; "
            f"{remedy(workload, hardware)}"
        )
    return Choice(config.parallel, size, (f"micro batch {size}: chosen for the given layout",))
