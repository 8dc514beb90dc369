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

from tuning.record.journal import LOSSES, METRICS, SCORES, Record, Trial, best_epoch
from tuning.settings.config import PARAMETERS, InputError, TrialConfig

SCHEMA_VERSION = 4
BATCH_ROWS = 1000  # made into columns at once

_TEXT, _WHOLE, _REAL, _TIME = pa.string(), pa.int64(), pa.float64(), pa.timestamp("us", tz="UTC")


def _config_type(name: str) -> pa.DataType:
    annotation = TrialConfig.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        annotation = type(get_args(annotation)[0])
    return {int: _WHOLE, float: _REAL, str: _TEXT}[annotation]  # type: ignore[index]


def versioned(columns: dict[str, pa.DataType], **facts: str) -> pa.Schema:
    """Return a schema with these columns; `facts` lie beside the version in its metadata."""
    return pa.schema(list(columns.items()), metadata={"schema_version": str(SCHEMA_VERSION), **facts})


TRIALS = versioned(
    {"trial_id": _TEXT, "number": _WHOLE}
    | dict.fromkeys(("origin", "status", "reason"), _TEXT)
    | {"seed": _WHOLE, "finalist_of": _TEXT}
    | {f"config_{name}": _config_type(name) for name in PARAMETERS}
    | dict.fromkeys(("epochs", "best_epoch"), _WHOLE)
    | dict.fromkeys((*LOSSES, *SCORES, "train_loss"), _REAL)
    | dict.fromkeys(("train_eval_loss", "gap", "seconds", "gpu_seconds", "images_per_second", "peak_memory_mb"), _REAL)
    | dict.fromkeys(("micro_batch", "trained_parameters", "parameters"), _WHOLE)
    | {"latency_ms": _REAL, "error": _TEXT, "started_at": _TIME, "ended_at": _TIME}
)
EPOCHS = versioned(
    {"seq": _WHOLE, "trial_id": _TEXT, "epoch": _WHOLE}
    | dict.fromkeys((*METRICS, "early_loss", "learning_rate", "seconds", "data_seconds", "prefix_seconds"), _REAL)
    | {"train_seconds": _REAL, "evaluate_seconds": _REAL, "cache_hits": _WHOLE, "wall_s": _REAL}
)
DECISIONS = versioned(
    {"seq": _WHOLE, "trial_id": _TEXT, "epoch": _WHOLE, "rung": _WHOLE, "stratum": _TEXT}
    | {"value": _REAL, "cutoff": _REAL, "verdict": _TEXT}
)
FINALISTS = versioned(
    {"trial_id": _TEXT, "role": _TEXT, "chosen": pa.bool_(), "runs": _WHOLE}
    | dict.fromkeys(("mean", "sd", "searched", "luck", "difference", "low", "high", "p_value", "seconds"), _REAL)
)
SAMPLES = versioned(dict.fromkeys(("path", "file", "label", "split", "group"), _TEXT) | {"unit": _WHOLE})
AUDIT = versioned(
    dict.fromkeys(("finding", "severity", "path_a", "path_b"), _TEXT)
    | {"value": _REAL, "p_value": _REAL, "detail": _TEXT}
)
SUBGROUP = "subgroup_"  # before the names of further columns of samples, by which figures are given
SCHEMAS = {"trials": TRIALS, "epochs": EPOCHS, "decisions": DECISIONS, "samples": SAMPLES}
SCHEMAS |= {"finalists": FINALISTS, "audit": AUDIT}
LIGHT = ("brightness", "contrast")  # rules of shortcut_colour that need no colour
FILLED = {  # columns that have a value in every row
    "trials": ("trial_id", "origin", "status", "epochs", "seconds", "config_backbone", "config_unfreeze_depth"),
    "epochs": ("seq", "trial_id", "epoch", "seconds", "wall_s"),
    "decisions": ("seq", "trial_id", "epoch", "rung", "verdict"),
    "samples": ("path", "file", "label", "split"),
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, which replaces it, whole and on disk, if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors puts a file there that only its owner may read
            os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _network(trial: Trial) -> tuple[str, int]:
    return trial.config["backbone"], trial.config["image_size"]


def _latencies(trials: Iterable[Trial]) -> dict[tuple[str, int], float]:
    """Return each network's least measured latency: other load on the machine only makes it longer."""
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
    val_loss, train_eval_loss = best.get("val_loss"), best.get("train_eval_loss")
    config = trial.config | {"unfreeze_depth": last.get("unfreeze_depth", trial.config["unfreeze_depth"])}
    described = ("trial_id", "number", "origin", "status", "reason", "error", "finalist_of")
    return {
        **{name: getattr(trial, name) for name in described},
        "seed": config["seed"],
        **{f"config_{name}": config[name] for name in PARAMETERS},
        **{name: best.get(name) for name in METRICS},
        "epochs": len(trial.rows),
        "best_epoch": best.get("epoch"),
        "gap": None if val_loss is None or train_eval_loss is None else val_loss - train_eval_loss,
        "seconds": seconds,
        "gpu_seconds": seconds * trial.gpus,
        "images_per_second": sum(row["images"] for row in trial.rows) / training if training else None,
        "peak_memory_mb": max((row["peak_memory_mb"] or 0.0 for row in trial.rows), default=0.0) or None,
        **{name: last.get(name) for name in ("micro_batch", "trained_parameters", "parameters")},
        "latency_ms": latencies.get(_network(trial)),
        "started_at": _utc(trial.started_at),
        "ended_at": _utc(trial.ended_at),
    }


def _utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def make_tables(record: Record, metric: str) -> dict[str, pa.Table]:
    """Return the tables `trials`, `epochs` and `decisions`; `metric` chooses the best epochs.

    Their metadata holds the `seq` of the last event in them.
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


def _table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Column by column and part by part: dicts of all rows at once would take most of the memory."""
    rows, batches = iter(rows), []
    while part := list(itertools.islice(rows, BATCH_ROWS)):
        columns = [pa.array([row.get(field.name) for row in part], field.type) for field in schema]
        batches.append(pa.record_batch(columns, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def samples_table(samples: pd.DataFrame) -> pa.Table:
    """Return samples with the schema of `samples.parquet`."""
    schema = SAMPLES
    for name in samples.columns:
        if str(name).startswith(SUBGROUP):
            schema = schema.append(pa.field(str(name), _TEXT))
    return pa.Table.from_pandas(samples[schema.names], schema=schema, preserve_index=False)


def write_tables(tables: dict[str, pa.Table], folder: Path) -> None:
    """Write each table to `folder/<name>.parquet`, replaced whole."""
    for name, table in tables.items():
        with replacing(folder / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
    pa.default_memory_pool().release_unused()  # else it keeps as much as the largest tables took


def up_to_date(folder: Path) -> bool:
    """Return whether a run's three tables hold all that its journal does.

    They don't if the driver was killed before or while it wrote them. A run without a journal has its tables alone.
    """
    journal = folder / "journal.jsonl"
    if not journal.exists():
        return (folder / "trials.parquet").exists()
    held = {_last_seq(folder / f"{name}.parquet") for name in ("trials", "epochs", "decisions")}
    events = journal.read_bytes().count(b"\n")  # `seq` counts them
    return len(held) == 1 and min(held) >= events


def _last_seq(path: Path) -> int:
    """Return the `seq` of the last event in a table; -1 if there is no table, or no `seq` in its metadata."""
    try:
        return int((pq.read_schema(path).metadata or {})[b"seq"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return -1


def read_table(path: str | Path) -> pd.DataFrame:
    """Return a table of a run; columns that an older version didn't write are empty.

    Raises:
        InputError: the table is missing, damaged, not Parquet, or written by a newer version.
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
    if faults := _faults(table, path.stem, version):
        raise InputError(f"{path}: is damaged: {'; '.join(faults)}; restore it from a copy")
    for column in SCHEMAS.get(path.stem, ()):
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
    if path.stem in SCHEMAS:
        table = table.select([*dict.fromkeys((*SCHEMAS[path.stem].names, *table.column_names))])
    return table.replace_schema_metadata(None).to_pandas()  # without what pandas added to the metadata


def read_whole(path: Path) -> pa.Table:
    """Return a Parquet file's table, with its checksums verified.

    Raises:
        pa.ArrowException, OSError: it can't be read, or is damaged.
    """
    table = pq.read_table(pa.BufferReader(path.read_bytes()), page_checksum_verification=True)
    table.validate(full=True)  # finds text that isn't UTF-8, say
    return table


def _faults(table: pa.Table, name: str, version: int) -> list[str]:
    """Return how a table departs from its schema; older versions may have other columns."""
    if name not in SCHEMAS:
        return []
    schema, there = SCHEMAS[name], set(table.column_names)
    wrong = [
        f"{field.name} ({field.type})"
        for field in table.schema
        if (field.name not in schema.names and version == SCHEMA_VERSION and not field.name.startswith(SUBGROUP))
        or (field.name in schema.names and field.type != schema.field(field.name).type)
    ]
    filled = FILLED.get(name, ())
    listed = {
        "unknown columns or types: ": wrong,
        "missing columns: ": [column for column in filled if column not in there],
        "missing values in columns: ": [column for column in filled if column in there and table[column].null_count],
    }
    faults = [f"{kind}{', '.join(columns)}" for kind, columns in listed.items() if columns]
    if name != "trials" or faults:
        return faults
    empty = pa.nulls(table.num_rows)
    best, seeds, losses = (table[column] if column in there else empty for column in ("best_epoch", "seed", "val_loss"))
    if pc.any(pc.and_(pc.is_null(best), pc.is_valid(losses))).as_py():
        faults.append("a row has a val_loss and no best_epoch")
    if pc.any(pc.and_(pc.is_null(seeds), pc.equal(table["origin"], "finalist"))).as_py():
        faults.append("a finalist's run has no seed")
    return faults


def searched(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the start points and suggested trials, without probes and the finalists' runs."""
    return trials[~trials["origin"].isin(["probe", "finalist"])]


def warned_shortcuts(table: pd.DataFrame) -> list[str]:
    """Return what alone predicts a class, by the table of findings: shape, metadata and so on, each once."""
    found = table[(table["severity"] == "warn") & table["finding"].str.startswith("shortcut_")]
    light = found["detail"].str.startswith(LIGHT)
    return sorted(set(found["finding"].str.removeprefix("shortcut_").mask(light, "brightness or contrast")))
