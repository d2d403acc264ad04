"""Comparing: arms that differ in one thing, each going on from the same first round, over several seeds.

For every seed a base trains and scores round 1 once. An arm is a run of its own beside it: it has the base's corpus and
first round by hard links, so that its stages find them complete, and does what comes after. Arms that differ in how a
model begins have the corpus alone from their base, and train round 1 themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.ledger import query, refresh_ledger
from data_scoring.refine.budget import CALIBRATION
from data_scoring.refine.policies import POLICIES
from data_scoring.refine.refine_config import RefineConfig
from flows.display.result_page import Page
from flows.experiments.compare_report import write_comparison
from flows.experiments.compare_results import BASE, CURVES, RESULTS, SCORES, curves_path, scores_path
from flows.experiments.trials import (
    Trial,
    final_losses,
    named,
    prepare_corpus,
    share,
    train_trial,
    trial_config,
    with_tokens,
)
from flows.inheritance.initial_checkpoint import is_current, layers_of
from flows.inheritance.teacher import check_inheritance
from flows.run.config import RunConfig
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.stages.refine import preview
from flows.stages.stage_order import complete, steps_to_train
from trainer.config import InheritConfig, InheritMethod, ModelConfig

# An arm that asks for no losses puts no outliers aside either.
_BLIND = {"outlier_z": None}


@dataclass(frozen=True)
class Arm:
    """One way on from the base: its name, its folder's name, the fields it sets by section, and its last round."""

    name: str
    folder: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_rounds: int = 2

    @property
    def refine(self) -> dict[str, Any]:
        """Return the fields of `refine` that the arm sets."""
        return self.values.get("refine", {})


@dataclass(frozen=True)
class Sweep:
    """Arms that differ in the option `option` alone; `stem` names the files of their result.

    They go on from the same first round, or begin with one of their own (`shares_round`).
    """

    option: str
    stem: str
    arms: tuple[Arm, ...]
    shares_round: bool = True


_BASE = Arm(BASE, "base", num_rounds=1)


def policy_sweep(text: str) -> Sweep:
    """Return the arms of a list of policies, such as loss,random. Raises ValueError for one that there is not."""
    names = entries("--policies", text)
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"--policies: {name!r} is none of {', '.join(POLICIES)}; give some of them")
    return Sweep("--policies", "compare", tuple(_policy_arm(name) for name in names))


def _policy_arm(name: str) -> Arm:
    return Arm(name, name, {"refine": {"policy": name, **({} if POLICIES[name].needs_losses else _BLIND)}})


def rate_sweep(text: str) -> Sweep:
    """Return the arms of a list of sampling rates from 0, which is no second round, to 1, which is everything."""
    rates = sorted(numbers("--sampling-rates", text, 0, 1))
    arms = [Arm(f"{rate:g}", f"rate-{rate:g}", {"refine": {"sampling_rate": rate}}) for rate in rates]
    for place, rate in enumerate(rates):
        if rate == 0:
            arms[place] = Arm("0", _BASE.folder, num_rounds=1)
        elif rate == 1:
            arms[place].refine.update(_BLIND)
    return Sweep("--sampling-rates", "compare-sampling-rates", tuple(arms))


def round_sweep(text: str) -> Sweep:
    """Return the arms of a list of numbers of rounds; each goes on from where the one before it ends."""
    rounds = sorted(numbers("--rounds", text, 1, 100))
    if any(number % 1 for number in rounds):
        raise ValueError(f"--rounds: {text!r} holds a fraction of a round; give whole numbers")
    arms = tuple(Arm(f"{number:g}", f"rounds-{number:g}", {}, int(number)) for number in rounds)
    return Sweep("--rounds", "compare-rounds", arms)


def init_sweep(text: str) -> Sweep:
    """Return the arms of a list of initialisations, such as gpt2,internlm. Raises ValueError for one there is not."""
    names, known = entries("--inits", text), get_args(ModelConfig.model_fields["init"].annotation)
    for name in names:
        if name not in known:
            raise ValueError(f"--inits: {name!r} is none of {', '.join(known)}; give some of them")
    arms = tuple(Arm(name, f"init-{name}", {"model": {"init": name}}, num_rounds=1) for name in names)
    return Sweep("--inits", "compare-inits", arms, shares_round=False)


