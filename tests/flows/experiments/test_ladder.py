"""A ladder's steps, its arithmetic across tokenizers and resuming it, with fake ranks; and a real ladder."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.refine.training_mix import Mix
from flows.cli.main import main
from flows.experiments.arms import ladder_comparison, vocabulary_comparison
from flows.experiments.ladder import train_ladder
from flows.experiments.ladder_report import added_fields, write_ladder
from flows.experiments.ladder_results import ALL_TEXT, RESULTS, open_ladder
from flows.inheritance.initial_checkpoint import inherited_checkpoint
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run, read_run
from flows.stages.stage_order import complete
from tests.evaluation_data import write_items
from tests.flows.fakes import FakeRanks, values
from tests.flows.inheritance.test_initial_checkpoint import write_random_weights
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.jobs import TrainJob

STEPS = """
base: {}
tokenizer: {tokenizer: {vocab_size: 270}}
shape: {model: {num_layers: 2, hidden_size: 8}, train: {lr: 0.004}}
rounds: {rounds: {num_rounds: 2}}
"""
# What ranks "measure" by step and seed: nats per token of sources a and b.
LOSSES = {"base": (4.0, 2.0), "tokenizer": (3.9, 2.1), "shape": (3.8, 2.0), "rounds": (3.85, 1.9)}

# A row of results, but for what a test is about.
ROW = {
    "seed": 0, "source": "a", "bits_per_byte": 1.0, "loss": 1.0, "num_tokens": 10, "num_bytes": 30, "num_rounds": 1,
    "vocab_size": 9, "num_parameters": 99, "embedding_share": 0.1, "scoring_cost": 0,
}  # fmt: skip


def of_step(job: TrainJob, run: str) -> tuple[float, float]:
    name, _, seed = run.rpartition("-seed-")
    a, b = LOSSES.get(name, (5.0, 5.0))
    return a + 0.1 * int(seed), b


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    path = tmp_path / "ladder.yaml"
    path.write_text(STEPS)
    return path


def trained(run: Path) -> list[int]:
    """Return the predicted tokens of a run's rounds, from their mixes and the corpus."""
    lengths = Corpus(run / "corpus")
    mixes = [Mix(run / "rounds" / number / "mix.parquet") for number in "12" if (run / "rounds" / number).is_dir()]
    return [int(lengths.read(*mix.read(0, len(mix))).num_tokens.sum()) for mix in mixes]


