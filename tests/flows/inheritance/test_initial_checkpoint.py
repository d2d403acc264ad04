"""A run whose first round starts from parts of a larger model: its lineage, and rejected configurations."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.files import read_json, write_json
from data_scoring.base.progress import silent
from data_scoring.config import padded_vocab_size
from data_scoring.sandboxed_query import ask
from flows.cli.main import main
from flows.experiments.arms import inherit_comparison, init_comparison
from flows.experiments.compare import compare
from flows.experiments.compare_results import curves_path
from flows.inheritance import initial_checkpoint as inheritance
from flows.inheritance.layer_importance import keep_layers
from flows.inheritance.teacher import check_inheritance
from flows.models.vocabulary_pruning import prune_vocabulary
from flows.models.vocabulary_pruning_result import Request
from flows.report.run_report import write_report
from flows.run.config import RunConfig, parse_config
from flows.run.folder import Run, open_run
from flows.run.stored_model import find_model
from flows.stages.stage_order import complete
from flows.stages.status import read_status
from tests.conftest import read_rows
from tests.flows.fakes import FakeRanks
from trainer.checkpoint_folder import RECORD, list_checkpoints, read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD, shapes_of
from trainer.config import ModelConfig
from trainer.jobs import TrainJob
from trainer.pruning import PruningPlan
from trainer.weights import write_weights

LARGE = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
SMALL = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16}


def write_random_weights(model: ModelConfig, vocab_size: int, target: Path, seed: int = 3) -> None:
    """Write a checkpoint of weights drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (shape, torch.float32) for name, shape in shapes_of(model, padded_vocab_size(vocab_size)).items()}

    def draw(name: str, layer: int | None) -> torch.Tensor:
        return torch.randn(shapes[name][0][layer is not None :], generator=generator) * 0.05

    write_weights(target, shapes, draw, {"step": 7, "vocab_size": vocab_size, "fingerprint": ""})


@pytest.fixture
def teacher(config: RunConfig) -> Run:
    """A run called large, with a corpus and a checkpoint of random weights."""
    values = config.model_dump()
    run = open_run(parse_config({**values, "name": "large", "model": LARGE}, "teacher"))
    complete(run, "prepare", 0, silent)
    write_random_weights(run.config.model, run.corpus().vocab_size, run.round_folder(1) / "checkpoint/step-00000007")
    return run


def student(config: RunConfig, teacher: Run, tokenizer: Path | None = None, **inherit: Any) -> RunConfig:
    values = config.model_dump()
    values["tokenizer"]["path"] = str(tokenizer or teacher.corpus().tokenizer_path)
    values["model"] = {**SMALL, "inherit": {"from": str(teacher.folder), "layers": [0, 3], "method": "l2", **inherit}}
    values["rounds"] = {"num_rounds": 1}
    return parse_config(values, "student")


def run_all(config: RunConfig) -> Run:
    run = open_run(config)
    complete(run, "prepare", 0, silent)
    complete(run, "inherit", 1, silent)
    complete(run, "mix", 1, silent)
    complete(run, "train", 1, silent)
    return run


def test_round_1_starts_from_what_is_cut_out_and_the_ledger_knows_it(
    config: RunConfig, teacher: Run, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path | None] = []

    def train(job: TrainJob, name: str) -> tuple[float, float]:
        started.append(job.start_from)
        return 4.0, 3.0

    fakes.losses = train
    run = run_all(student(config, teacher))
    [start] = started
    assert start == inheritance.inherited_checkpoint(run)
    part = PruningPlan.model_validate(read_json(start.parent.parent / "part.json"))
    assert part.layers == (0, 3)
    old, new = (
        read_checkpoint(list_checkpoints(folder)[-1])
        for folder in (teacher.round_folder(1) / "checkpoint", start.parent)
    )
    channels = list(part.channels)
    assert torch.equal(new[EMBEDDING], _without_padding(old[EMBEDDING], teacher)[:, channels])
    fc2 = "decoder.layers.mlp.linear_fc2.weight"
    for layer, of_teacher in enumerate(part.layers):
        assert torch.equal(new[fc2][layer], old[fc2][of_teacher][channels][:, list(part.ffn[layer])])
    rows = ask(run.folder, "select * from lineage order by layer").fetchall()
    assert [row[:3] for row in rows] == [(1, 0, 0), (1, 1, 3)]
    assert rows[1][3:] == (
        str(teacher.folder), str(list_checkpoints(teacher.round_folder(1) / "checkpoint")[-1]), "l2", channels,
        list(part.ffn[1]), list(part.groups[1]), list(part.heads[1]),
    )  # fmt: skip
    assert [row.name for row in read_status(run.folder)] == ["prepare", "inherit 1", "mix 1", "train 1"]
    assert {row.state for row in read_status(run.folder)} == {"done"}
    page = write_report(run).read_text()
    assert "<h2>Inheritance</h2>" in page
    assert f"from parts of <code>{teacher.folder}</code>" in page
    assert not complete(run, "inherit", 1, silent)
    assert read_checkpoint_record(start)["inherited_from"] == {
        "checkpoint": str(list_checkpoints(teacher.round_folder(1) / "checkpoint")[-1]), "layers": [0, 3],
        "method": "l2",
    }  # fmt: skip
    assert not (start.parent.parent / "work").exists()


