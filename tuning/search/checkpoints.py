"""A run's `checkpoints/`: the weights of trials' best epochs, the states that unfinished trials resume from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from tuning.record.journal import Trial, best_epoch, loss_like
from tuning.record.tables import replacing
from tuning.settings.config import TrialConfig

if TYPE_CHECKING:  # torch takes seconds to load, and the report only asks what is kept
    from torch import Tensor

    from tuning.record.mirror import Mirror
    from tuning.training.state import State

KEPT_TRIALS = 5  # ended trials whose best weights are kept
KEPT_STATES = 10  # stopped trials whose states are kept, so that they can go on if they are promoted


class StorageLost(OSError):
    """The files that a trial begins with can't be fetched from the storage."""


def state_file(run: str | Path, trial_id: str) -> Path:
    """Return the file that an unfinished trial resumes from."""
    return Path(run) / "checkpoints" / f"{trial_id}.state.safetensors"


def best_file(run: str | Path, trial_id: str) -> Path:
    """Return the file of a trial's best weights."""
    return Path(run) / "checkpoints" / f"{trial_id}.best.safetensors"


def save(
    run: Path, trial_id: str, state: "State", best: Mapping[str, Any] | None, config: dict[str, Any], *, ended: bool
) -> None:
    """Write the best weights, then, unless the trial has ended, the state.

    After a crash between the two the trial resumes from the older state and makes the same best weights again.

    Args:
        best: the row of the best epoch, if there is one; it is kept with `config` in the weights' metadata.

    Raises:
        OSError, SafetensorError: writing fails, for example because the disk is full.
    """
    from safetensors.torch import save_file

    weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
    rest = {name: tensor for name, tensor in state.tensors.items() if name not in weights}
    best_file(run, trial_id).parent.mkdir(exist_ok=True)
    if weights and best is not None:
        metadata = {"best_epoch": str(best["epoch"]), "val_loss": repr(best["val_loss"]), "config": json.dumps(config)}
        with replacing(best_file(run, trial_id)) as temporary:
            save_file(weights, temporary, metadata=metadata)
    if not ended:
        best_known = str(best["epoch"]) if weights and best else ""
        with replacing(state_file(run, trial_id)) as temporary:
            metadata = {"history": json.dumps(state.history), "best_epoch": best_known, "config": json.dumps(config)}
            save_file(rest, temporary, metadata=metadata)


def load_state(run: str | Path, trial_id: str, config: dict[str, Any]) -> "State | None":
    """Read the state that a trial resumes from.

    None if there is none, or if the best weights are missing or older than the state, or it is of another configuration
    that the journal never got to know: in a storage either may be.
    """
    from safetensors.torch import load_file

    from tuning.training.state import State

    path, best = state_file(run, trial_id), best_file(run, trial_id)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if "config" in metadata and json.loads(metadata["config"]) != json.loads(json.dumps(config)):
        return None
    history, expected = json.loads(metadata["history"]), int(metadata["best_epoch"] or 0)
    tensors, epoch = load_file(path), 0
    if best.exists():
        with safe_open(best, framework="pt") as file:
            epoch = int(file.metadata()["best_epoch"])
    if epoch < expected:
        return None
    if 0 < epoch <= len(history):  # else a crash came between the two files: that epoch is trained again
        tensors |= load_file(best)
    return State(history, tensors)


def kept(run: str | Path, trials: pd.DataFrame) -> dict[str, TrialConfig]:
    """Return the configuration of each trial whose best weights exist and are of the best epoch in the table.

    The weights may be of another epoch if their worker was killed.
    """
    found = {}
    for row in trials[trials["val_loss"].notna()].itertuples():
        try:
            with safe_open(best_file(run, row.trial_id), framework="np") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError):
            continue
        expected = str(int(row.best_epoch)), repr(float(row.val_loss))
        if (metadata.get("best_epoch"), metadata.get("val_loss")) == expected:
            found[row.trial_id] = TrialConfig(**json.loads(metadata["config"]))
    return found


def best_weights(run: str | Path, trial_id: str) -> "dict[str, Tensor]":
    """Read the tensors that a trial trained, at its best epoch, by their names in the model."""
    from safetensors.torch import load_file

    return {name.removeprefix("best/"): tensor for name, tensor in load_file(best_file(run, trial_id)).items()}


def delete_unneeded(
    run: Path,
    trials: Mapping[str, Trial],
    metric: str,
    checkpoint_bytes: int,
    mirror: "Mirror | None",
    *,
    promoting: bool = False,
) -> None:
    """Delete the checkpoints of ended trials, except the best weights of the best `KEPT_TRIALS` searched ones.

    While trials may be promoted, states and weights of the best `KEPT_STATES` stopped ones are kept too. Of all these
    the worst are deleted until all checkpoints, with unfinished trials' states, fit `checkpoint_bytes`.
    """
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoints").glob("[!.]*")}
    if mirror is not None:  # checkpoints of other nodes
        sizes = {Path(name).name: size for name, size in mirror.elsewhere.items()} | sizes
    with_files = sorted({name.partition(".")[0] for name in sizes} & trials.keys())
    total = sum(sizes.get(state_file(run, name).name, 0) for name in with_files if not trials[name].ended)
    ended = sorted((trials[name] for name in with_files if trials[name].ended), key=lambda trial: _rank(trial, metric))
    stopped = [trial for trial in ended if trial.status == "stopped"][:KEPT_STATES] if promoting else []
    wanted = [best_file(run, trial.trial_id) for trial in ended[:KEPT_TRIALS] if trial.number is not None]
    for trial in stopped:
        wanted += [state_file(run, trial.trial_id), best_file(run, trial.trial_id)]
    keeping = set[Path]()
    for path in dict.fromkeys(wanted):
        if total + sizes.get(path.name, 0) <= checkpoint_bytes:
            keeping.add(path)
            total += sizes.get(path.name, 0)
    for trial in ended:
        for path in {state_file(run, trial.trial_id), best_file(run, trial.trial_id)} - keeping:
            path.unlink(missing_ok=True)
            if mirror is not None and f"checkpoints/{path.name}" in mirror.elsewhere:
                mirror.forget(f"checkpoints/{path.name}")


def _rank(trial: Trial, metric: str) -> tuple[bool, float]:
    """Sort key: the best trial first; probes and finalists, whose scores are all that is needed of them, last."""
    best = best_epoch(trial.rows, metric)
    return trial.number is None, math.inf if best is None else loss_like(metric, best[metric])


def delete_temporary_files(run: Path) -> None:
    """Delete what killed writers left, which includes any hidden file in folders that only the search writes."""
    for pattern in (".*.[0-9]*", "checkpoints/.*", "predictions/.*"):
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)
