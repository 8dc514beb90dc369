"""Run folders as a search leaves them, made in memory from events; the losses depend on the configuration."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml

from tuning.record.journal import METRICS, Journal, Record, best_epoch
from tuning.record.tables import AUDIT, SAMPLES, make_tables, write_tables
from tuning.settings.config import SearchPlan, TrialConfig
from tuning.settings.space import Space, trial_values
from tuning.settings.space_file import parse

SPACE = {
    "parameters": {
        "backbone": {"type": "categorical", "choices": ["resnet18", "vgg16", "densenet121"]},
        "unfreeze_depth": {"type": "int", "low": 0, "high": 5},
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        "stage_lr_decay": {"type": "float", "low": 0.3, "high": 1.0, "when": "unfreeze_depth > 1"},
        "augmentation": {"type": "categorical", "choices": ["none", "light", "medium", "strong"]},
    },
    "fixed": {"image_size": 224, "batch_size": 32},
    "start": [{"backbone": "resnet18", "unfreeze_depth": 0, "learning_rate": 1e-3, "augmentation": "none"}],
}
CONFIG = TrialConfig(backbone="test_resnet", epochs=3).model_dump()


def given_by_ray(run, images, *, early_loss_epochs):
    """Return what every trial of a run is given, on one thread."""
    return {
        "run": str(run),
        "images": {"32": str(images)},
        "weights": {"test_resnet": None},
        "digests": {},
        "features": str(Path(run).with_name("features")),
        "cache_bytes": 0,
        "threads": 1,
        "gpus": 0,
        "device": "cpu",
        "deterministic": False,
        "graphs": False,
        "halve": True,
        "redraw": False,
        "promotable": False,
        "storage": None,
        "driver": None,
        "home": None,
        "run_id": "",
        "ending": {
            "metric": "val_loss",
            "patience": None,
            "divergence_factor": 10.0,
            "early_loss_epochs": early_loss_epochs,
        },
    }


def few_trials() -> pd.DataFrame:
    """Return five rows of the table of trials, with the columns that most functions read."""
    return pd.DataFrame(
        [
            ("t0", "a", 0, 0.5, 0.4, "completed", 4, 8.0),
            ("t1", "a", 3, 0.3, 0.1, "stopped", 1, 2.0),
            ("t2", "b", 5, None, None, "diverged", 2, 6.0),
            ("t3", "b", 5, 0.9, 0.9, "failed", 1, 1.0),
            ("t4", "a", 1, 0.4, 0.4, "running", 0, 0.0),
        ],
        columns=[
            *("trial_id", "config_backbone", "config_unfreeze_depth", "val_loss", "train_eval_loss"),
            *("status", "epochs", "seconds"),
        ],
    ).assign(
        origin="suggested",
        gap=lambda frame: frame["val_loss"] - frame["train_eval_loss"],
        val_auroc=[0.9, 0.8, None, 0.5, 0.7],
    )


def make_run(
    folder: Path,
    *,
    trials: int = 24,
    epochs: int = 8,
    finalists: bool = True,
    killed: bool = False,
    classes: tuple[str, ...] = ("normal", "pneumonia"),
    backbones: tuple[str, ...] = ("resnet18", "vgg16", "densenet121"),
    reason: str = "",
    early: float = 0.7,
    seed: int = 0,
    images: int = 20,
) -> Path:
    """Write a run's plan, samples and tables.

    `killed` leaves the last trials running and no finalists; `early` is the share of trials that end early.
    """
    folder.mkdir(parents=True)
    plan = SearchPlan(name=folder.name, trials=max(trials, 1), epochs=epochs, data="/data/films")
    provenance = {"fingerprint": "f" * 64, "val_drawn": True}
    document = {"settings": plan.model_dump(), "space": _space(backbones), "provenance": provenance}
    (folder / "plan.yaml").write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    _write_samples(folder, classes, images)
    options = {"reason": reason, "early": early, "seed": seed, "backbones": backbones}
    judged = finalists and not killed
    record = make_record(trials=trials, epochs=epochs, running=2 * killed, finalists=judged, **options)
    write_tables(make_tables(record, plan.metric), folder)
    return folder


def make_record(
    *,
    trials: int,
    epochs: int,
    running: int = 0,
    finalists: bool = False,
    backbones: tuple[str, ...] = ("resnet18", "vgg16", "densenet121"),
    reason: str = "",
    early: float = 0.7,
    seed: int = 0,
) -> Record:
    """Return trials as a journal gives them; the last `running` have not ended."""
    record = Record()
    rng = np.random.default_rng(seed)
    events = _Events(record)
    parsed = parse(_space(backbones), "space")
    for number in range(trials):
        params = parsed.start[0] if number == 0 else _sampled(rng, backbones)
        runs = number >= trials - running
        _trial(events, rng, parsed, f"t{number:05d}", number, params, epochs, running=runs, reason=reason, early=early)
    if trials > 2 and finalists:
        ended = [trial for trial in record.trials.values() if best_epoch(trial.rows, "val_loss")]
        order = sorted(ended, key=lambda trial: best_epoch(trial.rows, "val_loss")["val_loss"])
        chosen = dict.fromkeys(["t00000", *(trial.trial_id for trial in order)])
        for place in range(15):
            judged = record.trials[list(chosen)[place % 3]]
            options = {"finalist_of": judged.trial_id, "seed": 1 + place // 3}
            _trial(events, rng, parsed, f"f{place:05d}", None, judged.params, epochs, **options)
    return record


def _space(backbones: tuple[str, ...]) -> dict:
    parameters = SPACE["parameters"] | {"backbone": {"type": "categorical", "choices": list(backbones)}}
    return SPACE | {"parameters": parameters, "start": [SPACE["start"][0] | {"backbone": backbones[0]}]}


def _write_samples(folder: Path, classes: tuple[str, ...], images: int) -> None:
    splits = ("train", "train", "train", "val", "test")
    rows = [
        (
            f"{label}/{number}.png",
            f"/data/{number}.png",
            label,
            splits[number % 5],
            None,
            images * place + number,
        )
        for place, label in enumerate(classes)
        for number in range(images)
    ]
    frame = pd.DataFrame(rows, columns=SAMPLES.names)
    write_tables({"samples": pa.Table.from_pandas(frame, schema=SAMPLES, preserve_index=False)}, folder)


def ask(journal: Journal, number: int = 0, trial_id: str = "t00000") -> None:
    """Journal that a start point is asked for."""
    journal.append("asked", trial_id=trial_id, number=number, origin="start", params={}, config=CONFIG)


def epoch_fields(epoch: int, val_loss: float | None, **other: object) -> dict:
    """Return the fields of an epoch's event; `other` ones replace them."""
    values = dict.fromkeys(METRICS)
    values |= {"epoch": epoch, "val_loss": val_loss, "learning_rate": 0.1, "seconds": 2.0, "data_seconds": 0.5}
    values |= {"prefix_seconds": None, "train_seconds": 1.0, "evaluate_seconds": 0.5, "cache_hits": None, "images": 64}
    values |= {"micro_batch": 32, "trained_parameters": 10, "peak_memory_mb": None, "unfreeze_depth": 0}
    return values | {"ends": None, "reason": None} | other