def test_steps_add_up_at_equal_tokens(config: RunConfig, fakes: FakeRanks, steps: Path) -> None:
    fakes.losses = of_step
    folder = Path(config.output) / "x-ladder"
    page = train_ladder(config, ladder_comparison(steps), folder, 2, None, silent)
    made = {name: read_run(folder / f"{name}-seed-1").config for name in LOSSES}
    assert [made[name].tokenizer.vocab_size for name in LOSSES] == [280, 270, 270, 270]
    assert [made[name].model.num_layers for name in LOSSES] == [1, 1, 2, 2]
    assert [made[name].train.lr for name in LOSSES] == [0.002, 0.002, 0.004, 0.004]
    assert [made[name].rounds.num_rounds for name in LOSSES] == [1, 1, 1, 2]
    # The most that all reach is what the corpus of fewest tokens has.
    corpora = {(name, seed): Corpus(folder / f"{name}-seed-{seed}" / "corpus") for name in LOSSES for seed in (0, 1)}
    tokens = min(sum(int(corpus.lengths(shard).sum()) for shard in (0, 1)) for corpus in corpora.values())
    assert made["base"].train.max_tokens == tokens
    for name in LOSSES:
        for seed in (0, 1):
            rounds = trained(folder / f"{name}-seed-{seed}")
            assert len(rounds) == made[name].rounds.num_rounds
            assert tokens - 16 * len(rounds) < sum(rounds) <= tokens
    # Half of what round 1 had.
    assert trained(folder / "rounds-seed-0") == pytest.approx([tokens / 1.5, tokens / 3], abs=17)
    # Steps with the same tokenizer share a corpus, and all hold out the same text.
    assert sorted(path.name for path in folder.glob("corpus-*")) == [
        *("corpus-base-seed-0", "corpus-base-seed-1", "corpus-tokenizer-seed-0", "corpus-tokenizer-seed-1")
    ]
    held_out = [{source: size for source, (_, size) in corpora[name, 0].held_out_text.items()} for name in LOSSES]
    assert held_out == [held_out[0]] * 4
    with open_ladder(folder / "ladder.parquet", [*LOSSES]) as results:
        found = {
            row[:3]: row[3] for row in results.sql("select seed, step, source, bits_per_byte from losses").fetchall()
        }
        costs = dict(results.sql("select step, most_scoring from steps").fetchall())
    for (name, seed), corpus in corpora.items():
        total = 0.0
        for source, nats in zip(("a", "b"), (LOSSES[name][0] + 0.1 * seed, LOSSES[name][1]), strict=True):
            [entry] = [each for each in corpus.manifest["sources"] if each["name"] == source]
            bits = nats * entry["validation_tokens"] / math.log(2)
            assert found[seed, name, source] == pytest.approx(bits / held_out_bytes(corpus, source))
            total += bits
        everything = sum(held_out_bytes(corpus, source) for source in "ab")
        assert found[seed, name, ALL_TEXT] == pytest.approx(total / everything)
    largest = max(sum(int(corpora["rounds", seed].lengths(shard).sum()) for shard in (0, 1)) for seed in (0, 1))
    assert costs == {"base": 0, "tokenizer": 0, "shape": 0, "rounds": pytest.approx(largest / 3, abs=1)}
    text = page.text
    # Whole samples only: less than one is left over in each round.
    assert "its selection kept no more" not in text
    for words in (
        f"at most {tokens:,} predicted tokens, over all its rounds",
        f"rounds trains 2 rounds: {round(tokens / 1.5):,} tokens in round 1",
        "tokenizer sets tokenizer.vocab_size 270.\n",
        "shape sets model.num_layers 2, model.hidden_size 8, train.lr 0.004.\n",
        "rounds sets rounds.num_rounds 2.\n",
        "base sets nothing.\n",
    ):
        assert words in text
    assert text in page.page.with_suffix(".md").read_text()
    assert page.page.read_text().count("data:image/png;base64,") == 2
    fakes.jobs = []
    train_ladder(config, ladder_comparison(steps), folder, 2, None, silent)
    assert fakes.jobs == []


