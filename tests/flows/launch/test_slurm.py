"""Ranks in the hands of a real Slurm, of one node."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from data_scoring.base.files import read_json
from data_scoring.base.progress import silent
from flows.launch.slurm import SlurmLauncher, script
from flows.run.config import LaunchConfig, SlurmConfig, parse_config
from flows.run.folder import Run, open_run
from flows.run.locks import locked
from flows.stages.stage_order import complete_all, steps_of
from tests import ROOT
from tests.conftest import Ranks, make_documents, read_rows
from tests.flows.equal_runs import assert_equal_runs
from tests.flows.orchestration.place import wait_for
from trainer.checkpoint_folder import list_checkpoints
from trainer.job import Job

CONFIG = """
name: slurm
device: cpu
corpus: {sources: [{name: a, path: a.jsonl}], seq_length: 32, num_shards: 4}
tokenizer: {vocab_size: 300}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}
train: {global_batch_size: 4, micro_batch_size: 2, lr: 1.0e-2}
parallel: {data: 2}
checkpoint: {every_steps: 20}
launch: {kind: slurm, slurm: {partition: tiny, time_limit: "10", cpus_per_rank: 1}}
"""
CLUSTER = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/affinity
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=tiny Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    needed = ("munged", "slurmctld", "slurmd", "sbatch")
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm ({', '.join(missing)})")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CLUSTER.format(host=platform.node(), folder=folder))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    munge = subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground", "--force"], stderr=-3)
    wait_for("munge", lambda: subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0)
    daemons = [subprocess.Popen([name, "-D"], env=environment) for name in ("slurmctld", "slurmd")]
    wait_for("a node", lambda: "idle" in ask(environment, "sinfo", "--noheader", "--format=%t"))
    yield environment
    for daemon in [*daemons, munge]:
        daemon.terminate()
        daemon.wait(30)


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


class Place:
    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {**environment, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
        self.run = folder / "runs" / "slurm"
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_documents(500)))
        (folder / "config.yaml").write_text(CONFIG)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.cli.main", "run", "config.yaml", *arguments],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True,
            )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def jobs(self) -> list[str]:
        return ask(self.environment, "squeue", "--noheader", "--format=%i %T").splitlines()

    def wait_for_checkpoint(self, number: int = 1) -> None:
        folder = self.run / "rounds" / "1" / "checkpoint"
        wait_for(
            "a checkpoint", lambda: [path for path in list_checkpoints(folder) if path.name >= f"step-{number:08d}"]
        )


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_is_submitted_followed_cancelled_requeued_and_found_again(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    place = Place(tmp_path, cluster)
    first = place.start()
    place.wait_for_checkpoint()
    [job] = place.jobs()
    # A launcher that is killed leaves its job alone, and the next one finds it.
    first.kill()
    first.wait()
    second = place.start()
    wait_for("the job to be followed", lambda: (place.run / ".lock").exists() and place.jobs() == [job])
    time.sleep(5)
    assert place.jobs() == [job]
    number = job.split()[0]
    ask(cluster, "scontrol", "requeue", number)
    wait_for("another attempt", lambda: f"{number} RUNNING" in place.jobs() and not second.poll(), 200)
    place.wait_for_checkpoint(21)
    # Ctrl-C cancels it.
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130, place.said()
    assert place.jobs() == []
    third = place.start()
    assert third.wait(300) == 0, place.said()
    assert read_json(place.run / "logs" / "train-1.slurm.json")["id"] != number
    alone = place.start("--set", "name=alone", "--set", "launch.kind=local")
    assert alone.wait(300) == 0, place.said()
    for file, columns in (("seen", ("step", "shard", "sample", "loss")), ("losses", ("sample", "loss"))):
        mine, theirs = (
            read_rows(tmp_path / "runs" / name / "rounds" / "1" / file, *columns) for name in ("slurm", "alone")
        )
        assert mine == theirs


@pytest.fixture
def place(tmp_path: Path, cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place whose runs work in this process, by `work_here`."""
    place = Place(tmp_path, cluster)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return place


def work_here(name: str, kind: str) -> Run:
    values = yaml.safe_load(CONFIG)
    config = parse_config({**values, "name": name, "launch": {**values["launch"], "kind": kind}}, "test")
    with locked(config.folder):
        run = open_run(config)
        complete_all(run, steps_of(config), silent)
    return run


@pytest.mark.slow
@pytest.mark.slurm
def test_a_round_trains_and_scores_in_one_slurm_job(place: Place) -> None:
    run = work_here("slurm", "slurm")
    logs = run.folder / "logs"
    assert {path.name for path in logs.glob("*.sbatch")} == {"train-1.sbatch", "train-2.sbatch"}
    of_training, of_scoring, of_next = (
        read_json(logs / f"{job}.slurm.json")["id"] for job in ("train-1", "score-1", "train-2")
    )
    assert of_training == of_scoring != of_next
    assert place.jobs() == []
    assert_equal_runs(run.folder, work_here("alone", "local").folder)


