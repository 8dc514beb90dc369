"""The Parquet tables of a run: their schemas, how they are made from the journal, and how they are read."""

import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuning.record.journal import METRICS, Record, Trial, best_epoch
from tuning.settings.config import PARAMETERS, InputError, TrialConfig

SCHEMA_VERSION = 2
BATCH_ROWS = 1000  # made into columns at once

_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_TIME = pa.timestamp("us", tz="UTC")


def _config_type(name: str) -> pa.DataType:
    annotation = TrialConfig.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        annotation = type(get_args(annotation)[0])
    return _ARROW[annotation]  # type: ignore[index]


def _schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema(list(columns.items()), metadata={"schema_version": str(SCHEMA_VERSION)})


_TEXT, _WHOLE, _REAL = pa.string(), pa.int64(), pa.float64()
TRIALS = _schema(
    dict.fromkeys(("trial_id",), _TEXT)
    | {"number": _WHOLE}
    | dict.fromkeys(("origin", "status", "reason"), _TEXT)
    | {"seed": _WHOLE, "finalist_of": _TEXT}
    | {f"config_{name}": _config_type(name) for name in PARAMETERS}
    | dict.fromkeys(("epochs", "best_epoch"), _WHOLE)
    | dict.fromkeys(("val_loss", "val_accuracy", "val_auroc", "val_balanced_accuracy", "train_loss"), _REAL)
    | dict.fromkeys(("train_eval_loss", "gap", "seconds", "gpu_seconds", "images_per_second", "peak_memory_mb"), _REAL)
    | dict.fromkeys(("micro_batch", "trained_parameters", "parameters"), _WHOLE)
    | {"latency_ms": _REAL, "error": _TEXT, "started_at": _TIME, "ended_at": _TIME}
)
EPOCHS = _schema(
    {"seq": _WHOLE, "trial_id": _TEXT, "epoch": _WHOLE}
    | dict.fromkeys((*METRICS, "early_loss", "learning_rate", "seconds", "data_seconds", "prefix_seconds"), _REAL)
    | dict.fromkeys(("train_seconds", "evaluate_seconds"), _REAL)
    | {"cache_hits": _WHOLE, "wall_s": _REAL}
)
DECISIONS = _schema(
    {"seq": _WHOLE, "trial_id": _TEXT, "epoch": _WHOLE, "rung": _WHOLE, "stratum": _TEXT}
    | {"value": _REAL, "cutoff": _REAL, "verdict": _TEXT}
)
FINALISTS = _schema(
    {"trial_id": _TEXT, "role": _TEXT, "chosen": pa.bool_(), "runs": _WHOLE}
    | dict.fromkeys(("mean", "sd", "searched", "luck", "difference", "low", "high", "p_value", "seconds"), _REAL)
)
SAMPLES = _schema(dict.fromkeys(("path", "file", "label", "split", "group"), _TEXT) | {"unit": _WHOLE})
AUDIT = _schema(
    dict.fromkeys(("finding", "severity", "path_a", "path_b"), _TEXT)
    | {"value": _REAL, "p_value": _REAL, "detail": _TEXT}
)


SCHEMAS = {"trials": TRIALS, "epochs": EPOCHS, "decisions": DECISIONS, "samples": SAMPLES}
SCHEMAS |= {"finalists": FINALISTS, "audit": AUDIT}
FILLED = {
    "trials": ("trial_id", "origin", "status", "epochs", "seconds", "config_backbone", "config_unfreeze_depth"),
    "epochs": ("seq", "trial_id", "epoch", "seconds", "wall_s"),
    "decisions": ("seq", "trial_id", "epoch", "rung", "verdict"),
    "samples": ("path", "file", "label", "split"),
}


def predictions_schema(classes: Iterable[str], *, epoch: int, val_loss: float) -> pa.Schema:
    """Of a trial's validation probabilities; its metadata names the best epoch and the loss that they belong to."""
    columns = dict.fromkeys(("path", "label"), _TEXT) | {f"probability_{name}": _REAL for name in classes}
    schema = _schema(columns)
    return schema.with_metadata(schema.metadata | {"best_epoch": str(epoch), "val_loss": repr(float(val_loss))})


