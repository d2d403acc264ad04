"""Folders that libraries keep for themselves in the user's home, where the home cannot be written to."""

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path


def provide_caches() -> None:
    """Make libraries use a temporary folder, deleted when this process ends, instead of folders that are read-only.

    Call this before such a library is imported. Variables that the user has set stay as they are; so does a folder of
    downloads that exists, which can still be read.
    """
    cache, config = (os.environ.get(f"XDG_{kind.upper()}_HOME", f"~/.{kind}") for kind in ("cache", "config"))
    hugging_face = os.environ.get("HF_HOME", f"{cache}/huggingface")
    defaults = {
        "HF_DATASETS_CACHE": f"{hugging_face}/datasets",
        "HF_HUB_CACHE": f"{hugging_face}/hub",
        "HF_MODULES_CACHE": f"{hugging_face}/modules",
        "HF_XET_CACHE": f"{hugging_face}/xet",
        "MPLCONFIGDIR": f"{config}/matplotlib",
        "PREFECT_HOME": "~/.prefect",
        "TRITON_CACHE_DIR": f"{os.environ.get('TRITON_HOME', '~')}/.triton/cache",
    }
    missing = [name for name, path in defaults.items() if name not in os.environ and not _is_writable(path)]
    if os.path.isdir(os.path.expanduser(defaults["HF_HUB_CACHE"])):  # noqa: PTH111, PTH112 - as below
        missing = [name for name in missing if name != "HF_HUB_CACHE"]
    if not missing:
        return
    place = Path(tempfile.mkdtemp(prefix="reprise-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for name in missing:
        os.environ[name] = str(place / name.lower())
        Path(os.environ[name]).mkdir()


def _is_writable(path: str) -> bool:
    """Return whether the folder `path` can be written to, or made."""
    expanded = os.path.expanduser(path)  # noqa: PTH111 - pathlib raises if there is no home
    if expanded.startswith("~"):
        return False
    folder = Path(expanded)
    while not os.path.lexists(folder):
        folder = folder.parent
    return _takes_files(folder)


@cache
def _takes_files(folder: Path) -> bool:
    # Permissions alone do not say: the file system may be read-only, or its server may not trust this user.
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
