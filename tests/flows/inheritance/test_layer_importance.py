"""Layer importance: the choice compared with all possible choices, the command with real ranks, and its errors."""

import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.files import write_json
from data_scoring.base.parquet import write_parquet
from data_scoring.base.progress import silent
from data_scoring.corpus.corpus import Corpus
from data_scoring.losses.calibration import draw_calibration_set
from flows.cli.main import main
from flows.inheritance.layer_importance import keep_layers, predict_increase
from flows.run.config import RunConfig
from flows.run.folder import Run, open_run
from flows.stages.stage_order import complete
from tests.conftest import TINY_MODEL
from tests.evaluation_data import write_items
from tests.flows.cli.test_commands import one_line
from tests.flows.fakes import FakeRanks, write_ablation
from trainer.checkpoint_folder import list_checkpoints
from trainer.requests import LogLikelihood, read_answers, read_requests, requests_path


def cost_of(dropped: tuple[int, ...], increases: dict[tuple[int, int], float]) -> float:
    """Return what dropping layers costs, each run by itself: all blocks of three, less what two have in common."""
    starts = [layer for layer in dropped if layer - 1 not in dropped]
    total = 0.0
    for start in starts:
        length = next(n for n in range(1, len(dropped) + 1) if start + n not in dropped)
        blocks = range(start, start + length - 2)
        total += sum(increases[first, 3] for first in blocks) - sum(increases[first, 2] for first in blocks[1:])
        total += increases[start, length] if length < 3 else 0.0
    return total


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_choice_costs_less(num_layers: int, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "skips.parquet"
    write_ablation(path, num_layers, 3, seed=seed)
    increases = {(row["start"], row["length"]): row["increase"] for row in pq.read_table(path).to_pylist()}
    for depth in range(1, num_layers + 1):
        inner = range(1, num_layers - 1) if depth > 1 else range(num_layers)
        costs = {dropped: cost_of(dropped, increases) for dropped in combinations(inner, num_layers - depth)}
        kept = keep_layers(path, depth)
        assert len(kept) == depth and list(kept) == sorted(kept)
        dropped = tuple(sorted(set(range(num_layers)) - set(kept)))
        assert costs[dropped] == pytest.approx(min(costs.values()), abs=1e-8)
        assert predict_increase(path, kept) == pytest.approx(costs[dropped], abs=1e-8)
    for depth in (0, num_layers + 1):
        with pytest.raises(ValueError, match=f"num_layers: {depth} is not between 1 and the {num_layers} layers"):
            keep_layers(path, depth)


def test_of_choices_that_cost_the_same_the_earlier_layers_go(tmp_path: Path) -> None:
    blocks = [(0, 0), *((start, n) for n in (1, 2, 3) for start in range(7 - n))]
    rows = [{"start": start, "length": n, "loss": 0.1 * n, "increase": 0.1 * n, "stderr": None} for start, n in blocks]
    write_parquet(tmp_path / "skips.parquet", pa.Table.from_pylist(rows), "")
    assert keep_layers(tmp_path / "skips.parquet", 4) == (0, 3, 4, 5)
    assert predict_increase(tmp_path / "skips.parquet", (0, 1, 5)) == pytest.approx(0.3)
    # Four in a row: twice three, less the two that both have.
    assert predict_increase(tmp_path / "skips.parquet", (0, 5)) == pytest.approx(0.3 + 0.3 - 0.2)


@pytest.fixture(scope="module")
def teacher(trained: Path, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the trained model."""
    folder = tmp_path_factory.mktemp("teacher")
    checkpoint = list_checkpoints(trained / "checkpoint")[-1]
    shutil.copytree(checkpoint, folder / "checkpoint" / checkpoint.name)
    shutil.copy(tiny_corpus.tokenizer_path, folder)
    (folder / "model.yaml").write_text(yaml.safe_dump(TINY_MODEL.model_dump(exclude_none=True)))
    return folder


@pytest.fixture
def corpus_config(teacher: Path, config: RunConfig, tmp_path: Path) -> dict[str, Any]:
    """A configuration of another corpus in the teacher's tokens."""
    values = config.model_dump(mode="json", include={"name", "output", "device", "corpus"})
    values["corpus"]["seq_length"] = 128
    return {**values, "tokenizer": {"path": str(teacher / "tokenizer.json")}}


def test_a_model_is_measured_on_the_corpus_of_a_configuration(
    teacher: Path, corpus_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(yaml.safe_dump(corpus_config))
    folder = tmp_path / "found"
    command = ["inherit", "importance", str(teacher), "--config", str(path), "--output", str(folder)]
    assert main([*command, "--samples", "9"]) == 0
    assert "Layers to keep" in capsys.readouterr().out
    rows = {(row["start"], row["length"]): row for row in pq.read_table(folder / "skips.parquet").to_pylist()}
    assert list(rows) == [(0, 0), (0, 1), (1, 1), (0, 2)]
    corpus = Corpus(folder / "corpus" / "corpus")
    drawn = draw_calibration_set([corpus.num_samples(shard) for shard in range(corpus.num_shards)], 9, 0, 0)
    batch = corpus.read(*drawn)
    tokens = torch.from_numpy(batch.tokens)
    is_counted = torch.arange(corpus.seq_length) < torch.from_numpy(batch.num_tokens)[:, None]
    plain = PlainModel(TINY_MODEL, corpus.vocab_size)
    load_megatron_weights(plain, read_checkpoint(list_checkpoints(teacher / "checkpoint")[-1]))
    layers = list(plain.layers)
    for (start, length), row in rows.items():
        plain.layers = torch.nn.ModuleList(layers[:start] + layers[start + length :])
        with torch.no_grad():
            loss = plain(tokens[:, :-1], tokens[:, 1:])[is_counted].mean()
        assert row["loss"] == pytest.approx(float(loss), abs=1e-5)
    written = (folder / "skips.parquet").stat().st_mtime_ns
    # Nothing is measured again for another depth.
    assert main([*command, "--samples", "9", "--layers", "1"]) == 0
    assert (folder / "skips.parquet").stat().st_mtime_ns == written
    assert "| 1 | **[" in " ".join(capsys.readouterr().out.split())
    content = (folder / "report.html").read_text()
    assert content.count("data:image/png;base64,") == 1 and (folder / "report-increase.png").exists()
    # And asked: the log-likelihoods are those of the plain model without the layers, the scores those by hand.
    asked = ["--tasks", "piqa,xsum", "--data", str(write_items(tmp_path / "items"))]
    assert main([*command, "--samples", "9", *asked]) == 0
    text = " ".join(capsys.readouterr().out.split())
    scores = {(row["start"], row["length"]): row for row in pq.read_table(folder / "scores.parquet").to_pylist()}
    assert list(scores) == list(rows)
    requests = read_requests(requests_path(folder / "corpus" / "evaluation", "piqa"))
    for (start, length), row in scores.items():
        plain.layers = torch.nn.ModuleList(layers[:start] + layers[start + length :])
        expected = [log_likelihood(plain, request) for request in requests]
        answers = read_answers(requests_path(folder / "answers" / f"skip-{start:05d}-{length}", "piqa"))
        assert [answer.log_likelihood for answer in answers if isinstance(answer, LogLikelihood)] == pytest.approx(
            expected, abs=1e-4
        )
        # The first is right in the first item, the second in the other.
        right = [expected[0] > expected[1], expected[3] > expected[2]]
        assert row["score"] == sum(right) / 2
    assert f"| 0 to 1 | {100 * scores[0, 2]['score']:.1f} ± " in text and "| chance | 50.0 | 50.0 |" in text
    assert (folder / "report-scores.png").exists()
    answered = [path.stat().st_mtime_ns for path in folder.glob("answers/*/*.parquet")]
    assert main([*command, "--samples", "9", *asked]) == 0
    assert [path.stat().st_mtime_ns for path in folder.glob("answers/*/*.parquet")] == answered
    assert main([*command, "--samples", "9", *asked, "--tasks", "xsum"]) == 1
    assert one_line(capsys).startswith("error: --tasks: no item of xsum can be scored (xsum.jsonl:1: longer than")


def log_likelihood(plain: PlainModel, request: Any) -> float:
    """Return what a continuation's tokens sum up to, one request at a time."""
    tokens = torch.from_numpy(np.concatenate([request.context, request.continuation]).astype(np.int64))[None]
    with torch.no_grad():
        losses = plain(tokens[:, :-1], tokens[:, 1:])[0]
    return -float(losses[-len(request.continuation) :].sum())


@pytest.fixture
def run(config: RunConfig, fakes: FakeRanks) -> Run:
    """A run of a model of five layers that has a checkpoint."""
    model = config.model.model_copy(update={"num_layers": 5})
    run = open_run(config.model_copy(update={"model": model}))
    complete(run, "prepare", 0, silent)
    checkpoint = run.round_folder(1) / "checkpoint" / "step-00000001"
    write_json(checkpoint / "reprise.json", {"step": 1, "vocab_size": run.corpus().vocab_size})
    return run


def test_a_run_is_measured_on_its_own_corpus(run: Run, fakes: FakeRanks, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inherit", "importance", str(run.folder)]
    assert main(command) == 0
    folder = run.folder / "importance"
    text = capsys.readouterr().out
    for depth in (1, 2, 3):
        assert f"| {depth} | **{list(keep_layers(folder / 'skips.parquet', depth))}** |" in " ".join(text.split())
    assert "over 256 random samples of" in text
    assert main(command) == 0
    assert fakes.jobs.count(f"{run.folder.name} importance") == 1
    # Other samples are another question.
    assert main([*command, "--samples", "5"]) == 0
    assert fakes.jobs.count(f"{run.folder.name} importance") == 2


def test_what_cannot_be_measured_is_one_line(
    run: Run, teacher: Path, corpus_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(place: Path, *more: str) -> str:
        capsys.readouterr()
        assert main(["inherit", "importance", str(place), *more]) == 1
        return one_line(capsys)

    assert "nowhere: has no model" in error(tmp_path / "nowhere")
    assert "--layers: '6' is not a number of layers from 1 to the teacher's 5" in error(run.folder, "--layers", "2,6")
    assert "--layers: '0' is not a number of layers from 1" in error(run.folder, "--layers", "0")
    assert "--layers: 'x' is not a number of layers" in error(run.folder, "--layers", "3,x")
    assert "--samples: 100000 is more than the" in error(run.folder, "--samples", "100000")
    assert "--samples: 0 is less than 1" in error(run.folder, "--samples", "0")
    assert "is not a run and has no corpus" in error(teacher)
    assert "--round: needs a run folder" in error(teacher, "--round", "1")
    path = tmp_path / "other.yaml"
    for other in ({}, {"path": str(run.corpus().tokenizer_path)}, {"path": "nowhere.json"}):
        path.write_text(yaml.safe_dump({**corpus_config, "tokenizer": other}))
        message = error(teacher, "--config", str(path))
        assert f"is not the teacher's tokenizer; set it to {teacher / 'tokenizer.json'}" in message
    path.write_text(yaml.safe_dump({**corpus_config, "parallel": {"pipeline": 4}}))
    assert "parallel.pipeline: 4 does not divide model.num_layers 2" in error(teacher, "--config", str(path))
    assert not (teacher / "importance" / "skips.parquet").exists()