def _without_padding(rows: torch.Tensor, teacher: Run) -> torch.Tensor:
    rows = rows.clone()
    rows[teacher.corpus().vocab_size :] = 0
    return rows


def test_what_was_cut_from_another_model_is_cut_anew_until_training_begins(config: RunConfig, teacher: Run) -> None:
    run = open_run(student(config, teacher))
    complete(run, "prepare", 0, silent)
    assert complete(run, "inherit", 1, silent)
    before = read_checkpoint(inheritance.inherited_checkpoint(run))
    [checkpoint] = list_checkpoints(teacher.round_folder(1) / "checkpoint")
    shutil.rmtree(checkpoint)
    assert not complete(run, "inherit", 1, silent)
    write_random_weights(teacher.config.model, teacher.corpus().vocab_size, checkpoint, seed=4)
    assert complete(run, "inherit", 1, silent)
    assert not torch.equal(read_checkpoint(inheritance.inherited_checkpoint(run))[HEAD], before[HEAD])
    assert not complete(run, "inherit", 1, silent)
    # Training has begun, although its checkpoint was deleted since: the lineage is that of what was trained.
    run.record("train", 1, "trained", 0.0, [])
    shutil.rmtree(checkpoint)
    write_random_weights(teacher.config.model, teacher.corpus().vocab_size, checkpoint, seed=5)
    assert not complete(run, "inherit", 1, silent)


def test_a_model_that_inherited_itself_teaches_as_any_other(config: RunConfig, teacher: Run, fakes: FakeRanks) -> None:
    """What it says of its own beginning does not go with the parts that are cut from it."""
    first = run_all(student(config, teacher))
    last = first.round_folder(1) / "checkpoint" / "step-00000007"
    stored = replace(find_model(first.folder), checkpoint=last)
    write_random_weights(stored.config, first.corpus().vocab_size, last)
    # Ranks are told of it in a job, which is checked.
    shallow = inheritance._cut(stored, [1], first.folder / "shallow")
    assert ModelConfig.model_validate(shallow.config.model_dump()).num_layers == 1
    assert (stored.config.inherit, first.config.model.inherits) == (None, True)


@pytest.mark.parametrize("method", ["taylor", "learned"])
def test_where_all_neurons_stay_none_is_measured(
    config: RunConfig, teacher: Run, fakes: FakeRanks, method: str
) -> None:
    values = student(config, teacher, method=method).model_dump(by_alias=True)
    values["model"] |= {name: LARGE[name] for name in ("hidden_size", "num_attention_heads", "ffn_hidden_size")}
    run = run_all(parse_config(values, "shallow"))
    assert [job for job in fakes.jobs if "inherit" in job] == []
    old = read_checkpoint(list_checkpoints(teacher.round_folder(1) / "checkpoint")[-1])
    for name, new in read_checkpoint(inheritance.inherited_checkpoint(run)).items():
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(
                new, old[name][[0, 3]] if new.shape[0] == 2 and name.startswith("decoder.layers") else old[name]
            )


def test_what_is_measured_of_a_model_is_of_its_description_too(teacher: Run) -> None:
    stored = find_model(teacher.folder)
    others = [
        replace(stored, config=stored.config.model_copy(update=change))
        for change in ({"rotary_base": 500_000}, {"norm_epsilon": 1e-6}, {"init_std": 0.01}, {"preset": "llama-1b"})
    ]
    assert [other.identity == stored.identity for other in others] == [False, False, True, True]


