"""The commands that train many models to compare them: `compare`, `ladder`, `sweep` and `grid`."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.cli.options import add_config, count, path, read_checked
from flows.run.config import RunConfig

_SEEDS_HELP = "number of seeds, starting at the configuration's seed (default: 1)"
_TOKENS_HELP = "training tokens of each model (default: train.max_tokens)"
_JOBS_HELP = "trials that train concurrently (default: 1)"


def add_trial_commands(commands: Any) -> None:
    """Add the commands to the parser's `commands`."""
    _add_compare(commands.add_parser("compare", help="train arms that differ in one option, and compare their results"))
    _add_ladder(
        commands.add_parser("ladder", help="train the steps from a base to a better model, one on top of another")
    )
    _add_sweep(commands.add_parser("sweep", help="search for depth, width and expansion at one number of parameters"))
    _add_grid(commands.add_parser("grid", help="train every batch size with every learning rate rule"))


def _add_compare(command: argparse.ArgumentParser) -> None:
    add_config(command)
    arms = command.add_mutually_exclusive_group(required=True)
    arms.add_argument("--policies", help="arms that differ in refine.policy, such as loss,random, at equal tokens")
    arms.add_argument(
        "--arms", type=path, metavar="FILE", help="arms of a YAML file: a name and fields of refine for each"
    )
    arms.add_argument("--sampling-rates", help="arms that differ in refine.sampling_rate, such as 0,0.25,0.5,0.75,1")
    arms.add_argument("--rounds", help="arms that differ in rounds.num_rounds, such as 1,2,3")
    arms.add_argument("--inits", help="arms that differ in model.init, such as constant,gpt2,internlm, one round each")
    arms.add_argument(
        "--vocab-sizes", help="arms that differ in tokenizer.vocab_size, such as 1024,2048,4096, one round each"
    )
    command.add_argument("--seeds", type=int, default=1, help=_SEEDS_HELP)
    command.add_argument(
        "--tokens",
        type=count,
        help="with --policies and --arms: tokens, or cost, of round 2 (default: the most that all arms reach; set it "
        "to be able to add arms or seeds later); with --inits: tokens of round 1 (default: train.max_tokens); with "
        "--vocab-sizes: tokens of round 1 (default: train.max_tokens, else the most that all arms reach)",
    )
    command.add_argument(
        "--equal",
        choices=["tokens", "cost"],
        help="with --policies and --arms: whether all arms train on as many tokens (default), or training and scoring "
        "together cost as much",
    )
    command.set_defaults(command=_compare)


