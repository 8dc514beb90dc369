"""Read a manifest, whoever has written it: text with any delimiter, JSON, Excel or Parquet, as columns of cells."""

import csv
import gzip
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tuning.record import storage
from tuning.settings.config import FORMATS, InputError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'", " ": "spaces"}
TEXT, LINES = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson")
SUFFIXES = (*TEXT, ".json", *LINES, ".xlsx", ".parquet")
SNIFFED = 20  # rows by which the delimiter is known
UNREADABLE = (
    *(OSError, EOFError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, zlib.error, zipfile.BadZipFile),
    pa.ArrowException,
)


class Manifest(NamedTuple):
    """The columns of a manifest: all names, and the cells of those that could be read, in the same order of rows."""

    names: list[str]
    columns: dict[str, list[Any]]


def read_manifest(file: str, wanted: Sequence[str], named: Sequence[str] | None, remarks: list[str]) -> Manifest:
    """Read a manifest from a path or URI, by its suffix, which `.gz` may follow.

    Args:
        wanted: columns that are used; the cells of others may be left out.
        named: names of the columns of a text without a header.
        remarks: is given lines for the user: how the text was understood.

    Raises:
        InputError: it can't be read, with the cure.
    """
    suffix = os.path.splitext(file.lower().removesuffix(".gz"))[1]
    try:
        if suffix in TEXT:
            return _text(file, wanted, named, remarks)
        if named is not None:
            remarks.append(f"columns {list(named)} are for text without a header, not for {suffix}")
        if suffix == ".parquet":
            return _parquet(file, wanted)
        if suffix == ".xlsx":
            return _excel(file)
        if suffix == ".json" or suffix in LINES:
            return _json(file, wanted, lines=suffix in LINES)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except UNREADABLE as error:
        raise InputError(f"{file}: can't be read as {suffix} ({error}); save it again (text in UTF-8)") from None
    kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    raise InputError(f"{file}: a manifest must end in {kinds}, not in {suffix or 'no suffix'}; convert it")


def names_image(cell: Any) -> bool:
    """Return whether a cell is the name of an image file."""
    return isinstance(cell, str) and cell.strip().lower().endswith(tuple(FORMATS))


# ---- text -------------------------------------------------------------------------------------------------------


def _text(file: str, wanted: Sequence[str], named: Sequence[str] | None, remarks: list[str]) -> Manifest:
    """Columns of text; only an empty cell is empty, for `NA` and `None` may be classes."""
    with _open(file) as raw, TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        delimiter = _delimiter(stream, wanted, named)
        reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
        first = next((row for row in reader if any(row)), [])
        header = [cell.strip() for cell in first]
        if not header:
            raise InputError(f"{file}: is empty; give it a header and a row for each image")
        rows = [] if named is None else [first]
        if named is not None:
            if len(first) != len(named):
                raise InputError(f"{file}: columns names {len(named)}, but its first row has {len(first)}")
            header = list(named)
        elif not set(wanted) & set(header) and any(map(names_image, header)):
            header, rows = _unnamed(header, wanted), [first]
            unused = ", ".join(name for name in header if name not in wanted)
            said = [f"{name} = column {header.index(name) + 1}" for name in wanted if name in header]
            remarks.append(
                f"{os.path.basename(file)} has no header: {', '.join(said)}" + (unused and " (others unused)")
            )
        if delimiter != ",":
            sign = DELIMITERS.get(delimiter, repr(delimiter))
            remarks.append(f"the columns of {os.path.basename(file)} are separated by {sign}")
        places = {name: header.index(name) for name in header}  # the first of columns with one name
        columns: dict[str, list[Any]] = {name: [] for name in places}
        for row in chain(rows, reader):
            if any(row[len(header) :]):
                cure = "quote texts that contain the delimiter"
                raise InputError(f"{file}: line {reader.line_num} has more cells than the header; {cure}")
            if any(row):  # spreadsheets leave rows of delimiters behind
                for name, place in places.items():
                    columns[name].append(row[place] if place < len(row) else None)
    return Manifest(header, columns)


