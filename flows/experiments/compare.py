"""Comparisons: arms that differ in one option, over several seeds.

For each seed, a base run trains and scores round 1 once. Each arm is a separate run next to it: it hard-links the
base's corpus and first round, so that its stages find them complete, and continues from there. Arms that differ in how
a model is initialised share only the corpus, and train round 1 themselves.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.ledger import read_rows, refresh_ledger
from flows.display.result_page import Page
from flows.experiments.arms import BASE_ARM, Arm, Comparison, inherit_comparison
from flows.experiments.compare_report import write_comparison
from flows.experiments.compare_results import CURVES, RESULTS, SCORES, curves_path, scores_path
from flows.experiments.equal_arms import equal_cost, limited, needs_losses, scoring_cost
from flows.experiments.task_scores import read_task_scores
from flows.experiments.trials import (
    Trial,
    final_losses,
    named,
    prepare_corpus,
    share_run,
    train_trial,
    trial_config,
    with_tokens,
)
from flows.inheritance.initial_checkpoint import layers_of
from flows.inheritance.teacher import check_inheritance
from flows.run.config import RunConfig
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.stages.stage_order import complete_all, steps_at, steps_to_train


def compare(config: RunConfig, comparison: Comparison, num_seeds: int, tokens: int | None, progress: Progress) -> Page:
    """Return the result page, after training the arms for `num_seeds` seeds, starting at `config.seed`.

    Completed work is not repeated, so the same call resumes an interrupted one. Policies and arms of a file are
    compared at equal tokens or cost: `tokens`, else `refine.max_tokens`, else the most that every arm reaches within
    the sampling rate. Initialisations train on `tokens`, else on `train.max_tokens`, else on everything. Raises
    ValueError if an arm cannot reach the tokens, or if a folder was created by another configuration.
    """
    folder = config.folder.absolute().with_name(f"{config.run_name}-compare")
    seeds = range(config.seed, config.seed + num_seeds)
    if not comparison.shares_round:
        config = with_tokens(config, tokens)
        if config.model.inherits and comparison.option == "--inits":
            raise ValueError("model.inherit: initialisations are compared from random weights; remove it")
        if config.model.start_from is not None:
            raise ValueError("model.start_from: initialisations are compared from random weights; remove it")
    # Fail before the bases train if an arm's teacher is missing.
    for arm in comparison.arms:
        check_inheritance(_config(config, folder, config.seed, arm))
    path = folder / f"{comparison.stem}.parquet"
    with locked(folder):
        layers = None
        if comparison.option == "--methods" and any(arm.name != "base" for arm in comparison.arms):
            layers = _measure_layers(config, folder, progress)
            comparison = inherit_comparison(",".join(arm.name for arm in comparison.arms), config.model.inherit, layers)
        if comparison.shares_round:
            found, tokens = _train_from_bases(config, folder, seeds, comparison, tokens, progress)
        else:
            found = _train_first_rounds(config, folder, seeds, comparison, progress)
            write_parquet(curves_path(path), pa.Table.from_pylist(found.curves, CURVES), "")
        if config.eval.asked:
            write_parquet(scores_path(path), pa.Table.from_pylist(found.scores, SCORES), "")
        write_parquet(path, pa.Table.from_pylist(found.results, RESULTS), "")
        return write_comparison(path, comparison, config, tokens, layers)


@dataclass(frozen=True)
class _Found:
    """The rows of a comparison's files: results by source, scores by task, and the first rounds' curves by step."""

    results: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)

    def add(self, run: Run, seed: int, arm: Arm, progress: Progress) -> None:
        """Add the final results of an arm's run, and its task scores if the configuration asks for them."""
        self.results.extend(_results(run, seed, arm))
        self.scores.extend({"seed": seed, "arm": arm.name, **row} for row in read_task_scores(run, progress))


