"""A run that lies in a storage: the rest works with a copy on this machine, and a mirror keeps the two the same.

The journal is sent in segments; everything else is sent whole.
"""

import hashlib
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
from tuning.record.transfer import fetch_file, newer_here, patiently, push_file, write_file
from tuning.settings.config import InputError, cache_folder

SYNC_SECONDS = 5.0
JOURNAL = "journal.jsonl"
FORMER_CLAIM = "driver.json"  # of an older version; not read any more
OTHERS = ("checkpoints/", "predictions/")  # other nodes write there too


def run_folder(storage: str, name: str) -> Path:
    """Return where a run's files lie on this machine: in the folder itself, or in the copy of a run in a storage."""
    if not is_uri(storage):
        return Path(storage) / name
    return copy_folder(joined(storage, name)) / name


def copy_folder(uri: str) -> Path:
    """Return the folder in this machine's cache for a run's copy."""
    return cache_folder() / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]


@contextmanager
def mirrored(folder: Path, storage: str) -> Iterator["Mirror | None"]:
    """Mirror a run's folder in a storage during a search; give None if the run lies on this machine.

    At the end the copy on this machine is deleted, unless the storage fails.

    Raises:
        InputError: another driver writes the run, or the storage can't be written.
    """
    if not is_uri(storage):
        yield None
        return
    uri = joined(storage, folder.name)
    mirror = Mirror(folder, uri)
    with _reached(uri):
        mirror.start()
    try:
        yield mirror
    finally:
        if mirror.close():
            shutil.rmtree(folder.parent, ignore_errors=True)
        else:
            print(f"{uri}: the end of this run couldn't be sent; --resume sends it from {folder}", file=sys.stderr)
    if mirror.taken is not None:
        raise InputError(mirror.taken)


def fetch(folder: Path, uri: str) -> None:
    """Fetch a run that is to be resumed.

    Raises:
        InputError: another driver writes it, or the storage fails.
    """
    with _reached(uri):
        claim.check_free(uri)
        Mirror(folder, uri).fetch()


@contextmanager
def borrowed(place: str, *, without: tuple[str, ...] = ()) -> Iterator[Path]:
    """Give a run's folder, or a copy of a run in a storage, whose changes are sent back.

    Args:
        place: a folder, or a URI.
        without: beginnings of names that a copy leaves out.

    Raises:
        InputError: nothing is there, or the storage fails.
    """
    if not is_uri(place):
        yield Path(place)
        return
    (cache_folder() / "runs").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache_folder() / "runs")) / place.rstrip("/").rpartition("/")[2]
    mirror = Mirror(folder, place.rstrip("/"))
    with _reached(place):
        mirror.fetch(without)
    try:
        yield folder
    except InputError as error:  # the copy is about to be deleted
        raise InputError([fault.replace(str(folder), mirror.uri) for fault in error.faults]) from None
    finally:  # an interrupted command may have changed the run too: a reading of the test set is recorded first
        if mirror.sent_at_last():
            shutil.rmtree(folder.parent, ignore_errors=True)
        else:
            print(f"{place}: the results couldn't be sent; they are in {folder}", file=sys.stderr)