def _delimiter(stream: TextIO, wanted: Sequence[str], named: Sequence[str] | None) -> str:
    """Return the delimiter with which the header has most of the wanted columns, and all rows as many as the first.

    Excel's line `sep=;` names it. The stream stands after that line, or at its start.
    """
    start = stream.readline()
    if start.lower().startswith("sep=") and len(start.strip()) <= 5:
        return start.rstrip("\r\n")[4:5] or ","
    lines = [line for line in (start, *(stream.readline() for _ in range(SNIFFED))) if line.strip()]
    stream.seek(0)
    if all(map(names_image, lines)):  # a list of images, whose names may have spaces
        return ","

    def fits(delimiter: str) -> tuple[int, bool]:
        try:
            rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
        except csv.Error:
            return 0, False
        header = [cell.strip() for cell in rows[0]]
        widths = {len([*row[: len(header)], *filter(None, row[len(header) :])]) for row in rows}
        there = len(set(wanted) & set(header)) if named is None else int(len(header) == len(named))
        return there, len(widths) == 1 and len(header) > 1

    return max(DELIMITERS, key=lambda delimiter: fits(delimiter)) if lines else ","


def _unnamed(first: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Name the columns of a text without a header, as lists of images have them: a group, the path, the label, others.

    Args:
        first: row.
        wanted: names of the columns of path, label, split and group.
    """
    path, label, _, group = wanted
    at = next(place for place, cell in enumerate(first) if names_image(cell))
    known = {at: path, at + 1: label} | ({0: group} if at else {})
    return [known.get(place, f"column {place + 1}") for place in range(len(first))]


# ---- other formats ----------------------------------------------------------------------------------------------


def _parquet(file: str, wanted: Sequence[str]) -> Manifest:
    with _open(file) as stream:
        content = pq.ParquetFile(stream)
        schema = content.schema_arrow
        used = [name for name in dict.fromkeys(wanted) if schema.names.count(name) == 1]
        if nested := [(name, kind) for name in used if pa.types.is_nested(kind := schema.field(name).type)]:
            said = ", ".join(f"{name!r} contains {kind}" for name, kind in nested)
            raise InputError(f"{file}: column {said}; give one value per image")
        others = [name for name in schema.names if schema.names.count(name) == 1 and _is_plain(schema.field(name).type)]
        read = dict.fromkeys([*used, *others])
        return Manifest(schema.names, {name: content.read(columns=[name])[name].to_pylist() for name in read})


def _is_plain(kind: pa.DataType) -> bool:
    """Return whether a column may hold labels or ids: not images, nor lists."""
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _excel(file: str) -> Manifest:
    """The first sheet; a number stays one, so that an id keeps its digits."""
    import pandas as pd

    try:
        with _open(file) as stream:
            table = pd.read_excel(stream, dtype=object, keep_default_na=False, na_values=[""])
    except ImportError:
        raise InputError(f"{file}: Excel files need `pip install openpyxl`, or save it as CSV") from None
    except (ValueError, KeyError) as error:  # what openpyxl, xlrd and zipfile raise
        raise InputError(f"{file}: can't be read as Excel ({error}); save it again, or as CSV") from None
    names = [str(name).strip() for name in table.columns]
    return Manifest(names, {name: table.iloc[:, place].tolist() for place, name in enumerate(names)})


def _json(file: str, wanted: Sequence[str], *, lines: bool) -> Manifest:
    """A list of objects, an object of lists, or an object a line."""
    with _open(file) as raw, TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        found = [json.loads(line) for line in stream if line.strip()] if lines else json.load(stream)
    if isinstance(found, dict) and all(isinstance(cells, list) for cells in found.values()):
        longest = max(map(len, found.values()), default=0)
        found = [{name: cells[row] for name, cells in found.items() if row < len(cells)} for row in range(longest)]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise InputError(
            f"{file}: must hold a list of objects, one for each image, such as {{'path': ..., 'label': ...}}"
        )
    names = list(dict.fromkeys(name for row in found for name in row))
    nested = {name: row[name] for row in found for name in row if isinstance(row[name], list | dict)}
    if used := [name for name in nested if name in wanted]:
        raise InputError(f"{file}: column {used[0]!r} contains {nested[used[0]]!r}; give one value per image")
    return Manifest(names, {name: [row.get(name) for row in found] for name in names if name not in nested})


@contextmanager
def _open(file: str) -> Iterator[BinaryIO]:
    with storage.readable(file) if storage.is_uri(file) else open(file, "rb") as stream:
        if file.lower().endswith(".gz"):
            with gzip.open(stream) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield stream
