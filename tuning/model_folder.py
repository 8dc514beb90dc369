"""Predict with a final model; see `tuning.model.folder`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import csv
import dataclasses
import glob
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray

from tuning.checks.findings import notes_in_words
from tuning.data.folders import images_below, left_out, local_entries, stored_entries
from tuning.insight import conformal
from tuning.model.folder import Ensemble, Model, load_model
from tuning.record.mirror import borrowed
from tuning.record.storage import files_below, is_uri, stored
from tuning.record.tables import read_table
from tuning.settings.command_line import exit_code, leave
from tuning.settings.config import InputError, visible
from tuning.settings.words import count, examples

__all__ = ["load_model"]

NOT_LOADED = ("model.onnx", "mistakes.html", "known_images.parquet")
AT_ONCE = 256  # images that are decoded before they are classified


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images: one row for each, with the predicted class and the probability of every class.

    Of a model of several labels, those with a probability over 0.5 are predicted, separated by bars.

    Images that can't be read are reported and have no row; the exit code is then 2.

    Example: python tuning/model_folder.py predict results/xray/model films/ "more/*.png" --out predictions.csv
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder or URI of a model, such as results/NAME/model."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="")]
    """Image files, folders of images, URIs of either, or globs in quotes (** matches nested folders)."""
    out: Annotated[tyro.conf.DisallowNone[str | None], tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Table to write, .csv or .parquet. Default: CSV on the standard output."""
    sets: Annotated[tyro.conf.DisallowNone[float | None], tyro.conf.arg(metavar="SHARE", help_behavior_hint="")] = None
    """Adds a column `set`: the classes that can't be ruled out. Of the images of each class, at least this share (0.9)
    have it in their set, if they are like the validation images."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], tyro.conf.arg(metavar="auto|cpu|cuda|mps")] = "auto"
    """Device: `cpu`, `cuda`, `mps` (Apple's GPU), or `auto`: a GPU if there is one."""


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
    if flags.sets is not None and not 0 < flags.sets < 1:
        raise InputError(f"--sets {flags.sets:g}: must be a share between 0 and 1, such as 0.9")
    try:
        files, faults = named_images(flags.images)
    except OSError as error:
        raise InputError(f"predict: {error}; is the storage reachable, and are its keys set?") from None
    if not files:
        raise InputError(faults or ["predict: give at least one image"])
    with borrowed(flags.model, without=NOT_LOADED) as folder:
        model = load_model(folder, flags.device)
        least = None if flags.sets is None else _least(folder, model.classes, flags.sets)
    known: list[str] = []
    rows: list[NDArray[np.float64]] = []
    odd: list[bool | None] = []
    notes: dict[str, str] = {}
    for start in range(0, len(files), AT_ONCE):
        part = files[start : start + AT_ONCE]
        found, unreadable = _predict_readable(model, part, notes)
        known += [file for file, row in zip(part, found, strict=True) if row is not None]
        rows += [row[0] for row in found if row is not None]
        odd += [row[1] for row in found if row is not None]
        faults += unreadable
    for line in notes_in_words(notes.keys(), notes.values()):
        print(visible(line), file=sys.stderr)
    if rows or flags.out is None:
        probabilities = np.array(rows).reshape(len(rows), len(model.classes))
        if several := [file for file, unlike in zip(known, odd, strict=True) if unlike]:
            said = f"{count(len(several), 'image')} unlike those that the model was made from ({examples(several)})"
            print(visible(f"{said}: its predictions mean little there"), file=sys.stderr)
        _write_table(flags.out, known, model, probabilities, odd, least)
        if flags.out is not None:
            print(f"written: {visible(flags.out)}, {count(len(rows), 'image')}")
    if faults:
        raise InputError(faults)


def named_images(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the image files that files, folders, globs and URIs name, in order, and what is wrong with the others.

    In folders the same files count as in a folder of training images; a line is printed for what is left out.
    """
    files: list[str] = []
    faults: list[str] = []
    for word in words:
        there = [word] if is_uri(word) or os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        found = [file for place in there for file in _images_of(place, faults)]
        if not found:
            what = "has no images" if there else "no such file or folder, and as a glob it matches nothing"
            what = "is neither an image nor a folder of images" if is_uri(word) else what
            faults.append(f"{word}: {what}; give image files, folders of images, or globs")
        files += found
    return list(dict.fromkeys(files)), faults


def _images_of(place: str, faults: list[str]) -> list[str]:
    """Return a file itself, or the images below a folder; what is left out of them is printed."""
    if is_uri(place):
        if stored([place]) != [None]:
            return [place]
        entries_of = stored_entries(place, files_below(place))
    elif os.path.isdir(place):
        entries_of = partial(local_entries, faults=faults)
    else:
        return [str(Path(place))]
    images, others = images_below(place, entries_of)
    for line in left_out(others):
        print(f"{visible(place)}: {visible(line)}", file=sys.stderr)
    return sorted(images if is_uri(place) else [str(Path(image)) for image in images])


def _least(folder: Path, classes: Sequence[str], coverage: float) -> NDArray[np.float64]:
    """Return the probability of each class from which it is in a set."""
    path = folder / conformal.FILE
    if not path.exists():
        raise InputError(f"--sets: {folder} has no {path.name}: it was made by an older version, or without validation")
    return conformal.thresholds(read_table(path), classes, coverage)


def _predict_readable(
    model: Model | Ensemble, files: Sequence[str], notes: dict[str, str]
) -> tuple[list[tuple[NDArray[np.float64], bool | None] | None], list[str]]:
    """Return each file's probabilities and whether it is unlike the training images, None if it can't be read.

    And the faults, found by trying halves.
    """
    try:
        probabilities, unlike = model.look(files, notes)
        odd = [None] * len(files) if unlike is None else [bool(each > 1) for each in unlike]
        return list(zip(probabilities, odd, strict=True)), []
    except InputError as error:
        if len(files) == 1:
            return [None], error.faults[:1]
    halves = [_predict_readable(model, part, notes) for part in (files[: len(files) // 2], files[len(files) // 2 :])]
    return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]


def _write_table(
    out: str | None,
    files: Sequence[str],
    model: Model | Ensemble,
    probabilities: NDArray[np.float64],
    odd: Sequence[bool | None],
    least: NDArray[np.float64] | None,
) -> None:
    classes = model.classes

    def listed(chosen: NDArray[np.bool_]) -> list[str]:
        return ["|".join(name for name, yes in zip(classes, row, strict=True) if yes) for row in chosen]

    if model.multi_label:
        predicted = listed(probabilities > 0.5)
    else:
        predicted = [classes[index] for index in probabilities.argmax(axis=1)]
    more: dict[str, list[Any]] = {} if least is None else {"set": listed(probabilities >= least)}
    more |= {} if None in odd else {"unlike_training": list(odd)}
    header = ["path", "predicted", *(f"probability_{name}" for name in classes), *more]
    try:
        if out is not None and out.endswith(".parquet"):
            named = [os.fsencode(file).decode("utf-8", "replace") for file in files]  # Parquet holds only Unicode
            columns = [pa.array(values, pa.string()) for values in (named, predicted)]
            columns += [pa.array(values) for values in probabilities.T]
            columns += [pa.array(values, pa.bool_() if name != "set" else pa.string()) for name, values in more.items()]
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
            for place, (file, label, row) in enumerate(zip(files, predicted, probabilities, strict=True)):
                others = [
                    str(values[place]).lower() if name != "set" else values[place] for name, values in more.items()
                ]
                writer.writerow([file, label, *(f"{value:.6f}" for value in row), *others])
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(
            f"{out or 'standard output'}: can't be written ({error.strerror}); choose another file by --out"
        ) from None


if __name__ == "__main__":
    leave(main())
