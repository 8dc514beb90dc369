"""What a line of the journal must be: its checksum, and the fields of each kind of event."""

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from tuning.settings.config import TrialConfig

SEAL = b', "crc": '  # before the CRC-32 of the line without it


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    if missing := TrialConfig.model_fields.keys() - config.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    TrialConfig(**config)
    return config


_Count = Annotated[int, Field(ge=0)]
_Epoch = Annotated[int, Field(ge=1)]
_Trial: dict[str, Any] = {"trial_id": str}
_LOSSES = ("train_loss", "train_eval_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc")
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
    | dict.fromkeys((*_LOSSES, "learning_rate", "cache_hits", "peak_memory_mb", "prefix_seconds"), float | None)
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


def sealed(event: Mapping[str, Any]) -> bytes:
    """The line of an event: JSON that ends in its checksum."""
    line = json.dumps(event, allow_nan=False).encode()
    return line[:-1] + SEAL + str(zlib.crc32(line)).encode() + b"}\n"


def opened(line: bytes, *, must_be_sealed: bool) -> tuple[dict[str, Any], bool]:
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


def check(events: Iterable[Mapping[str, Any]]) -> None:
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
