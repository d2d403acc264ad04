"""Plans compared with calculations by hand, with what is on disk, and with the presets and recipes that we ship."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_scoring.config import padded_vocab_size
from data_scoring.corpus.corpus import Corpus
from flows.cli.main import main
from flows.orchestration.doctor import examine
from flows.planning.auto import resolve_auto
from flows.planning.plan import make_plan
from flows.planning.workload import with_devices
from flows.run.config import RunConfig, parse_config, read_config
from tests.conftest import TINY_MODEL, make_documents
from trainer.config import ModelConfig
from trainer.hardware import assumed_hardware
from trainer.presets import PRESETS

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = {"1xh100": "1xh100", "8xh100": "8xh100", "2x8-slurm": "2x8xh100", "8xascend910b": "8xascend910b"}
GIB = 1 << 30


@pytest.fixture
def text(tmp_path: Path, tiny_corpus: Corpus) -> Path:
    (tmp_path / "text").mkdir()
    lines = (json.dumps({"text": document}) + "\n" for document in make_documents(2000))
    (tmp_path / "text" / "a.jsonl").write_text("".join(lines))
    shutil.copy(tiny_corpus.tokenizer_path, tmp_path / "tokenizer.json")
    return tmp_path


def configured(text: Path, **sections: Any) -> RunConfig:
    corpus = {"sources": [{"name": "a", "path": str(text / "text")}], "seq_length": 2048}
    values = {"name": "x", "output": str(text), "corpus": corpus, "tokenizer": {"path": str(text / "tokenizer.json")}}
    train = {"global_batch_size": 8, "micro_batch_size": 4}
    return parse_config({**values, "model": {"preset": "pangu-pi-1b-pro"}, "train": train, **sections}, "test")


@pytest.mark.parametrize(("name", "assumed"), RECIPES.items())
def test_recipes_pass_plan_and_doctor_on_the_hardware_they_name(name: str, assumed: str, text: Path) -> None:
    sources = f"corpus.sources=[{{name: text, path: '{text}/text/*.jsonl'}}]"
    tokenizer, output = f"tokenizer.path={text}/tokenizer.json", f"output={text}"
    hardware = assumed_hardware(assumed)
    config = with_devices(read_config(CONFIGS / f"{name}.yaml", [sources, tokenizer, output]), hardware)
    plan = make_plan(config, hardware)
    assert plan.fault is None
    assert plan.total_seconds is not None, plan.corpus_basis
    assert plan.parallel["tensor"] * plan.parallel["pipeline"] * plan.parallel["data"] == hardware.count
    resolved, _ = resolve_auto(config, hardware)
    findings = examine(resolved, hardware)
    # Whether torch's and torch_npu's packages are here is not asked.
    assert [finding.text for finding in findings if finding.state == "missing"] == []
    assert resolved.parallel.model_dump() == plan.parallel


def test_recipes_have_the_paper_s_settings() -> None:
    for name in RECIPES:
        config = read_config(CONFIGS / f"{name}.yaml", [])
        train = config.resolved_train
        assert train.global_batch_size * config.corpus.seq_length == 1 << 20
        assert train.lr == pytest.approx(1e-4 * (1.048576) ** 0.5)
        assert (config.rounds.num_rounds, config.refine.sampling_rate) == (2, 0.5)
        assert "What has been run: nothing on a device." in (CONFIGS / f"{name}.yaml").read_text()


def test_hours_by_hand(text: Path) -> None:
    """Two devices at 40 % of 989 TFLOP/s; every matrix of a layer, then the head, then attention's scores and sums."""
    hidden, ffn, layers, vocabulary, length = 1792, 4864, 21, 48_000, 2048
    matrices = layers * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden * hidden // 32) + vocabulary * hidden
    flops = 6 * matrices + 3 * layers * 2 * 2 * hidden * length
    plan = make_plan(configured(text, parallel={"data": 2}), assumed_hardware("2xh100"))
    assert plan.tokens_per_second == pytest.approx(2 * 0.4 * 989e12 / flops, rel=1e-3)
    assert plan.corpus is not None
    samples, held_out = plan.corpus.num_samples, plan.corpus.num_validation_samples
    # A step has 8 samples. Validation, a forward pass, is at the end of a round of fewer than 100 steps.
    assert 8 < samples < 800
    first = (samples + held_out / 3) * length / plan.tokens_per_second
    second = (round(samples / 2) + held_out / 3) * length / plan.tokens_per_second
    assert [each.samples for each in plan.rounds] == [samples, round(samples / 2)]
    assert [each.steps for each in plan.rounds] == [-(-samples // 8), -(-round(samples / 2) // 8)]
    assert plan.rounds[0].train_seconds == pytest.approx(first)
    assert plan.rounds[1].train_seconds == pytest.approx(second)
    scoring = samples * length / 3 / plan.tokens_per_second
    assert plan.rounds[0].score_seconds == pytest.approx(scoring)
    assert plan.rounds[1].score_seconds is None
    assert plan.total_seconds == pytest.approx(first + scoring + second)
    assert plan.scoring is not None
    assert plan.scoring.prefix_seconds[512] == pytest.approx(scoring / 4)
    half = make_plan(configured(text, parallel={"data": 2}), assumed_hardware("2xh100"), utilisation=0.2)
    assert half.total_seconds == pytest.approx(2 * plan.total_seconds)


def test_a_pipeline_costs_its_bubble(text: Path) -> None:
    """Three stages and two microbatches: two of four slots more than the work takes."""
    one, three = ({}, {"parallel": {"pipeline": 3}})
    plans = [make_plan(configured(text, **each), assumed_hardware("3xh100")) for each in (one, three)]
    assert [rank.kind for rank in plans[1].ranks] == ["first", "middle", "last"]
    assert plans[0].tokens_per_second is not None
    assert plans[1].tokens_per_second == pytest.approx(plans[0].tokens_per_second * 3 / (1 + 2 / 2))
    # Embedding and head have as many parameters; the last stage has the final norm as well.
    first, middle, last = (rank.parameters for rank in plans[1].ranks)
    assert first - middle == 48_000 * 1792 == last - middle - 1792
    assert sum((first, middle, last)) == plans[1].parameters


def test_every_preset_is_planned_in_seconds() -> None:
    """Also on this CPU, where small models would be measured: without text they are not."""
    started = time.process_time()
    for name in PRESETS:
        model = ModelConfig(preset=name)
        corpus = {"sources": [{"name": "a", "path": "nowhere.jsonl"}]}
        for device, hardware in (("cuda", "8xh100"), ("npu", "2x8xascend910b")):
            config = parse_config({"name": "x", "corpus": corpus, "device": device, "parallel": "auto",
                                   "model": {"preset": name}, "train": {"micro_batch_size": "auto"}}, "x")  # fmt: skip
            plan = make_plan(config, assumed_hardware(hardware))
            assert plan.parameters == model.num_parameters(padded_vocab_size(model.vocab_size or 2048))
            assert plan.fault is None
            assert plan.corpus_basis.startswith("unknown, since the text cannot be read: corpus.sources.a.path:")
    assert time.process_time() - started < 30


def test_what_does_not_fit_is_said_first_with_the_change(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hardware = assumed_hardware("1xh100")
    config = configured(text, train={"global_batch_size": 32, "micro_batch_size": 32})
    plan = make_plan(config, hardware)
    assert plan.fault is not None
    assert plan.fault.startswith("does not fit: a rank takes ")
    assert plan.fault.endswith("; set train.micro_batch_size: 16")
    assert make_plan(config.with_choice(config.parallel, 16), hardware).fault is None
    path = text / "x.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["plan", str(path), "--assume", "1xh100"]) == 0
    assert capsys.readouterr().out.startswith("does not fit: ")
    assert main(["plan", str(path), "--assume", "1xh100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fault"] == plan.fault


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--assume 8xh99", "--assume: '8xh99' is not "),
        ("--assume 8xh100 --devices 8", "--assume: cannot be combined"),
        ("--devices 8", "--devices: needs a number"),
        ("--devices 3 --memory 80 --set launch={nodes:2} --set parallel=auto", "--devices: 3 is not a multiple"),
        ("--set device=npu", "name the devices to plan for: --assume 8xh100"),
        ("--utilisation 1.5", "--utilisation: 1.5 is not between 0 and 1"),
        ("--set parallel={data:3} --assume 8xh100", "train.global_batch_size: 8 is not a multiple"),
        ("--set model={preset:llama-7b} --set parallel=auto --assume 1xh100", "parallel: auto: no layout"),
        ("--set model={preset:llama-7b} --set train.micro_batch_size=auto --assume 1xrtx4090", "auto: not even one"),
        ("--set tokenizer.path=nowhere.json --set model.vocab_size=null", "tokenizer.path: nowhere.json"),
    ],
)
def test_errors_are_one_line(options: str, message: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = text / "x.yaml"
    path.write_text(json.dumps(configured(text).model_dump(mode="json")))
    assert main(["plan", str(path), *(each.replace(":", ": ") for each in options.split())]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_disk_is_what_a_run_leaves(text: Path, trained: Path, scored: Path, tiny_corpus: Corpus) -> None:
    model = TINY_MODEL.model_dump() | {"vocab_size": tiny_corpus.vocab_size}
    train = {"global_batch_size": 8, "micro_batch_size": 4, "precision": "float32"}
    sources = [{"name": name, "path": str(tiny_corpus.folder.parent / name)} for name in ("one", "two")]
    corpus = {"sources": sources, "seq_length": 32, "validation_fraction": 0.1}
    tokenizer = {"path": str(tiny_corpus.tokenizer_path)}
    config = configured(text, model=model, train=train, corpus=corpus, tokenizer=tokenizer)
    disk = make_plan(config, assumed_hardware("1xh100")).disk
    [checkpoint] = (trained / "checkpoint").glob("step-*")
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*.distcp"))
    # Files have a header for each tensor, which counts for little in larger models.
    assert disk.checkpoint == pytest.approx(stored, rel=0.25)
    # Two rounds, two that are kept, one being written.
    assert disk.checkpoints_at_most == 5 * disk.checkpoint
    assert disk.checkpoints_at_the_end == 2 * disk.checkpoint
    stored = sum(path.stat().st_size for path in tiny_corpus.folder.glob("*.bin"))
    assert disk.corpus == pytest.approx(stored, rel=0.005)
    # Losses are of all samples, seen losses of those of a round and of half of them.
    num_samples = sum(tiny_corpus.num_samples(shard) for shard in range(tiny_corpus.num_shards))
    tables = [pq.read_table(path) for path in (scored / "losses").glob("*.parquet")]
    seen = [pq.read_table(path) for path in (trained / "seen").glob("*.parquet")]
    assert sum(table.num_rows for table in tables) == sum(table.num_rows for table in seen) == num_samples
    held = sum(table.nbytes for table in tables) + 1.5 * sum(table.nbytes for table in seen)
    assert disk.losses == pytest.approx(held, rel=0.25)
