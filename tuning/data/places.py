"""Where the images of a manifest are: at their paths, or found by name in the folders below."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tuning.data.folders import is_junk
from tuning.record import storage
from tuning.settings.config import FORMATS

Parts = tuple[str, ...]


class Places:
    """The image files below a folder, to be found by the ends of their paths, with or without a suffix."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Parts]] = defaultdict(list)
        self._by_stem: dict[str, list[Parts]] = defaultdict(list)
        for path in _files(folder):
            parts = tuple(path.split("/"))
            stem, suffix = os.path.splitext(parts[-1])
            self._by_name[parts[-1]].append(parts)
            if suffix.lower() in FORMATS:
                self._by_stem[stem].append(parts)

    def find(self, path: str) -> list[str]:
        """Return the files whose paths in the folder end as `path` does, or the other way round.

        Of several those with most folders in common.
        """
        wanted = tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", ".", ".."))
        found = self._by_name.get(wanted[-1]) or self._by_stem.get(wanted[-1]) or [] if wanted else []
        common = [(_common(wanted[:-1], parts[:-1]), parts) for parts in found]
        fitting = [(number, parts) for number, parts in common if number == min(len(wanted), len(parts)) - 1]
        most = max((number for number, _ in fitting), default=0)
        return [storage.joined(self._folder, "/".join(parts)) for number, parts in fitting if number == most]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the number of last folders that two paths have in common."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((number for number, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _files(folder: str) -> Iterable[str]:
    """Return the files below a folder by their paths in it, without hidden ones and what archives leave behind."""
    if storage.is_uri(folder):
        yield from sorted(storage.files_below(folder))
        return
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in sorted(files):
            if not is_junk(name):
                yield name if below == "." else f"{below}/{name}"
