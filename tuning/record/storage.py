"""Data and runs where clusters keep them: whatever pyarrow's file systems open, such as S3, GCS and fsspec's."""

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial, wraps
from io import BytesIO
from typing import NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
from pyarrow import fs

from tuning.settings.config import InputError, without_secrets

READERS = 32  # requests at once
READ_TRIES = 3  # of an image
LISTED = 20  # files of a folder from which it is listed: it may hold many more than those that are asked for
OBJECTS = fs.S3FileSystem | fs.GcsFileSystem
ANONYMOUS = "gs://anonymous"  # how pyarrow is told that a public bucket needs no keys
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def _as_os_errors(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Some file systems raise errors of their own kinds."""

    @wraps(function)
    def call(*args: Given.args, **named: Given.kwargs) -> Answer:
        try:
            return function(*args, **named)
        except (OSError, InputError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    return call


class Stored(NamedTuple):
    """What a storage says of a file."""

    size: int  # bytes
    mtime_ns: int


def is_uri(place: object) -> bool:
    """Whether a place is named by a URI (s3://bucket/folder), and not a path of this machine."""
    return "://" in str(place)


def joined(place: str, name: str) -> str:
    """A name below a folder, which is a path or a URI."""
    return f"{place.rstrip('/')}/{name}" if is_uri(place) else os.path.join(place, name)


@_as_os_errors
def read_bytes(uri: str) -> bytes:
    """A file's content.

    Raises:
        OSError: it is not there, or the storage fails.
    """
    filesystem, path = _opened(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        content: bytes = stream.readall()
    return content


def read_all(uris: Sequence[str]) -> list[bytes]:
    """Several files' contents.

    Raises:
        OSError: one is not there, or the storage fails.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read_bytes, uris))


@_as_os_errors
def write_bytes(uri: str, content: bytes) -> None:
    """Put a file there, whole.

    Raises:
        OSError: the storage fails.
    """
    filesystem, path = _opened(uri)
    if isinstance(filesystem, OBJECTS):  # an object appears whole
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)
        return
    if isinstance(filesystem, fs.LocalFileSystem):  # others make folders
        filesystem.create_dir(os.path.dirname(path), recursive=True)
    folder, _, name = path.rpartition("/")
    unfinished = f"{folder}/.{name}.part-{uuid.uuid4().hex}"
    with filesystem.open_output_stream(unfinished, compression=None) as stream:
        stream.write(content)
    filesystem.move(unfinished, path)


@_as_os_errors
def delete_folder(uri: str) -> None:
    """Take a folder away with all that is in it.

    Raises:
        OSError: it is not there, or the storage fails.
    """
    for name in files_below(uri):
        delete(joined(uri, name))
    filesystem, path = _opened(uri)
    if not isinstance(filesystem, OBJECTS):  # GCS refuses to delete a folder that is only part of names
        filesystem.delete_dir(path)


@_as_os_errors
def delete(uri: str) -> None:
    """Take a file away, if it is there.

    Raises:
        OSError: the storage fails.
    """
    filesystem, path = _opened(uri)
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        with suppress(FileNotFoundError):  # another process was faster
            filesystem.delete_file(path)


def stored(uris: Sequence[str]) -> list[Stored | None]:
    """What is known of each file; null where there is none. Folders with many of them are listed: a request for each
    thousand files, not for each.

    Raises:
        OSError: the storage fails.
    """
    folders = Counter(uri.rpartition("/")[0] for uri in uris)
    listed = [folder for folder, count in folders.items() if count >= LISTED]
    with ThreadPoolExecutor(READERS) as pool:
        there = dict(zip(listed, pool.map(_files_in, listed), strict=True))
        alone = [uri for uri in uris if uri.rpartition("/")[0] not in there]
        known = dict(zip(alone, pool.map(_stored, alone), strict=True))
    return [known[uri] if uri in known else there[uri.rpartition("/")[0]].get(uri.rpartition("/")[2]) for uri in uris]


@_as_os_errors
def _stored(uri: str) -> Stored | None:
    filesystem, path = _opened(uri)
    info = filesystem.get_file_info(path)
    return Stored(info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


@_as_os_errors
def files_below(uri: str) -> dict[str, Stored]:
    """All files below a folder by their names relative to it; none where there is no such folder.

    Raises:
        OSError: the storage fails.
    """
    return _listed(uri, recursive=True)


@_as_os_errors
def _files_in(uri: str) -> dict[str, Stored]:
    """The same of a folder without those in it."""
    return _listed(uri, recursive=False)


def _listed(uri: str, *, recursive: bool) -> dict[str, Stored]:
    filesystem, path = _opened(uri)
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
    start = len(path.rstrip("/")) + 1
    return {info.path[start:]: Stored(info.size, info.mtime_ns or 0) for info in found if info.is_file}


def apart(
    place: str, nodes: Iterable[str], on_each: Callable[[Callable[[str], str | None]], dict[str, str]]
) -> dict[str, str]:
    """What keeps nodes from working at one place with this one, tried: each must see what the other has written.

    Args:
        place: URI of what they are to share.
        nodes: their ids.
        on_each: calls a function with each node's id, there, and gives what it answers where that isn't null.

    Returns:
        Why, for each node's id that this is so of.

    Raises:
        OSError: this one can't write there.
    """
    meeting = joined(place, f".nodes-{uuid.uuid4().hex}")
    write_bytes(joined(meeting, "driver"), b"here")
    try:
        said = on_each(partial(_attend, meeting))
        seen = zip(nodes, stored([joined(meeting, node) for node in nodes]), strict=True)
        return {node: "what it writes there isn't seen here" for node, known in seen if known is None} | said
    finally:
        delete_folder(meeting)


def _attend(meeting: str, node: str) -> str | None:
    """Why a node doesn't see what the driver wrote, or can't write; null where it does and has."""
    try:
        if stored([joined(meeting, "driver")]) == [None]:
            return "what is written here isn't seen there: it is another place of the same name"
        write_bytes(joined(meeting, node), b"here")
    except (OSError, InputError) as error:
        return str(error)
    return None


def unreadable(place: str) -> str | None:
    """Why a folder or file, or a URI of one, can't be read; null where it can."""
    try:
        if is_uri(place):
            if stored([place]) == [None] and not files_below(place):
                return "nothing is there"
        elif os.path.isdir(place):
            os.scandir(place).close()
        else:
            open(place, "rb").close()
    except (OSError, InputError) as error:
        return str(error)
    return None


def readable(uri: str) -> BytesIO:
    """A file to be read from memory: image formats jump to and fro, and each jump would be a request.

    Raises:
        ConnectionError: the storage fails again and again.
    """
    for tries_left in reversed(range(READ_TRIES)):
        try:
            return BytesIO(read_bytes(uri))
        except OSError as error:
            if not tries_left:
                raise ConnectionError(str(error)) from None
            time.sleep(1.0)
    raise AssertionError


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system, and the path in it, taken literally: no query, no percent signs to be decoded."""
    scheme, _, rest = uri.partition("://")
    host, _, path = rest.partition("/")
    if without_secrets(uri) != uri or ("@" in host and f"{scheme}://{host}".rpartition("@")[0] != ANONYMOUS):
        cure = "take it out and give it by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say)"
        raise InputError(f"{scheme}://...: a password or key in a URI would be written into tables; {cure}")
    filesystem, base = _filesystem(f"{scheme}://{host}" if host else f"{scheme}:///")
    return filesystem, f"{base.rstrip('/')}/{path}".rstrip("/")


@lru_cache
def _filesystem(base: str) -> tuple[fs.FileSystem, str]:
    """Raises InputError where there is none of this kind."""
    try:
        opened: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(base)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{base}: no storage of this kind ({error}); give a folder, or s3://, gs://, hdfs:// or fsspec+NAME:// "
            "and what follows"
        ) from None
    return opened