def _add_ladder(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument(
        "--steps", type=path, required=True, metavar="FILE", help="steps of a YAML file: a name and the fields it sets"
    )
    command.add_argument("--seeds", type=int, default=1, help=_SEEDS_HELP)
    command.add_argument(
        "--tokens",
        type=count,
        help="training tokens of each step, over all its rounds (default: train.max_tokens, else the most that all "
        "reach; set it to be able to add steps or seeds later)",
    )
    command.set_defaults(command=_ladder)


def _add_sweep(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("--parameters", type=count, required=True, help="parameters of every model, such as 1e9")
    command.add_argument("--tolerance", type=float, help="largest relative deviation from it (default: 0.03)")
    command.add_argument("--trials", type=int, help="models to train (default: 30)")
    command.add_argument("--depth", metavar="MIN-MAX", help="range of layers (default: 9-40)")
    command.add_argument("--expansion", metavar="MIN-MAX", help="range of FFN width / model width (default: 1-4)")
    command.add_argument("--tokens", type=count, help=_TOKENS_HELP)
    command.add_argument("--seed", type=int, help="seed of the random search (default: 0)")
    command.add_argument("--jobs", type=int, help=_JOBS_HELP)
    command.add_argument("--no-generation", action="store_true", help="do not measure generation speed")
    command.set_defaults(command=_sweep)


def _add_grid(command: argparse.ArgumentParser) -> None:
    add_config(command)
    command.add_argument("--batch-tokens", required=True, help="batch sizes in tokens, such as 4096,8192,16384")
    command.add_argument(
        "--increment-rates", default="0.5,1.0", help="exponents r of the batch size (default: 0.5,1.0)"
    )
    command.add_argument("--seeds", type=int, default=1, help=_SEEDS_HELP)
    command.add_argument("--tokens", type=count, help=_TOKENS_HELP)
    command.add_argument("--jobs", type=int, default=1, help=_JOBS_HELP)
    command.set_defaults(command=_grid)


def _compare(options: argparse.Namespace) -> None:
    from flows.experiments.arms import (
        arm_comparison,
        init_comparison,
        policy_comparison,
        rate_comparison,
        round_comparison,
        vocabulary_comparison,
    )

    config = read_checked(options, "-compare")
    if options.equal is not None and options.policies is None and options.arms is None:
        raise ValueError("--equal: only valid with --policies or --arms; other arms differ in their tokens; omit it")
    if options.policies is not None:
        comparison = policy_comparison(options.policies)
    elif options.arms is not None:
        comparison = arm_comparison(options.arms, config.refine)
    elif options.inits is not None:
        comparison = init_comparison(options.inits)
    elif options.vocab_sizes is not None:
        _train_steps(config, vocabulary_comparison(options.vocab_sizes), "compare", options)
        return
    elif options.tokens is not None:
        raise ValueError(
            "--tokens: only valid with --policies, --arms, --inits or --vocab-sizes; other arms differ in their "
            "tokens; omit it"
        )
    elif options.sampling_rates is not None:
        comparison = rate_comparison(options.sampling_rates)
    else:
        comparison = round_comparison(options.rounds)
    if options.equal is not None:
        comparison = replace(comparison, equal=options.equal)

    # Takes seconds to import.
    from flows.display.terminal_progress import TerminalProgress
    from flows.experiments.compare import compare

    with TerminalProgress() as progress:
        page = compare(config, comparison, options.seeds, options.tokens, progress)
    print(f"{page.text}\ncomparison: {page.page}")


def _ladder(options: argparse.Namespace) -> None:
    from flows.experiments.arms import ladder_comparison

    config = read_checked(options, "-ladder")
    _train_steps(config, ladder_comparison(options.steps), "ladder", options)


def _train_steps(config: RunConfig, comparison: Any, command: str, options: argparse.Namespace) -> None:
    from flows.display.terminal_progress import TerminalProgress
    from flows.experiments.ladder import train_ladder

    folder = config.folder.absolute().with_name(f"{config.run_name}-{command}")
    with TerminalProgress() as progress:
        page = train_ladder(config, comparison, folder, options.seeds, options.tokens, progress)
    print(f"{page.text}\n{'comparison' if command == 'compare' else command}: {page.page}")


def _grid(options: argparse.Namespace) -> None:
    from flows.experiments.arms import entries, numbers

    config = read_checked(options, "-grid")
    batches = []
    for entry in entries("--batch-tokens", options.batch_tokens):
        if not entry.isdecimal() or int(entry) < 1:
            raise ValueError(f"--batch-tokens: {entry!r} is not a number of tokens; give comma-separated integers")
        batches.append(int(entry))
    rates = tuple(sorted(numbers("--increment-rates", options.increment_rates, 0, 2)))

    # Takes seconds to import.
    from flows.display.terminal_progress import TerminalProgress
    from flows.experiments.grid import Grid, train_grid

    grid = Grid(tuple(sorted(set(batches))), rates, options.seeds, options.tokens, options.jobs)
    with TerminalProgress() as progress:
        page = train_grid(config, grid, progress)
    print(f"{page.text}\ngrid: {page.page}")


def _sweep(options: argparse.Namespace) -> None:
    config = read_checked(options, "-sweep")

    from flows.experiments.trials import with_tokens

    config = with_tokens(config, options.tokens)
    search = _search(options)

    from flows.orchestration.here import run_here

    page = run_here(_import_sweep, config, search)
    assert isinstance(page, Path)
    print(f"{page.with_suffix('.md').read_text(encoding='utf-8')}\nsweep: {page}")


def _import_sweep() -> Any:
    from flows.sweep_pipeline import architecture_sweep

    return architecture_sweep


def _search(options: argparse.Namespace) -> Any:
    from flows.experiments.search_space import SearchConfig

    names = ("parameters", "tolerance", "trials", "seed", "jobs")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in ("depth", "expansion"):
        if (text := getattr(options, name)) is not None:
            given[f"min_{name}"], given[f"max_{name}"] = _range(name, text)
    try:
        return SearchConfig.model_validate({**given, "generation": not options.no_generation})
    except ValidationError as error:
        detail, *_ = error.errors()
        if not detail["loc"]:
            raise ValueError(f"--{detail['ctx']['error']}") from None
        option = re.sub("^(min|max)_", "", str(detail["loc"][0]))
        raise ValueError(f"--{option}: {detail['msg']} (it is {detail['input']}); correct it") from None


def _range(option: str, text: str) -> tuple[float, float]:
    found = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text.strip())
    try:
        return (float(found[1]), float(found[2])) if found else (float(text), float(text))
    except ValueError:
        raise ValueError(f"--{option}: {text!r} is not a range; write MIN-MAX, such as 9-40") from None
