"""Samples of a folder of class folders: which of its files are images, and which are left out."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from tuning.data.decoding import is_image
from tuning.record import storage
from tuning.settings.config import FORMATS
from tuning.settings.words import are, count, examples

IMAGE_SUFFIXES = tuple(FORMATS)
IMAGES = "images"
MASK_FOLDERS, MASK_ENDINGS = {"mask", "masks"}, ("_mask", "-mask", ".mask")
SPLIT_WORDS = {"train": "train", "training": "train"}
SPLIT_WORDS |= {"val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
FOLDER_WORDS = SPLIT_WORDS | {"dev": "val", "eval": "val"}  # only beside a folder for training: both may be classes


class Sample(NamedTuple):
    """One row of the table; what isn't known yet is None."""

    path: str
    file: str
    label: str | None
    split: str | None
    group: str | None


class Entry(NamedTuple):
    """A file or folder inside a folder."""

    name: str
    path: str
    is_folder: bool


Lister: TypeAlias = Callable[[str], list[Entry]]  # the entries of a folder by name, without hidden ones


def read_folder(root: str, entries_of: Lister, faults: list[str], remarks: list[str]) -> list[Sample]:
    """Samples of a folder of class folders, with or without split folders."""
    inside = entries_of(root)
    names = [entry.name for entry in inside if entry.is_folder]
    words = FOLDER_WORDS if any(SPLIT_WORDS.get(name.lower()) == "train" for name in names) else SPLIT_WORDS
    split_of = {name: words[name.lower()] for name in names if name.lower() in words}
    if len(set(split_of.values())) < len(split_of):
        faults.append(f"{root}: two of the folders {', '.join(split_of)} mean the same split; keep one of each")
    if split_of and "train" not in split_of.values():
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
            files = _list_files(entry.path, entries_of, set())
            below = [file.removeprefix(entry.path).strip(os.sep).split(os.sep) for file in files]
            inside_class.setdefault(entry.name, set()).update(first for first, *rest in below if rest)
            kinds = _by_kind(files, entry.path)
            images = kinds.pop(IMAGES, None) or kinds.pop("masks", [])  # a class may be one of masks
            for kind, there in kinds.items():
                asides[kind] += there
            if not images:
                suffixes = sorted({os.path.splitext(file)[1] or "none" for file in files})
                others = f"{count(len(files), 'file')} with other suffixes: {examples(suffixes)}"
                faults.append(
                    f"{entry.path}: no images in this class folder ({others if files else 'no files'}); add some "
                    f"({', '.join(IMAGE_SUFFIXES)}) or remove the folder"
                )
            for file in images:
                path = file.removeprefix(root).lstrip(os.sep).replace(os.sep, "/")
                samples.append(Sample(path, file, entry.name, split, None))
    faults += [f"{root}: {fault}" for fault in class_faults(classes)]
    for kind, there in asides.items():
        shown = [os.path.basename(file) for file in there]
        remarks.append(f"left out: {count(len(there), 'file')} ({kind}), such as {shown[0]}")
    parts = [{name for name in inner if name.lower() not in MASK_FOLDERS} for inner in inside_class.values()]
    if len(parts) > 1 and len(parts[0]) > 1 and all(part == parts[0] for part in parts):
        taken = (
            f"the folders {examples(sorted(inside_class))} are taken for the classes, not {examples(sorted(parts[0]))}"
        )
        remarks.append(f"{taken}, which lie in each of them")

    # Neither Parquet nor a hash takes a name that is not Unicode.
    odd = [repr(path) for path, file, *_ in samples if file.encode("utf-8", "ignore") != os.fsencode(file)]
    if odd:
        faults.append(f"{root}: {are(len(odd), 'file name')} not in UTF-8 ({examples(odd)}); rename each")
    return samples


def _is_loose_image(entry: Entry) -> bool:
    """Whether a file beside class folders is an image."""
    if entry.is_folder:
        return False
    known = entry.name.lower().endswith(IMAGE_SUFFIXES)
    return known or (not storage.is_uri(entry.path) and is_image(entry.path))


def _by_kind(files: list[str], folder: str) -> dict[str, list[str]]:
    """Files below a class folder by kind: images, masks, thumbnails, and what is no image."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for file in files:
        *folders, name = file.removeprefix(folder).lower().strip(os.sep).split(os.sep)
        stem, suffix = os.path.splitext(name)
        if suffix not in FORMATS and (storage.is_uri(file) or not is_image(file)):
            kinds["no images"].append(file)
        elif "@eadir" in folders or "thumbnails" in folders:
            kinds["thumbnails"].append(file)
        elif MASK_FOLDERS & set(folders) or stem.endswith(MASK_ENDINGS):
            kinds["masks"].append(file)
        else:
            kinds[IMAGES].append(file)
    return kinds


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
