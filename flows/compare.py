"""Comparing: arms that differ in one thing, each going on from the same first round, over several seeds.

For every seed a base trains and scores round 1 once. An arm is a run of its own beside it: it has the base's corpus and
first round by hard links, so that its stages find them complete, and does what comes after.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from data_scoring.budget import CALIBRATION
from data_scoring.config import Policy, RefineConfig
from data_scoring.files import commit
from data_scoring.ledger import query, refresh_ledger
from data_scoring.near_duplicates import SCRATCH
from data_scoring.progress import Progress
from data_scoring.scoring import write_parquet
from flows import stages
from flows.compare_report import Comparison, write_comparison
from flows.compare_results import BASE, RESULTS
from flows.config import RunConfig, parse_config
from flows.run_folder import Run, locked, open_run

_WITHOUT_LOSSES = ("random", "all")
# An arm that asks for no losses puts no outliers aside either.
_BLIND = {"outlier_z": None}


@dataclass(frozen=True)
class Arm:
    """One way on from the base: its name, its folder's name, the fields of `refine` it sets, and its last round."""

    name: str
    folder: str
    refine: dict[str, Any] = field(default_factory=dict)
    num_rounds: int = 2


@dataclass(frozen=True)
class Sweep:
    """Arms that differ in the option `option` alone; `stem` names the files of their result."""

    option: str
    stem: str
    arms: tuple[Arm, ...]


_BASE = Arm(BASE, BASE, num_rounds=1)


def policy_sweep(text: str) -> Sweep:
    """Return the arms of a list of policies, such as loss,random. Raises ValueError for one that there is not."""
    names = _entries("--policies", text)
    for name in names:
        if name not in get_args(Policy):
            raise ValueError(f"--policies: {name!r} is none of {', '.join(get_args(Policy))}; give some of them")
    return Sweep("--policies", "compare", tuple(_policy_arm(name) for name in names))


def _policy_arm(name: str) -> Arm:
    return Arm(name, name, {"policy": name, **(_BLIND if name in _WITHOUT_LOSSES else {})})


def rate_sweep(text: str) -> Sweep:
    """Return the arms of a list of sampling rates from 0, which is no second round, to 1, which is everything."""
    rates = sorted(_numbers("--sampling-rates", text, 0, 1))
    arms = [Arm(f"{rate:g}", f"rate-{rate:g}", {"sampling_rate": rate}) for rate in rates]
    for place, rate in enumerate(rates):
        if rate == 0:
            arms[place] = Arm("0", BASE, num_rounds=1)
        elif rate == 1:
            arms[place].refine.update(_BLIND)
    return Sweep("--sampling-rates", "compare-sampling-rates", tuple(arms))


def round_sweep(text: str) -> Sweep:
    """Return the arms of a list of numbers of rounds; each goes on from where the one before it ends."""
    rounds = sorted(_numbers("--rounds", text, 1, 100))
    if any(number % 1 for number in rounds):
        raise ValueError(f"--rounds: {text!r} holds a fraction of a round; give whole numbers")
    arms = tuple(Arm(f"{number:g}", f"rounds-{number:g}", {}, int(number)) for number in rounds)
    return Sweep("--rounds", "compare-rounds", arms)


def _entries(option: str, text: str) -> list[str]:
    entries = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not entries:
        raise ValueError(f"{option}: names nothing; give a list with commas")
    return entries


def _numbers(option: str, text: str, least: float, most: float) -> set[float]:
    try:
        numbers = {float(entry) for entry in _entries(option, text)}
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no list of numbers; give some with commas between them") from None
    if not all(least <= number <= most for number in numbers):
        raise ValueError(f"{option}: {text!r} is not within {least} and {most}; give numbers from there")
    return numbers


def compare(config: RunConfig, sweep: Sweep, num_seeds: int, tokens: int | None, progress: Progress) -> Comparison:
    """Train the arms of `sweep` for each of `num_seeds` seeds from `config.seed` on, and return how they compare.

    What is complete is not done again, so the same call goes on where one was stopped. Policies are compared at equal
    tokens: `tokens`, else `refine.max_tokens`, else the most that every arm reaches within the sampling rate. Raises
    ValueError where an arm cannot reach them, or where a folder was made by another configuration.
    """
    folder = config.folder.absolute().with_name(f"{config.run_name}-compare")
    seeds = range(config.seed, config.seed + num_seeds)
    # What an arm lacks is best known before the bases have trained.
    for arm in sweep.arms:
        _config(config, folder, config.seed, arm)
    with locked(folder):
        bases = {seed: _train_base(_config(config, folder, seed, _BASE), progress) for seed in seeds}
        arms = sweep.arms
        if sweep.option == "--policies":
            tokens = equal_tokens(config, list(bases.values()), arms, tokens or config.refine.max_tokens)
            arms = tuple(Arm(arm.name, arm.folder, {**arm.refine, "max_tokens": tokens}) for arm in arms)
        rows = []
        for seed, base in bases.items():
            rows += _results(base, seed, _BASE)
            before = base
            for arm in arms:
                run = base
                if arm.num_rounds > 1:
                    run = _train_arm(_config(config, folder, seed, arm), before, progress)
                rows += _results(run, seed, arm)
                # Only a round that is the same in both can be gone on from.
                before = run if sweep.option == "--rounds" else base
        path = folder / f"{sweep.stem}.parquet"
        write_parquet(path, pa.Table.from_pylist(rows, RESULTS), "")
        return write_comparison(path, sweep.option, [arm.name for arm in arms], config, tokens)


