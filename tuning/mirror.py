"""A run that lies in a storage: a copy on this machine that all else works with, and what keeps the two alike.

The journal goes there in segments, for objects can't be appended to; everything else goes whole.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tuning.config import InputError
from tuning.images import cache_folder
from tuning.storage import Stored, delete, files_below, is_uri, joined, read_bytes, stored, write_bytes
from tuning.tables import replacing

SYNC_SECONDS = 5.0
LAST_TRIES, LAST_TRY_SECONDS = 4, 5.0  # at the end of a search, for a storage that fails
CLAIM_SECONDS = 60.0  # a driver that has not been heard of for so long is gone
JOURNAL, SEGMENTS, CLAIM = "journal.jsonl", "journal/", "driver.json"
OTHERS = ("checkpoints/", "predictions/")  # what other nodes write


def run_folder(storage: str, name: str) -> Path:
    """Where a run's files lie on this machine: in the folder itself, or in the copy of what is in a storage."""
    if not is_uri(storage):
        return Path(storage) / name
    return copies(joined(storage, name)) / name


def copies(uri: str) -> Path:
    """The folder in this machine's cache that a run's copy is in."""
    return cache_folder() / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]


@contextmanager
def mirrored(folder: Path, storage: str) -> Iterator["Mirror | None"]:
    """Keep a run's folder and its copy in a storage alike while it is searched; null where it lies on this machine.

    At the end the copy on this machine goes, unless the storage has failed.

    Raises:
        InputError: another driver writes the run, or the storage can't be written.
    """
    if not is_uri(storage):
        yield None
        return
    uri = joined(storage, folder.name)
    mirror = Mirror(folder, uri)
    if folder.exists():
        with _failure_told(uri):
            mirror.fetch()
    mirror.start()
    try:
        yield mirror
    finally:
        if mirror.close():
            shutil.rmtree(folder.parent, ignore_errors=True)
        else:
            print(f"{uri}: the end of this run couldn't be sent; it is in {folder}, --resume sends it", file=sys.stderr)


def fetch(folder: Path, uri: str) -> None:
    """Bring a run here that is to go on.

    Raises:
        InputError: another driver writes it, or the storage fails.
    """
    mirror = Mirror(folder, uri)
    with _failure_told(uri):
        mirror.check_claim()
        mirror.fetch()


@contextmanager
def borrowed(place: str, *, without: tuple[str, ...] = ()) -> Iterator[Path]:
    """A run's folder, or a copy of what is in a storage that is sent back where it was changed.

    Args:
        place: a folder, or a URI.
        without: beginnings of names that a copy isn't to have.

    Raises:
        InputError: nothing is there, or the storage fails.
    """
    if not is_uri(place):
        yield Path(place)
        return
    (cache_folder() / "runs").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache_folder() / "runs")) / place.rstrip("/").rpartition("/")[2]
    mirror = Mirror(folder, place.rstrip("/"))
    with _failure_told(place):
        mirror.fetch(without)
    try:
        yield folder
    except InputError as error:  # the copy isn't there for long
        raise InputError([fault.replace(str(folder), mirror.uri) for fault in error.faults]) from None
    finally:  # also what an interrupted command has noted, such as a reading of the test set
        if mirror.sent_at_last():
            shutil.rmtree(folder.parent, ignore_errors=True)
        else:
            print(f"{place}: what was made couldn't be sent; it is in {folder}", file=sys.stderr)


