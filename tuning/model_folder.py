"""Predict with a final model; see `tuning.model.folder`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import csv
import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray

from tuning.checks.findings import notes_in_words
from tuning.data.decoding import is_image
from tuning.model.folder import Ensemble, Model, load_model
from tuning.record.mirror import borrowed
from tuning.record.storage import files_below, is_uri, joined, stored
from tuning.settings.command_line import exit_code
from tuning.settings.config import FORMATS, InputError, visible
from tuning.settings.words import count

__all__ = ["load_model"]

NOT_LOADED = ("model.onnx", "mistakes.html")
AT_ONCE = 256  # images that are decoded before they are classified


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images: one row for each, with the predicted class and the probability of every class.

    Images that can't be read are reported and have no row; the exit code is then 2.

    Example: python tuning/model_folder.py predict results/xray/model films/ "more/*.png" --out predictions.csv
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or URI of a model, such as results/NAME/model."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="")]
    """Image files, folders of images, URIs of either, or globs in quotes (** matches nested folders)."""
    out: Annotated[tyro.conf.DisallowNone[str | None], tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Table to write, .csv or .parquet. Default: CSV on the standard output."""


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = [_not_a_flag(word) for word in sys.argv[1:]]
    return exit_code(lambda: run(tyro.extras.subcommand_cli_from_dict({"predict": Predict}, args=arguments)))


def _not_a_flag(word: str) -> str:
    """Return a file whose name begins with a dash, as from the shell's *, in a form that is not a flag."""
    return f"./{word}" if word.startswith("-") and os.path.lexists(word) else word


def run(flags: Predict) -> None:
    """Classify the images and write the table.

    Raises:
        InputError: there is no model, no image, or the table can't be written; or, once the other rows are written,
            images that can't be read.
    """
    if flags.out is not None and Path(flags.out).suffix not in (".csv", ".parquet"):
        raise InputError(f"--out: must end in .csv or .parquet, got {flags.out}")
    try:
        files, faults = named_images(flags.images)
    except OSError as error:
        raise InputError(f"predict: {error}; is the storage reachable, and are its keys set?") from None
    if not files:
        raise InputError(faults or ["predict: give at least one image"])
    with borrowed(flags.model, without=NOT_LOADED) as folder:
        model = load_model(folder)
    known: list[str] = []
    rows: list[NDArray[np.float64]] = []
    notes: dict[str, str] = {}
    for start in range(0, len(files), AT_ONCE):
        part = files[start : start + AT_ONCE]
        found, unreadable = _predict_readable(model, part, notes)
        known += [file for file, row in zip(part, found, strict=True) if row is not None]
        rows += [row for row in found if row is not None]
        faults += unreadable
    for line in notes_in_words(notes.keys(), notes.values()):
        print(visible(line), file=sys.stderr)
    if rows or flags.out is None:
        _write_table(flags.out, known, model.classes, np.array(rows).reshape(len(rows), len(model.classes)))
    if faults:
        raise InputError(faults)


def named_images(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the image files that files, folders, globs and URIs name, in order, and what is wrong with the others.

    In folders, files with the suffix or the first bytes of an image count (in a storage by the suffix alone); hidden
    files and folders do not.
    """
    files, faults = [], []
    for word in words:
        if is_uri(word):
            found = [word] if stored([word]) != [None] else [joined(word, name) for name in _images(files_below(word))]
            what = "is neither an image nor a folder of images"
        else:
            there = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
            found = [
                str(Path(file)) for place in there for file in (_below(place) if os.path.isdir(place) else [place])
            ]
            what = "has no images" if there else "no such file or folder, and as a glob it matches nothing"
        if not found:
            faults.append(f"{word}: {what}; give image files, folders of images, or globs")
        files += found
    return list(dict.fromkeys(files)), faults


def _below(folder: str) -> list[str]:
    """Return the images below a folder, by suffix or first bytes; how many other files there are is printed."""
    images: list[str] = []
    others: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (os.path.join(place, name) for name in names if not name.startswith(".")):
            known = os.path.splitext(file)[1].lower() in FORMATS or is_image(file)
            (images if known else others).append(file)
    if others:
        what = f"{count(len(others), 'file')} (no images), such as {visible(os.path.basename(min(others)))}"
        print(f"{visible(folder)}: left out: {what}", file=sys.stderr)
    return sorted(images)


def _images(names: Iterable[str]) -> list[str]:
    """Return, sorted, the names that have the suffix of an image and no hidden part."""
    images = [name for name in sorted(names) if os.path.splitext(name)[1].lower() in FORMATS]
    return [name for name in images if not any(part.startswith(".") for part in name.split("/"))]


def _predict_readable(
    model: Model | Ensemble, files: Sequence[str], notes: dict[str, str]
) -> tuple[list[NDArray[np.float64] | None], list[str]]:
    """Return each file's probabilities, None if it can't be read, and the faults, found by trying halves."""
    try:
        return list(model.predict(files, notes)), []
    except InputError as error:
        if len(files) == 1:
            return [None], error.faults[:1]
    halves = [_predict_readable(model, part, notes) for part in (files[: len(files) // 2], files[len(files) // 2 :])]
    return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]


def _write_table(
    out: str | None, files: Sequence[str], classes: Sequence[str], probabilities: NDArray[np.float64]
) -> None:
    predicted = [classes[index] for index in probabilities.argmax(axis=1)]
    header = ["path", "predicted", *(f"probability_{name}" for name in classes)]
    try:
        if out is not None and out.endswith(".parquet"):
            named = [os.fsencode(file).decode("utf-8", "replace") for file in files]  # Parquet holds only Unicode
            columns = [pa.array(values, pa.string()) for values in (named, predicted)]
            columns += [pa.array(values) for values in probabilities.T]
            pq.write_table(pa.Table.from_arrays(columns, names=header), out)
            return
        if out is None:
            sys.stdout.reconfigure(errors="surrogateescape", newline="")  # type: ignore[union-attr]
            opened: Any = nullcontext(sys.stdout)
        else:
            opened = open(out, "w", encoding="utf-8", errors="surrogateescape", newline="")
        with opened as stream:
            writer = csv.writer(stream)
            writer.writerow(header)
            for file, label, row in zip(files, predicted, probabilities, strict=True):
                writer.writerow([file, label, *(f"{value:.6f}" for value in row)])
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(
            f"{out or 'standard output'}: can't be written ({error.strerror}); choose another file by --out"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
