"""`auto`: resolved once, recorded as numbers, kept when the run goes on; or one line that says what to set."""

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from data_scoring.base.progress import silent
from flows.cli.main import main
from flows.planning.auto import resolve_auto
from flows.run.config import RunConfig, parse_config
from flows.run.folder import open_run, read_run
from flows.stages.stage_order import complete
from tests.conftest import make_documents
from trainer.hardware import assumed_hardware
from trainer.parallel_config import ParallelConfig

GIB = 1 << 30


def configured(folder: Path, **sections: Any) -> RunConfig:
    corpus = {"sources": [{"name": "a", "path": str(folder / "a.txt"), "document": "line"}], "seq_length": 32}
    values = {"name": "x", "output": str(folder), "corpus": corpus, "device": "cpu", "parallel": "auto",
              "tokenizer": {"vocab_size": 300}}  # fmt: skip
    return parse_config({**values, "train": {"micro_batch_size": "auto"}, **sections}, "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("\n".join(make_documents(200)))
    return tmp_path


def test_a_run_records_numbers_and_keeps_them(folder: Path) -> None:
    config = configured(folder)
    resolved, reasons = resolve_auto(config)
    assert (resolved.parallel, resolved.train.micro_batch_size) == (ParallelConfig(), 16)
    assert len(reasons) == 2
    assert resolve_auto(config)[0] == resolved
    run = open_run(resolved)
    complete(run, "prepare", 0, silent)
    stored = yaml.safe_load((folder / "x" / "run.yaml").read_text())["config"]
    assert stored["parallel"] == ParallelConfig().model_dump()
    assert stored["train"]["micro_batch_size"] == 16
    # Another machine would give other numbers.
    with_two = configured(folder, launch={"processes_per_node": 2})
    kept, reasons = resolve_auto(configured(folder))
    assert kept.model_dump() == read_run(folder / "x").config.model_dump()
    assert "run.yaml" in reasons[0]
    shutil.rmtree(folder / "x")
    assert resolve_auto(with_two)[0].parallel == ParallelConfig(data=2)


def test_a_run_is_not_opened_with_auto(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^parallel: auto is not resolved here; "):
        open_run(configured(folder))
    with pytest.raises(ValueError, match=r"^train\.micro_batch_size: auto is not resolved here; "):
        open_run(configured(folder, parallel={"data": 2}))
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("sections", "parallel", "size"),
    [
        ({}, ParallelConfig(data=4), 64),
        ({"parallel": {"data": 2}}, ParallelConfig(data=2), 128),
        ({"train": {"global_batch_size": 256, "micro_batch_size": 4}}, ParallelConfig(data=4), 4),
        ({"launch": {"processes_per_node": 2}}, ParallelConfig(data=2), 128),
    ],
)
def test_devices_here_decide(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], parallel: ParallelConfig, size: int
) -> None:
    """Four devices; a batch of 256 samples of 32 tokens each."""
    device = type("Properties", (), {"name": "NVIDIA H100 80GB HBM3", "total_memory": 79 * GIB})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    train = {"global_batch_size": 256, "micro_batch_size": "auto"}
    resolved, _ = resolve_auto(configured(folder, **{"device": "cuda", "train": train, **sections}))
    assert (resolved.parallel, resolved.train.micro_batch_size) == (parallel, size)


def test_slurm_s_nodes_are_known_by_the_type_in_gres(folder: Path) -> None:
    def asked(gres: str | None) -> RunConfig:
        launch = {"kind": "slurm", "nodes": 2, "slurm": {"gres": gres}}
        return configured(folder, device="cuda", launch=launch, train={"global_batch_size": 64, "micro_batch_size": 2})

    assert resolve_auto(asked("gpu:h100:8"))[0].parallel == ParallelConfig(data=16)
    for gres in (None, "gpu:8", "gpu:k80:8"):
        with pytest.raises(ValueError, match=r"^launch\.slurm\.gres: .*set one such as gpu:h100:8 ") as raised:
            resolve_auto(asked(gres))
        assert "\n" not in str(raised.value)


def test_slurm_s_nodes_without_accelerators_are_not_known(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^parallel: auto cannot see the memory of the nodes .*to numbers$"):
        resolve_auto(configured(folder, launch={"kind": "slurm"}))


def test_assumed_devices_do_not_need_to_be_launched(folder: Path) -> None:
    """Two hosts need a rendezvous for a run, but not for a plan."""
    config = configured(
        folder, device="cuda", launch={"nodes": 2}, train={"global_batch_size": 16, "micro_batch_size": 1}
    )
    assert resolve_auto(config, assumed_hardware("2x8xh100"))[0].parallel == ParallelConfig(data=16)


def test_what_fits_nowhere_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"total": GIB // 4, "available": GIB // 4})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        ValueError, match=r"^parallel: auto: no layout of the model fits on 1 ranks on CPU, 0\.2 GiB each;"
    ):
        resolve_auto(configured(folder))


def test_run_shows_the_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "x.yaml"
    path.write_text(json.dumps(configured(folder).model_dump(mode="json")))
    assert main(["prepare", str(path)]) == 0
    assert "auto: micro batch 16: 512 tokens" in capsys.readouterr().err
    assert read_run(folder / "x").config.train.micro_batch_size == 16
