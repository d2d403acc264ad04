"""What ranks are given by their launcher."""

from pathlib import Path

import pytest

from flows.launch.torchrun import rank_environment
from flows.run.config import parse_config
from flows.stages.train import launch_plan
from tests.flows.fakes import values
from trainer.checkpoint_folder import seconds_to_stop


def test_ranks_have_the_time_to_save_that_their_checkpoint_takes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """995.6 M parameters of 14 bytes, four times at 400 MB a second, beside the 20 seconds that everybody has."""
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert seconds_to_stop(995_600_000 * 14) == pytest.approx(20 + 4 * 995.6 * 14 / 400)
    assert rank_environment(None, 89.69)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    slurm = {"launch": {"kind": "slurm"}, "device": "cuda"}
    large = launch_plan(
        parse_config({**values(texts, tmp_path), **slurm, "model": {"preset": "pangu-pi-1b-pro"}}, "test"), ()
    )
    assert "#SBATCH --signal=TERM@160\n" in large
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=160\n" in large
    small = launch_plan(parse_config({**values(texts, tmp_path), **slurm}, "test"), ())
    assert "--signal" not in small
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=21\n" in small


SETTINGS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_devices_are_the_user_s_own_where_they_are_set(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (*SETTINGS, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    slurm = {"launch": {"kind": "slurm"}, "device": "cuda"}

    def script() -> str:
        return launch_plan(parse_config({**values(texts, tmp_path), **slurm}, "test"), ())

    assert rank_environment(None, 20).items() >= SETTINGS.items()
    assert f"export {name}={SETTINGS[name]}\n" in script()
    monkeypatch.setenv(name, "own")
    assert rank_environment(None, 20)[name] == "own"
    assert f"export {name}=own\n" in script()


def test_torch_s_common_setting_of_allocators_replaces_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    environment = rank_environment(None, 20)
    assert environment["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    assert not environment.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"}