def test_documents_end_as_they_do_for_the_larger_model(config: RunConfig, teacher: Run, tmp_path: Path) -> None:
    """A tokenizer with two such tokens: the usual one is taken unless somebody says which."""
    content = json.loads(teacher.corpus().tokenizer_path.read_text())
    token = content["added_tokens"][0]
    size = teacher.corpus().vocab_size
    content["added_tokens"].append({**token, "id": size, "content": "<|im_end|>"})
    folder = tmp_path / "model"
    write_random_weights(teacher.config.model, size + 1, folder / "checkpoint" / "step-00000000")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "model.yaml").write_text(yaml.safe_dump(LARGE))
    write_json(folder / "import.json", {"end_of_document": "<|im_end|>"})
    there = {"from": str(folder)}
    with pytest.raises(
        ValueError, match=r"tokenizer.end_of_document: null stands for '<\|endoftext\|>' here, and"
    ) as error:
        check_inheritance(student(config, teacher, folder / "tokenizer.json", **there))
    assert "documents of the larger model end with '<|im_end|>'; set it to one of them" in str(error.value)
    for said in ("<|im_end|>", "<|endoftext|>"):
        values = student(config, teacher, folder / "tokenizer.json", **there).model_dump(by_alias=True)
        values["tokenizer"]["end_of_document"] = said
        check_inheritance(parse_config(values, "said"))


def test_a_compact_vocabulary_takes_its_rows(
    config: RunConfig, teacher: Run, texts: Path, tmp_path: Path, fakes: FakeRanks
) -> None:
    whole = teacher.corpus()
    request = Request(whole.tokenizer_path, texts, size=270, output=tmp_path / "compact")
    made = prune_vocabulary(request, silent)
    assert len(made.choice.kept) == 270 < whole.vocab_size
    run = run_all(student(config, teacher, made.tokenizer))
    start = inheritance.inherited_checkpoint(run)
    assert read_checkpoint_record(start)["vocab_size"] == 270 == run.corpus().vocab_size
    old = read_checkpoint(list_checkpoints(teacher.round_folder(1) / "checkpoint")[-1])
    part = PruningPlan.model_validate(read_json(start.parent.parent / "part.json"))
    for name, new in read_checkpoint(start).items():
        if name in (EMBEDDING, HEAD):
            assert torch.equal(new[:270], old[name][made.choice.kept][:, list(part.channels)])


def test_what_cannot_be_inherited_is_one_line(config: RunConfig, teacher: Run, texts: Path, tmp_path: Path) -> None:
    def refused(config: RunConfig) -> str:
        with pytest.raises(ValueError) as error:
            run_all(config)
        assert not (config.folder / "corpus").exists()
        return str(error.value)

    good = student(config, teacher)
    message = refused(good.model_copy(update={"tokenizer": config.tokenizer}))
    assert message == (
        "tokenizer.path: a model that inherits needs the tokenizer of the larger model, or one pruned from it; "
        f"give {teacher.corpus().tokenizer_path}"
    )
    other = prune_vocabulary(Request(teacher.corpus().tokenizer_path, texts, size=270, output=tmp_path / "o"), silent)
    (other.folder / "vocabulary.parquet").unlink()
    assert refused(student(config, teacher, other.tokenizer)).startswith(
        f"tokenizer.path: {other.tokenizer} is neither the tokenizer of model.inherit.from "
    )
    nowhere = student(config, teacher, **{"from": str(tmp_path / "nowhere")})
    assert refused(nowhere).startswith(f"model.inherit.from: {tmp_path / 'nowhere'}: has no model; give a run folder")
    assert refused(student(config, teacher, layers=[0, 9])) == (
        "model.inherit.layers: 9 is no layer of the larger model, which has 0 to 3; choose from these"
    )
    [checkpoint] = list_checkpoints(teacher.round_folder(1) / "checkpoint")
    wrong = good.model_copy(update={"model": good.model.model_copy(update={"vocab_size": 999})})
    assert refused(wrong).startswith("model.vocab_size: 999 differs from the ")
    record = read_checkpoint_record(checkpoint)
    write_json(checkpoint / RECORD, {**record, "num_steps": 9})
    assert refused(good) == (
        f"model.inherit.from: {checkpoint} is of step 7 of 9; finish its round, or name a finished one "
        "(model.inherit.round)"
    )
    write_json(checkpoint / RECORD, record)
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    assert refused(good).startswith(f"model.inherit.from: {checkpoint}: not an intact checkpoint (__0_0.distcp has 5 ")
    deep = good.model_copy(update={"model": good.model.model_copy(update={"hidden_size": 64, "head_size": 8})})
    assert refused(deep).startswith("model.inherit: the model has 64 channels and the teacher 32; ")


