"""The wheel: what is in it, and a run with it in an environment and a folder without the checkout."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.conftest import MakeOnce

PACKAGES = ("flows", "data_scoring", "trainer", "kernels")
SOURCES = (
    *PACKAGES,
    "configs",
    "docs",
    "prefect.yaml",
    "prefect.toml",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="session")
def built(make_once: MakeOnce) -> Path:
    """Return a folder with the sdist, the wheel made from it, and in `direct` the wheel made from the tree."""

    def build(folder: Path) -> None:
        # A copy: building writes into the tree, and a wheel may contain what an earlier build has left there.
        tree = folder / "tree"
        tree.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tree / name)
        _run(tree, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})")
        [sdist] = folder.glob("*.tar.gz")
        wheel = ("-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
        _run(folder, *wheel, str(folder), str(sdist))
        _run(folder, *wheel, str(folder / "direct"), str(tree))

    return make_once("distribution", build)


def _run(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Setuptools says so of a folder that it takes for a package, but that is not listed as one.
    assert "would be ignored" not in done.stdout + done.stderr


def _contents(folder: Path) -> dict[str, bytes]:
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(built: Path) -> None:
    expected: dict[str, bytes] = {}
    for package in PACKAGES:
        for folder, _, names in os.walk(ROOT / package, followlinks=True):
            paths = [Path(folder, name) for name in names if not name.endswith(".pyc")]
            expected |= {str(path.relative_to(ROOT)): path.read_bytes() for path in paths}
    found = _contents(built)
    own = {name: content for name, content in found.items() if ".dist-info/" not in name}
    assert own.keys() == expected.keys()
    assert own == expected
    assert {f"{package}/py.typed" for package in PACKAGES} < own.keys()
    assert "flows/project/template/configs/demo.yaml" in own


def test_the_sdist_builds_the_same_wheel_as_the_tree(built: Path) -> None:
    assert _contents(built) == _contents(built / "direct")


def test_pages_that_the_wheel_names_are_written_by_init(built: Path) -> None:
    contents = _contents(built)
    template = "flows/project/template/"
    pages = {name.removeprefix(template) for name in contents if name.startswith(f"{template}docs/")}
    texts = [content.decode() for name, content in contents.items() if name.endswith((".py", ".yaml"))]
    named = {page for text in texts for page in re.findall(r"\bdocs/[a-z-]+\.(?:md|ipynb)", text)}
    assert {"docs/study.md", "docs/python.md"} < named <= pages


def test_the_metadata_name_the_licence_and_the_command(built: Path) -> None:
    own = {name.partition(".dist-info/")[2]: content.decode() for name, content in _contents(built).items()}
    headers = own["METADATA"].partition("\n\n")[0].splitlines()
    assert {"Name: reprise-lm", "License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(headers)
    assert own["licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    assert "reprise = flows.cli.main:run" in own["entry_points.txt"]


class Wheel:
    """An environment that has the wheel and what it depends on, and a folder made by `reprise init`."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder = folder / "mine"
        self.bin = folder / "environment" / "bin"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", "PYTHON", "VIRTUAL_ENV", "REPRISE_"))
        }
        subprocess.run([sys.executable, "-m", "venv", str(self.bin.parent)], check=True)
        # Without constraints.txt, which the wheel's users do not have: the newest versions that it allows.
        self.run("pip", "install", "--quiet", "--disable-pip-version-check", str(wheel), cwd=folder)
        self.run("reprise", "init", "mine", cwd=folder)

    def run(self, command: str, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            [self.bin / command, *arguments],
            cwd=cwd or self.folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    [file] = built.glob("*.whl")
    return Wheel(tmp_path_factory.mktemp("wheel"), file)


@pytest.fixture
def served(wheel: Wheel) -> Iterator[dict[str, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [wheel.bin / "reprise", "serve", "--port", str(port)]
    log = wheel.folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=wheel.folder, env=wheel.environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 300
    while "Start a run" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(1)
    yield {"api": f"http://127.0.0.1:{port}/api", "reports": f"http://127.0.0.1:{port + 1}"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, log.read_text()


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(wheel: Wheel) -> None:
    assert "No broken requirements found" in wheel.run("pip", "check")
    where = wheel.run("python", "-c", "import flows; print(flows.__file__)")
    assert Path(where).is_relative_to(wheel.bin.parent)
    assert "--nproc-per-node 1" in wheel.run("reprise", "run", "mine.yaml", "--dry-run")
    wheel.run("reprise", "plan", "mine.yaml", "--assume", "1xh100")
    assert "runs/mine/report.html" in wheel.run("reprise", "run", "mine.yaml")
    assert "runs/mine/report.html" in wheel.run("reprise", "report", "runs/mine")
    assert re.search(r"│\s+2 │", wheel.run("reprise", "sql", "runs/mine", "select round from rounds order by round"))
    assert _stages_to_do(wheel, "runs/mine") == []


@pytest.mark.slow
def test_the_wheel_serves_its_deployments(wheel: Wheel, served: dict[str, Any]) -> None:
    said = wheel.run("prefect", "deployment", "run", "multi-round/production", "--watch", PREFECT_API_URL=served["api"])
    assert "Completed" in said
    assert _stages_to_do(wheel, "runs/production") == []
    with urllib.request.urlopen(f"{served['reports']}/production/report.html") as page:
        assert b"<h1>production</h1>" in page.read()


def _stages_to_do(wheel: Wheel, run: str) -> list[str]:
    stages = wheel.run("reprise", "status", run).splitlines()
    assert len(stages) == 7  # prepare; mix, train and score of round 1; refine, mix and train of round 2
    return [stage for stage in stages if " done" not in stage]