@contextmanager
def _reached(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: {error}; is the storage reachable, and are its keys set?") from None


class Mirror:
    """Keeps a run in a storage, at `uri`, the same as its copy in a folder on this machine."""

    def __init__(self, folder: Path, uri: str):
        self.folder, self.uri = folder, uri
        self.elsewhere: dict[str, int] = {}  # bytes of checkpoints that other nodes have written
        self.claim: str | None = None  # its name, if this process is the run's driver
        self.taken: str | None = None  # why nothing more is sent: another driver writes the run
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files here that are also there
        self._there: dict[str, Stored] = {}  # of files that other nodes write too
        self._doomed: set[str] = set()  # files to delete there
        self._journal_bytes = 0
        self._stop, self._ended = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._keep_sending, self._keep_claim)]
        self._failing = False
        self._lock = threading.Lock()  # for `_sent` and `_there`

    # ---- From the storage to this machine ----

    def fetch(self, without: tuple[str, ...] = ()) -> None:
        """Fetch what is there, except files that are newer here and names that begin as in `without`.

        A journal here that begins as the one there is kept: a driver that was killed here hadn't sent its end. If it
        begins otherwise, another driver has continued the run, and all that is here is deleted.

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
            if not newer_here(self.folder / name, there[name]):
                fetch_file(self.folder, self.uri, name, there[name])
            elif _stamp(self.folder / name) != there[name]:
                continue  # it is newer here, and yet to be sent
            self._note(name, there[name])

    def fetch_others(self) -> None:
        """Fetch the weights and predictions that other nodes have sent; warn if the storage fails."""
        try:
            patiently(self._fetch_others)
        except OSError as error:
            print(f"{self.uri}: weights and predictions of other nodes can't be read ({error})", file=sys.stderr)

    def _fetch_others(self) -> None:
        with self._lock:
            for name, there in self._listed().items():
                path = self.folder / name
                if path.exists():  # a file that has changed here, or not there, stays as it is
                    wanted = self._sent.get(name) == _stamp(path) and self._there.get(name) != there
                else:
                    wanted = name not in self._doomed | self._sent.keys()
                if wanted:
                    fetch_file(self.folder, self.uri, name, there)
                    self._note(name, there)

    def _listed(self) -> dict[str, Stored]:
        """Return the files there that other nodes write too."""
        return {
            f"{folder}{name}": known
            for folder in OTHERS
            for name, known in files_below(joined(self.uri, folder)).items()
            if not name.startswith(".")  # half written
        }

    def _note(self, name: str, there: Stored) -> None:
        self._sent[name], self._there[name] = _stamp(self.folder / name), there

    # ---- From this machine to the storage ----

    def push(self) -> None:
        """Send what has changed here.

        The plan goes last of the files, and the journal after it, as far as it went before: if they are there, so is
        all that they need, but what a worker was still writing.

        Raises:
            InputError: another driver writes the run.
            OSError: the storage fails.
        """
        journal = self.folder / JOURNAL
        until = journal.stat().st_size if journal.exists() else 0
        here = sorted(_files(self.folder), key=lambda name: (name == "plan.yaml", name))
        for name in here:
            stamp = _stamp(self.folder / name)
            if self._sent.get(name) != stamp:
                push_file(self.folder, self.uri, name, self.claim)
                self._sent[name] = stamp
                self._there.pop(name, None)
        for name in self._doomed | (self._sent.keys() - set(here)):
            claim.check_mine(self.uri, self.claim)
            delete(joined(self.uri, name))
            self._sent.pop(name, None)
            self._there.pop(name, None)
            self._doomed.discard(name)
        self._push_journal(until)
        self._see()

    def _push_journal(self, until: int) -> None:
        if until <= self._journal_bytes:
            return
        with open(self.folder / JOURNAL, "rb") as file:
            file.seek(self._journal_bytes)
            lines = file.read(until - self._journal_bytes)
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole:
            assert self.claim is not None  # a run that is only borrowed keeps its journal
            claim.check_mine(self.uri, self.claim)
            write_bytes(joined(self.uri, segment(self.claim, self._journal_bytes)), whole)
            self._journal_bytes += len(whole)

    def _see(self) -> None:
        """Note what the storage says of files that were sent, and which checkpoints other nodes have sent."""
        there = self._listed()
        for name in self._sent.keys() & there.keys():
            self._there.setdefault(name, there[name])
        checkpoints = {name: known.size for name, known in there.items() if name.startswith("checkpoints/")}
        self.elsewhere = {name: size for name, size in checkpoints.items() if not (self.folder / name).exists()}

    def forget(self, name: str) -> None:
        """Delete a file that another node has sent, with the next push."""
        self.elsewhere.pop(name, None)
        self._doomed.add(name)

    def push_first(self) -> None:
        """Send a new run before its trials start, because other nodes read its samples.

        Raises:
            InputError: the storage can't be written, or another driver writes the run.
        """
        with _reached(self.uri), self._lock:
            self.push()

    # ---- During a search ----

    def start(self) -> None:
        """Become the run's driver, fetch what is there, and send what changes every few seconds.

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
        """Send the last changes; return whether the copy here can be deleted.

        It stays if the storage keeps failing. If another driver has taken the run over, it is of no use.
        """
        self._stop.set()
        self._threads[0].join()
        sent = self.sent_at_last()
        self._ended.set()
        self._threads[1].join()
        if sent and self.taken is None:
            assert self.claim is not None
            with suppress(OSError):
                claim.release(self.uri, self.claim)
                return True
        return self.taken is not None

    def sent_at_last(self) -> bool:
        """Send what has changed, with retries for a while; return whether the storage has it."""
        until = time.monotonic() + transfer.PATIENCE_SECONDS
        while not (sent := self._pushed()) and self.taken is None and time.monotonic() <= until:
            time.sleep(transfer.RETRY_SECONDS)
        return sent

    def _keep_sending(self) -> None:
        while self.taken is None and not self._stop.wait(SYNC_SECONDS):
            self._pushed()

    def _keep_claim(self) -> None:
        """Renew the claim in its own thread, because a push may take longer than a claim holds."""
        assert self.claim is not None
        while self.taken is None and not self._ended.wait(claim.CLAIM_SECONDS / 3):
            try:
                claim.renew(self.uri, self.claim)
            except InputError as error:
                self.taken = str(error)
            except OSError:
                pass  # the push warns of it

    def _pushed(self) -> bool:
        """Push, and return whether it worked; warn of a failure once. What failed is sent with the next push."""
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
                cure = f"changes are kept in {self.folder} and sent when it works again"
                print(f"{self.uri}: the storage fails ({error}); {cure}", file=sys.stderr)
            self._failing = True
            return False
        if self._failing:
            print(f"{self.uri}: the storage works again", file=sys.stderr)
        self._failing = False
        return True


def _check_unused(journal: Path) -> None:
    """Raise InputError if another process on this machine writes the journal."""
    with suppress(FileNotFoundError), open(journal, "r+b") as file:
        lock(file, journal.parent)


def _files(folder: Path) -> list[str]:
    """Return the names of a run's files, without the journal and what is half written."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != JOURNAL and "/." not in f"/{name}"]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns
