"""What ranks and their launcher import: they run on machines that have little more than torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Torch with what it needs itself, megatron-core, and what reading corpora, jobs and configurations takes.
ALLOWED = {
    *("torch", "torchgen", "functorch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"),
    *("filelock", "typing_extensions", "megatron", "numpy"),
    # Torch needs it, and it brings these along.
    *("setuptools", "_distutils_hack", "distutils", "jaraco", "more_itertools", "backports"),
    *("pyarrow", "tokenizers", "sentencepiece", "psutil", "yaml", "_yaml", "packaging"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection"),
    *("pytest", "_pytest", "pluggy", "iniconfig", "pygments", "py"),
    *("tests", "flows", "data_scoring", "trainer", "kernels", "benchmarks"),
}
# Its copies go into exported folders, where transformers imports them.
EXPORTED = "trainer.modeling_reprise"
# The launcher imports it once it has connected to a Ray cluster.
ON_RAY = "flows.launch.ray_nodes"
# Finds neither more nor less than a machine would that has these packages and Python.
IMPORTER = """
import importlib, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

allowed = {*sys.argv[1].split(","), *sys.stdlib_module_names}
finders = [BuiltinImporter, FrozenImporter, PathFinder]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)

# What Python imports as it starts is found again, or not.
for name in [name for name in sys.modules if name.partition(".")[0] not in allowed and name != "__main__"]:
    del sys.modules[name]
sys.meta_path[:] = [Finder()]
for name in sys.argv[2:]:
    importlib.import_module(name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def import_all(modules: list[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-c", IMPORTER, ",".join(sorted(ALLOWED)), *modules]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}
    )


def modules_of(*folders: str) -> list[str]:
    files = [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    return [name for name in names if name not in (EXPORTED, ON_RAY)]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        pytest.param(modules_of("trainer", "kernels"), {"torch", "megatron", "pyarrow", "tokenizers"}, id="ranks"),
        pytest.param(modules_of("flows/launch"), {"pydantic", "psutil"}, id="launcher"),
        pytest.param([*modules_of("benchmarks/device"), "tests.conftest"], {"torch", "pyarrow"}, id="device-check"),
        pytest.param(
            ["data_scoring.corpus.prepare_corpus", "data_scoring.refine.refine_shards"],
            {"pyarrow", "tokenizers"},
            id="corpus",
        ),
    ],
)
def test_imports_no_more_than_a_machine_with_torch_has(modules: list[str], expected: set[str]) -> None:
    done = import_all(modules)
    assert done.returncode == 0, done.stderr
    assert expected <= set(done.stdout.split())


def test_a_package_beyond_them_is_not_found() -> None:
    done = import_all(["torch", "duckdb"])
    assert done.returncode != 0
    assert "ModuleNotFoundError: No module named 'duckdb'" in done.stderr
