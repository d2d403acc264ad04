"""`reprise plan`: what a run needs and how long it takes; and the options that name devices which are not here."""

import argparse
from typing import TYPE_CHECKING, Any

from flows.cli.json_output import add_json, print_json
from flows.cli.options import path
from flows.run.config import RunConfig, read_config

if TYPE_CHECKING:
    from trainer.hardware import Hardware


def add_plan(commands: Any) -> None:
    """Add the command to the parser of `reprise`."""
    command = commands.add_parser("plan", help="estimate memory, layout, time and disk of a run before it starts")
    command.add_argument("config", type=path, metavar="CONFIG", help="YAML configuration")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )
    add_assume(command)
    command.add_argument("--devices", type=int, metavar="N", help="plan for N devices with --memory, of any kind")
    command.add_argument("--memory", type=float, metavar="GIB", help="memory of each of the --devices")
    command.add_argument(
        "--utilisation", type=float, metavar="SHARE", help="assumed share of the devices' peak FLOP/s (default: 0.4)"
    )
    add_json(command)
    command.set_defaults(command=_plan)


def add_assume(command: argparse.ArgumentParser) -> None:
    """Add the option that names devices in place of those of this machine."""
    command.add_argument(
        "--assume",
        metavar="HARDWARE",
        help="[NODESx]COUNTxNAME, such as 8xh100 or 2x8xh100: devices in place of those of this machine",
    )


def _plan(options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.planning.plan import UTILISATION, make_plan
    from flows.planning.plan_table import print_plan
    from flows.planning.workload import find_hardware, with_devices

    utilisation = UTILISATION if options.utilisation is None else options.utilisation
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation: {utilisation} is not between 0 and 1; give a share such as 0.4")
    config = read_config(options.config, options.set)
    hardware = _given_hardware(options, config)
    if hardware is None:
        try:
            hardware = find_hardware(config)
        except ValueError as error:
            raise ValueError(f"{error}; or name the devices to plan for: --assume 8xh100") from None
    else:
        config = with_devices(config, hardware)
    with TerminalProgress() as progress:
        plan = make_plan(config, hardware, utilisation, progress)
    if options.json:
        print_json(plan)
    else:
        print_plan(plan)


def _given_hardware(options: argparse.Namespace, config: RunConfig) -> "Hardware | None":
    """Return the devices that the options name, or None. Raises ValueError if they do not fit together."""
    from trainer.hardware import GIB, Hardware, accelerator_kind, assumed_hardware

    if options.assume is not None:
        if options.devices is not None or options.memory is not None:
            raise ValueError("--assume: cannot be combined with --devices and --memory; leave one of them out")
        return assumed_hardware(options.assume)
    if options.devices is None and options.memory is None:
        return None
    if options.devices is None or options.memory is None or options.devices < 1 or not 0 < options.memory < 1e6:
        raise ValueError("--devices: needs a number of at least 1, together with --memory in GiB; give both")
    nodes = config.launch.nodes
    if options.devices % nodes:
        raise ValueError(f"--devices: {options.devices} is not a multiple of launch.nodes {nodes}; change one of them")
    return Hardware(accelerator_kind(config.device), nodes, options.devices // nodes, round(options.memory * GIB))
