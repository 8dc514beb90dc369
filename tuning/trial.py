"""The Ray trainable: hands epochs of `finetune` to Ray, one a step, and keeps its own checkpoints."""

import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tuning.cluster import images_here
from tuning.config import TrialConfig
from tuning.data import Data, join, placed
from tuning.features import FeatureCache
from tuning.finetune import Row, State, finetune, out_of_memory
from tuning.images import open_images
from tuning.models import Models, keep_memory
from tuning.probe import probe
from tuning.samples import redrawn
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

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        bundle = {"CPU": config["threads"]} | ({"GPU": config["gpus"]} if config["gpus"] else {})
        return tune.PlacementGroupFactory([bundle])

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(config["threads"])
        self._device = torch.device(config["device"])
        if self._device.type == "cpu":
            keep_memory()
        self._data: dict[int, Data] = {}
        self._models = Models()
        folder = Path(config["features"]) / platform.node()  # nodes may share the disk that the cache is on
        self._features = FeatureCache(folder, config["cache_bytes"], self._device)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial; the one before has ended, so only its best weights are of use."""
        if self._snapshot is not None:
            self._save(self._snapshot(), final=True)
        self._forget()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """The slot is given up: keep what the trial would need to go on."""
        if self._snapshot is not None and not self._saved:
            self._save(self._snapshot())
        self._forget()

    def step(self) -> dict[str, str]:
        try:
            if self._rows is None:
                self._rows = self._start()
            if self._replay:
                return {"row": json.dumps(self._replay.pop(0) | {"replayed": True})}
            row, self._snapshot = next(self._rows)
            self._saved = time.monotonic() - self._saved_at > CHECKPOINT_SECONDS and self._save(self._snapshot())
            return {"row": json.dumps(row | {"checkpoint": self._saved})}
        except Exception as error:
            self._models.clear()  # one that failed in a strange state, or takes memory
            lines = traceback.format_exception(error)
            row = {
                "ends": "out_of_memory" if out_of_memory(error) else "failed",
                "reason": lines[-1].strip(),
                "error": "".join(lines),
            }
        self._forget()
        return {"row": json.dumps(row)}

    def _forget(self) -> None:
        self._rows = self._snapshot = None
        gc.collect()  # the generator's frame holds optimizer and activations
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # a neighbour on the same GPU may need it

    def _begin(self, config: dict[str, Any]) -> None:
        self._config = config
        self._saved, self._saved_at = False, time.monotonic()

    def _start(self) -> Iterator[tuple[Row, Callable[[], State]]]:
        state = load_state(self._config["run"], self._config["trial_id"])
        self._replay = list(state.history) if state else []
        trial = TrialConfig(**self._config["config"])
        data = self._load(trial)
        weights = self._config["weights"][trial.backbone]
        given: dict[str, Any] = {
            "device": self._device,
            "weights": None if weights is None else Path(weights),
            "features": self._features,
            "models": self._models,
        }
        if self._config["origin"] == "probe":
            row = probe(trial, data, **given)
            return iter([(row, lambda: State([row], {}))])
        return finetune(trial, data, state=state, **given, **self._config["ending"])

    def _load(self, trial: TrialConfig) -> Data:
        samples = Path(self._config["run"]) / "samples.parquet"
        if trial.image_size not in self._data:
            images = open_images(images_here(Path(self._config["images"][str(trial.image_size)])))
            self._data[trial.image_size] = join(read_table(samples), placed(images, self._device))
        data = self._data[trial.image_size]
        return join(redrawn(read_table(samples), trial.seed), data.images) if self._config["redraw"] else data

    def _save(self, state: State, *, final: bool = False) -> bool:
        """Write the best weights, then, unless the trial has ended, the state; true if they are on disk.

        A crash between the two leaves a state that makes the same best weights again. A full disk costs the checkpoint,
        not the trial.
        """
        run, trial_id = self._config["run"], self._config["trial_id"]
        weights = {name: tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
        rest = {name: tensor for name, tensor in state.tensors.items() if name not in weights}
        self._saved_at = time.monotonic()
        try:
            best_file(run, trial_id).parent.mkdir(exist_ok=True)
            if weights:
                with replacing(best_file(run, trial_id)) as temporary:
                    save_file(weights, temporary)
            if not final and state.history[-1]["ends"] is None:
                with replacing(state_file(run, trial_id)) as temporary:
                    save_file(rest, temporary, metadata={"history": json.dumps(state.history)})
        except (OSError, SafetensorError) as error:
            print(f"{trial_id}: no checkpoint was written: {error}", file=sys.stderr)
            return False
        return True


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
