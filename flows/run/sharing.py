"""Sharing of finished folders between runs, by hard links."""

import os
import shutil
from pathlib import Path

from data_scoring.base.files import commit
from data_scoring.contamination import contaminated_samples
from data_scoring.refine import near_duplicates


def share(source: Path, target: Path) -> int:
    """Copy the finished folder `source` to `target`, atomically, with hard links where possible.

    Files of a run are replaced and never modified, so neither side sees later changes of the other. Returns the bytes
    of the files that were copied because they could not be linked, for example to another file system.
    """
    if target.exists():
        return 0
    temporary = target.with_name(f".{target.name}.sharing")
    shutil.rmtree(temporary, ignore_errors=True)
    ignored = shutil.ignore_patterns(".told-*", ".*.tmp", near_duplicates.SCRATCH, contaminated_samples.SCRATCH)
    num_bytes = 0

    def link(source: str, target: str) -> None:
        nonlocal num_bytes
        try:
            os.link(source, target)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copy2(source, target)
            num_bytes += Path(target).stat().st_size

    shutil.copytree(source, temporary, symlinks=True, ignore=ignored, copy_function=link)
    commit(temporary, target)
    return num_bytes
