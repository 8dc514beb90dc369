"""Backbones and their weights, found and checked in another process, since the driver loads no torch.

The question lies in a folder, with the answer of the process that has taken it: a worker that has loaded torch and has
no trial yet, or one that is started for it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tuning.record.tables import replacing
from tuning.settings.config import InputError, SearchPlan, cache_folder, check_value
from tuning.settings.values import Weights
from tuning.training.digests import plain, weights_of

Found = tuple[dict[str, Weights | None], list[str]]  # by backbone, and a line for each that is not timm's own file
Within = Callable[[float], Found | None]
FOLDER = "FINETUNE_SEARCH_CHECK"  # the environment's variable that names the folder
TAKEN_SECONDS = 60.0  # within which a worker has taken the question; else a process is started
LOOK_SECONDS = 0.05
VERSION = 2  # raised with any change of what is checked
MOST_REMEMBERED = 1000  # backbones with their sizes and files


@contextmanager
def weights_checked(
    sizes: Mapping[str, Sequence[int]], weights: str | Mapping[str, Weights], *, by_worker: bool = False
) -> Iterator[Within]:
    """Have another process find and check weights, unless this one has loaded torch.

    Args:
        by_worker: whether workers that start meanwhile call `answer`.

    Yields:
        A function that waits for some seconds, and returns each backbone's weights (None if they are random) and what
        to say of them, or None if they aren't known yet.

        Raises:
            InputError: as `find_weights` and `backbones.check` do, or the process that was started for it has died.
    """
    if "torch" in sys.modules:
        done = _checked(sizes, weights)
        yield lambda seconds: done
        return
    with ExitStack() as end:
        folder = Path(end.enter_context(tempfile.TemporaryDirectory(prefix="finetune-search-")))
        question = [sizes, weights if isinstance(weights, str) else plain(weights)]
        (folder / "question").write_text(json.dumps(question))
        os.environ[FOLDER] = str(folder)
        end.callback(os.environ.pop, FOLDER, None)
        started, process = time.monotonic(), None

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", f"from {__name__} import answer; answer()"]
            # In a session of its own, since Ctrl-C is for the driver; what a download shows goes to the terminal.
            begun = subprocess.Popen(
                command, env=package_environment(), stdin=subprocess.DEVNULL, start_new_session=True
            )
            end.callback(begun.wait)
            end.callback(begun.kill)
            return begun

        def known(seconds: float) -> Found | None:
            nonlocal process
            until = time.monotonic() + seconds
            while not (folder / "answer").exists():
                ended = process is None or process.poll() is not None
                if ended and not _at_work(folder) and not (folder / "answer").exists():
                    if process is not None:
                        why = f"the process that checks the backbones ended with status {process.returncode}"
                        raise InputError(f"weights: {why}; is there enough memory? Start again")
                    if (folder / "taken").exists() or time.monotonic() > started + TAKEN_SECONDS:  # it died, or is late
                        (folder / "taken").unlink(missing_ok=True)
                        process = start()
                if time.monotonic() >= until:
                    return None
                time.sleep(LOOK_SECONDS)
            found = json.loads((folder / "answer").read_text())
            if "error" in found:
                raise RuntimeError(found["error"])
            if "faults" in found:
                raise InputError(found["faults"])
            return weights_of(found["weights"]), found["said"]

        if not by_worker:
            process = start()
        yield known


def package_environment() -> dict[str, str]:
    """Return this process's environment for another that imports this package."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def answer() -> None:
    """Answer the question in the folder that the environment names, if there is one that no other process has taken."""
    folder = Path(os.environ.get(FOLDER, os.devnull))
    try:
        sizes, given = json.loads((folder / "question").read_text())
        with open(folder / "taken", "x") as file:
            file.write(str(os.getpid()))
    except OSError:
        return
    try:
        weights, said = _checked(sizes, check_value(SearchPlan, "weights", given))
        found: dict[str, Any] = {"weights": plain(weights), "said": said}
    except InputError as error:
        found = {"faults": error.faults}
    except Exception:
        found = {"error": traceback.format_exc()}
    with suppress(OSError), replacing(folder / "answer") as temporary:  # the folder goes with the driver
        temporary.write_text(json.dumps(found))


def _checked(sizes: Mapping[str, Sequence[int]], weights: str | Mapping[str, Weights]) -> Found:
    """Find each backbone's weights as `find_weights` does, and `backbones.check` them at its image sizes.

    What has been checked is remembered on this machine: building three small backbones takes more than a second.

    Raises:
        InputError: as both do.
    """
    import timm
    import torch

    from tuning.training.backbones import check  # finds a damaged file or an impossible image size before trials do
    from tuning.training.weights import find_weights

    found, place = find_weights(list(sizes), weights), cache_folder() / "checked.json"
    try:
        known = json.loads(place.read_text())
    except (OSError, ValueError):
        known = None
    known = known if isinstance(known, list) else []
    remembered = {json.dumps(entry[:-1]): entry[-1] for entry in known if isinstance(entry, list) and entry}
    new, lines = [], []
    for backbone, given in found.items():
        stamp = None
        if given is not None:
            status = given.file.stat()
            stamp = [str(given.file), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = [VERSION, backbone, sorted(sizes[backbone]), stamp, timm.__version__, str(torch.__version__)]
        if (said := remembered.get(json.dumps(entry))) is None:
            said = check(backbone, sizes[backbone], given)
            new.append([*entry, said])
        if said and given is not None:
            lines.append(f"{backbone}: {given.file}: {said}")
    if new:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as temporary:
                temporary.write_text(json.dumps([*known, *new][-MOST_REMEMBERED:]))
    return found, lines


def _at_work(folder: Path) -> bool:
    """Return whether a process has taken the question, and is there."""
    try:
        os.kill(int((folder / "taken").read_text()), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, ValueError):  # another user's, or it has just taken it
        return True
    return True
