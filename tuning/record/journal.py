"""The journal, the source of truth while a search runs, and the trials that it describes."""

import fcntl
import itertools
import json
import os
import time
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import IO, Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from tuning.settings.config import InputError, TrialConfig

FINAL = ("completed", "stopped", "converged", "diverged", "out_of_memory", "failed")  # ends that resume never undoes
PROMOTED = "promoted"  # the decision that a stopped trial continues after all
EARLY = ("stopped", "converged", "diverged")  # ends that early stopping brought about before the last epoch
LOSSES = ("val_loss", "val_tempered_loss")  # metrics of which less is better
NEW_SCORES = ("val_f1", "val_auprc", "val_sensitivity_at_90", "val_sensitivity_at_95")
SCORES = ("val_accuracy", "val_balanced_accuracy", "val_auroc", *NEW_SCORES)
METRICS = ("train_loss", "train_eval_loss", *LOSSES, *SCORES)
LATER = ("val_tempered_loss", *NEW_SCORES)  # fields that older versions did not write
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])

# ---- Lines ------------------------------------------------------------------------------------------------------

_CHECKSUM = b', "crc": '  # before the CRC-32 of the line without it


def _full_config(config: dict[str, Any]) -> dict[str, Any]:
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
    | {"config": Annotated[dict[str, Any], AfterValidator(_full_config)]},
    "started": _Trial | {"gpus": float},
    "lost": _Trial | {"started": bool, "error": str | None},
    "moved": _Trial | {"error": str},  # scheduled again, since it could not run where it was
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
_EVENTS: dict[str, type[BaseModel]] = {
    kind: create_model(
        kind,
        __config__=ConfigDict(strict=True, allow_inf_nan=False),
        **{name: (rule, None if name in LATER else ...) for name, rule in fields.items()},  # type: ignore[call-overload]
    )
    for kind, fields in _FIELDS.items()
}


def _fault(event: Mapping[str, Any], trial_ids: Collection[str]) -> str | None:
    """Return what is wrong with an event of a search; None if its fields are right and its trial is known."""
    kind = event.get("event")
    if not isinstance(kind, str) or kind not in _EVENTS:
        return f"unknown event {kind!r}"
    try:
        _EVENTS[kind].model_validate(event)
    except ValidationError as error:
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    if kind not in ("priors", "asked") and event["trial_id"] not in trial_ids:
        return f"no `asked` event before it has trial {event['trial_id']!r}"
    return None


def _with_checksum(event: Mapping[str, Any]) -> bytes:
    line = json.dumps(event, allow_nan=False).encode()
    return line[:-1] + _CHECKSUM + str(zlib.crc32(line)).encode() + b"}\n"