def make_audit(folder: Path, paths: tuple[str, str], rows: int = 1) -> None:
    """Write a table of findings about two images."""
    found = {"finding": "duplicate_across_splits", "severity": "stop", "path_a": paths[0], "path_b": paths[1]}
    row = found | {"value": 0.5, "p_value": None, "detail": "the same pixels"}
    table = pa.Table.from_pylist([row] * rows, schema=AUDIT)
    write_tables({"audit": table}, folder)


PARTS = ("data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds")


class _Events:
    """Applies events to a record, with their number and time."""

    def __init__(self, record: Record):
        self._record, self._seq, self.wall_s = record, 0, 0.0

    def __call__(self, event: str, **fields: object) -> None:
        self._seq += 1
        entry = {"seq": self._seq, "event": event, "wall_s": round(self.wall_s, 3), "time": 1.7e9 + self.wall_s}
        self._record.apply(entry | fields)


def _sampled(rng: np.random.Generator, backbones: tuple[str, ...]) -> dict:
    params = {
        "backbone": str(rng.choice(backbones)),
        "unfreeze_depth": int(rng.integers(0, 6)),
        "learning_rate": float(10 ** rng.uniform(-5, -1)),
    }
    if params["unfreeze_depth"] > 1:
        params["stage_lr_decay"] = float(rng.uniform(0.3, 1.0))
    return params | {"augmentation": str(rng.choice(["none", "light", "medium", "strong"]))}