def inherit_sweep(text: str, inherit: InheritConfig | None, layers: Sequence[int] | None = None) -> Sweep:
    """Return the arms of a list of methods, such as base,l1,learned, each a way to inherit as `inherit` says.

    layers: those that stay, where they are known already; `base` has no use for them. Raises ValueError for a method
    that there is not, or where there is nothing to inherit from.
    """
    if inherit is None:
        raise ValueError("model.inherit: names no larger model to inherit from; add one, such as {from: runs/large}")
    names = entries("--methods", text)
    for name in names:
        if name not in get_args(InheritMethod):
            raise ValueError(f"--methods: {name!r} is none of {', '.join(get_args(InheritMethod))}; give some of them")
    arms = []
    for name in names:
        pinned = {} if layers is None or name == "base" else {"layers": tuple(layers)}
        values = {"model": {"inherit": {**inherit.model_dump(), "method": name, **pinned}}}
        arms.append(Arm(name, f"inherit-{name}", values, num_rounds=1))
    return Sweep("--methods", "compare-inherit", tuple(arms), shares_round=False)


def entries(option: str, text: str) -> list[str]:
    """Return the entries of a list with commas, each once. Raises ValueError, naming `option`, where there is none."""
    found = list(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not found:
        raise ValueError(f"{option}: names nothing; give a list with commas")
    return found


def numbers(option: str, text: str, least: float, most: float) -> set[float]:
    """Return the numbers of a list with commas. Raises ValueError where one is none, or not within the bounds."""
    try:
        found = {float(entry) for entry in entries(option, text)}
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no list of numbers; give some with commas between them") from None
    if not all(least <= number <= most for number in found):
        raise ValueError(f"{option}: {text!r} is not within {least} and {most}; give numbers from there")
    return found


def compare(config: RunConfig, sweep: Sweep, num_seeds: int, tokens: int | None, progress: Progress) -> Page:
    """Train the arms of `sweep` for each of `num_seeds` seeds from `config.seed` on, and return how they compare.

    What is complete is not done again, so the same call goes on where one was stopped. Policies are compared at equal
    tokens: `tokens`, else `refine.max_tokens`, else the most that every arm reaches within the sampling rate.
    Initialisations train on `tokens`, else on `train.max_tokens`, else on everything. Raises ValueError where an arm
    cannot reach them, or where a folder was made by another configuration.
    """
    folder = config.folder.absolute().with_name(f"{config.run_name}-compare")
    seeds = range(config.seed, config.seed + num_seeds)
    if not sweep.shares_round:
        config = with_tokens(config, tokens)
        if config.model.inherits and sweep.option == "--inits":
            raise ValueError("model.inherit: initialisations are compared from random weights; leave it out")
        if config.model.start_from is not None:
            raise ValueError("model.start_from: initialisations are compared from random weights; leave it out")
    # What an arm lacks is best known before the bases have trained.
    for arm in sweep.arms:
        check_inheritance(_config(config, folder, config.seed, arm))
    path = folder / f"{sweep.stem}.parquet"
    with locked(folder):
        layers = None
        if sweep.option == "--methods" and any(arm.name != "base" for arm in sweep.arms):
            layers = _measure_layers(config, folder, progress)
            sweep = inherit_sweep(",".join(arm.name for arm in sweep.arms), config.model.inherit, layers)
        if sweep.shares_round:
            found, tokens = _go_on(config, folder, seeds, sweep, tokens, progress)
        else:
            found = _begin(config, folder, seeds, sweep, progress)
            write_parquet(curves_path(path), pa.Table.from_pylist(found.curves, CURVES), "")
        if config.eval.asked:
            write_parquet(scores_path(path), pa.Table.from_pylist(found.scores, SCORES), "")
        write_parquet(path, pa.Table.from_pylist(found.results, RESULTS), "")
        return write_comparison(path, sweep.option, [arm.name for arm in sweep.arms], config, tokens, layers)


@dataclass(frozen=True)
class _Found:
    """The rows of a comparison's files: results by source, scores by task, and the curves of first rounds by step."""

    results: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)

    def add(self, run: Run, seed: int, arm: Arm, progress: Progress) -> None:
        """Add what an arm's run ends with, evaluated where the configuration asks for it."""
        self.results.extend(_results(run, seed, arm))
        self.scores.extend(_scores(run, seed, arm, progress))


def _go_on(
    config: RunConfig, folder: Path, seeds: range, sweep: Sweep, tokens: int | None, progress: Progress
) -> tuple[_Found, int | None]:
    """Return what arms that go on from a base's first round end with, and the tokens that each of them trains on."""
    bases = {seed: _train_base(_config(config, folder, seed, _BASE), progress) for seed in seeds}
    arms = sweep.arms
    if sweep.option == "--policies":
        tokens = equal_tokens(config, list(bases.values()), arms, tokens or config.refine.max_tokens)
        arms = tuple(Arm(arm.name, arm.folder, {"refine": {**arm.refine, "max_tokens": tokens}}) for arm in arms)
    found = _Found()
    for seed, base in bases.items():
        found.add(base, seed, _BASE, progress)
        before = base
        for arm in arms:
            run = base
            if arm.num_rounds > 1:
                run = _train_arm(_config(config, folder, seed, arm), before, progress)
            found.add(run, seed, arm, progress)
            # Only a round that is the same in both can be gone on from.
            before = run if sweep.option == "--rounds" else base
    return found, tokens


