"""The Ray trainable: hands epochs of `finetune` to Ray, one a step, and keeps its own checkpoints."""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuning.config import TrialConfig
from tuning.finetune import Data, Row, State, finetune, join
from tuning.images import open_images
from tuning.tables import read_table, replacing

CHECKPOINT_SECONDS = 30.0


class FinetuneTrial(tune.Trainable):  # type: ignore[misc]
    """A trial as Ray sees it; the actor is used again for the next trial.

    A step returns {"row": JSON}. A row that the checkpoint's history holds is sent again first, marked `replayed`. A
    row with `ends` is the last. A failure of the trial's own is a row without an epoch: nothing is raised, since Ray
    would throw the actor away.
    """

    _rows: Iterator[tuple[Row, Callable[[], State]]] | None = None
    _snapshot: Callable[[], State] | None = None  # of the last epoch's end
    _replay: list[Row]
    _saved_at: float  # monotonic seconds

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(config["threads"])
        self._data: dict[int, Data] = {}
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """The slot is given up: keep what the trial would need to go on, or to be used."""
        if self._snapshot is not None and not self._saved:
            try:
                self._save(self._snapshot())
            except OSError as error:  # a full disk must not cost the next trial, which would fail if this raised
                print(f"{self._config['trial_id']}: no checkpoint was written: {error}", file=sys.stderr)
        self._rows = self._snapshot = None
        gc.collect()  # the generator's frame holds the model

    def step(self) -> dict[str, str]:
        try:
            if self._rows is None:
                self._rows = self._start()
            if self._replay:
                return {"row": json.dumps(self._replay.pop(0) | {"replayed": True})}
            row, self._snapshot = next(self._rows)
            self._saved = False
            if time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
                self._save(self._snapshot())
            return {"row": json.dumps(row | {"checkpoint": self._saved})}
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            lines = traceback.format_exception(error)
            self._rows = self._snapshot = None
            row = {
                "ends": "out_of_memory" if memory else "failed",
                "reason": lines[-1].strip(),
                "error": "".join(lines),
            }
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"row": json.dumps(row)}

    def _begin(self, config: dict[str, Any]) -> None:
        self._config = config
        self._saved, self._saved_at = False, time.monotonic()

    def _start(self) -> Iterator[tuple[Row, Callable[[], State]]]:
        state = load_state(self._config["run"], self._config["trial_id"])
        self._replay = list(state.history) if state else []
        trial = TrialConfig(**self._config["config"])
        if trial.image_size not in self._data:
            samples = read_table(Path(self._config["run"]) / "samples.parquet")
            self._data[trial.image_size] = join(
                samples, open_images(Path(self._config["images"][str(trial.image_size)]))
            )
        weights = self._config["weights"][trial.backbone]
        return finetune(
            trial,
            self._data[trial.image_size],
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            weights=None if weights is None else Path(weights),
            state=state,
            **self._config["ending"],
        )

    def _save(self, state: State) -> None:
        """Best weights first, then the state: a crash between leaves a state that makes the same best weights again."""
        best = best_file(self._config["run"], self._config["trial_id"])
        best.parent.mkdir(exist_ok=True)
        weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
        if weights:
            with replacing(best) as temporary:
                save_file(weights, temporary)
        if state.history[-1]["ends"] is None:
            rest = {name: tensor for name, tensor in state.tensors.items() if name not in weights}
            with replacing(state_file(self._config["run"], self._config["trial_id"])) as temporary:
                save_file(rest, temporary, metadata={"history": json.dumps(state.history)})
        self._saved, self._saved_at = True, time.monotonic()


def state_file(run: str | Path, trial_id: str) -> Path:
    """What an unfinished trial goes on from."""
    return Path(run) / "checkpoints" / f"{trial_id}.state.safetensors"


def best_file(run: str | Path, trial_id: str) -> Path:
    """The weights of a trial's best epoch."""
    return Path(run) / "checkpoints" / f"{trial_id}.best.safetensors"


def load_state(run: str | Path, trial_id: str) -> State | None:
    """A trial's checkpoint, null where there is none."""
    path, best = state_file(run, trial_id), best_file(run, trial_id)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        history = json.loads(file.metadata()["history"])
    return State(history, load_file(path) | (load_file(best) if best.exists() else {}))
