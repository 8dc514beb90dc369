"""The journal, which is the truth while a search runs, and what it says of each trial."""

import fcntl
import itertools
import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import IO, Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from tuning.settings.config import InputError, TrialConfig

FINAL = ("completed", "stopped", "converged", "diverged", "out_of_memory", "failed")  # resume never undoes these
METRICS = ("train_loss", "train_eval_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc")
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])
SEAL = b', "crc": '  # before the CRC-32 of the line without it


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    if missing := TrialConfig.model_fields.keys() - config.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    TrialConfig(**config)
    return config


_Count = Annotated[int, Field(ge=0)]
_Epoch = Annotated[int, Field(ge=1)]
_Trial: dict[str, Any] = {"trial_id": str}
_FIELDS: dict[str, dict[str, Any]] = {
    "priors": {"priors": list[dict[str, Any]]},
    "asked": _Trial
    | {"number": _Count | None, "origin": str, "params": dict[str, Any]}
    | {"config": Annotated[dict[str, Any], AfterValidator(_whole)]},
    "started": _Trial | {"gpus": float},
    "lost": _Trial | {"started": bool, "error": str | None},
    "resumed": _Trial | {"from_epoch": _Count},
    "epoch": _Trial
    | {"epoch": _Epoch, "images": _Count, "unfreeze_depth": _Count, "micro_batch": int | None}
    | dict.fromkeys((*METRICS, "learning_rate", "cache_hits", "peak_memory_mb", "prefix_seconds"), float | None)
    | dict.fromkeys(("seconds", "data_seconds", "train_seconds", "evaluate_seconds"), float)
    | dict.fromkeys(("ends", "reason"), str | None),
    "checkpoint": _Trial | {"epoch": _Epoch},
    "decision": _Trial
    | {"epoch": _Epoch, "rung": _Epoch, "stratum": str, "verdict": str}
    | dict.fromkeys(("value", "cutoff"), float | None),
    "ended": _Trial | {"status": str} | dict.fromkeys(("reason", "error"), str | None),
}
_KINDS: dict[str, type[BaseModel]] = {
    kind: create_model(
        kind,
        __config__=ConfigDict(strict=True, allow_inf_nan=False),
        **{name: (rule, ...) for name, rule in fields.items()},  # type: ignore[call-overload]
    )
    for kind, fields in _FIELDS.items()
}


def _sealed(event: Mapping[str, Any]) -> bytes:
    """The line of an event: JSON that ends in its checksum."""
    line = json.dumps(event, allow_nan=False).encode()
    return line[:-1] + SEAL + str(zlib.crc32(line)).encode() + b"}\n"


def _opened(line: bytes, *, must_be_sealed: bool) -> tuple[dict[str, Any], bool]:
    """The event of a line, and whether a checksum says that it is whole: older versions wrote none.

    Raises:
        ValueError: it is damaged.
    """
    content, seal, checksum = line.rpartition(SEAL)
    if seal and zlib.crc32(content + b"}") != int(checksum.removesuffix(b"}")):
        raise ValueError("its checksum is another")
    if must_be_sealed and not seal:
        raise ValueError("it has no checksum")
    event = json.loads(content + b"}" if seal else line)
    if not isinstance(event, dict):
        raise ValueError("no mapping")
    for name in ("wall_s", "time"):
        if not isinstance(event[name], int | float) or not 0 <= event[name] < 1e12:
            raise ValueError(f"{name} is {event[name]!r}")
    return event, bool(seal)