def _config(config: RunConfig, folder: Path, seed: int, arm: Arm) -> RunConfig:
    """Return the configuration of an arm's run."""
    values = config.model_dump()
    values |= {"name": f"{arm.folder}-seed-{seed}", "output": str(folder), "seed": seed}
    values["rounds"] |= {"num_rounds": arm.num_rounds, "approval": False}
    values["refine"] |= arm.refine
    return parse_config(values, f"arm {arm.name}")


def _train_base(config: RunConfig, progress: Progress) -> Run:
    progress = _named(config, progress)
    with locked(config.folder):
        run = open_run(config)
        stages.prepare(run, progress)
        stages.mix(run, 1, progress)
        stages.train(run, 1, progress)
        stages.score(run, 1, progress)
    return run


def _train_arm(config: RunConfig, before: Run, progress: Progress) -> Run:
    """Return the arm's run, its rounds after those of `before` trained."""
    progress = _named(config, progress)
    with locked(config.folder):
        for part in ("corpus", *(f"rounds/{number}" for number in range(1, before.config.rounds.num_rounds + 1))):
            share(before.folder / part, config.folder / part)
        run = open_run(config)
        for number in range(2, config.rounds.num_rounds + 1):
            stages.score(run, number - 1, progress)
            stages.refine(run, number, progress)
            stages.mix(run, number, progress)
            stages.train(run, number, progress)
    return run


def _named(config: RunConfig, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{config.name}: {what}", done, total)


def share(source: Path, target: Path) -> None:
    """Make the folder `target` hold what the finished folder `source` does, at once, by hard links where it can.

    Files of a run are replaced and never changed, so neither side sees what the other does later.
    """
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.sharing")
    shutil.rmtree(temporary, ignore_errors=True)
    notes = shutil.ignore_patterns(".told-*", ".*.tmp", SCRATCH)
    shutil.copytree(source, temporary, symlinks=True, ignore=notes, copy_function=_link)
    commit(temporary, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one that has no links.
        shutil.copy2(source, target)


def equal_tokens(config: RunConfig, bases: list[Run], arms: tuple[Arm, ...], wanted: int | None) -> int:
    """Return the predicted tokens that all `arms` train on in all seeds: `wanted`, or the most that is fair.

    That is what the sampling rate keeps of the smallest corpus, or less where an arm's samples are shorter. Raises
    ValueError where an arm keeps fewer than `wanted`.
    """
    reached = {}
    for base in bases:
        for arm in arms:
            draw = RefineConfig.model_validate({**base.config.refine.model_dump(), **arm.refine, "max_tokens": None})
            reached[arm.name, base.config.seed] = stages.preview(base, 2, draw).total.num_tokens_kept
    (name, seed), least = min(reached.items(), key=lambda item: item[1])
    if wanted is None:
        corpora = [_number(base, "select sum(num_tokens) from samples") for base in bases]
        return min(least, int(min(corpora) * config.refine.sampling_rate))
    if least < wanted:
        raise ValueError(
            f"--tokens: {wanted} is more than arm {name} keeps in seed {seed}, {least}; give fewer, or raise "
            "refine.sampling_rate"
        )
    return wanted


def scoring_cost(run: Run, round_number: int) -> int:
    """Return what scoring a round cost, choosing how included, in training-token equivalents."""
    return _number(
        run,
        f"select sum(cost_tokens) from budgets "
        f"where round = {round_number} and (chosen or candidate = '{CALIBRATION}')",
    )


def needs_losses(refine: RefineConfig) -> bool:
    """Return whether what is kept depends on losses; keeping everything, or some at random, does not."""
    is_blind = refine.policy in _WITHOUT_LOSSES or refine.sampling_rate == 1
    return not is_blind or refine.outlier_z is not None


def _results(run: Run, seed: int, arm: Arm) -> list[dict[str, Any]]:
    """Return a row for each source: the validation loss that the run ends with, and what it cost to get there."""
    refresh_ledger(run.folder)
    scored = range(1, run.config.rounds.num_rounds) if needs_losses(run.config.refine) else ()
    [costs] = query(
        run.folder,
        """select coalesce(sum(num_steps) filter (round > 1), 0), coalesce(sum(num_tokens) filter (round > 1), 0),
            sum(num_tokens) filter (round = 1) from rounds""",
    ).fetchall()
    common = dict(zip(("num_steps", "trained_tokens", "round_1_tokens"), map(int, costs), strict=True))
    common["scoring_cost"] = sum(scoring_cost(run, number) for number in scored)
    last = f"select * from validation where round = {run.config.rounds.num_rounds} qualify step = max(step) over ()"
    rows = query(run.folder, f"select source, loss, num_tokens from ({last}) order by source").fetchall()
    names = ("source", "loss", "num_tokens")
    return [{"seed": seed, "arm": arm.name, **dict(zip(names, row, strict=True)), **common} for row in rows]


def _number(run: Run, sql: str) -> int:
    [(number,)] = query(run.folder, sql).fetchall()
    return int(number or 0)