def tested_schema(classes: Iterable[str], *, temperature: float) -> pa.Schema:
    """Of a final model's test probabilities; its metadata names the temperature that is in them."""
    columns = dict.fromkeys(("path", "label", "split"), _TEXT) | {f"probability_{name}": _REAL for name in classes}
    schema = _schema(columns)
    return schema.with_metadata(schema.metadata | {"temperature": repr(float(temperature))})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place, whole and on disk, when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors puts a file there that is its owner's alone
            os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _network(trial: Trial) -> tuple[str, int]:
    """What trials of the same latency have in common."""
    return trial.config["backbone"], trial.config["image_size"]


def _latencies(trials: Iterable[Trial]) -> dict[tuple[str, int], float]:
    """The least that was measured of each network: neighbours on the machine only make it longer."""
    least: dict[tuple[str, int], float] = {}
    for trial in trials:
        measured = trial.rows[-1].get("latency_ms") if trial.rows else None
        if measured is not None:
            least[_network(trial)] = min(measured, least.get(_network(trial), measured))
    return least


def _trial_row(trial: Trial, metric: str, latencies: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    best: Mapping[str, Any] = best_epoch(trial.rows, metric) or {}
    last: Mapping[str, Any] = trial.rows[-1] if trial.rows else {}
    seconds = sum(row["seconds"] for row in trial.rows)
    training = sum(row["seconds"] - row["evaluate_seconds"] for row in trial.rows)
    values = {name: best.get(name) for name in METRICS}
    gap = None
    if values["val_loss"] is not None and values["train_eval_loss"] is not None:
        gap = values["val_loss"] - values["train_eval_loss"]
    config = trial.config | {"unfreeze_depth": last.get("unfreeze_depth", trial.config["unfreeze_depth"])}
    return {
        **{name: getattr(trial, name) for name in ("trial_id", "number", "origin", "status", "reason", "error")},
        "seed": config["seed"],
        "finalist_of": trial.finalist_of,
        **{f"config_{name}": config[name] for name in PARAMETERS},
        **values,
        "epochs": len(trial.rows),
        "best_epoch": best.get("epoch"),
        "gap": gap,
        "seconds": seconds,
        "gpu_seconds": seconds * trial.gpus,
        "images_per_second": sum(row["images"] for row in trial.rows) / training if training else None,
        "peak_memory_mb": max((row["peak_memory_mb"] or 0.0 for row in trial.rows), default=0.0) or None,
        "micro_batch": last.get("micro_batch"),
        "trained_parameters": last.get("trained_parameters"),
        "parameters": last.get("parameters"),
        "latency_ms": latencies.get(_network(trial)),
        "started_at": _utc(trial.started_at),
        "ended_at": _utc(trial.ended_at),
    }


def _utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def make_tables(record: Record, metric: str) -> dict[str, pa.Table]:
    """The tables `trials`, `epochs` and `decisions`; best epochs are chosen by `metric`.

    Their metadata names the `seq` of the last event that they tell of.
    """
    trials = [trial for trial in record.trials.values() if trial.started_at is not None]
    latencies = _latencies(trials)
    epochs = sorted((row for trial in trials for row in trial.rows), key=lambda row: int(row["seq"]))
    decisions = sorted((row for trial in trials for row in trial.decisions), key=lambda row: int(row["seq"]))
    made = {
        "trials": _table((_trial_row(trial, metric, latencies) for trial in trials), TRIALS),
        "epochs": _table(epochs, EPOCHS),
        "decisions": _table(decisions, DECISIONS),
    }
    return {
        name: table.replace_schema_metadata(table.schema.metadata | {"seq": str(record.seq)})
        for name, table in made.items()
    }


def tell_all(folder: Path) -> bool:
    """Whether a run's three tables tell of all that its journal does.

    They don't where the driver was killed before it wrote them anew, or while it did. A run without a journal has
    its tables alone.
    """
    journal = folder / "journal.jsonl"
    if not journal.exists():
        return (folder / "trials.parquet").exists()
    told = {_seq_told(folder / f"{name}.parquet") for name in ("trials", "epochs", "decisions")}
    events = journal.read_bytes().count(b"\n")  # `seq` counts them
    return len(told) == 1 and min(told) >= events


def _seq_told(path: Path) -> int:
    """Of the last event that a table tells of; -1 where there is no table, or none of this version."""
    try:
        return int((pq.read_schema(path).metadata or {})[b"seq"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return -1


def _table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Column by column and part by part: all rows as dicts would take more memory for a moment than they do else."""
    rows, batches = iter(rows), []
    while part := list(itertools.islice(rows, BATCH_ROWS)):
        columns = [pa.array([row.get(field.name) for row in part], field.type) for field in schema]
        batches.append(pa.record_batch(columns, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def write_tables(tables: dict[str, pa.Table], folder: Path) -> None:
    """Each table to `folder/<name>.parquet`, replaced whole."""
    for name, table in tables.items():
        with replacing(folder / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
    pa.default_memory_pool().release_unused()  # else it keeps as much as the largest tables took


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of a run.

    Raises:
        InputError: not there, not Parquet, or written by a newer version.
    """
    path = Path(path)
    try:
        table = read_whole(path)
        version = int((table.schema.metadata or {})[b"schema_version"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such table; give the folder of a run") from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a table of a run, or damaged ({error}); restore it from a copy") from None
    if version > SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}; update finetune-search")
    _check_columns(table, path, version)
    for column in SCHEMAS.get(path.stem, ()):  # an older version's table lacks some
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    frame: pd.DataFrame = table.replace_schema_metadata(None).to_pandas()  # what pandas has added isn't needed
    return frame


def read_whole(path: Path) -> pa.Table:
    """A Parquet file whose pages are as they were written.

    Raises:
        pa.ArrowException, OSError: it can't be read, or is damaged.
    """
    table = pq.read_table(pa.BufferReader(path.read_bytes()), page_checksum_verification=True)
    table.validate(full=True)  # that text is UTF-8, say
    return table


def _check_columns(table: pa.Table, path: Path, version: int) -> None:
    """Columns must be of the table's schema, and filled where every row has a value; older versions may have others."""
    schema = SCHEMAS.get(path.stem)
    if schema is None:
        return
    faults = [
        f"{path}: is damaged: column {field.name!r} of {field.type} is none of this table; restore it from a copy"
        for field in table.schema
        if (version == SCHEMA_VERSION and field.name not in schema.names)
        or (field.name in schema.names and not field.type.equals(schema.field(field.name).type))
    ]
    faults += [
        f"{path}: is damaged: column {name!r} {'has gaps' if name in table.column_names else 'is missing'}; "
        "restore it from a copy"
        for name in FILLED.get(path.stem, ())
        if name not in table.column_names or table[name].null_count
    ]
    if path.stem == "trials" and "val_loss" in table.column_names and not faults:
        best = table["best_epoch"] if "best_epoch" in table.column_names else pa.nulls(table.num_rows)
        if pc.any(pc.and_(pc.is_null(best), pc.is_valid(table["val_loss"]))).as_py():
            faults = [f"{path}: is damaged: a row has a val_loss and no best_epoch; restore it from a copy"]
    if path.stem == "trials" and not faults:
        seeds = table["seed"] if "seed" in table.column_names else pa.nulls(table.num_rows)
        if pc.any(pc.and_(pc.is_null(seeds), pc.equal(table["origin"], "finalist"))).as_py():
            faults = [f"{path}: is damaged: a finalist's run has no seed; restore it from a copy"]
    if faults:
        raise InputError(faults)


def searched(trials: pd.DataFrame) -> pd.DataFrame:
    """Start points and suggested trials: without probes and the finalists' runs."""
    return trials[~trials["origin"].isin(["probe", "finalist"])]
