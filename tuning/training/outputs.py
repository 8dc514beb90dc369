"""The folder of a run's frozen outputs, without torch, which the driver does not load."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tuning.settings.config import InputError


@contextmanager
def run_folder(cache: Path, run: Path) -> Iterator[Path]:
    """Make an empty folder for a run's outputs in `cache`, delete it when the run ends, and delete those of dead runs.

    Raises:
        InputError: another process works on the same run.
    """
    folders = cache / "features"
    folders.mkdir(parents=True, exist_ok=True)
    name = f"{run.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
    folder, own_lock = folders / name, folders / f"{name}.lock"
    for lock in set(folders.glob("*.lock")) - {own_lock}:
        with open(lock, "a") as file:
            if _locks(file):  # else that run is alive
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
    with open(own_lock, "a") as file:
        if not _locks(file):
            raise InputError(f"{run}: another process works on this run; wait for it or stop it")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():  # else a killed worker was still writing: the next run cleans up
                own_lock.unlink(missing_ok=True)


def _locks(file: IO[str]) -> bool:
    """Lock an open file unless another process has; the lock ends with the file or the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
