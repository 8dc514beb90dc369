"""A run that lies in a storage: a copy on this machine that all else works with, and what keeps the two alike.

The journal goes there in segments; everything else goes whole.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tuning.record import claim, transfer
from tuning.record.claim import SEGMENTS, read_segments, segment, segments_among
from tuning.record.journal import lock
from tuning.record.storage import Stored, delete, files_below, is_uri, joined, write_bytes
from tuning.record.transfer import bring, fetch_file, patiently, push_file, write_file
from tuning.settings.config import InputError, cache_folder

SYNC_SECONDS = 5.0
JOURNAL = "journal.jsonl"
FORMER_CLAIM = "driver.json"  # of a version before; it says nothing now
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
    with _failure_told(uri):
        mirror.start()
    try:
        yield mirror
    finally:
        if mirror.close():
            shutil.rmtree(folder.parent, ignore_errors=True)
        else:
            print(f"{uri}: the end of this run couldn't be sent; it is in {folder}, --resume sends it", file=sys.stderr)
    if mirror.taken is not None:
        raise InputError(mirror.taken)


def fetch(folder: Path, uri: str) -> None:
    """Bring a run here that is to go on.

    Raises:
        InputError: another driver writes it, or the storage fails.
    """
    with _failure_told(uri):
        claim.check_free(uri)
        Mirror(folder, uri).fetch()


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
        self.claim: str | None = None  # the claim's name while this process is the run's driver
        self.taken: str | None = None  # why nothing more is sent: another driver writes the run
        self._sent: dict[str, tuple[int, int]] = {}  # size and time here of what is there
        self._there: dict[str, Stored] = {}  # what the storage said of files that other nodes write too
        self._doomed: set[str] = set()
        self._journal_bytes = 0
        self._stop, self._ended = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep_alike, self._keep_claim)]
        self._failing = False
        self._lock = threading.Lock()  # for `_sent` and `_there`

    # What is there comes here.

    def fetch(self, without: tuple[str, ...] = ()) -> None:
        """Bring here what is there, but for files that are newer here, and names that begin as in `without`.

        A journal that begins as the one there is kept: a driver that was killed on this machine hadn't sent its end.
        Where it does not, another driver has gone on, and all that is here is void.

        Raises:
            InputError: another driver on this machine works with the copy, or a segment of the journal is missing.
            OSError: the storage fails.
        """
        there = {name: known for name, known in files_below(self.uri).items() if "/." not in f"/{name}"}
        segments = segments_among(there)
        journal = read_segments(self.uri, segments)
        self._journal_bytes = len(journal)
        path = self.folder / JOURNAL
        _check_unused(path)
        if path.exists() and not path.read_bytes().startswith(journal):
            shutil.rmtree(self.folder)
        if segments and not path.exists():
            write_file(path, journal)
        others = (SEGMENTS, claim.CLAIMS, FORMER_CLAIM, *without)
        for name in sorted(name for name in there if not name.startswith(others)):
            fetched = fetch_file(self.folder, self.uri, name, there[name])
            if fetched or _stamp(self.folder / name) == there[name]:  # what is newer here is yet to be sent
                self._note(name, there[name])

    def fetch_others(self) -> None:
        """Bring here the weights and predictions that other nodes have put there; a storage that fails is told."""
        try:
            patiently(self._fetch_others)
        except OSError as error:
            print(f"{self.uri}: what other nodes left can't be read ({error})", file=sys.stderr)

    def _fetch_others(self) -> None:
        with self._lock:
            for name, there in self._listed().items():
                path = self.folder / name
                if path.exists():  # not what is newer here, nor what is the same
                    wanted = self._sent.get(name) == _stamp(path) and self._there.get(name) != there
                else:
                    wanted = name not in self._doomed | self._sent.keys()
                if wanted:
                    bring(self.folder, self.uri, name, there)
                    self._note(name, there)

    def _listed(self) -> dict[str, Stored]:
        """What there is of that which other nodes write too."""
        return {
            f"{folder}{name}": known
            for folder in OTHERS
            for name, known in files_below(joined(self.uri, folder)).items()
            if not name.startswith(".")  # half written
        }

    def _note(self, name: str, there: Stored) -> None:
        self._sent[name], self._there[name] = _stamp(self.folder / name), there

    # What is here goes there.

    def push(self) -> None:
        """Send there what has changed here.

        The plan goes last of the files, and the journal after it: where they are, what they need is there.

        Raises:
            InputError: another driver writes the run.
            OSError: the storage fails.
        """
        here = sorted(_files(self.folder), key=lambda name: (name == "plan.yaml", name))
        for name in here:
            with_stamp = _stamp(self.folder / name)
            if self._sent.get(name) != with_stamp:
                push_file(self.folder, self.uri, name, self.claim)
                self._sent[name] = with_stamp
                self._there.pop(name, None)
        for name in self._doomed | (self._sent.keys() - set(here)):
            self._check_mine()
            delete(joined(self.uri, name))
            self._sent.pop(name, None)
            self._there.pop(name, None)
            self._doomed.discard(name)
        self._push_journal()
        self._see()

    def _push_journal(self) -> None:
        path = self.folder / JOURNAL
        if not path.exists() or path.stat().st_size <= self._journal_bytes:
            return
        with open(path, "rb") as file:
            file.seek(self._journal_bytes)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole:
            assert self.claim is not None  # who only borrows a run doesn't write its journal
            self._check_mine()
            write_bytes(joined(self.uri, segment(self.claim, self._journal_bytes)), whole)
            self._journal_bytes += len(whole)

    def _see(self) -> None:
        """Note what the storage says of files that have been sent, and what other nodes have put there."""
        there = self._listed()
        for name in self._sent.keys() & there.keys():
            self._there.setdefault(name, there[name])
        checkpoints = {name: known.size for name, known in there.items() if name.startswith("checkpoints/")}
        self.elsewhere = {name: size for name, size in checkpoints.items() if not (self.folder / name).exists()}

    def _check_mine(self) -> None:
        if self.claim is not None:
            claim.check_mine(self.uri, self.claim)

    def forget(self, name: str) -> None:
        """Delete a file that another node has put there, with the next sending."""
        self.elsewhere.pop(name, None)
        self._doomed.add(name)

    def push_first(self) -> None:
        """Send a new run before its trials start: nodes read its samples there.

        Raises:
            InputError: the storage can't be written, or another driver writes the run.
        """
        with _failure_told(self.uri), self._lock:
            self.push()

    # The two are kept alike while a search runs.

    def start(self) -> None:
        """Become the run's driver, bring here what is there, and send what changes from now on, every few seconds.

        Raises:
            InputError: another driver writes this run.
            OSError: the storage fails.
        """
        _check_unused(self.folder / JOURNAL)
        self.claim = claim.take(self.uri)
        if self.folder.exists():
            self.fetch()
        for thread in self._threads:
            thread.start()

    def close(self) -> bool:
        """Send the last changes; false where the storage goes on failing. What is here then stays.

        Where another driver has taken the run over, what is here is of no use.
        """
        self._stop.set()
        self._threads[0].join()
        sent = self.sent_at_last()
        self._ended.set()
        self._threads[1].join()
        return self.taken is not None or (sent and self._released())

    def sent_at_last(self) -> bool:
        """Send what has changed, tried again for a while; false where the storage goes on failing."""
        until = time.monotonic() + transfer.PATIENCE_SECONDS
        while not self._pushed():
            if self.taken is not None or time.monotonic() > until:
                return False
            time.sleep(transfer.RETRY_SECONDS)
        return True

    def _keep_alike(self) -> None:
        while self.taken is None and not self._stop.wait(SYNC_SECONDS):
            self._pushed()

    def _keep_claim(self) -> None:
        """Beside the sending, which may take longer than a claim holds."""
        assert self.claim is not None
        while self.taken is None and not self._ended.wait(claim.CLAIM_SECONDS / 3):
            try:
                claim.renew(self.uri, self.claim)
            except InputError as error:
                self.taken = str(error)
            except OSError:
                pass  # the sending tells of it

    def _pushed(self) -> bool:
        """Whether the storage took it; a failure is told once, and what failed is sent again the next time."""
        if self.taken is not None:
            return False
        try:
            with self._lock:
                self.push()
        except InputError as error:
            self.taken = str(error)
            return False
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

    def _released(self) -> bool:
        assert self.claim is not None
        try:
            claim.release(self.uri, self.claim)
        except OSError:
            return False
        return True


def _check_unused(journal: Path) -> None:
    """Raises InputError where another process on this machine writes the journal."""
    with suppress(FileNotFoundError), open(journal, "r+b") as file:
        lock(file, journal.parent)


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