def held_out_bytes(corpus: Corpus, source: str) -> int:
    """Return the bytes of a source's held-out text, from its tokens, which are bytes or merges of bytes."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_path))
    [part] = corpus.parts(-1)
    tokens = [part.sequence(number) for number in range(len(part.lengths))]
    mine = [each for each, name in zip(tokens, corpus.validation_sources, strict=True) if name == source]
    return len(tokenizer.decode(np.concatenate(mine).tolist(), skip_special_tokens=True).encode())


def test_a_stopped_ladder_goes_on(config: RunConfig, fakes: FakeRanks, steps: Path) -> None:
    folder = Path(config.output) / "x-ladder"
    fakes.fails_at = "shape-seed-0 train-1"
    with pytest.raises(ValueError, match="killed"):
        train_ladder(config, ladder_comparison(steps), folder, 1, 1500, silent)
    done, fakes.jobs, fakes.fails_at = fakes.jobs, [], ""
    assert done == [f"{name}-seed-0 train-1" for name in ("base", "tokenizer", "shape")]
    train_ladder(config, ladder_comparison(steps), folder, 1, 1500, silent)
    assert fakes.jobs == [
        "shape-seed-0 train-1",
        *(f"rounds-seed-0 {job}" for job in ("train-1", "score-1", "train-2")),
    ]
    assert sum(trained(folder / "rounds-seed-0")) == pytest.approx(1500, abs=32)
    # Other tokens are another ladder.
    with pytest.raises(ValueError, match=r"another configuration \(train.max_tokens: 1500 there, 1400 here\)"):
        train_ladder(config, ladder_comparison(steps), folder, 1, 1400, silent)
    with pytest.raises(ValueError, match=r"--tokens: 10000000 is more than the \d+ that step \w+ reaches in one pass"):
        train_ladder(config, ladder_comparison(steps), folder.with_name("other"), 1, 10_000_000, silent)


def test_the_page_has_the_scores_of_each_step_s_final_model(
    config: RunConfig, fakes: FakeRanks, tmp_path: Path
) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text("base:\nrounds: {rounds: {num_rounds: 2}}\n")
    fields = config.model_dump()
    fields["corpus"]["seq_length"] = 512
    fields["eval"] = {"tasks": ["piqa", "boolq"], "data": str(write_items(tmp_path / "items"))}
    folder, fakes.prefers_long = Path(config.output) / "x-ladder", ("rounds",)
    page = train_ladder(parse_config(fields, "test"), ladder_comparison(path), folder, 1, 6000, silent)
    assert [job for job in fakes.jobs if "evaluate" in job] == ["base-seed-0 evaluate-1", "rounds-seed-0 evaluate-2"]
    # The shorter option is right in both questions of PIQA, and in one of BoolQ's two, where the longer one is, too.
    found = {
        (row["arm"], row["task"]): row["score"] for row in pq.read_table(folder / "ladder-scores.parquet").to_pylist()
    }
    assert found == {("base", "piqa"): 1, ("base", "boolq"): 0.5, ("rounds", "piqa"): 0, ("rounds", "boolq"): 0.5}
    table = page.text.split("## Scores in tasks")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == ["step", "BoolQ", "PIQA", "Average"]
    assert rows[3:] == [
        ["base", "**50.0** ± 50.0", "**100.0** ± 0.0", "**75.0** ± 25.0"],
        ["rounds", "**50.0** ± 50.0", "0.0 ± 0.0", "25.0 ± 25.0"],
    ]
    assert "<h2>Scores in tasks</h2>" in page.page.read_text()


@pytest.fixture
def teacher(config: RunConfig, tmp_path: Path) -> Run:
    """A larger model of random weights, with the tokenizer that it was trained with."""
    large = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
    run = open_run(parse_config({**config.model_dump(), "name": "large", "model": large}, "test"))
    complete(run, "prepare", 0, silent)
    write_random_weights(run.config.model, run.corpus().vocab_size, run.round_folder(1) / "checkpoint/step-00000007")
    return run


def test_a_step_inherits_from_a_larger_model(config: RunConfig, fakes: FakeRanks, teacher: Run, tmp_path: Path) -> None:
    started: dict[str, Path | None] = {}

    def measure(job: TrainJob, run: str) -> tuple[float, float]:
        started[run] = job.start_from
        return 4.0, 3.0

    fakes.losses = measure
    base, path, folder = with_tokenizer(config, teacher), write_inheriting_steps(tmp_path, teacher), tmp_path / "l"
    page = train_ladder(base, ladder_comparison(path), folder, 1, 1000, silent)
    inherited = inherited_checkpoint(read_run(folder / "inheritance-seed-0"))
    assert started == {"base-seed-0": None, "inheritance-seed-0": inherited}
    assert read_checkpoint_record(inherited)["inherited_from"]["layers"] == [1, 3]
    assert "From parts of a larger model: inheritance. The tokens that it was trained" in page.text
    # A model without the tokenizer of the larger one is named before anything is trained.
    with pytest.raises(ValueError, match=r"inheritance: tokenizer\.path: .*needs the tokenizer of the larger model"):
        train_ladder(config, ladder_comparison(path), tmp_path / "other", 1, 1000, silent)
    assert not (tmp_path / "other").exists()


def with_tokenizer(config: RunConfig, teacher: Run) -> RunConfig:
    tokenizer = {"path": str(teacher.corpus().tokenizer_path)}
    return parse_config({**config.model_dump(), "tokenizer": tokenizer}, "test")


def write_inheriting_steps(folder: Path, teacher: Run) -> Path:
    inherit = {"from": str(teacher.folder), "layers": [1, 3], "method": "l2"}
    steps = {
        "base": None,
        "inheritance": {"model": {"num_layers": 2, "inherit": inherit}},
    }
    path = folder / "ladder.yaml"
    path.write_text(yaml.safe_dump(steps, sort_keys=False))
    return path


def test_vocabulary_sizes_are_compared_in_bits_per_byte(config: RunConfig, fakes: FakeRanks) -> None:
    folder = Path(config.output) / "x-compare"
    page = train_ladder(config, vocabulary_comparison("300,260,280"), folder, 1, None, silent)
    assert page.page == folder / "compare-vocab-sizes.html"
    rows = pq.read_table(folder / "compare-vocab-sizes.parquet").to_pylist()
    assert [row["step"] for row in rows if row["source"] == "a"] == ["260", "280", "300"]
    # As many nats per token are fewer bits per byte if tokens are longer.
    bits = [row["bits_per_byte"] for row in rows if row["source"] == "a"]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == 3
    assert [row["num_parameters"] for row in rows if row["source"] == "a"] == [
        config.model.num_parameters(size) for size in (260, 280, 300)
    ]
    assert "vocabulary sizes compared" in page.text and "tokenizer.vocab_size 260" in page.text


def test_changes_to_the_step_before_are_those_computed_by_hand(tmp_path: Path) -> None:
    bits = {"x": ((1.0, 3.0), (1.2, 3.0)), "y": ((0.9, 3.0), (1.3, 2.6)), "z": ((0.8, 2.0), (1.0, 2.0))}
    rows = [
        {**ROW, "seed": seed, "step": step, "source": source, "bits_per_byte": value, "num_bytes": num_bytes,
         "trained_tokens": 100 + seed}
        for step, seeds in bits.items() for seed, by_source in enumerate(seeds)
        for source, value, num_bytes in zip("ab", by_source, (30, 10), strict=True)
    ]  # fmt: skip
    write_parquet(tmp_path / "l.parquet", pa.Table.from_pylist(rows, RESULTS), "")
    with open_ladder(tmp_path / "l.parquet", ["x", "y", "z"]) as results:
        changes = {row[:2]: row[2:] for row in results.sql("select * exclude place from changes").fetchall()}
        assert (
            results.sql("select bytes_per_token, least_tokens, most_tokens from steps").fetchall()
            == [(2, 100, 101)] * 3
        )
    # x: (30 + 30) / 40 = 1.5, (36 + 30) / 40 = 1.65; y: (27 + 30) / 40 = 1.425, (39 + 26) / 40 = 1.625.
    assert changes["y", ALL_TEXT] == pytest.approx((-0.05, 0.025, 2, 2))
    assert changes["y", "a"] == pytest.approx((0.0, 0.1, 1, 2))
    assert changes["z", "b"] == pytest.approx((-0.8, 0.2, 2, 2))
    assert {step for step, _ in changes} == {"y", "z"}


def test_a_step_is_named_that_had_no_more_to_train_on(config: RunConfig, tmp_path: Path) -> None:
    """Samples of 16 tokens are not divided: in two rounds, up to 31 tokens of what was wanted may be left over."""
    path = tmp_path / "steps.yaml"
    path.write_text("one:\nshort:\ntwo:\nshorter:\n")
    rounds = {"one": 1, "short": 1, "two": 2, "shorter": 2}
    limits = {"train": {**config.train.model_dump(), "max_tokens": 700}, "refine": {"max_tokens": 300}}
    configs = {
        name: parse_config({**config.model_dump(), **limits, "rounds": {"num_rounds": number}}, "test")
        for name, number in rounds.items()
    }
    trained_tokens = {"one": 985, "short": 984, "two": 969, "shorter": 968}
    rows = [{**ROW, "step": name, "trained_tokens": tokens} for name, tokens in trained_tokens.items()]
    write_parquet(tmp_path / "steps.parquet", pa.Table.from_pylist(rows, RESULTS), "")
    text = write_ladder(tmp_path / "steps.parquet", ladder_comparison(path), configs, 1000).text
    assert [line for line in text.splitlines() if "kept no more" in line] == [
        "short trained on 984 tokens only: its selection kept no more.",
        "shorter trained on 968 tokens only: its selection kept no more.",
    ]


def test_presets_and_fields_add_up(tmp_path: Path) -> None:
    path = tmp_path / "l.yaml"
    path.write_text("a: {model: {num_layers: 3}}\nb: {model: {preset: llama-2m}}\nc: {model: {num_layers: 5}}\nd:\n")
    a, b, c, d = (arm.values for arm in ladder_comparison(path).arms)
    assert a == {"model": {"num_layers": 3}}
    assert (b["model"]["num_layers"], b["model"]["hidden_size"]) == (6, 128)
    assert c["model"] == {**b["model"], "num_layers": 5} and d == c
    assert added_fields([a, c, d])[1:] == [
        ", ".join(f"model.{name} {'null' if value is None else value}" for name, value in c["model"].items()), "nothing"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; give a YAML file of steps"),
        ("[]", "no steps; write"),
        ("a b: {}", "'a b' cannot name a step"),
        ("a: [1]", "a: [1] is not a mapping"),
        ("a: {seed: 1}", "a: seed: a step cannot set this; choose from the sections corpus, tokenizer"),
        ("a: {eval: {limit: 1}}", "a: eval: a step cannot set this"),
        ("a: {model: 3}", "a: model: 3 is not a mapping"),
        ("a: {model: {preset: huge}}", "a: model.preset: 'huge' is not a preset"),
        ("a: {model: {num_layer: 3}}", "a: model.num_layer: unknown field; did you mean num_layers?"),
        ("a: {model: {num_attention_heads: 3}}", "a: model.num_attention_heads: 3 does not divide"),
        ("a: {train: {max_tokens: 3}}", "a: train.max_tokens: all steps train on as many tokens"),
        ("a: {corpus: {validation_fraction: 0.1}}", "a: corpus.validation_fraction: decides which text is held out"),
        ("a: {rounds: {num_rounds: two}}", "a: rounds.num_rounds:"),
        ("a: {tokenizer: {path: none.json}}", "a: tokenizer.path: "),
        ("a: {model: {inherit: {from: nowhere}}}", "a: model.inherit.from: "),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(texts, tmp_path / "runs")))
    path = tmp_path / "ladder.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["ladder", str(tmp_path / "config.yaml"), "--steps", str(path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.lower().startswith(f"error: {path}: {message}".lower())
    assert not (tmp_path / "runs").exists()


def test_a_vocabulary_that_would_stay_and_text_that_differs_are_named(
    config: RunConfig, fakes: FakeRanks, tmp_path: Path, texts: Path
) -> None:
    path, folder = tmp_path / "ladder.yaml", tmp_path / "x-ladder"
    path.write_text("base:\ncompact: {tokenizer: {vocab_size: 270}}\n")
    large = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 512})})
    with pytest.raises(ValueError, match=r"compact: model.vocab_size: 512, of the base, would keep"):
        train_ladder(large, ladder_comparison(path), folder, 1, None, silent)
    # The text changes between the corpora of two steps.
    path.write_text("base: {}")
    train_ladder(config, ladder_comparison(path), folder, 1, 1000, silent)
    path.write_text("base: {}\ncompact: {tokenizer: {vocab_size: 270}}\n")
    whole, fakes.jobs = (texts / "a.jsonl").read_text(), []
    try:
        (texts / "a.jsonl").write_text(whole.replace("the", "thee"))
        with pytest.raises(ValueError, match="step compact holds out other text of a than step base"):
            train_ladder(config, ladder_comparison(path), folder, 1, 1000, silent)
    finally:
        (texts / "a.jsonl").write_text(whole)
    assert fakes.jobs == []


@pytest.mark.slow
def test_a_real_ladder(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(texts, tmp_path)))
    (tmp_path / "steps.yaml").write_text(STEPS)
    command = ["ladder", str(tmp_path / "config.yaml"), "--steps", str(tmp_path / "steps.yaml"), "--tokens", "1500"]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.main", *command], capture_output=True, text=True, check=True, timeout=300
    )
    with open_ladder(tmp_path / "x-ladder" / "steps.parquet", [*LOSSES]) as results:
        losses = dict(results.sql(f"select step, bits_per_byte from losses where source = '{ALL_TEXT}'").fetchall())
        tokens = results.sql("select least_tokens from steps").fetchall()
    # Between what nothing learned costs, 8 bits a byte, and what no text costs.
    assert len(losses) == 4 and all(0.5 < loss < 8 for loss in losses.values())
    assert all(1400 < count <= 1500 for (count,) in tokens)
    assert done.stdout.rstrip().endswith(f"ladder: {tmp_path}/x-ladder/steps.html")


@pytest.mark.slow
def test_a_real_step_starts_at_the_loss_of_what_it_inherits(config: RunConfig, teacher: Run, tmp_path: Path) -> None:
    folder, base = tmp_path / "l", with_tokenizer(config, teacher)
    train_ladder(base, ladder_comparison(write_inheriting_steps(tmp_path, teacher)), folder, 1, 300, silent)
    run = read_run(folder / "inheritance-seed-0")
    plain = PlainModel(run.config.model, run.corpus().vocab_size).eval()
    load_megatron_weights(plain, read_checkpoint(inherited_checkpoint(run)))
    seen = [row for path in (run.round_folder(1) / "seen").glob("*") for row in pq.read_table(path).to_pylist()]
    first = [row for row in seen if row["step"] == 1]
    assert first
    for row in first:
        batch = run.corpus().read(np.array([row["shard"]]), np.array([row["sample"]]))
        tokens = torch.from_numpy(batch.tokens[:, : int(batch.num_tokens[0]) + 1])
        with torch.no_grad():
            assert row["loss"] == pytest.approx(plain(tokens[:, :-1], tokens[:, 1:]).mean().item(), abs=1e-5)
