"""Where the images of a manifest are: at their paths, or found by name below a folder."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable

from tuning.data.folders import Sample
from tuning.data.places import Ends, files_below
from tuning.data.reading import Reading
from tuning.record import storage
from tuning.settings.words import are, count, examples

AT_ONCE = 100  # files of a storage


def located(root: str, path: str, begin: str | None = None) -> tuple[str, str]:
    """Path as shown and file of an image, from its path in a manifest.

    Args:
        root: folder by which it is shown.
        begin: folder in which relative paths begin, if it is another.
    """
    begin, slashed = root if begin is None else begin, path.replace("\\", "/")
    if storage.is_uri(path) or (storage.is_uri(begin) and not os.path.isabs(path)):
        file = path if storage.is_uri(path) else storage.joined(begin, posixpath.normpath(slashed))
        return file.removeprefix(f"{root}/"), file
    file = os.path.abspath(os.path.join(begin, slashed))
    below = file.startswith(os.path.join(root, ""))
    shown = os.path.relpath(file, root) if below or (begin == root and not os.path.isabs(path)) else file
    return shown.replace(os.sep, "/"), file


def placed(file: str, samples: list[Sample], how: Reading, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Return the samples with the files below a folder whose paths end as theirs do, if no image is at its path."""
    folder = os.path.dirname(file) if how.images is None else how.images
    if how.images is None and any_exists(sample.file for sample in samples):
        return samples
    if not storage.is_uri(folder) and not os.path.isdir(folder):
        faults.append(f"images: {folder}: no such folder")
        return samples
    ends = Ends(files_below(folder))
    files = [ends.find(sample.path) for sample in samples]
    times = Counter(each[0] for each in files if len(each) == 1)
    several = [
        f"{sample.path}: {each[0]} and {each[1]}" for sample, each in zip(samples, files, strict=True) if len(each) > 1
    ]
    if several:
        cure = "name the folder by `--set images=...`, or write the paths from there"
        faults.append(f"{file}: {are(len(several), 'image name')} in two places ({examples(several)}); {cure}")
    moved = [len(each) == 1 and times[each[0]] == 1 for each in files]
    if any(moved):
        remarks.append(f"{count(sum(moved), 'image')} found by name below {folder}")
    return [
        sample._replace(file=storage.joined(folder, each[0])) if found else sample
        for sample, each, found in zip(samples, files, moved, strict=True)
    ]


def any_exists(files: Iterable[str]) -> bool:
    """Return whether one of some files exists; storages are asked for some at a time."""
    uris = []
    for file in files:
        if not storage.is_uri(file):
            if os.path.isfile(file):
                return True
            continue
        uris.append(file)
        if len(uris) == AT_ONCE:
            if storage.stored(uris) != [None] * AT_ONCE:
                return True
            uris = []
    return storage.stored(uris) != [None] * len(uris)
