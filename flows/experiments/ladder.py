"""A ladder: steps from a base to a better model, each on top of the last, trained from the start at equal tokens.

Steps may differ in anything, also in their tokenizers, so each has its own corpus and trains all its rounds itself.
Losses per token would not be comparable between tokenizers: they are given in bits per byte of the held-out documents,
which are the same for all steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import Progress
from data_scoring.corpus.prepare_corpus import check_corpus
from data_scoring.corpus.sources import is_in_place
from data_scoring.ledger import refresh_ledger
from flows.display.result_page import Page
from flows.experiments.arms import Arm, Comparison
from flows.experiments.compare_results import SCORES, scores_path
from flows.experiments.equal_arms import count, needs_losses, scoring_cost
from flows.experiments.ladder_report import write_ladder
from flows.experiments.ladder_results import RESULTS
from flows.experiments.task_scores import read_task_scores
from flows.experiments.trials import Trial, final_losses, named, prepare_corpus, train_trial, trial_config
from flows.inheritance.teacher import check_inheritance
from flows.run.config import RunConfig
from flows.run.folder import Run
from flows.run.locks import locked

# In place of the number of tokens, while it is not known yet.
_SOME_TOKENS = 1_000_000
# The run of each step and seed.
_Runs = dict[tuple[str, int], Run]


def train_ladder(
    config: RunConfig, comparison: Comparison, folder: Path, num_seeds: int, tokens: int | None, progress: Progress
) -> Page:
    """Return the result page, after training the steps in `folder` for `num_seeds` seeds, starting at `config.seed`.

    Each step trains on `tokens` predicted tokens over all its rounds: by default on `train.max_tokens`, or the most
    that all steps reach in one pass. Completed work is not repeated, so the same call resumes an interrupted one.
    Raises ValueError, before anything is trained, if a step is invalid, or if the steps hold out different text.
    """
    seeds = range(config.seed, config.seed + num_seeds)
    tokens = tokens or config.train.max_tokens
    for step in comparison.arms:
        _check(config, comparison, step, folder, tokens or _SOME_TOKENS)
    path = folder / f"{comparison.stem}.parquet"
    with locked(folder):
        corpora = _prepare_corpora(config, comparison, folder, seeds, progress)
        for seed in seeds:
            _check_held_out({step.name: corpora[step.name, seed] for step in comparison.arms})
        tokens = _equal_tokens(corpora, tokens)
        results: list[dict[str, Any]] = []
        scores: list[dict[str, Any]] = []
        for seed in seeds:
            for step in comparison.arms:
                step_config = _step_config(config, folder, step, seed, tokens)
                run = train_trial(step_config, corpora[step.name, seed], named(step_config, progress))
                results.extend(_results(run, seed, step))
                scores.extend({"seed": seed, "arm": step.name, **row} for row in read_task_scores(run, progress))
        write_parquet(path, pa.Table.from_pylist(results, RESULTS), "")
        if config.eval.asked:
            write_parquet(scores_path(path), pa.Table.from_pylist(scores, SCORES), "")
        models = {step.name: _step_config(config, folder, step, config.seed, tokens) for step in comparison.arms}
        return write_ladder(path, comparison, models, tokens)


def _check(config: RunConfig, comparison: Comparison, step: Arm, folder: Path, tokens: int) -> None:
    """Raise ValueError, naming the step, if it cannot be trained on top of the steps before it."""
    try:
        made = _step_config(config, folder, step, config.seed, tokens)
    except ValueError as error:
        raise ValueError(f"{comparison.origin}: {step.name}: {str(error).partition(': ')[2]}") from None
    try:
        if is_in_place(check_corpus(made.corpus, made.tokenizer)):
            raise ValueError(
                "corpus.sources: sources in Megatron's format have no text, by which losses are compared here; give "
                "the text of all sources"
            )
        size = config.model.vocab_size
        if size is not None and "tokenizer" in step.values and made.model.vocab_size == size:
            raise ValueError(
                f"model.vocab_size: {size}, of the base, would keep the embedding's size for another tokenizer; set "
                "model: {vocab_size: null} in the step"
            )
        check_inheritance(made)
    except ValueError as error:
        raise ValueError(f"{comparison.origin}: {step.name}: {error}") from None


def _step_config(config: RunConfig, folder: Path, step: Arm, seed: int, tokens: int | None) -> RunConfig:
    """Return the configuration of a step's run, with `tokens` divided over its rounds.

    Round 1 gets as many as the others multiply by the sampling rate: of all samples, each keeps this share.
    """
    made = trial_config(config, folder, Trial(f"{step.folder}-seed-{seed}", step.values, step.num_rounds), seed)
    if tokens is None:
        return made
    later = made.rounds.num_rounds - 1
    first = round(tokens / (1 + later * made.refine.draw_rate))
    values = {**step.values, "train": {**step.values.get("train", {}), "max_tokens": first}}
    if later:
        values["refine"] = {**step.values.get("refine", {}), "max_tokens": (tokens - first) // later}
    return trial_config(config, folder, Trial(f"{step.folder}-seed-{seed}", values, step.num_rounds), seed)


def _prepare_corpora(
    config: RunConfig, comparison: Comparison, folder: Path, seeds: range, progress: Progress
) -> _Runs:
    """Return the run with the corpus of each step and seed; steps with the same corpus and tokenizer share it."""
    corpora: _Runs = {}
    for seed in seeds:
        made: list[tuple[RunConfig, Run]] = []
        for step in comparison.arms:
            own = _step_config(config, folder, step, seed, None)
            same = [run for other, run in made if (other.corpus, other.tokenizer) == (own.corpus, own.tokenizer)]
            if not same:
                same = [prepare_corpus(own, folder, f"corpus-{step.folder}-seed-{seed}", seed, progress)]
                made.append((own, same[0]))
            corpora[step.name, seed] = same[0]
    return corpora


def _check_held_out(corpora: Mapping[str, Run]) -> None:
    """Raise ValueError if the corpora of the steps, by their names, do not hold out the same text."""
    sizes = {name: {source: size for source, (_, size) in run.corpus().held_out_text.items()}
             for name, run in corpora.items()}  # fmt: skip
    (first, before), *others = sizes.items()
    for name, held_out in others:
        for source, size in before.items():
            if held_out.get(source) != size:
                raise ValueError(
                    f"{corpora[name].folder}: step {name} holds out other text of {source} than step {first} "
                    f"({held_out.get(source, 0):,} bytes, not {size:,}): the text has changed, or a tokenizer cannot "
                    "encode some of it; delete the folder, or give another tokenizer"
                )


def _equal_tokens(corpora: _Runs, wanted: int | None) -> int:
    """Return the tokens that every step trains on: `wanted`, or the most that all reach in one pass.

    Raises ValueError if a step reaches less than `wanted`.
    """
    reached = {place: _reach(run) for place, run in corpora.items()}
    (name, seed), least = min(reached.items(), key=lambda item: item[1])
    if wanted is not None and least < wanted:
        raise ValueError(
            f"--tokens: {wanted} is more than the {least} that step {name} reaches in one pass for seed {seed}; lower "
            "it, or add text"
        )
    return wanted or least


def _reach(run: Run) -> int:
    """Return the number of predicted tokens of all samples that round 1 may train on."""
    late = [rule.name for rule in run.config.refine.sources if rule.from_round > 1]
    left_out = "anti join contamination using (shard, sample)" if run.config.eval.removes else ""
    names = ", ".join(f"'{name}'" for name in ["", *late])
    return count(run, f"select sum(num_tokens) from samples {left_out} where source not in ({names})")


def _results(run: Run, seed: int, step: Arm) -> list[dict[str, Any]]:
    """Return a row for each source: the run's final validation loss, its size, and its cost."""
    refresh_ledger(run.folder)
    corpus, model, last = run.corpus(), run.config.model, run.config.rounds.num_rounds
    vocab_size = model.vocab_size or corpus.vocab_size
    scored = range(1, last) if needs_losses(run.config.refine) else ()
    common = {
        "seed": seed,
        "step": step.name,
        "num_rounds": last,
        "vocab_size": vocab_size,
        "num_parameters": model.num_parameters(vocab_size),
        "embedding_share": model.embedding_share(vocab_size),
        "trained_tokens": count(run, "select sum(num_tokens) from rounds"),
        "scoring_cost": sum(scoring_cost(run, number) for number in scored),
    }
    rows = []
    for row in final_losses(run, last):
        num_tokens, num_bytes = corpus.held_out_text[row["source"]]
        bits = corpus.bits_per_byte(row["source"], row["loss"])
        losses = {"loss": row["loss"], "bits_per_byte": bits, "num_tokens": num_tokens, "num_bytes": num_bytes}
        rows.append({**common, "source": row["source"], **losses})
    return rows
