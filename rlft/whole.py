"""Files that are whole or not there: written under a temporary name, then renamed. What a kill left is swept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING, REMOVING = ".writing-", ".removing-"
PLACES = (".", "rollouts", "eval", "checkpoints", "skipped")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, which becomes `path` when all went well; else nothing is left of it."""
    scratch = path.with_name(f".{path.name}{WRITING}{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def remove(folder: Path) -> None:
    """Remove a folder that has a meaning: first its name, so that a kill never leaves half of it under that name."""
    gone = folder.with_name(f"{REMOVING}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone)


def scraps(folder: Path) -> list[Path]:
    """What has a temporary name in a run's folder. Of a killed process, where nobody else may write there now."""
    found = [path for place in PLACES for path in (folder / place).glob(".*")]
    return [path for path in found if WRITING in path.name or path.name.startswith(REMOVING)]


def sweep(folder: Path) -> None:
    """Remove what a killed process left in the run's folder half written or half removed."""
    for path in scraps(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