def _trial(
    events: _Events,
    rng: np.random.Generator,
    space: Space,
    trial_id: str,
    number: int | None,
    params: dict,
    epochs: int,
    *,
    running: bool = False,
    finalist_of: str | None = None,
    reason: str = "",
    early: float = 0.7,
    seed: int = 0,
) -> None:
    config = TrialConfig(**trial_values(space, params), epochs=epochs, seed=seed).model_dump()
    origin = "finalist" if number is None else "suggested" if number else "start"
    asked = {"trial_id": trial_id, "number": number, "origin": origin, "params": params, "config": config}
    events("asked", **asked, finalist_of=finalist_of)
    events("started", trial_id=trial_id, gpus=1.0)
    rate, depth = params["learning_rate"], params["unfreeze_depth"]
    floor = 0.3 + 0.08 * abs(math.log10(rate) + 3) + 0.02 * abs(depth - 2) + 0.04 * (params["backbone"] == "vgg16")
    latency_ms = 1.0 + len(params["backbone"]) / 4
    diverges = rate > 0.05 and number is not None
    status, length = ("diverged", 2) if diverges else ("completed", epochs)
    if not diverges and number is not None and rng.random() < early:
        length = min(int(rng.choice([1, 2, 4])), epochs)
        status = "stopped" if rng.random() < 0.8 else "converged"
    if number is not None and number % 17 == 16:
        status, length = "failed", 1
    for epoch in range(1, length + 1):
        events.wall_s += 3.0 + depth
        loss = floor + 0.5 * math.exp(-epoch / 2) + float(rng.normal(0, 0.01))
        loss = 4.0 * 10**epoch if diverges else loss
        events("epoch", trial_id=trial_id, **_row(rng, epoch, epochs, loss, rate, depth, diverges, latency_ms))
        if epoch in (1, 2, 4) and number is not None:
            decision = {
                "stratum": "all",
                "value": loss,
                "cutoff": 0.6,
                "verdict": "stop" if epoch == length else "continue",
            }
            events("decision", trial_id=trial_id, epoch=epoch, rung=epoch, **decision)
    if not running:
        error = "Traceback:\n  ...\nRuntimeError: <b>the film is torn</b>" if status == "failed" else None
        events("ended", trial_id=trial_id, status=status, reason=f"{status} after {length} epochs{reason}", error=error)


def _row(
    rng: np.random.Generator,
    epoch: int,
    epochs: int,
    loss: float,
    rate: float,
    depth: int,
    diverges: bool,
    latency_ms: float,
) -> dict:
    train = loss - 0.03 * epoch
    parts = dict(zip(PARTS, rng.uniform(0.2, 1 + depth, 4).tolist(), strict=True))
    rate *= 0.5 + 0.5 * math.cos(math.pi * epoch / epochs)
    values = {"epoch": epoch, "val_loss": None if diverges and epoch == 2 else loss, "train_eval_loss": train}
    values |= {"val_tempered_loss": values["val_loss"] and 0.9 * values["val_loss"]}
    values |= {"train_loss": train + 0.1, "val_accuracy": 1 / (1 + loss), "val_balanced_accuracy": 1 / (1 + loss)}
    values |= {
        "val_auroc": 1 / (1 + loss / 2),
        "early_loss": loss - 0.01,
        "learning_rate": rate,
        "seconds": 3.0 + depth,
    }
    values |= parts | {"seconds": sum(parts.values())}
    values |= {"cache_hits": 64, "images": 64, "micro_batch": 32, "trained_parameters": 1000 * 8**depth}
    values |= {"parameters": 5 * 10**6, "latency_ms": latency_ms}
    return values | {"peak_memory_mb": 900.0, "unfreeze_depth": depth, "ends": None, "reason": None}
