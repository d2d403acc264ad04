"""What commands that train trials ask for alike: the configuration that these are made from, and numbers."""

import argparse
from pathlib import Path

from flows.run.config import RunConfig, read_config


def add_config(command: argparse.ArgumentParser) -> None:
    """Add to `command` the configuration that trials are made from."""
    command.add_argument("target", type=Path, metavar="CONFIG", help="YAML configuration; the same command resumes it")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )


def count(text: str) -> int:
    """Return a whole number that may be written as 1e9."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if number % 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; write 1000000 or 1e6")
    return int(number)


def read_trial_config(options: argparse.Namespace) -> RunConfig:
    """Return that configuration. Raises ValueError where it, or a number among the options, is none."""
    if options.target.is_dir():
        raise ValueError(f"{options.target}: is a folder; give the configuration that the trials are made from")
    for option in ("seeds", "tokens", "jobs", "trials"):
        if (number := getattr(options, option, None)) is not None and number < 1:
            raise ValueError(f"--{option}: {number} is less than 1; give more")
    return read_config(options.target, options.set)
