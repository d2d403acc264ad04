"""What `reprise doctor` says of memory and disk, on machines that are made up."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from flows.orchestration import doctor
from flows.run.config import RunConfig, parse_config
from tests.flows.fakes import make_tokenizer

GIB = 1 << 30


def configured(**sections: Any) -> RunConfig:
    corpus = {"sources": [{"name": "a", "path": "a.txt"}], "seq_length": 4096}
    return parse_config({"name": "x", "corpus": corpus, **sections}, "test")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A host with 8 devices of 80 GB and plenty of memory; the list has what is free on each, in bytes."""
    free = [79 * GIB] * 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 80 * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1024 * GIB, total=1024 * GIB))
    monkeypatch.setattr(doctor, "describe_devices", list)
    return free


def line(config: RunConfig, start: str) -> tuple[str, str]:
    [found] = [finding for finding in doctor.examine(config) if finding.text.startswith(start)]
    return found.state, found.text


def seven_billion(**train: Any) -> RunConfig:
    kernels = {"loss_kernel": "reference", "activation_kernel": "reference"}
    train = {"global_batch_size": 32, "micro_batch_size": 1, **kernels, **train}
    return configured(device="cuda", model={"preset": "llama-7b"}, parallel={"data": 8}, train=train)


def test_seven_billion_parameters_fit_on_eight_devices(machine: list[int]) -> None:
    """47.1 GiB of states: 6 bytes of each of 6.738 G parameters, and an eighth of 12; see tests of `trainer.memory`."""
    state, text = line(seven_billion(), "memory of a device: ")
    assert state == "ok"
    assert "6,738.4 M parameters on 8 ranks take 65.7 GiB; model states 47.1, activations 16.1, logits 1.5," in text
    # 14 bytes a parameter are saved.
    state, text = line(seven_billion(), "memory of a host: ")
    assert (state, "87.9 of it for saving checkpoints" in text) == ("ok", True)


def test_what_does_not_fit_is_told_with_what_to_change(machine: list[int]) -> None:
    state, text = line(seven_billion(micro_batch_size=2), "memory of a device: ")
    assert state == "missing"
    assert text.endswith(
        "; 79.0 GiB free; lower train.micro_batch_size, set train.loss_kernel: chunked, raise parallel.tensor or "
        "parallel.data, or make the model smaller"
    )
    machine[5] = 60 * GIB
    state, text = line(seven_billion(loss_kernel="chunked"), "memory of a device: ")
    assert state == "missing"
    assert text.endswith("; 60.0 GiB free; raise parallel.tensor or parallel.data, or make the model smaller")


def test_a_device_that_no_rank_takes_does_not_count(machine: list[int]) -> None:
    machine[5] = 0
    config = configured(device="cuda", model={"preset": "llama-2m"}, parallel={"data": 4})
    assert line(config, "memory of a device: ")[0] == "ok"
    config = configured(device="cuda", model={"preset": "llama-2m"}, parallel={"data": 8})
    assert line(config, "memory of a device: ")[0] == "missing"


@pytest.mark.parametrize(("nodes", "state"), [(1, "missing"), (4, "ok")])
def test_ranks_on_cpu_share_the_memory_of_their_host(monkeypatch: pytest.MonkeyPatch, nodes: int, state: str) -> None:
    """Eight ranks take half a GiB each before they have a model."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GIB, total=16 * GIB))
    launch = {"nodes": nodes, "rendezvous": "127.0.0.1:29400"}
    config = configured(device="cpu", model={"preset": "llama-2m"}, parallel={"data": 8}, launch=launch)
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"seq_length": 64})})
    found, text = line(config, "memory of a host: ")
    assert (found, f"; {8 // nodes} on this host, each with model states" in text) == (state, True)
    assert ("put fewer ranks on a host" in text) == (state == "missing")


def test_what_slurm_s_nodes_have_is_not_made_up(machine: list[int]) -> None:
    config = seven_billion().model_copy(update={"launch": configured(device="cuda", launch={"kind": "slurm"}).launch})
    for start in ("memory of a device: ", "memory of a host: "):
        state, text = line(config, start)
        assert (state, "free" in text) == ("ok", False)


@pytest.mark.parametrize(("precision", "size"), [("float32", 16), ("bfloat16", 14)])
def test_parameters_and_checkpoints_are_counted_with_the_tokenizer(tmp_path: Path, precision: str, size: int) -> None:
    make_tokenizer(tmp_path / "tokenizer.json", 48_000)
    config = configured(
        device="cpu", output=str(tmp_path), tokenizer={"path": str(tmp_path / "tokenizer.json")},
        model={"preset": "pangu-pi-1b-pro", "vocab_size": None}, train={"precision": precision},
    )  # fmt: skip
    assert "995.6 M parameters" in line(config, "memory of a host: ")[1]
    disk = line(config, "disk: ")[1]
    # Two rounds' checkpoints, the two that are kept, and the one that is being written.
    assert float(re.findall("[0-9.]+", disk)[0]) == pytest.approx(5 * size * 995_604_736 / GIB, abs=0.06)


def test_a_tokenizer_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    config = configured(device="cpu", output=str(tmp_path), tokenizer={"path": str(tmp_path / "tokenizer.json")})
    found = [finding.text for finding in doctor.examine(config) if finding.state == "missing"]
    assert sum("tokenizer.json" in text for text in found) == 1
    assert not any(text.startswith(("memory", "disk")) for text in found)


def test_an_engine_that_is_not_installed_is_missing(machine: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(engine={"kind": "ray", "address": "local"})
    monkeypatch.setitem(sys.modules, "ray", None)
    state, text = line(config, "engine.kind: ray is not installed")
    assert (state, text.endswith("`pip install 'reprise-lm[ray]'`")) == ("missing", True)


def test_an_engine_whose_cluster_does_not_answer_is_missing(machine: list[int]) -> None:
    pytest.importorskip("ray")
    # Nobody listens on the discard port.
    config = configured(engine={"kind": "ray", "address": "127.0.0.1:9"})
    state, text = line(config, "engine.address: 127.0.0.1:9: no Ray cluster answers")
    assert (state, text.endswith("or set local")) == ("missing", True)
