"""What a worker does: one epoch of `finetune` per step, with its own checkpoints, one trial after another."""

import gc
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors import SafetensorError

from tuning.data.images import open_images
from tuning.data.splits import resplit
from tuning.record.journal import best_epoch
from tuning.record.mirror import copy_folder
from tuning.record.predictions import predictions_file, write_predictions
from tuning.record.tables import read_table
from tuning.record.targets import is_multi_label
from tuning.record.temperature import tempered
from tuning.record.transfer import fetch_files, patiently, push_file
from tuning.search.checkpoints import StorageLost, best_file, load_state, save, state_file
from tuning.search.cluster import images_here
from tuning.search.gpus import CONTEXT_MB, gpus_here
from tuning.settings.config import InputError, TrialConfig
from tuning.settings.values import Weights
from tuning.training.dataset import Data, join, placed
from tuning.training.device import accelerator, exercise, keep_memory, prepare_gpu
from tuning.training.digests import digests, other_weights, weights_of
from tuning.training.features import Cache, FeatureCache, HeldOutputs
from tuning.training.finetune import finetune, out_of_memory
from tuning.training.models import Models
from tuning.training.probe import probe
from tuning.training.state import Row, Snapshot, State

CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 30.0, 0.05  # least time between two; largest share of a trial's time
STOPPED_SHARE = 0.1  # the same of a stopped trial's last one: of ten such trials about one is promoted
LARGE_BYTES = 2**22  # of a checkpoint, from which its bytes take longer than all else about it
STATE_BYTES = 20  # of a trained parameter in a checkpoint: it, its best and average, and two of the optimizer
Rows = Iterator[tuple[Row, Snapshot]]


class ProcessLost(RuntimeError):
    """The GPU works, but no longer in this process."""


