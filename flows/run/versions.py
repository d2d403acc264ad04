"""The versions of Reprise, Python and the packages that results depend on, without importing these."""

import importlib.metadata
import platform

# The name under which Reprise is installed; on package indexes, `reprise` is another project.
DISTRIBUTION = "reprise-lm"
_PACKAGES = ("torch", "megatron-core", "datasets", "tokenizers", "pyarrow", "duckdb", "prefect", "numpy")


def reprise_version() -> str:
    """Return the version of Reprise."""
    return importlib.metadata.version(DISTRIBUTION)


def package_versions() -> dict[str, str]:
    """Return the versions of Python, Reprise and the packages that results depend on."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"reprise": reprise_version(), "python": platform.python_version(), **versions}


def version_line() -> str:
    """Return the version of Reprise and those of what it trains with, as one line."""
    training = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES[:2])
    return f"reprise {reprise_version()} (Python {platform.python_version()}, {training})"
