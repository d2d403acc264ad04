"""Options that the commands that train trials share: the base configuration, and counts."""

import argparse
import sys
from pathlib import Path

from data_scoring.base.user_paths import expand_home
from flows.run.config import RunConfig, read_config

# Seeds, trials, or trials at a time.
_MOST = 10_000


def add_config(command: argparse.ArgumentParser) -> None:
    """Add the trials' base configuration to `command`."""
    command.add_argument("target", type=path, metavar="CONFIG", help="YAML configuration; the same command resumes it")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field of the configuration"
    )


def path(text: str) -> Path:
    """Return the path in `text`, in which `~` is the home folder: shells expand it at the start of a word only."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """Return the integer in `text`, which may be written as 1e9."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if number % 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer; write 1000000 or 1e6")
    return int(number)


def read_trial_config(options: argparse.Namespace) -> RunConfig:
    """Return the base configuration. Raises ValueError if it, or a numeric option, is invalid."""
    if options.target.is_dir():
        raise ValueError(f"{options.target}: is a folder; give the YAML configuration of the trials")
    for option in ("seeds", "tokens", "jobs", "trials"):
        if (number := getattr(options, option, None)) is not None and number < 1:
            raise ValueError(f"--{option}: {number} is less than 1; raise it")
        if number is not None and number > _MOST and option != "tokens":
            raise ValueError(f"--{option}: {number} is more than {_MOST}; lower it")
    return read_resolved(options.target, options.set)


def read_checked(options: argparse.Namespace, suffix: str) -> RunConfig:
    """Return the base configuration of trials, whose folder's name ends with `suffix`.

    Raises ValueError as `read_trial_config`, and for sources and tokenizers that cannot be read.
    """
    config = read_trial_config(options)
    folder = config.folder.with_name(f"{config.run_name}{suffix}")
    if not any(folder.glob("*/corpus/manifest.json")):
        check_text(config)
    return config


def check_text(config: RunConfig) -> None:
    """Raise ValueError if a source or the tokenizer cannot be read: before Prefect and torch, which take seconds."""
    from data_scoring.corpus.prepare_corpus import check_corpus

    check_corpus(config.corpus, config.tokenizer)


def read_resolved(target: Path, overrides: list[str]) -> RunConfig:
    """Return the configuration in a YAML file, with numbers in place of `auto`; prints why these."""
    config = read_config(target, overrides)
    if not config.is_auto:
        return config
    from flows.planning.auto import resolve_auto

    config, reasons = resolve_auto(config)
    for reason in reasons:
        print(f"auto: {reason}", file=sys.stderr)
    return config
