"""What lies in a run's `checkpoints/`: the weights of trials' best epochs, and what unfinished trials go on from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from tuning.record.tables import replacing
from tuning.settings.config import TrialConfig

if TYPE_CHECKING:  # torch takes seconds to load, and the report only asks what is kept
    from torch import Tensor

    from tuning.training.finetune import State


def state_file(run: str | Path, trial_id: str) -> Path:
    """What an unfinished trial goes on from."""
    return Path(run) / "checkpoints" / f"{trial_id}.state.safetensors"


def best_file(run: str | Path, trial_id: str) -> Path:
    """The weights of a trial's best epoch."""
    return Path(run) / "checkpoints" / f"{trial_id}.best.safetensors"


def save(
    run: str | Path,
    trial_id: str,
    state: "State",
    best: Mapping[str, Any] | None,
    config: dict[str, Any],
    *,
    ended: bool,
) -> None:
    """Write the best weights, then, unless the trial has ended, the state.

    A crash between the two leaves a state that makes the same best weights again.

    Args:
        run: its folder.
        trial_id: whose.
        state: a snapshot.
        best: the row of its best epoch; null where there is none.
        config: the trial's; it, the best epoch and its loss stand in the weights' metadata.
        ended: whether no state is needed.

    Raises:
        OSError, SafetensorError: there is no room, say.
    """
    from safetensors.torch import save_file

    weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
    rest = {name: tensor for name, tensor in state.tensors.items() if name not in weights}
    best_file(run, trial_id).parent.mkdir(exist_ok=True)
    if weights and best is not None:
        described = {"best_epoch": str(best["epoch"]), "val_loss": repr(best["val_loss"]), "config": json.dumps(config)}
        with replacing(best_file(run, trial_id)) as temporary:
            save_file(weights, temporary, metadata=described)
    if not ended:
        with replacing(state_file(run, trial_id)) as temporary:
            described = {
                "history": json.dumps(state.history),
                "best_epoch": str(best["epoch"]) if weights and best else "",
            }
            save_file(rest, temporary, metadata=described)


def load_state(run: str | Path, trial_id: str) -> "State | None":
    """A trial's checkpoint; null where there is none, or its best weights were lost: a storage may have older ones."""
    from safetensors.torch import load_file

    from tuning.training.finetune import State

    path, best = state_file(run, trial_id), best_file(run, trial_id)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        history, due = json.loads(file.metadata()["history"]), int(file.metadata()["best_epoch"] or 0)
    tensors, epoch = load_file(path), 0
    if best.exists():
        with safe_open(best, framework="pt") as file:
            epoch = int(file.metadata()["best_epoch"])
    if epoch < due:
        return None
    if 0 < epoch <= len(history):  # else a crash came between the two: that epoch is trained again
        tensors |= load_file(best)
    return State(history, tensors)


def kept(run: str | Path, trials: pd.DataFrame) -> dict[str, TrialConfig]:
    """The configurations of the trials whose best weights are there, and are those of the best epoch in the table.

    A worker that is killed may leave the weights of an epoch that is no longer the best.
    """
    found = {}
    for row in trials[trials["val_loss"].notna()].itertuples():
        try:
            with safe_open(best_file(run, row.trial_id), framework="np") as file:
                said = file.metadata() or {}
        except (OSError, SafetensorError):
            continue
        if (said.get("best_epoch"), said.get("val_loss")) == (str(int(row.best_epoch)), repr(float(row.val_loss))):
            found[row.trial_id] = TrialConfig(**json.loads(said["config"]))
    return found


def best_weights(run: str | Path, trial_id: str) -> "dict[str, Tensor]":
    """The tensors that a trial changed, at its best epoch, by their names in the model."""
    from safetensors.torch import load_file

    return {name.removeprefix("best/"): tensor for name, tensor in load_file(best_file(run, trial_id)).items()}