@contextmanager
def _failure_told(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: {error}; is the storage reached, and are its keys given?") from None


class Mirror:
    """Keeps the copy of a run in a storage like the one on this machine.

    Args:
        folder: on this machine.
        uri: of the run in the storage.
    """

    def __init__(self, folder: Path, uri: str):
        self.folder, self.uri = folder, uri
        self.elsewhere: dict[str, int] = {}  # bytes of checkpoints that other nodes have put there
        self._sent: dict[str, tuple[int, int]] = {}  # size and time here of what is there
        self._doomed: set[str] = set()
        self._journal_bytes = self._segments = 0
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._keep_alike, daemon=True)
        self._failing = False
        self._lock = threading.Lock()  # for `_sent`
        self._claimed_at = -CLAIM_SECONDS

    def fetch(self, without: tuple[str, ...] = ()) -> None:
        """Bring here what is there, but for files that are newer here, and names that begin as in `without`.

        A journal that begins as the one there is kept: a driver that was killed on this machine hadn't sent its end.

        Raises:
            OSError: the storage fails.
        """
        there = files_below(self.uri)
        segments = sorted(name for name in there if name.startswith(SEGMENTS))
        journal = b"".join(read_bytes(joined(self.uri, name)) for name in segments)
        self._journal_bytes, self._segments = len(journal), len(segments)
        path = self.folder / JOURNAL
        if segments and not (path.exists() and path.read_bytes().startswith(journal)):
            _write(path, journal)
        for name in sorted(name for name in there if not name.startswith((SEGMENTS, CLAIM, *without))):
            if fetch_file(self.folder, self.uri, name, there[name]):  # what is newer here is yet to be sent
                self._sent[name] = _stamp(self.folder / name)

    def push(self) -> None:
        """Send there what has changed here.

        The plan goes last of the files, and the journal after it: where they are, what they need is there.

        Raises:
            OSError: the storage fails.
        """
        here = sorted(_files(self.folder), key=lambda name: (name == "plan.yaml", name))
        for name in here:
            with_stamp = _stamp(self.folder / name)
            if self._sent.get(name) != with_stamp:
                push_file(self.folder, self.uri, name)
                self._sent[name] = with_stamp
        for name in self._doomed | (self._sent.keys() - set(here)):
            delete(joined(self.uri, name))
            self._sent.pop(name, None)
            self._doomed.discard(name)
        self._push_journal()

    def _push_journal(self) -> None:
        path = self.folder / JOURNAL
        if not path.exists() or path.stat().st_size <= self._journal_bytes:
            return
        with open(path, "rb") as file:
            file.seek(self._journal_bytes)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole:
            write_bytes(joined(self.uri, f"{SEGMENTS}{self._segments + 1:08d}.jsonl"), whole)
            self._segments, self._journal_bytes = self._segments + 1, self._journal_bytes + len(whole)

    def forget(self, name: str) -> None:
        """Delete a file that another node has put there, with the next sending."""
        self.elsewhere.pop(name, None)
        self._doomed.add(name)

    def fetch_others(self) -> None:
        """Bring here the weights and predictions that other nodes have put there; a storage that fails is told."""
        try:
            with self._lock:
                for name, there in files_below(self.uri).items():
                    if name.startswith(OTHERS) and name not in self._sent and not (self.folder / name).exists():
                        fetch_file(self.folder, self.uri, name, there)
                        self._sent[name] = _stamp(self.folder / name)
        except OSError as error:
            print(f"{self.uri}: what other nodes left can't be read ({error})", file=sys.stderr)

    def start(self) -> None:
        """Send what changes from now on, every few seconds, beside what this process does.

        Raises:
            InputError: another driver writes this run, or the storage can't be written.
        """
        with _failure_told(self.uri):
            self.check_claim()
            self._write_claim()
        self._thread.start()

    def close(self) -> bool:
        """Send the last changes; false where the storage goes on failing. What is here then stays."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        return self.sent_at_last() and self._unclaimed()

    def sent_at_last(self) -> bool:
        """Send what has changed, tried again a few times; false where the storage goes on failing."""
        for _ in range(LAST_TRIES):
            if self._pushed(claim=False):
                return True
            time.sleep(LAST_TRY_SECONDS)
        return False

    def push_first(self) -> None:
        """Send a new run before its trials start: nodes read its samples there.

        Raises:
            InputError: the storage can't be written.
        """
        with _failure_told(self.uri), self._lock:
            self.push()

    def _keep_alike(self) -> None:
        while not self._stop.wait(SYNC_SECONDS):
            self._pushed()

    def _pushed(self, *, claim: bool = True) -> bool:
        """Whether the storage took it; a failure is told once, and what failed is sent again the next time."""
        try:
            with self._lock:
                self.push()
            if claim and time.monotonic() - self._claimed_at > CLAIM_SECONDS / 3:
                self._write_claim()
            mine = {f"checkpoints/{path.name}" for path in (self.folder / "checkpoints").glob("[!.]*")}
            there = files_below(joined(self.uri, "checkpoints"))
            sizes = {f"checkpoints/{name}": known.size for name, known in there.items()}
            self.elsewhere = {name: size for name, size in sizes.items() if name not in mine}
        except OSError as error:
            if not self._failing:
                cure = f"it is kept in {self.folder} and sent again"
                print(f"{self.uri}: the storage fails ({error}); {cure}", file=sys.stderr)
            self._failing = True
            return False
        if self._failing:
            print(f"{self.uri}: the storage works again", file=sys.stderr)
        self._failing = False
        return True

    def check_claim(self) -> None:
        """Raises InputError where another driver writes the run."""
        place = joined(self.uri, CLAIM)
        if stored([place]) == [None]:
            return
        try:
            said = json.loads(read_bytes(place))
        except ValueError:  # half written
            return
        gone = said["host"] == platform.node() and not Path(f"/proc/{said['pid']}").exists()
        if not gone and time.time() - said["time"] < CLAIM_SECONDS:
            cure = f"stop it, or wait {CLAIM_SECONDS:.0f} s if it has crashed"
            raise InputError(f"{self.uri}: another search, on {said['host']}, is writing this run; {cure}")

    def _unclaimed(self) -> bool:
        try:
            delete(joined(self.uri, CLAIM))
        except OSError:
            return False
        return True

    def _write_claim(self) -> None:
        """Note in the storage that this process writes the run."""
        claim = {"host": platform.node(), "pid": os.getpid(), "time": time.time()}
        write_bytes(joined(self.uri, CLAIM), json.dumps(claim).encode())
        self._claimed_at = time.monotonic()


def fetch_file(folder: Path, uri: str, name: str, there: Stored) -> bool:
    """Bring a file here, unless the one here is newer; says whether it was brought.

    Raises:
        InputError: its name leads out of the folder.
    """
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise InputError(f"{uri}: holds a file {name!r}, whose name leads out of the run's folder; take it away")
    path = folder / name
    if path.exists() and path.stat().st_mtime_ns >= there.mtime_ns:
        return False
    _write(path, read_bytes(joined(uri, name)))
    return True


def fetch_files(folder: Path, uri: str, names: Iterable[str]) -> None:
    """Bring files here that are there: all of them, or none where the last of them is newer here."""
    names = list(names)
    there = stored([joined(uri, name) for name in names])
    last = folder / names[-1]
    newest = there[-1]
    if last.exists() and (newest is None or last.stat().st_mtime_ns >= newest.mtime_ns):
        return
    for name, known in zip(names, there, strict=True):
        if known is not None:
            _write(folder / name, read_bytes(joined(uri, name)))


def push_file(folder: Path, uri: str, name: str) -> None:
    """Send a file there; one that has gone meanwhile is left out."""
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        return
    write_bytes(joined(uri, name), content)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _files(folder: Path) -> list[str]:
    """Names of a run's files, without the journal and what is half written."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if name != JOURNAL and not any(part.startswith(".") for part in name.split(os.sep))]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns
