"""Samples of a folder of class folders: which of its files are images, and which are left out."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from tuning.data.decoding import is_image
from tuning.record import storage
from tuning.settings.config import FORMATS
from tuning.settings.words import are, count, examples

IMAGE_SUFFIXES = tuple(FORMATS)
IMAGES = "images"
MASKS = "masks"
MASK_FOLDER = re.compile(r"(.*[_\-. ])?(masks?|segmentations?)([_\-. ].*)?")  # whole names in lower case
MASK_FILE = re.compile(r".*[_\-. ](masks?|segmentation)([_\-. ]?\d+)?")  # without the suffix
SPLIT_WORDS = {"train": "train", "training": "train"}
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val", "validate": "val"}
SPLIT_WORDS |= {"test": "test", "testing": "test"}
JUNK = {  # what archives, systems and network drives leave behind
    *("__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", "ehthumbs.db"),
}
FOLDER_WORDS = SPLIT_WORDS | {"dev": "val", "eval": "val"}  # only beside a folder for training: both may be classes


class Sample(NamedTuple):
    """One row of the table; what isn't known yet is None."""

    path: str
    file: str
    label: str | None
    split: str | None
    group: str | None
    subgroups: tuple[str | None, ...] = ()  # cells of the columns that `subgroups` names


class Entry(NamedTuple):
    """A file or folder inside a folder."""

    name: str
    path: str
    is_folder: bool


Lister: TypeAlias = Callable[[str], list[Entry]]  # the entries of a folder by name, without hidden ones


def read_folder(
    root: str, entries_of: Lister, faults: list[str], remarks: list[str], *, evaluated: bool = False
) -> list[Sample]:
    """Samples of a folder of class folders, with or without split folders; `evaluated`: for a test alone."""
    inside = entries_of(root)
    while (only := _only_folder(inside)) is not None and _only_folders(entries_of(only.path)):
        remarks.append(f"looked into {only.name}, the only folder there")
        root, inside = only.path, entries_of(only.path)
    names = [entry.name for entry in inside if entry.is_folder]
    words = FOLDER_WORDS if any(SPLIT_WORDS.get(name.lower()) == "train" for name in names) else SPLIT_WORDS
    split_of = {name: words[name.lower()] for name in names if name.lower() in words}
    if len(set(split_of.values())) < len(split_of) and not evaluated:
        faults.append(f"{root}: two of the folders {', '.join(split_of)} mean the same split; keep one of each")
    if split_of and "train" not in split_of.values() and not evaluated:
        faults.append(
            f"{root}: has {', '.join(split_of)} but no train folder; add one, or rename the folder if it is a class"
        )

    if split_of and (beside := [name for name in names if name not in split_of]):
        remarks.append(f"left out: {count(len(beside), 'folder')} beside {', '.join(split_of)}: {examples(beside)}")

    samples: list[Sample] = []
    asides: dict[str, list[str]] = defaultdict(list)
    if split_of and (images_beside := [entry.path for entry in inside if _is_loose_image(entry)]):
        asides["images beside the folders"] = images_beside
    inside_class: dict[str, set[str]] = {}  # names of the folders in each class folder
    classes: dict[str | None, set[str]] = defaultdict(set)
    for part in [*split_of] or [""]:
        split = split_of.get(part)
        folder = storage.joined(root, part) if part else root
        entries = entries_of(folder) if part else inside
        class_folders = [entry for entry in entries if entry.is_folder]
        loose = [entry.name for entry in entries if _is_loose_image(entry)]
        if loose:
            faults.append(
                f"{folder}: {are(len(loose), 'image')} outside the class folders ({examples(loose)}); put each into "
                "the folder of its class"
            )
        elif not class_folders:
            faults.append(f"{folder}: no class folders; put the images of each class into a folder named after it")
        for entry in class_folders:
            classes[split].add(entry.name)
            images, others = images_below(entry.path, entries_of)
            for kind, there in others.items():
                asides[kind] += there
            below = [file.removeprefix(entry.path).strip(os.sep).split(os.sep) for file in images]
            inside_class.setdefault(entry.name, set()).update(first for first, *rest in below if rest)
            if not images:
                left = [file for files in others.values() for file in files]
                suffixes = sorted({os.path.splitext(file)[1] or "none" for file in left})
                what = f"{count(len(left), 'file')} with other suffixes: {examples(suffixes)}" if left else "no files"
                faults.append(
                    f"{entry.path}: no images in this class folder ({what}); add some "
                    f"({', '.join(IMAGE_SUFFIXES)}) or remove the folder"
                )
            for file in images:
                path = file.removeprefix(root).lstrip(os.sep).replace(os.sep, "/")
                samples.append(Sample(path, file, entry.name, split, None))
    faults += [] if evaluated else [f"{root}: {fault}" for fault in class_faults(classes)]
    remarks += left_out(asides)
    times = Counter(name for inner in inside_class.values() for name in inner)
    if recurring := sorted(name for name, number in times.items() if number > 1 and len(times) > 1):
        classes_of = f"the folders {examples(sorted(inside_class))} are taken for the classes"
        remarks.append(f"{classes_of}, not {examples(recurring)}, found in more than one of them")

    # Neither Parquet nor a hash takes a name that is not Unicode.
    odd = [repr(path) for path, file, *_ in samples if file.encode("utf-8", "ignore") != os.fsencode(file)]
    if odd:
        faults.append(f"{root}: {are(len(odd), 'file name')} not in UTF-8 ({examples(odd)}); rename each")
    return samples


def _only_folder(entries: list[Entry]) -> Entry | None:
    """Return the one folder that there is beside files that are no images, unless its name is that of a split."""
    folders = [entry for entry in entries if entry.is_folder]
    if len(folders) != 1 or folders[0].name.lower() in FOLDER_WORDS or any(map(_is_loose_image, entries)):
        return None
    return folders[0]


def _only_folders(entries: list[Entry]) -> bool:
    """Return whether there are folders and no images, nor a folder of images or masks, so that this is no class."""
    names = [entry.name.lower() for entry in entries if entry.is_folder]
    parts = any(name == IMAGES or MASK_FOLDER.fullmatch(name) for name in names)
    return bool(names) and not parts and not any(map(_is_loose_image, entries))


def _is_loose_image(entry: Entry) -> bool:
    """Whether a file beside class folders is an image."""
    if entry.is_folder:
        return False
    known = entry.name.lower().endswith(IMAGE_SUFFIXES)
    return known or (not storage.is_uri(entry.path) and is_image(entry.path))


def images_below(folder: str, entries_of: Lister) -> tuple[list[str], dict[str, list[str]]]:
    """Return the images below a folder, and by kind the files that are left out: masks, thumbnails and no images.

    In a folder of masks alone these are the images. Links are followed.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for file in _list_files(folder, entries_of, set()):
        *folders, name = file.removeprefix(folder).lower().strip(os.sep).split(os.sep)
        stem, suffix = os.path.splitext(name)
        if suffix not in FORMATS and (storage.is_uri(file) or not is_image(file)):
            kinds["no images"].append(file)
        elif "@eadir" in folders or "thumbnails" in folders:
            kinds["thumbnails"].append(file)
        elif any(map(MASK_FOLDER.fullmatch, folders)) or MASK_FILE.fullmatch(stem):
            kinds[MASKS].append(file)
        else:
            kinds[IMAGES].append(file)
    return kinds.pop(IMAGES, None) or kinds.pop(MASKS, []), kinds


def left_out(kinds: Mapping[str, list[str]]) -> list[str]:
    """Return a line for each kind of file that is left out."""
    shown = {kind: os.path.basename(files[0]) for kind, files in kinds.items() if files}
    return [f"left out: {count(len(kinds[kind]), 'file')} ({kind}), such as {name}" for kind, name in shown.items()]


def is_junk(name: str) -> bool:
    """Return whether a file or folder is hidden, or left behind by an archive or a system."""
    return name[:1] == "." or name in JUNK


def local_entries(folder: str, faults: list[str], junk: set[str] | None = None) -> list[Entry]:
    """Return the entries of a folder on this machine; one that can't be listed is a fault.

    Args:
        junk: is given the paths that are left out, see `is_junk`.
    """
    try:
        with os.scandir(folder) as entries:
            there = sorted(Entry(each.name, each.path, each.is_dir()) for each in entries)
        if junk is not None:
            junk |= {entry.path for entry in there if is_junk(entry.name)}
        return [entry for entry in there if not is_junk(entry.name)]
    except OSError as error:
        faults.append(f"{folder}: can't be listed ({error.strerror}); make the folder readable")
        return []


def stored_entries(root: str, names: Iterable[str]) -> Lister:
    """Return the lister of a folder in a storage whose files below, at any depth, have these names."""
    below: dict[str, dict[str, Entry]] = defaultdict(dict)
    for name in names:
        folder, parts = root, name.split("/")
        for part in parts[:-1]:
            below[folder][part] = Entry(part, storage.joined(folder, part), True)
            folder = storage.joined(folder, part)
        below[folder].setdefault(parts[-1], Entry(parts[-1], storage.joined(folder, parts[-1]), False))
    return lambda folder: sorted(entry for entry in below[folder].values() if not is_junk(entry.name))


def _list_files(folder: str, entries_of: Lister, seen: set[str]) -> list[str]:
    """All files below a folder; `seen` holds the real folders already listed, since links may form a cycle."""
    real = os.path.realpath(folder)
    if real in seen:
        return []
    seen.add(real)
    files: list[str] = []
    for entry in entries_of(folder):
        files += _list_files(entry.path, entries_of, seen) if entry.is_folder else [entry.path]
    return files


def class_faults(classes: Mapping[str | None, set[str]]) -> list[str]:
    """Faults of the classes of each split (all under None if no split is given)."""
    names = sorted(set().union(*classes.values()))
    if len(names) == 1:
        return [f"there is only one class, {names[0]!r}; a classifier needs two or more"]
    missing = [f"{name!r} not in {split}" for split in classes for name in names if name not in classes[split]]
    if missing:
        return [f"classes differ between splits ({examples(missing)}); give every split images of every class"]
    return []
