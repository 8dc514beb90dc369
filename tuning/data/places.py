"""Files and images by the ends of their paths: where the images of a manifest are, and which a list names."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tuning.data.folders import is_junk
from tuning.record import storage
from tuning.settings.config import FORMATS

Parts = tuple[str, ...]


class Ends:
    """Paths, to be found by how they end: with or without the suffix of an image, or folders in front."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._by_name: dict[str, list[Parts]] = defaultdict(list)
        self._by_stem: dict[str, list[Parts]] = defaultdict(list)
        for path in paths:
            parts = _parts(path)
            self._by_name[parts[-1]].append(parts)
            self._by_stem[_stem(parts[-1])].append(parts)

    def find(self, path: str) -> list[str]:
        """Return the paths that end as this one does, or as whose end it does; the whole path alone, if it is there.

        Of several those with most folders in common.
        """
        wanted = _parts(path)
        if not wanted:
            return []
        found = self._by_name.get(wanted[-1], [])
        if wanted in found:
            return ["/".join(wanted)]
        found = found or self._by_stem.get(_stem(wanted[-1]), [])
        common = [(_common(wanted[:-1], parts[:-1]), parts) for parts in found]
        fitting = [(number, parts) for number, parts in common if number == min(len(wanted), len(parts)) - 1]
        most = max((number for number, _ in fitting), default=0)
        return ["/".join(parts) for number, parts in fitting if number == most]


def files_below(folder: str) -> Iterator[str]:
    """Return the files below a folder by their paths in it, without hidden ones and what archives leave behind."""
    if storage.is_uri(folder):
        yield from (path for path in sorted(storage.files_below(folder)) if not any(map(is_junk, path.split("/"))))
        return
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may form a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_junk(name))
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in sorted(files):
            if not is_junk(name):
                yield name if below == "." else f"{below}/{name}"


def normalised(path: str) -> str:
    """Return a path as `Ends.find` does."""
    return "/".join(_parts(path))


def _parts(path: str) -> Parts:
    return tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", ".", ".."))


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in FORMATS else name


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the number of last folders that two paths have in common."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((number for number, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