def _begin(config: RunConfig, folder: Path, seeds: range, sweep: Sweep, progress: Progress) -> _Found:
    """Return what arms that train round 1 themselves end with, over the same corpus in each seed."""
    found = _Found()
    for seed in seeds:
        corpus = prepare_corpus(config, folder, f"corpus-seed-{seed}", seed, progress)
        for arm in sweep.arms:
            arm_config = _config(config, folder, seed, arm)
            run = train_trial(arm_config, corpus, named(arm_config, progress))
            if run.config.model.inherits and not is_current(run):
                raise ValueError(
                    f"{run.folder}: began with another larger model than there is now; delete that folder, or put the "
                    "model back"
                )
            found.add(run, seed, arm, progress)
            found.curves.extend(_curve(run, seed, arm))
    return found


def _measure_layers(config: RunConfig, folder: Path, progress: Progress) -> list[int]:
    """Return the layers that all arms inherit in all seeds, measured once, over the corpus of the first."""
    corpus = prepare_corpus(config, folder, f"corpus-seed-{config.seed}", config.seed, progress)
    with locked(corpus.folder):
        return layers_of(corpus, named(corpus.config, progress))


def _config(config: RunConfig, folder: Path, seed: int, arm: Arm) -> RunConfig:
    """Return the configuration of an arm's run."""
    return trial_config(config, folder, Trial(f"{arm.folder}-seed-{seed}", arm.values, arm.num_rounds), seed)


def _train_base(config: RunConfig, progress: Progress) -> Run:
    progress = named(config, progress)
    with locked(config.folder):
        run = open_run(config)
        for step in steps_to_train(config, 1):
            complete(run, step.stage.name, step.round_number, progress)
        complete(run, "score", 1, progress)
    return run


def _train_arm(config: RunConfig, before: Run, progress: Progress) -> Run:
    """Return the arm's run, its rounds after those of `before` trained."""
    progress = named(config, progress)
    with locked(config.folder):
        for part in ("corpus", *(f"rounds/{number}" for number in range(1, before.config.rounds.num_rounds + 1))):
            share(before.folder / part, config.folder / part)
        run = open_run(config)
        for step in steps_to_train(config, config.rounds.num_rounds):
            if step.place > 1:
                complete(run, step.stage.name, step.round_number, progress)
    return run


def equal_tokens(config: RunConfig, bases: list[Run], arms: tuple[Arm, ...], wanted: int | None) -> int:
    """Return the predicted tokens that all `arms` train on in all seeds: `wanted`, or the most that is fair.

    That is what the sampling rate keeps of the smallest corpus, or less where an arm's samples are shorter. Raises
    ValueError where an arm keeps fewer than `wanted`.
    """
    reached = {}
    for base in bases:
        for arm in arms:
            draw = RefineConfig.model_validate({**base.config.refine.model_dump(), **arm.refine, "max_tokens": None})
            reached[arm.name, base.config.seed] = preview(base, 2, draw).total.num_tokens_kept
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
    is_blind = not refine.policy_row.needs_losses or refine.sampling_rate == 1
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
    losses = final_losses(run, run.config.rounds.num_rounds)
    return [{"seed": seed, "arm": arm.name, **row, **common} for row in losses]


def _scores(run: Run, seed: int, arm: Arm, progress: Progress) -> list[dict[str, Any]]:
    """Return a row for each evaluation task of the configuration: what the model that the run ends with scores."""
    if not run.config.eval.asked:
        return []
    last = run.config.rounds.num_rounds
    with locked(run.folder):
        complete(run, "evaluate", last, named(run.config, progress))
    names = SCORES.names[2:]
    found = query(run.folder, f"select {', '.join(names)} from final_scores where round = {last}").fetchall()
    return [{"seed": seed, "arm": arm.name, **dict(zip(names, row, strict=True))} for row in found]


def _curve(run: Run, seed: int, arm: Arm) -> list[dict[str, Any]]:
    """Return a row for each step of the run's first round: the tokens trained on up to there, and the step's loss."""
    steps = query(
        run.folder,
        "select step, sum(num_tokens) over (order by step)::bigint, loss from steps where round = 1 order by step",
    ).fetchall()
    names = ("step", "num_tokens", "loss")
    return [{"seed": seed, "arm": arm.name, **dict(zip(names, row, strict=True))} for row in steps]


def _number(run: Run, sql: str) -> int:
    [(number,)] = query(run.folder, sql).fetchall()
    return int(number or 0)
