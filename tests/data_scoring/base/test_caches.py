import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import os
from data_scoring.base.caches import provide_caches
before = dict(os.environ)
provide_caches()
added = {name: path for name, path in os.environ.items() if before.get(name) != path}
assert all(os.access(path, os.W_OK) for path in added.values())
print(*sorted(added))
print(*{os.path.dirname(path) for path in added.values()})
"""
_NAMES = "HF_DATASETS_CACHE HF_HUB_CACHE HF_MODULES_CACHE HF_XET_CACHE MPLCONFIGDIR PREFECT_HOME TRITON_CACHE_DIR"


def added(home: str, tmp_path: Path, **more: str) -> tuple[str, str]:
    """Return the variables that a process with this home gets, and the folder that they name."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "HOME": home, "TMPDIR": str(tmp_path), **more}
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    names, folder = done.stdout.splitlines()
    return names, folder


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "/proc/none/home"])
def test_a_home_that_cannot_be_written_to_is_not_needed(home: str, tmp_path: Path) -> None:
    names, folder = added(home, tmp_path)
    assert names == _NAMES
    assert Path(folder).parent == tmp_path
    # It goes when the process ends.
    assert list(tmp_path.iterdir()) == []


def test_a_home_is_used_and_so_is_what_the_user_has_set(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert added(str(home), tmp_path) == ("", "")
    assert list(home.iterdir()) == []
    names, _ = added("/proc", tmp_path, HF_HOME=str(home), PREFECT_HOME="/set", XDG_CONFIG_HOME=str(home))
    assert names == "TRITON_CACHE_DIR"