def _check(events: Iterable[Mapping[str, Any]]) -> None:
    """A search's events must be of known kinds, have their fields, and tell of trials that were asked for.

    Raises:
        ValueError: the first fault, with its line.
    """
    asked: set[str] = set()
    for event in events:
        kind = event.get("event")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"line {event['seq']}: no such event")
        try:
            _KINDS[kind].model_validate(event)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ValueError(f"line {event['seq']}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
        if kind == "asked":
            asked.add(event["trial_id"])
        elif kind != "priors" and event["trial_id"] not in asked:
            raise ValueError(f"line {event['seq']}: a trial that was never asked for")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's events in order; a torn last line is dropped.

    Raises:
        InputError: a line before the last is not an event, or not as it was written.
    """
    events: list[dict[str, Any]] = []
    *lines, _torn = path.read_bytes().split(b"\n")
    sealed = False
    for number, line in enumerate(lines, 1):
        try:
            event, sealed = _opened(line, must_be_sealed=sealed)
            if event["seq"] != number:
                raise ValueError(f"seq {event['seq']} where {number} was due")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is damaged ({error}); restore it from a copy") from None
        events.append(event)
    return events


def lock(journal: IO[bytes], run: Path) -> None:
    """Be the only one that writes a run, until the file is closed.

    Args:
        journal: open for writing: NFS locks no other.
        run: its folder.

    Raises:
        InputError: another process writes it.
    """
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{run}: another search is writing this run; wait for it or stop it") from None


class Journal:
    """Appends events, each on disk before `append` returns.

    `wall_s` is active time in seconds since the search began, summed over all starts.

    Raises:
        InputError: the journal is damaged, or another process writes it.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._file = open(path, "ab")
        try:
            lock(self._file, path.parent)
            events = read_journal(path)
        except InputError:
            self._file.close()
            raise
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        self._seq = len(events)
        self._wall_before = float(events[-1]["wall_s"]) if events else 0.0
        self._clock, self._opened = clock, clock()

    @property
    def wall_s(self) -> float:
        return self._wall_before + self._clock() - self._opened

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Write one event and return it with its `seq`, `wall_s` and `time` (Unix seconds)."""
        self._seq += 1
        entry = {"seq": self._seq, "event": event, "wall_s": round(self.wall_s, 3), "time": time.time(), **fields}
        self._file.write(_sealed(entry))
        self._file.flush()
        os.fsync(self._file.fileno())
        return entry

    def close(self) -> None:
        self._file.close()


class Row(Mapping[str, Any]):
    """The fields of an event, in a fifth of a dict's memory: a search has hundreds of thousands of them.

    Numbers lie in one array, unboxed, and nulls nowhere; where each field lies is kept once for all events of a kind.
    """

    __slots__ = ("_numbers", "_others", "_places")
    _layouts: ClassVar[dict[tuple[tuple[str, type], ...], dict[str, tuple[type, int]]]] = {}

    def __init__(self, fields: Mapping[str, Any]):
        kinds = tuple((name, type(value)) for name, value in fields.items())
        if kinds not in self._layouts:
            counts = {kind: itertools.count() for kind in (True, False, None)}
            self._layouts[kinds] = {name: (kind, next(counts[_is_number(kind)])) for name, kind in kinds}
        self._places = self._layouts[kinds]
        self._numbers = array("d", [value for value in fields.values() if _is_number(type(value))])
        self._others = tuple(value for value in fields.values() if _is_number(type(value)) is False)

    def __getitem__(self, name: str) -> Any:
        kind, place = self._places[name]
        if kind is float:
            return self._numbers[place]
        if kind is int:
            return int(self._numbers[place])
        return None if kind is NoneType else self._others[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _is_number(kind: type) -> bool | None:
    """Null for the type of null."""
    return None if kind is NoneType else kind in (int, float)


@dataclass(slots=True)
class Trial:
    """What the journal says of one trial; `status` is null until it starts."""

    trial_id: str
    number: int | None  # of a start point or suggested trial
    origin: str
    params: dict[str, Any]
    config: dict[str, Any]
    finalist_of: str | None = None  # the trial whose configuration a finalist's run trains again
    status: str | None = None
    reason: str | None = None
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    gpus: float = 0.0
    losses: int = 0  # of its worker process while it ran
    lost_starts: int = 0  # of one that it was given, before it began there
    rows: list[Row] = field(default_factory=list)
    decisions: list[Row] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.status in FINAL


def loss_like(metric: str, value: float) -> float:
    """The metric's value, negated where more is better, so that less is better."""
    return value if metric == "val_loss" else -value


def best_epoch(rows: Iterable[AnyRow], metric: str) -> AnyRow | None:
    """The row of the best epoch, the earliest of equals; null where no epoch has finite losses."""
    finite = [row for row in rows if row["val_loss"] is not None and row[metric] is not None]
    return min(finite, key=lambda row: loss_like(metric, row[metric])) if finite else None


@dataclass
class Record:
    """The journal folded into trials, in the order in which they were asked."""

    trials: dict[str, Trial] = field(default_factory=dict)
    priors: list[dict[str, Any]] = field(default_factory=list)  # what the sampler knows of another run
    seq: int = 0  # of the last event

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]]) -> "Record":
        record = cls()
        for event in events:
            record.apply(event)
        return record

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        self.seq = event["seq"]
        kind = event["event"]
        if kind == "priors":
            self.priors = event["priors"]
            return
        trial_id = event["trial_id"]
        if kind == "asked":
            fields = {name: event[name] for name in ("number", "origin", "params", "config")}
            self.trials[trial_id] = Trial(trial_id, **fields, finalist_of=event.get("finalist_of"))
            return
        trial = self.trials[trial_id]
        if kind == "started":
            trial.status, trial.reason, trial.ended_at = "running", None, None
            trial.started_at = trial.started_at or event["time"]
            trial.gpus = event["gpus"]
        elif kind == "lost":
            trial.losses += event["started"]
            trial.lost_starts += not event["started"]
        elif kind == "resumed":  # later rows and decisions are void: they will be made again
            trial.rows = [row for row in trial.rows if row["epoch"] <= event["from_epoch"]]
            trial.decisions = [row for row in trial.decisions if row["epoch"] <= event["from_epoch"]]
        elif kind == "epoch":
            trial.rows.append(Row(event))
        elif kind == "decision":
            trial.decisions.append(Row(event))
        elif kind == "ended":
            trial.status, trial.reason, trial.error = event["status"], event["reason"], event["error"]
            trial.ended_at = event["time"]


def read_record(path: Path) -> Record:
    """The trials of a search's journal; none where there is no journal yet.

    Raises:
        InputError: it is damaged.
    """
    events = read_journal(path) if path.exists() else []
    try:
        _check(events)
    except ValueError as error:
        raise InputError(f"{path}: {error}; restore it from a copy") from None
    return Record.of(events)
