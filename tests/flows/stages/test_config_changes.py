"""What a run that goes on may change is what docs/configuration.md says of each field."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.run.config import RunConfig, differences, parse_config
from flows.run.config_docs import page
from flows.run.folder import Run, open_run, read_run
from flows.stages.refine import draw_of
from flows.stages.stage_order import fingerprint_of

# Every section that a configuration may have, over the run in `golden/plain`.
BASE: dict[str, Any] = {
    "model.inherit": {"from": "runs/plain", "layers": "auto"},
    "launch.slurm.options": ["--exclusive"],
    "train.lr": {"rule": "scaled", "base_lr": 0.01},
    "refine.sources": [{"name": "b"}],
    "eval": {"tasks": ["piqa"], "data": "items"},
    "track": ["tensorboard"],
}
# A valid value of each field other than that of BASE, and what both configurations have besides.
CHANGES: dict[str, Any] = {
    "name": "other", "output": "elsewhere", "seed": 3, "device": "npu",
    "corpus.sources[].name": "c", "corpus.sources[].path": "c.jsonl", "corpus.sources[].format": "jsonl",
    "corpus.sources[].text_field": "body", "corpus.sources[].document": "line", "corpus.sources[].split": "test",
    "corpus.sources[].subset": "en", "corpus.sources[].max_documents": 9, "corpus.seq_length": 16,
    "corpus.num_shards": 3, "corpus.validation_fraction": 0.2, "corpus.on_bad_record": "skip",
    "tokenizer.path": "t.json", "tokenizer.vocab_size": 301, "tokenizer.train_megabytes": 1.0,
    "tokenizer.end_of_document": "</s>",
    "model.preset": "llama", "model.num_layers": 4, "model.hidden_size": 64, "model.num_attention_heads": 2,
    "model.head_size": 16, "model.num_query_groups": 4, "model.ffn_hidden_size": 128, "model.vocab_size": 512,
    "model.tied_embeddings": True, "model.attention_bias": "qkv", "model.ffn_bias": True, "model.rotary_base": 500,
    "model.rotary_scaling": 8.0, "model.norm_epsilon": 1e-6, "model.init_std": 0.01, "model.init": "internlm",
    "model.activation_terms": 2, "model.activation_scales": "layer", "model.shortcut_reduction": 4,
    "model.shortcut_input": "residual", "model.start_from": "somewhere", "model.layers": "transformer_engine",
    "model.inherit": None, "model.inherit.from": "runs/other", "model.inherit.round": 1,
    "model.inherit.layers": [0, 1, 2], "model.inherit.method": "l1", "model.inherit.calibration_samples": 9,
    "model.inherit.mask_steps": 9, "model.inherit.mask_lr": 0.1,
    "parallel": "auto", "parallel.tensor": 2, "parallel.pipeline": 3, "parallel.data": 2, "parallel.sequence": True,
    "parallel.virtual_pipeline": 2,
    "launch.kind": "slurm", "launch.nodes": 2, "launch.processes_per_node": 1, "launch.rendezvous": "other:1",
    "launch.rendezvous_port": 3000, "launch.interface": "eth0", "launch.join_minutes": 1.0, "launch.max_restarts": 0,
    "launch.slurm.partition": "p", "launch.slurm.account": "a", "launch.slurm.qos": "q", "launch.slurm.gres": "gpu:1",
    "launch.slurm.cpus_per_rank": 1, "launch.slurm.time_limit": "1:00:00", "launch.slurm.options": ["--mem=1G"],
    "launch.address": "head:6379", "launch.resources": {"GPU": 1},
    "engine.kind": "ray", "engine.processes": 3, "engine.address": "node1:6379", "engine.cpus_per_task": 2,
    "train.global_batch_size": 16, "train.global_batch_tokens": 512, "train.micro_batch_size": 4, "train.lr": 0.01,
    "train.lr.increment_rate": 1.0, "train.lr.base_lr": 0.02, "train.lr.base_tokens": 9, "train.min_lr": 0.0,
    "train.max_tokens": 999, "train.warmup_fraction": 0.2, "train.weight_decay": 0.0, "train.adam_beta1": 0.8,
    "train.adam_beta2": 0.9, "train.clip_grad": 2.0, "train.validate_every_steps": 7, "train.precision": "bfloat16",
    "train.loss_kernel": "chunked", "train.activation_kernel": "triton", "train.recompute": "selective",
    "checkpoint.every_minutes": 1.0, "checkpoint.every_steps": 7, "checkpoint.keep_last": 5,
    "checkpoint.asynchronous": "never",
    "score.micro_batch_size": 2, "score.budget": "full", "score.min_correlation": 0.5, "score.calibration_samples": 32,
    "score.loss_kernel": "reference",
    "refine.policy": "top", "refine.within": "part", "refine.keep_batches": True, "refine.weights": "inverse",
    "refine.max_weight": None, "refine.sampling_rate": 0.25, "refine.temperature": 2.0, "refine.drop_hardest": 0.2,
    "refine.batch_size": 4, "refine.reference": "runs/large/rounds/1", "refine.sql": "loss", "refine.outlier_z": None,
    "refine.min_tokens": 2, "refine.near_duplicates": None, "refine.max_rounds": 1, "refine.max_tokens": 999,
    "refine.sources[].name": "a", "refine.sources[].at_least": 0.1, "refine.sources[].at_most": 0.9,
    "refine.sources[].from_round": 2, "refine.memory_gb": 1.0,
    "rounds.num_rounds": 5, "rounds.approval": True, "rounds.num_parts": 4, "rounds.lr_factor": 0.5,
    "rounds.keep_optimizer": True, "rounds.first_order": "sources",
    "eval.tasks": ["piqa", "boolq"], "eval.data": None, "eval.limit": 2, "eval.every_steps": 5,
    "eval.training_tasks": ["boolq"], "eval.contamination": "report", "eval.contamination_ngram": 8,
    "track[].name": "wandb", "track[].project": "other", "track[].uri": "elsewhere",
}  # fmt: skip
BESIDES: dict[str, dict[str, Any]] = {
    "model.start_from": {"model.inherit": None},
    "parallel.sequence": {"parallel.tensor": 2},
    "parallel.virtual_pipeline": {"model.num_layers": 4, "parallel.pipeline": 2},
    "launch.nodes": {"parallel.data": 2, "launch.rendezvous": "host:1"},
    "refine.keep_batches": {"refine.policy": "loss_batch"},
    "rounds.num_parts": {"refine.within": "part"},
}
# Fields that are compared by what follows from them.
FOLLOWS = {
    "train.global_batch_tokens": "train.global_batch_size",
    "train.lr.increment_rate": "train.lr",
    "train.lr.base_lr": "train.lr",
    "train.lr.base_tokens": "train.lr",
}
# It has one value: what tells a rule from a number.
CONSTANT = {"train.lr.rule"}
ROWS = dict(re.findall(r"^\| `([^`]+)` \|.*\| (yes|no|yes, unless `eval.contamination` is remove) \|", page(), re.M))
CHAIN = [
    ("prepare", 0), ("inherit", 1), ("mix", 1), ("train", 1), ("score", 1), ("refine", 2), ("mix", 2), ("train", 2),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    shutil.copytree(Path(__file__).with_name("golden"), tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    plain = read_run(tmp_path / "runs" / "plain")
    return replace(plain, config=changed(plain.config, BASE))


def changed(config: RunConfig, fields: dict[str, Any]) -> RunConfig:
    values = config.model_dump()
    for name, value in fields.items():
        *way, last = name.replace("[]", ".0").split(".")
        section: Any = values
        for part in way:
            section = section[int(part) if part.isdigit() else part]
        section[last] = value
    return parse_config(values, "x")


def fingerprints(run: Run, config: RunConfig) -> dict[tuple[str, int], str]:
    asked = replace(run, config=config)
    return {place: fingerprint_of(asked, *place) for place in CHAIN}


def test_every_field_is_tried() -> None:
    assert ROWS.keys() - CHANGES.keys() == CONSTANT
    assert CHANGES.keys() <= ROWS.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_may_change_where_its_row_says_so(run: Run, name: str) -> None:
    before = changed(run.config, BESIDES.get(name, {}))
    after = changed(before, {name: CHANGES[name]})
    different, same = differences(before, after), fingerprints(run, before) == fingerprints(run, after)
    if ROWS[name] == "no":
        shown = FOLLOWS.get(name, name).replace("[]", ".0")
        assert any(re.match(rf"{re.escape(shown)}[.:]", line) for line in different)
        # A scaled rate follows the batch, and so the length of samples.
        assert all(re.match(rf"{name.partition('.')[0]}\b|train\.(min_)?lr:", line) for line in different)
        assert not same
    else:
        assert different == []
        assert same


@pytest.mark.parametrize("name", [name for name in CHANGES if "unless" in ROWS[name]])
def test_evaluation_may_not_change_where_it_removes(run: Run, name: str) -> None:
    before = changed(run.config, {"eval.contamination": "remove"})
    if name == "eval.training_tasks":
        before = changed(before, {"eval.every_steps": 5})
    after = changed(before, {name: CHANGES[name]})
    for old, new in ((before, after), (after, before)):
        assert differences(old, new)
        assert all(line.startswith(name) for line in differences(old, new))


@pytest.mark.parametrize(("name", "stages"), [
    ("train.max_tokens", {("mix", 1), ("train", 1), ("score", 1), ("refine", 2), ("mix", 2), ("train", 2)}),
    ("model.start_from", {("train", 1), ("score", 1), ("refine", 2), ("mix", 2), ("train", 2)}),
    ("model.init_std", {("inherit", 1), ("train", 1), ("score", 1), ("refine", 2), ("mix", 2), ("train", 2)}),
    ("score.budget", {("score", 1), ("refine", 2), ("mix", 2), ("train", 2)}),
    ("refine.policy", {("refine", 2), ("mix", 2), ("train", 2)}),
    ("refine.weights", {("refine", 2), ("mix", 2), ("train", 2)}),
    ("rounds.num_parts", {("refine", 2), ("mix", 2), ("train", 2)}),
    ("rounds.lr_factor", {("train", 2)}),
    ("rounds.keep_optimizer", {("train", 2)}),
    ("rounds.first_order", {("mix", 1), ("train", 1), ("score", 1), ("refine", 2), ("mix", 2), ("train", 2)}),
])  # fmt: skip
def test_a_field_decides_the_stages_from_its_own_on(run: Run, name: str, stages: set[tuple[str, int]]) -> None:
    before = changed(run.config, BESIDES.get(name, {}))
    after = changed(before, {name: CHANGES[name]})
    old, new = fingerprints(run, before), fingerprints(run, after)
    assert {place for place in CHAIN if old[place] != new[place]} == stages


def test_batches_are_those_of_training_unless_set(run: Run) -> None:
    """A run of another policy keeps the fingerprints that it has had with batches of 16."""
    by_loss, by_batch = (changed(run.config, {"refine.policy": policy}) for policy in ("loss", "loss_batch"))
    unset, small = (changed(by_batch, {"refine.batch_size": size}) for size in (None, 16))
    batch = unset.resolved_train.global_batch_size
    assert batch != 16
    given = changed(by_batch, {"refine.batch_size": batch})
    assert fingerprints(run, unset) == fingerprints(run, given) != fingerprints(run, small)
    assert differences(unset, given) == []
    assert differences(unset, small) == [f"refine.batch_size: {batch} there, 16 here"]
    assert unset.run_name == given.run_name
    assert draw_of(replace(run, config=unset), 2, unset.refine).config.batch_size == batch
    other = changed(by_loss, {"refine.batch_size": None})
    assert fingerprints(run, other) == fingerprints(run, changed(by_loss, {"refine.batch_size": 16}))


def test_a_run_goes_on_with_what_is_free_and_names_the_rest(run: Run) -> None:
    config = read_run(run.folder).config
    assert open_run(changed(config, {"parallel.data": 2})).folder == run.folder
    with pytest.raises(ValueError, match=r"another configuration \(model\.tied_embeddings: false there, true here\)"):
        open_run(changed(config, {"model.tied_embeddings": True}))


def test_a_run_without_a_name_keeps_the_one_that_0_7_gave_it() -> None:
    names = [RunConfig.model_validate(values).run_name for values in (
        {}, {"device": "cpu", "eval": {"tasks": ["hellaswag"]}}, {"seed": 1},
        {"eval": {"tasks": ["hellaswag"], "contamination": "remove"}},
        {"model": {"inherit": {"from": "runs/x", "layers": [0, 1, 2, 3]}}, "parallel": {"data": 2},
         "refine": {"sources": [{"name": "topics", "at_least": 0.2}]}},
    )]  # fmt: skip
    assert names == [
        "run-15488245d5f18129", "run-15488245d5f18129", "run-f15c5c4e6180d57a", "run-aa7a6d7d2fd21b3b",
        "run-811aedf2854f5c33",
    ]  # fmt: skip
