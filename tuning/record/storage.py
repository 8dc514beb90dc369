"""Files in shared storage: S3, GCS, fsspec and whatever else pyarrow's file systems open.

All functions that reach a storage raise OSError if it fails.
"""

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

READERS = 32  # concurrent requests
READ_TRIES = 3  # of an image
LISTED = 20  # from so many files of a folder on, it is listed instead of asking for each: it may hold many more
OBJECTS = fs.S3FileSystem | fs.GcsFileSystem
ANONYMOUS = "gs://anonymous"  # tells pyarrow that a public bucket needs no keys
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def _as_os_errors(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Raise OSError instead of the errors of their own kinds that some file systems raise."""

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
    mtime_ns: int  # 0 if it has no times


def is_uri(place: object) -> bool:
    """Return whether a location is a URI (s3://bucket/folder) and not a path on this machine."""
    return "://" in str(place)


def absolute(place: str) -> str:
    """Return a path that holds in any folder; a URI as it is."""
    return place if is_uri(place) else os.path.abspath(os.path.expanduser(place))


def joined(place: str, name: str) -> str:
    """Return the location of a name below a folder, which is a path or a URI."""
    return f"{place.rstrip('/')}/{name}" if is_uri(place) else os.path.join(place, name)


@_as_os_errors
def read_bytes(uri: str) -> bytes:
    """Return a file's content; raise OSError if it doesn't exist."""
    filesystem, path = _opened(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.readall())


def read_all(uris: Sequence[str]) -> list[bytes]:
    """Return several files' contents; raise OSError if one doesn't exist."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read_bytes, uris))


@_as_os_errors
def write_bytes(uri: str, content: bytes) -> None:
    """Write a file, which appears whole."""
    filesystem, path = _opened(uri)
    folder, _, name = path.rpartition("/")
    if isinstance(filesystem, fs.LocalFileSystem):  # others make folders
        filesystem.create_dir(os.path.dirname(path), recursive=True)
    whole = isinstance(filesystem, OBJECTS)  # objects are never half written
    target = path if whole else f"{folder}/.{name}.part-{uuid.uuid4().hex}"
    with filesystem.open_output_stream(target, compression=None) as stream:
        stream.write(content)
    if not whole:
        filesystem.move(target, path)


@_as_os_errors
def delete(uri: str) -> None:
    """Delete a file, if it exists."""
    filesystem, path = _opened(uri)
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        with suppress(FileNotFoundError):  # another process was faster
            filesystem.delete_file(path)


def stored(uris: Sequence[str]) -> list[Stored | None]:
    """Return what is known of each file; None if it doesn't exist.

    A folder with many of them is listed, which takes a request for each thousand files instead of one for each.
    """
    split = {uri: uri.rpartition("/")[::2] for uri in uris}
    folders = [folder for folder, count in Counter(folder for folder, _ in split.values()).items() if count >= LISTED]
    with ThreadPoolExecutor(READERS) as pool:
        listed = dict(zip(folders, pool.map(partial(files_below, recursive=False), folders), strict=True))
        alone = [uri for uri, (folder, _) in split.items() if folder not in listed]
        known = dict(zip(alone, pool.map(_stored, alone), strict=True))
    known |= {uri: listed[folder].get(name) for uri, (folder, name) in split.items() if folder in listed}
    return [known[uri] for uri in uris]


@_as_os_errors
def _stored(uri: str) -> Stored | None:
    filesystem, path = _opened(uri)
    info = filesystem.get_file_info(path)
    return Stored(info.size, info.mtime_ns or 0) if info.is_file else None


@_as_os_errors
def files_below(uri: str, *, recursive: bool = True) -> dict[str, Stored]:
    """Return all files in a folder, and in those below it, by their names relative to it; none if it doesn't exist."""
    filesystem, path = _opened(uri)
    found = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
    start = len(path.rstrip("/")) + 1
    return {info.path[start:]: Stored(info.size, info.mtime_ns or 0) for info in found if info.is_file}


def isolated_nodes(
    place: str, nodes: Iterable[str], on_each: Callable[[Callable[[str], str | None]], dict[str, str]]
) -> dict[str, str]:
    """Find the nodes that can't share a location with this one: each must see what the other has written.

    Args:
        place: URI of the location.
        nodes: their ids.
        on_each: calls a function on each node with the node's id, and returns the answers that aren't None.

    Returns:
        The reason for each such node, by its id.
    """
    meeting = joined(place, f".nodes-{uuid.uuid4().hex}")
    write_bytes(joined(meeting, "driver"), b"here")
    try:
        reasons = on_each(partial(_meet, meeting))
        seen = zip(nodes, stored([joined(meeting, node) for node in nodes]), strict=True)
        return {node: "the driver doesn't see what it writes there" for node, known in seen if known is None} | reasons
    finally:
        _delete_folder(meeting)


@_as_os_errors
def _delete_folder(uri: str) -> None:
    for name in files_below(uri):
        delete(joined(uri, name))
    filesystem, path = _opened(uri)
    if not isinstance(filesystem, OBJECTS):  # GCS refuses to delete a folder that is only part of names
        filesystem.delete_dir(path)


def _meet(meeting: str, node: str) -> str | None:
    """Return why a node doesn't see what the driver wrote, or can't write; None if it does and has."""
    try:
        if stored([joined(meeting, "driver")]) == [None]:
            return "it doesn't see what the driver writes there: the location has the same name, but isn't shared"
        write_bytes(joined(meeting, node), b"here")
    except (OSError, InputError) as error:
        return str(error)
    return None


def unreadable(place: str) -> str | None:
    """Return why a folder or file, or a URI of one, can't be read; None if it can."""
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
    """Return a file in memory: image formats jump to and fro, and each jump would be a request.

    Raises:
        ConnectionError: the storage failed in all of `READ_TRIES` attempts.
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
    """Return the file system, and the path in it, taken literally: no query, no percent signs to be decoded."""
    scheme, _, rest = uri.partition("://")
    host, _, path = rest.partition("/")
    if without_secrets(uri) != uri or ("@" in host and f"{scheme}://{host}".rpartition("@")[0] != ANONYMOUS):
        cure = "set environment variables instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say)"
        raise InputError(f"{scheme}://...: a password or key in a URI would be written into tables; {cure}")
    filesystem, base = _filesystem(f"{scheme}://{host}" if host else f"{scheme}:///")
    return filesystem, f"{base.rstrip('/')}/{path}".rstrip("/")


@lru_cache
def _filesystem(base: str) -> tuple[fs.FileSystem, str]:
    try:
        opened: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(base)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        cure = "give a folder, or a URI that begins with s3://, gs://, hdfs:// or fsspec+NAME://"
        raise InputError(f"{base}: unsupported storage ({error}); {cure}") from None
    return opened