class Worker:
    """Runs trials one after another; what they share stays in memory.

    A step returns a row. The rows of the checkpoint's history come first, marked `replayed`. The last row has `ends`.
    If the trial itself fails, that is a row without an epoch, not an exception, after which Ray would throw the actor
    away. If the GPU doesn't work, the row is {"broken": what is wrong with it}: the driver gives it no more trials.
    Only `StorageLost` and `ProcessLost` are raised: the trial is then scheduled again, as after its worker died.
    """

    _rows: Rows | None
    _snapshot: Snapshot | None  # of the last epoch
    _saved_at: float  # monotonic seconds, when the last checkpoint was written
    _freed: bool  # whether the trial has begun again after it was out of memory
    _saving_seconds: float | None  # that the trial's last checkpoint took
    _trained_seconds: float  # for which this process has trained the trial
    _bytes_per_second = 1e8  # of the last large checkpoint; at first as to a file system in a network

    def __init__(self, config: dict[str, Any]):
        torch.set_num_threads(config["threads"])
        self._device = accelerator() if config["device"] == "auto" else torch.device(config["device"])
        if self._device.type == "cpu":
            keep_memory()
        self._tried = self._device.type == "cpu"  # whether the GPU works
        self._images: dict[int, Any] = {}  # by size; an array, or a tensor on the GPU
        self._models = Models()
        self._known_weights: set[tuple[str, int, int, int]] = set()  # name, size and times of files that were checked
        self._unsent: dict[str, bool] = {}  # files to send to the storage, and whether to delete them here afterwards
        self._features: Cache
        if self._device.type == "cpu":
            folder = Path(config["features"]) / platform.node()  # nodes may share the disk of the cache
            self._features = FeatureCache(folder, config["cache_bytes"])
        else:
            self._features = HeldOutputs(self._device, share=config["gpus"], most_bytes=config["cache_bytes"])
        gc.collect()
        gc.freeze()  # what is imported stays: looking through it takes 0.3 s between two trials
        self._begin(config)

    def next_trial(self, config: dict[str, Any]) -> None:
        """Begin the next trial. Of the one before only the best weights are saved, unless it may be promoted."""
        if self._snapshot is not None:
            may_go_on = self._config["promotable"] and not self._ended
            self._save(ended=not (may_go_on and self._is_cheap()), left=True)
        self._begin(config)

    def end(self, patience: float) -> None:
        """Save what the trial needs to resume: the worker is no longer needed; for some seconds, retry to send it."""
        if self._snapshot is not None and not self._saved:
            self._save(ended=self._ended, left=True)
        self._forget()
        try:
            patiently(self._send, patience)
        except (OSError, InputError) as error:
            print(f"{', '.join(self._unsent)}: could not be sent: {error}", file=sys.stderr)

    def step(self) -> Row:
        try:
            if not self._tried:
                self._try_gpu()
            if self._rows is None:
                self._rows = self._start()
            if self._replay:
                return self._replay.pop(0) | {"replayed": True}
            row, self._snapshot = next(self._rows)
            self._ended = row["ends"] is not None
            self._parameters, self._trained_seconds = row["trained_parameters"], self._trained_seconds + row["seconds"]
            self._saved = self._is_due(row) and self._save(ended=self._ended)
            return row | {"checkpoint": self._saved}
        except StorageLost:
            raise
        except Exception as error:
            self._models.clear()  # their state is unknown, and they take memory
            lines, memory = traceback.format_exception(error), out_of_memory(error)
            if not memory:
                self._rows = self._snapshot = None  # another worker goes on with the trial, if the GPU is broken
                if (broken := self._broken()) is not None:
                    return {"broken": broken}
            ends = "out_of_memory" if memory else "failed"
            row = {"ends": ends, "reason": lines[-1].strip(), "error": "".join(lines)}
        self._forget()
        if memory and not self._freed:  # once more, from the last checkpoint, without what other trials left
            self._freed = True
            self._images.clear()
            self._features.clear()
            return self.step()
        return row

    def _try_gpu(self) -> None:
        prepare_gpu(deterministic=self._config["deterministic"])
        exercise(self._device)
        if self._device.type == "cuda" and self._config["gpus"] < 1:  # what another process was promised stays free
            gpus, total_mib = self._config["gpus"], torch.cuda.mem_get_info()[1] / 2**20
            if gpus * total_mib < 2 * CONTEXT_MB:
                raise InputError(f"--gpus-per-trial {gpus:g}: is too little of {total_mib:.0f} MiB; give a trial more")
            torch.cuda.set_per_process_memory_fraction(gpus - CONTEXT_MB / total_mib)
        self._tried = True

    def _broken(self) -> str | None:
        """Return what is wrong with the GPU, after an error; None if it works.

        Raises:
            ProcessLost: it works, but not in this process any more, as after an illegal memory access.
        """
        if self._device.type == "cpu":
            return None
        try:
            exercise(self._device)
        except Exception as error:
            if out_of_memory(error):
                return None
            wrong = next((wrong for _, wrong in gpus_here() if wrong is not None), None)
            # A GPU without room, or that this process alone may use, can't be tried by another.
            if wrong is not None and not out_of_memory(RuntimeError(wrong)) and "busy or unavailable" not in wrong:
                return f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '')} of {platform.node()}: {wrong}"
            raise ProcessLost(str(error)) from None
        return None

    def _forget(self) -> None:
        self._rows = self._snapshot = None
        gc.collect()  # the generator's frame holds optimizer and activations
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # the GPU may be broken
                torch.cuda.empty_cache()  # another trial on the same GPU may need the memory

    def _begin(self, config: dict[str, Any]) -> None:
        self._forget()
        self._config, self._run = config, Path(config["run"])
        self._away = config["storage"] is not None and ray.get_runtime_context().get_node_id() != config["home"]
        if self._away:  # the driver's folder is on another node
            self._run = copy_folder(f"{config['storage']} {config['run_id']}") / self._run.name
        self._saved, self._saved_at = False, time.monotonic()  # whether the last epoch's checkpoint is on disk
        self._ended, self._saving_seconds = False, None  # whether the trial ended with the last epoch
        self._parameters, self._trained_seconds = 0, 0.0  # that the trial trains, and for how long it has
        self._predicted: int | None = None  # the epoch whose validation probabilities are on disk
        self._freed = False

    def _start(self) -> Rows:
        if self._config["storage"] is not None:  # the trial may have begun on a node that died
            self._fetch(self._checkpoint_names())
        state = load_state(self._run, self._config["trial_id"], self._config["config"])
        self._replay: list[Row] = list(state.history) if state else []
        trial = TrialConfig(**self._config["config"])
        data = self._load(trial)
        weights = self._weights(trial.backbone)
        given: dict[str, Any] = {"device": self._device, "features": self._features, "models": self._models}
        graphs = self._config["graphs"] and self._device.type == "cuda"
        whole = {"halve": self._config["halve"], "graphs": graphs} | self._config["ending"]
        if self._config["origin"] == "probe":
            row = probe(trial, data, weights=weights, **given)
            return iter([(row, lambda only_best=False: State([row], {}))])
        return finetune(trial, data, state=state, weights=weights, **given, **whole)

    def _weights(self, backbone: str) -> Weights | None:
        """Return a backbone's weights; raise InputError if the file here, or by now, is another than at the start."""
        given = weights_of(self._config["weights"])[backbone]
        if given is None:
            return None
        file = given.file
        status = file.stat()
        stamp = (str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if stamp not in self._known_weights:
            if other_weights(digests({backbone: given}), self._config["digests"]):
                cure = f"give {platform.node()} the file that the search began with"
                raise InputError(f"weights: {file} holds other weights than at the start of the search; {cure}")
            self._known_weights.add(stamp)
        return given

    def _fetch(self, names: list[str]) -> None:
        """Fetch files from the storage. On the driver's node, which has all that is needed, a failure is ignored."""
        storage = self._config["storage"]
        try:
            patiently(lambda: fetch_files(self._run, storage, names), None if self._away else 0.0)
        except OSError as error:
            if self._away:
                raise StorageLost(f"{storage}: {error}") from error

    def _load(self, trial: TrialConfig) -> Data:
        if self._away:
            self._fetch(["samples.parquet"])
        samples = read_table(self._run / "samples.parquet")
        if self._config["redraw"]:
            samples = resplit(samples, trial.seed)
        size = trial.image_size
        if size not in self._images:
            images = open_images(images_here(Path(self._config["images"][str(size)])))
            self._images[size] = placed(images, self._device, share=self._config["gpus"])
        data = join(samples, self._images[size])
        self._classes, self._validation = data.classes, samples[samples["split"] == "val"]
        return data

    def _is_due(self, row: Row) -> bool:
        """Return whether to write a checkpoint, which takes at most `CHECKPOINT_SHARE` of a trial's time."""
        least = self._seconds_to_save(row["trained_parameters"]) * (1 / CHECKPOINT_SHARE - 1)
        return time.monotonic() - self._saved_at > max(CHECKPOINT_SECONDS, least)

    def _is_cheap(self) -> bool:
        """Return whether a stopped trial's state takes at most `STOPPED_SHARE` of the time to train it again."""
        return bool(self._seconds_to_save(self._parameters) <= STOPPED_SHARE * self._trained_seconds)

    def _seconds_to_save(self, parameters: int | None) -> float:
        if self._saving_seconds is not None:
            return self._saving_seconds
        return STATE_BYTES * (parameters or 0) / self._bytes_per_second

    def _save(self, *, ended: bool, left: bool = False) -> bool:
        """Write a checkpoint; return whether it is on disk. A full disk costs the checkpoint, not the trial.

        Of a trial that is `left`, or has ended, nothing stays on a node that is not the driver's.
        """
        assert self._snapshot is not None
        trial_id, config, began = self._config["trial_id"], self._config["config"], time.monotonic()
        state = self._snapshot(only_best=ended)
        best = best_epoch(state.history, self._config["ending"]["metric"])
        self._save_predictions(state, best)
        try:
            save(self._run, trial_id, state, best, config, ended=ended)
            if self._away:
                self._will_send(ended, left or ended)
                self._send()
        except (OSError, SafetensorError, InputError) as error:
            print(f"{trial_id}: no checkpoint was written: {error}", file=sys.stderr)
            return False
        finally:
            self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began
        if (n_bytes := sum(tensor.nbytes for tensor in state.tensors.values())) >= LARGE_BYTES:
            self._bytes_per_second = n_bytes / max(self._saving_seconds, 1e-9)
        return True

    def _save_predictions(self, state: State, best: Row | None) -> None:
        """Write validation probabilities, before the checkpoint: a resumed trial may not compute them again."""
        logits = state.tensors.get("validation/logits")
        if best is None or logits is None or best["epoch"] == self._predicted:
            return
        trial_id = self._config["trial_id"]
        path, several = predictions_file(self._run, trial_id), is_multi_label(self._validation["label"])
        probabilities = tempered(logits.numpy(), 1.0, multi_label=several)
        at_best: dict[str, Any] = {"epoch": best["epoch"], "val_loss": best["val_loss"]}
        try:
            write_predictions(path, self._validation, self._classes, probabilities, **at_best)
            self._predicted = best["epoch"]
        except OSError as error:
            print(f"{trial_id}: no validation probabilities were written: {error}", file=sys.stderr)

    def _checkpoint_names(self) -> list[str]:
        return [str(file("", self._config["trial_id"])) for file in (best_file, state_file)]

    def _will_send(self, ended: bool, delete: bool) -> None:
        """Note the trial's files for the next sending. Of an ended trial no state is needed."""
        best, state = self._checkpoint_names()
        self._unsent |= dict.fromkeys((str(predictions_file("", self._config["trial_id"])), best), delete)
        if ended:
            self._unsent.pop(state, None)
            (self._run / state).unlink(missing_ok=True)
        else:
            self._unsent[state] = delete

    def _send(self) -> None:
        """Send the noted files to the storage; those that fail are sent the next time.

        Raises:
            InputError: another driver writes the run.
            OSError: the storage fails.
        """
        for name, delete in list(self._unsent.items()):
            push_file(self._run, self._config["storage"], name, self._config["driver"])
            if delete:
                (self._run / name).unlink(missing_ok=True)
            del self._unsent[name]