def test_methods_are_compared_from_the_same_layers_measured_once(
    config: RunConfig, teacher: Run, fakes: FakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(run: Run, *_: Any) -> Path:
        measured.append(run.folder.name)
        return run.folder

    monkeypatch.setattr(inheritance, "measure_importance", measure)
    monkeypatch.setattr(inheritance, "keep_layers", lambda path, num_layers: (1, 2))
    comparison = inherit_comparison("base,l1,l2", student(config, teacher, layers="auto").model.inherit)
    page = compare(student(config, teacher, layers="auto"), comparison, 2, 300, silent)
    assert measured == ["corpus-seed-0"]
    assert [job for job in fakes.jobs if "train" not in job] == []
    folder = page.page.parent
    for name in ("l1", "l2"):
        [row] = ask(
            folder / f"inherit-{name}-seed-1", "select distinct list_sort(list(teacher_layer)) from lineage"
        ).fetchall()
        assert row == ([1, 2],)
    assert ask(folder / "inherit-base-seed-0", "from lineage").fetchall() == []
    curves = read_rows(curves_path(page.page.with_suffix(".parquet")), "arm", "seed", "step", "num_tokens")
    assert {row[:2] for row in curves} == {(arm, seed) for arm in ("base", "l1", "l2") for seed in (0, 1)}
    assert page.page.read_text().count("data:image/png;base64,") == 3
    assert "## Difference to arm base, paired by seed" in page.text
    assert "the larger model" in page.text and "4 layers of width 32, 4 heads, FFN 48" in page.text
    assert "its layers 1, 2, counted from 0, those whose removal costs most" in page.text
    assert compare(student(config, teacher, layers="auto"), comparison, 2, 300, silent).text == page.text
    # An arm is as it is whichever others there are, and not of another larger model than they are.
    fewer = student(config, teacher, layers="auto")
    jobs = len(fakes.jobs)
    compare(fewer, inherit_comparison("base", fewer.model.inherit), 2, 300, silent)
    compare(fewer, inherit_comparison("l2,base", fewer.model.inherit), 2, 300, silent)
    assert len(fakes.jobs) == jobs
    [checkpoint] = list_checkpoints(teacher.round_folder(1) / "checkpoint")
    shutil.rmtree(checkpoint)
    write_random_weights(teacher.config.model, teacher.corpus().vocab_size, checkpoint, seed=4)
    with pytest.raises(
        ValueError, match=r"inherit-l1-seed-0: the larger model has changed since this run started; delete"
    ):
        compare(fewer, comparison, 2, 300, silent)
    with pytest.raises(ValueError, match=r"model.inherit: initialisations are compared from random weights; remove it"):
        compare(student(config, teacher), init_comparison("gpt2,constant"), 1, 300, silent)


def test_the_command_needs_something_to_inherit_from(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = tmp_path / "c.yaml", tmp_path / "a.jsonl"
    text.write_text('{"text": "one"}\n')
    path.write_text(f"name: x\noutput: {tmp_path}\ncorpus: {{sources: [{{name: a, path: {text}}}]}}\n")
    assert main(["inherit", "compare", str(path)]) == 1
    assert "model.inherit: not set; name a larger model to inherit from" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taylor", "learned"])
def test_ranks_measure_and_choose_and_train(config: RunConfig, teacher: Run, method: str) -> None:
    """Two ranks share layers and stages of the larger model, and round 1 starts at the loss of what was cut out."""
    values = student(config, teacher, layers="auto", method=method, calibration_samples=16, mask_steps=3).model_dump()
    values["parallel"] = {"tensor": 2}
    run = run_all(parse_config(values, "ranks"))
    folder = inheritance.inheritance_folder(run)
    part = PruningPlan.model_validate(read_json(folder / "part.json"))
    assert part.layers == keep_layers(folder / "skips.parquet", 2)
    start = inheritance.inherited_checkpoint(run)
    plain = PlainModel(run.config.model, run.corpus().vocab_size).eval()
    load_megatron_weights(plain, read_checkpoint(start))
    rows = [row for path in sorted((run.round_folder(1) / "seen").glob("*")) for row in pq.read_table(path).to_pylist()]
    for row in (row for row in rows if row["step"] == 1):
        batch = run.corpus().read(np.array([row["shard"]]), np.array([row["sample"]]))
        tokens = torch.from_numpy(batch.tokens[:, : int(batch.num_tokens[0]) + 1])
        with torch.no_grad():
            assert row["loss"] == pytest.approx(plain(tokens[:, :-1], tokens[:, 1:]).mean().item(), abs=1e-5)
    page = write_report(run).read_text()
    assert "when layers are skipped" in page and (run.folder / "report" / "importance.png").exists()
    if method == "learned":
        assert len(read_json(folder / "masks.json")["losses"]) == 3