def _parsed(line: bytes, *, needs_checksum: bool) -> tuple[dict[str, Any], bool]:
    """Return a line's event, and whether it has a checksum: older versions wrote none. Raise ValueError if damaged."""
    content, has_checksum, checksum = line.rpartition(_CHECKSUM)
    if has_checksum and zlib.crc32(content + b"}") != int(checksum.removesuffix(b"}")):
        raise ValueError("checksum mismatch")
    if needs_checksum and not has_checksum:
        raise ValueError("no checksum")
    event = json.loads(content + b"}" if has_checksum else line)
    if not isinstance(event, dict):
        raise ValueError("not a mapping")
    for name in ("wall_s", "time"):
        if not isinstance(event[name], int | float) or not 0 <= event[name] < 1e12:
            raise ValueError(f"{name} is {event[name]!r}")
    return event, bool(has_checksum)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the journal's events in order, without a last line that was only half written.

    Raises:
        InputError: another line is not as it was written.
    """
    events: list[dict[str, Any]] = []
    *lines, _half_written = path.read_bytes().split(b"\n")
    has_checksum = False
    for number, line in enumerate(lines, 1):
        try:
            event, has_checksum = _parsed(line, needs_checksum=has_checksum)
            if event["seq"] != number:
                raise ValueError(f"seq is {event['seq']}, not {number}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is damaged ({error}); restore it from a copy") from None
        events.append(event)
    return events


# ---- Writing ----------------------------------------------------------------------------------------------------


def lock(journal: IO[bytes], run: Path) -> None:
    """Lock a run's folder for this process until its journal, open for writing as NFS demands, is closed.

    Raises:
        InputError: another process has it.
    """
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{run}: another search is writing this run; wait for it or stop it") from None


class Journal:
    """Appends events, each on disk before `append` returns.

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
        """Active time in seconds since the search began, summed over all starts."""
        return self._wall_before + self._clock() - self._opened

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Write one event and return it with its `seq`, `wall_s` and `time` (Unix seconds)."""
        self._seq += 1
        entry = {"seq": self._seq, "event": event, "wall_s": round(self.wall_s, 3), "time": time.time(), **fields}
        self._file.write(_with_checksum(entry))
        self._file.flush()
        os.fsync(self._file.fileno())
        return entry

    def close(self) -> None:
        self._file.close()


# ---- Trials -----------------------------------------------------------------------------------------------------


_GROUPS = {int: "numbers", float: "numbers", NoneType: "nothing"}  # of `Row`; other values go into a tuple


class Row(Mapping[str, Any]):
    """The fields of an event in a fifth of a dict's memory: a search has hundreds of thousands of them.

    Numbers lie unboxed in one array, None nowhere, and all events of a kind share one layout.
    """

    __slots__ = ("_layout", "_numbers", "_others")
    _layouts: ClassVar[dict[tuple[tuple[str, type], ...], dict[str, tuple[type, int]]]] = {}

    def __init__(self, fields: Mapping[str, Any]):
        types = tuple((name, type(value)) for name, value in fields.items())
        if types not in self._layouts:
            counts: dict[str | None, Iterator[int]] = defaultdict(itertools.count)
            self._layouts[types] = {name: (kind, next(counts[_GROUPS.get(kind)])) for name, kind in types}
        self._layout = self._layouts[types]
        self._numbers = array("d", [value for value in fields.values() if type(value) in (int, float)])
        self._others = tuple(value for value in fields.values() if type(value) not in _GROUPS)

    def __getitem__(self, name: str) -> Any:
        kind, place = self._layout[name]
        if kind is NoneType:
            return None
        return kind(self._numbers[place]) if kind in (int, float) else self._others[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


@dataclass(slots=True)
class Trial:
    """What the journal says of one trial; `status` is None until it starts."""

    trial_id: str
    number: int | None  # counts start points and suggested trials; None for others
    origin: str
    params: dict[str, Any]
    config: dict[str, Any]
    finalist_of: str | None = None  # the trial whose configuration a finalist's run retrains
    status: str | None = None
    reason: str | None = None
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    ended_seq: int | None = None  # of the event that ended it
    gpus: float = 0.0
    losses: int = 0  # times that its worker process died while it ran
    lost_starts: int = 0  # times that its worker process died before it began there
    rows: list[Row] = field(default_factory=list)
    decisions: list[Row] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.status in FINAL


def loss_like(metric: str, value: float) -> float:
    """Return the metric's value, negated if more is better, so that less is better."""
    return value if metric in LOSSES else -value


def best_epoch(rows: Iterable[AnyRow], metric: str) -> AnyRow | None:
    """Return the row of the best epoch, the earliest of equals; None if no epoch has finite losses."""
    finite = [row for row in rows if row["val_loss"] is not None and row.get(metric) is not None]
    return min(finite, key=lambda row: loss_like(metric, row[metric])) if finite else None


@dataclass
class Record:
    """The journal folded into trials, in the order in which they were asked for."""

    trials: dict[str, Trial] = field(default_factory=dict)
    priors: list[dict[str, Any]] = field(default_factory=list)  # another run's trials, for the sampler
    seq: int = 0  # of the last event

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
            promoted = (row["epoch"] for row in trial.decisions if row["verdict"] == PROMOTED)
            until = max(promoted, default=event["from_epoch"])  # a promotion holds if the epochs before are made again
            trial.decisions = [row for row in trial.decisions if row["epoch"] <= max(until, event["from_epoch"])]
        elif kind == "epoch":
            trial.rows.append(Row(event))
        elif kind == "decision":
            trial.decisions.append(Row(event))
            if event["verdict"] == PROMOTED:
                trial.status, trial.reason = "interrupted", "it was promoted, and has not begun again"
                trial.ended_at = trial.ended_seq = None
        elif kind == "ended":
            trial.status, trial.reason, trial.error = event["status"], event["reason"], event["error"]
            trial.ended_at, trial.ended_seq = event["time"], event["seq"]


def read_record(path: Path) -> Record:
    """Return the trials of a search from its journal; none if there is no journal yet.

    Raises:
        InputError: the journal is damaged.
    """
    record = Record()
    for event in read_journal(path) if path.exists() else []:
        if fault := _fault(event, record.trials):
            raise InputError(f"{path}: line {event['seq']} is damaged ({fault}); restore it from a copy")
        record.apply(event)
    return record