def _train_from_bases(
    config: RunConfig, folder: Path, seeds: range, comparison: Comparison, tokens: int | None, progress: Progress
) -> tuple[_Found, int | None]:
    """Return the results of arms that continue from a base's first round, and the tokens that each trains on."""
    bases = {seed: _train_base(_config(config, folder, seed, BASE_ARM), progress) for seed in seeds}
    arms = dict.fromkeys(bases, comparison.arms)
    if comparison.equal is not None:
        tokens = equal_cost(config, bases, comparison, tokens or config.refine.max_tokens)
        for seed, base in bases.items():
            arms[seed] = tuple(limited(base, arm, comparison.equal, tokens) for arm in comparison.arms)
    found = _Found()
    for seed, base in bases.items():
        found.add(base, seed, BASE_ARM, progress)
        before = base
        for arm in arms[seed]:
            run = base
            if arm.num_rounds > 1:
                run = _train_arm(_config(config, folder, seed, arm), before, progress)
            found.add(run, seed, arm, progress)
            # An arm can only continue from rounds that it shares.
            before = run if comparison.option == "--rounds" else base
    return found, tokens


def _train_first_rounds(
    config: RunConfig, folder: Path, seeds: range, comparison: Comparison, progress: Progress
) -> _Found:
    """Return the results of arms that train round 1 themselves; for each seed, they share a corpus."""
    found = _Found()
    for seed in seeds:
        corpus = prepare_corpus(config, folder, f"corpus-seed-{seed}", seed, progress)
        for arm in comparison.arms:
            arm_config = _config(config, folder, seed, arm)
            run = train_trial(arm_config, corpus, named(arm_config, progress))
            found.add(run, seed, arm, progress)
            found.curves.extend(_curve(run, seed, arm))
    return found


def _measure_layers(config: RunConfig, folder: Path, progress: Progress) -> list[int]:
    """Return the layers that all arms inherit for all seeds, measured once, on the first seed's corpus."""
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
        scoring = [step for step in steps_at(config, 2) if step.stage.name == "score"]
        complete_all(run, [*steps_to_train(config, 1), *scoring], progress)
    return run


def _train_arm(config: RunConfig, before: Run, progress: Progress) -> Run:
    """Return the arm's run, after training the rounds that follow those of `before`."""
    progress = named(config, progress)
    with locked(config.folder):
        rounds = (f"rounds/{number}" for number in range(1, before.config.rounds.num_rounds + 1))
        share_run(before, config.folder, ["corpus", *rounds], progress)
        run = open_run(config)
        steps = [step for step in steps_to_train(config, config.rounds.num_rounds) if step.place > 1]
        complete_all(run, steps, progress)
    return run


def _results(run: Run, seed: int, arm: Arm) -> list[dict[str, Any]]:
    """Return a row for each source: the run's final validation loss, and the cost to reach it."""
    refresh_ledger(run.folder)
    scored = range(1, run.config.rounds.num_rounds) if needs_losses(run.config.refine) else ()
    [costs] = read_rows(
        run.folder,
        """select coalesce(sum(num_steps) filter (round > 1), 0), coalesce(sum(num_tokens) filter (round > 1), 0),
            sum(num_tokens) filter (round = 1) from rounds""",
    )
    common = dict(zip(("num_steps", "trained_tokens", "round_1_tokens"), map(int, costs), strict=True))
    common["scoring_cost"] = sum(scoring_cost(run, number) for number in scored)
    losses = final_losses(run, run.config.rounds.num_rounds)
    return [{"seed": seed, "arm": arm.name, **row, **common} for row in losses]


def _curve(run: Run, seed: int, arm: Arm) -> list[dict[str, Any]]:
    """Return a row for each step of the run's first round: the tokens trained on so far, and the step's loss."""
    steps = read_rows(
        run.folder,
        "select step, sum(num_tokens) over (order by step)::bigint, loss from steps where round = 1 order by step",
    )
    names = ("step", "num_tokens", "loss")
    return [{"seed": seed, "arm": arm.name, **dict(zip(names, row, strict=True))} for row in steps]
