"""Predict with a final model; see `tuning.model.folder`."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import csv
import dataclasses
import glob
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from tuning.model.folder import Ensemble, Model, load_model
from tuning.record.mirror import borrowed
from tuning.record.storage import files_below, is_uri, joined, stored
from tuning.settings.command_line import DONE, exit_code
from tuning.settings.config import FORMATS, InputError

__all__ = ["load_model"]

NOT_LOADED = ("model.onnx", "mistakes.html")
AT_ONCE = 256  # images that predict decodes before it classifies them


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images: a row each, with the class and every class's probability.

    Images that can't be read are told and have no row; the exit code is then 2.

    Example: python tuning/model_folder.py predict results/xray/model films/ "more/*.png" --out predictions.csv
    """

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, or its URI."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders of them, URIs of these, or globs in quotes (** for folders in folders)."""
    out: str | None = None
    """Where to write, .csv or .parquet. Default: CSV to the standard output."""


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = [_not_a_flag(word) for word in sys.argv[1:]]
    return exit_code(lambda: run(tyro.extras.subcommand_cli_from_dict({"predict": Predict}, args=arguments)))


def _not_a_flag(word: str) -> str:
    """A file whose name begins with a dash, as the shell's * gives it, in a way that is no flag."""
    return f"./{word}" if word.startswith("-") and os.path.lexists(word) else word


def run(flags: Predict) -> int:
    """Classify the images and write the table; returns the exit code.

    Raises:
        InputError: images that can't be read, once the others' rows are written; nothing can be classified or written.
    """
    if flags.out is not None and Path(flags.out).suffix not in (".csv", ".parquet"):
        raise InputError(f"--out: must end in .csv or .parquet, got {flags.out}")
    try:
        files, faults = named_images(flags.images)
    except OSError as error:
        raise InputError(f"predict: {error}; is the storage reached, and are its keys given?") from None
    if not files:
        raise InputError(faults or ["predict: give at least one image file"])
    with borrowed(flags.model, without=NOT_LOADED) as folder:
        model = load_model(folder)
    known: list[str] = []
    rows: list[NDArray[np.float64]] = []
    for start in range(0, len(files), AT_ONCE):
        part = files[start : start + AT_ONCE]
        found, unreadable = _predict_readable(model, part)
        known += [file for file, row in zip(part, found, strict=True) if row is not None]
        rows += [row for row in found if row is not None]
        faults += unreadable
    if rows or flags.out is None:
        _write_table(flags.out, known, model.classes, np.array(rows).reshape(len(rows), len(model.classes)))
    if faults:
        raise InputError(faults)
    return DONE


def named_images(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Image files that files, folders and globs stand for, in order, and what is wrong with the rest.

    In folders, images are what has the suffix of one; hidden files and folders are left out.
    """
    files, faults = [], []
    for word in words:
        if is_uri(word):
            there, found = [], _stored(word)
            what = "neither an image nor a folder of images"
        else:
            there = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
            found = [
                str(Path(file)) for place in there for file in (_below(place) if os.path.isdir(place) else [place])
            ]
            what = "no images in this folder" if there else "no such file or folder, and no file matches it as a glob"
        if not found:
            faults.append(f"{word}: {what}; give image files, folders or globs")
        files += found
    return list(dict.fromkeys(files)), faults


def _stored(uri: str) -> list[str]:
    if stored([uri]) != [None]:
        return [uri]
    images = [name for name in sorted(files_below(uri)) if os.path.splitext(name)[1].lower() in FORMATS]
    return [joined(uri, name) for name in images if not any(part.startswith(".") for part in name.split("/"))]


def _below(folder: str) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in names if os.path.splitext(name)[1].lower() in FORMATS and not name.startswith(".")]
        found += [os.path.join(place, name) for name in images]
    return sorted(found)


def _predict_readable(
    model: Model | Ensemble, files: Sequence[str]
) -> tuple[list[NDArray[np.float64] | None], list[str]]:
    """Probabilities of each file, null where it can't be read, and why; halves are tried until the faulty are alone."""
    try:
        return list(model.predict(files)), []
    except InputError as error:
        if len(files) == 1:
            return [None], error.faults[:1]
    halves = [_predict_readable(model, part) for part in (files[: len(files) // 2], files[len(files) // 2 :])]
    return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]


def _write_table(
    out: str | None, files: Sequence[str], classes: Sequence[str], probabilities: NDArray[np.float64]
) -> None:
    """Rows of path, predicted class and each class's probability, as CSV or Parquet."""
    predicted = [classes[place] for place in probabilities.argmax(axis=1)]
    heads = ["path", "predicted", *(f"probability_{name}" for name in classes)]
    try:
        if out is not None and out.endswith(".parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            named = [os.fsencode(file).decode("utf-8", "replace") for file in files]  # Parquet holds Unicode alone
            columns = [pa.array(values, pa.string()) for values in (named, predicted)]
            columns += [pa.array(values) for values in probabilities.T]
            pq.write_table(pa.Table.from_arrays(columns, names=heads), out)
            return
        with ExitStack() as stack:
            if out is None:
                sys.stdout.reconfigure(errors="surrogateescape", newline="")  # type: ignore[union-attr]
                stream: Any = sys.stdout
            else:
                opened = open(out, "w", encoding="utf-8", errors="surrogateescape", newline="")
                stream = stack.enter_context(opened)
            writer = csv.writer(stream)
            writer.writerow(heads)
            for file, label, row in zip(files, predicted, probabilities, strict=True):
                writer.writerow([file, label, *(f"{value:.6f}" for value in row)])
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror}); choose another place by --out") from None


if __name__ == "__main__":
    sys.exit(main())
