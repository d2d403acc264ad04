"""One run on two hosts: network namespaces, with an address each, a wire between them, and a folder that both see."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.conftest import make_documents, read_rows
from trainer.checkpoint_folder import list_checkpoints

pytestmark = pytest.mark.slow

CONFIG = """
name: two
corpus: {sources: [{name: a, path: a.jsonl}], seq_length: 32, num_shards: 4}
tokenizer: {vocab_size: 300}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}
train: {global_batch_size: 4, micro_batch_size: 2, lr: 1.0e-2}
parallel: {data: 2}
checkpoint: {every_steps: 20}
"""
TWO_HOSTS = ("--set", "launch={nodes: 2, rendezvous: '10.77.0.1:29411'}")


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    names = ("reprise-h1", "reprise-h2")
    commands = [
        *(f"ip netns add {name}" for name in names),
        "ip link add rp1 netns reprise-h1 type veth peer name rp2 netns reprise-h2",
        "ip -n reprise-h1 addr add 10.77.0.1/24 dev rp1",
        "ip -n reprise-h2 addr add 10.77.0.2/24 dev rp2",
        *(f"ip -n {name} link set lo up" for name in names),
        "ip -n reprise-h1 link set rp1 up",
        "ip -n reprise-h2 link set rp2 up",
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces need root and iproute2: {done.stderr}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def on(host: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "flows.cli.main", *arguments]
    with (folder / f"{host}.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def kill_host(process: subprocess.Popen[str]) -> None:
    """End everything on a host at once, as a loss of power would."""
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    process.wait()


def test_two_hosts_train_as_one_and_a_lost_one_is_waited_for(tmp_path: Path, hosts: tuple[str, str]) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_documents(500)))
    (tmp_path / "config.yaml").write_text(CONFIG)
    first, second = hosts
    leader = on(first, tmp_path, "run", "config.yaml", *TWO_HOSTS)
    run = tmp_path / "runs" / "two"
    deadline = time.monotonic() + 600
    while not (run / "run.yaml").exists():
        assert time.monotonic() < deadline and leader.poll() is None, (tmp_path / f"{first}.log").read_text()
        time.sleep(0.2)
    follower = on(second, tmp_path, "join", "runs/two")
    while not list_checkpoints(run / "rounds" / "1" / "checkpoint"):
        assert time.monotonic() < deadline and leader.poll() is None, (tmp_path / f"{first}.log").read_text()
        time.sleep(0.1)
    kill_host(follower)
    follower = on(second, tmp_path, "join", "runs/two")
    assert leader.wait(600) == 0, (tmp_path / f"{first}.log").read_text()
    assert follower.wait(600) == 0, (tmp_path / f"{second}.log").read_text()
    assert "restarting (1 of 3)" in (run / "logs" / "train-1.log").read_text()
    alone = on(first, tmp_path, "run", "config.yaml", "--set", "name=alone")
    assert alone.wait(600) == 0, (tmp_path / f"{first}.log").read_text()
    for file, columns in (("seen", ("step", "shard", "sample", "loss")), ("losses", ("sample", "loss"))):
        mine, theirs = (
            read_rows(tmp_path / "runs" / name / "rounds" / "1" / file, *columns) for name in ("two", "alone")
        )
        assert mine == theirs