@pytest.mark.slow
@pytest.mark.slurm
def test_scoring_gets_a_job_of_its_own_if_its_rounds_is_cancelled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job ends after training, before its ranks receive the scoring."""
    hand_over, cancelled = SlurmLauncher.hand_over, list[str]()

    def cancel(launcher: SlurmLauncher, job: Job, name: str) -> None:
        if not cancelled:
            cancelled.append(launcher.id)
            ask(place.environment, "scancel", launcher.id)
            wait_for("the job's end", lambda: not place.jobs())
        hand_over(launcher, job, name)

    monkeypatch.setattr(SlurmLauncher, "hand_over", cancel)
    run = work_here("slurm", "slurm")
    logs = run.folder / "logs"
    assert (logs / "score-1.sbatch").exists()
    assert [read_json(logs / "train-1.slurm.json")["id"]] == cancelled
    assert read_json(logs / "score-1.slurm.json")["id"] not in cancelled
    assert place.jobs() == []
    assert_equal_runs(run.folder, work_here("alone", "local").folder)


@pytest.mark.slow
@pytest.mark.slurm
def test_ranks_have_the_cpus_that_are_asked_for(ranks: Ranks, tmp_path: Path, cluster: dict[str, str]) -> None:
    """Of a node's two CPUs one rank that asks for one has one, and two ranks have both between them."""
    for num_ranks in (1, 2):
        launch = LaunchConfig(kind="slurm", slurm=SlurmConfig(partition="tiny", cpus_per_rank=1))
        log = tmp_path / f"{num_ranks}.log"
        text = script(ranks.job("cpus", (1, 1, num_ranks)), tmp_path / "x.job.json", f"cpus-{num_ranks}", log, launch)
        # In place of a worker, torchrun starts what says how many CPUs it may run on; OpenMP's setting would be heeded.
        path = tmp_path / f"{num_ranks}.sbatch"
        path.write_text(text.replace("-m trainer.worker", "--no-python env -u OMP_NUM_THREADS nproc #"))
        subprocess.run(["sbatch", "--wait", path], env={**cluster, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
        seen = set(re.findall(r"\[rank (\d)\]: *(\d+)$", log.read_text(), re.MULTILINE))
        assert seen == {(str(rank), str(num_ranks)) for rank in range(num_ranks)}


def test_cpus_that_the_options_name_hold(ranks: Ranks, tmp_path: Path) -> None:
    arguments = ranks.job("cpus", (1, 1, 8)), tmp_path / "job.json", "train-1", tmp_path / "log"
    assert "#SBATCH --cpus-per-task=16\n" in script(*arguments, LaunchConfig(kind="slurm", nodes=2))
    for option in ("--cpus-per-task=12", "--cpus-per-gpu=12"):
        text = script(*arguments, LaunchConfig(kind="slurm", nodes=2, slurm=SlurmConfig(options=(option,))))
        assert re.findall("--cpus.*", text) == [option]


def test_the_script_quotes_what_it_is_given(ranks: Ranks, tmp_path: Path) -> None:
    job = ranks.job("quoted")
    launch = LaunchConfig(
        kind="slurm", slurm=SlurmConfig(partition="gpu", time_limit="1-00:00:00", options=("--exclusive",))
    )
    text = script(job, tmp_path / "a b$(touch x)" / "train.job.json", "train-1", tmp_path / "it's.log", launch)
    assert "#SBATCH --partition=gpu\n" in text
    assert "#SBATCH --exclusive\n" in text
    assert f"'{tmp_path}/a b$(touch x)/train.job.json'" in text
    (tmp_path / "script").write_text(
        text.replace("exec srun", "exec echo cpus $SRUN_CPUS_PER_TASK").replace("$(scontrol", "$(echo")
    )
    environment = {**os.environ, "SLURM_JOB_NODELIST": "h", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    command = ["bash", str(tmp_path / "script")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(f"-m trainer.worker {tmp_path}/a b$(touch x)/train.job.json")
    assert "--rdzv-id 7-0 " in done.stdout
    assert done.stdout.startswith("cpus 4 ")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Commands of a Slurm that answers what it is told to."""

    def answer(command: str, script: str) -> None:
        (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / command).chmod(0o755)

    for command in ("sbatch", "squeue", "scontrol", "scancel"):
        answer(command, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    return answer


def test_a_controller_that_is_away_is_waited_for(
    ranks: Ranks, tmp_path: Path, answers: Callable[[str, str], None]
) -> None:
    answers("sbatch", "echo 7")
    found = SlurmLauncher(ranks.job("away"), "away", tmp_path, LaunchConfig(kind="slurm"))
    found.job_path.parent.mkdir()
    found.start()
    for state, answer, code in (
        ("PENDING", "echo JobState=PENDING", None),
        ("UNREACHABLE", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", None),
        ("RUNNING", "echo JobState=RUNNING", None),
        ("NODE_FAIL", "echo JobState=NODE_FAIL", 1),
        ("COMPLETED", "echo JobState=COMPLETED", 0),
    ):
        answers("squeue", answer)
        found._last_poll = 0.0
        assert (found.poll(), found.state) == (code, state)
    answers("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    answers("scontrol", "echo JobId=7 JobState=COMPLETED Reason=None")
    found._last_poll = 0.0
    assert found.poll() == 0


@pytest.mark.parametrize("value", ["gpu; rm -rf /", "$(id)", "a b", "-x\n#SBATCH --uid=0"])
def test_what_is_not_a_word_does_not_reach_slurm(value: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        SlurmConfig(partition=value)
    with pytest.raises(ValueError, match="pattern"):
        SlurmConfig(options=(f"--comment={value}",))


@pytest.mark.parametrize("option", ["--error=/root/x", "--output=x", "--chdir=/", "--uid=0", "--wrap=id", "-o x"])
def test_options_that_name_files_or_users_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        SlurmConfig(options=(option,))
    SlurmConfig(options=("--constraint=a100&nvlink", "--exclusive", "--mem=0", "--signal=TERM@90"))


def test_a_line_break_in_a_path_is_no_command(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: '.*\\ntouch x' contains a control character"):
        script(
            ranks.job("broken"), tmp_path / "job.json", "train-1", tmp_path / "a\ntouch x", LaunchConfig(kind="slurm")
        )
