"""Validation probabilities of trials at their best epochs: workers write them, the tables say which still hold."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tuning.record.journal import loss_like
from tuning.record.tables import read_whole, replacing, versioned
from tuning.record.targets import class_names, encoded
from tuning.record.temperature import Temperature, fit_temperature, image_losses, logarithms, plain, tempered

MOST_TRIALS = 200  # are read at once: the best
VALIDATION = ("path", "label")  # columns beside the probabilities
TESTED = (*VALIDATION, "split")


@dataclass(frozen=True)
class Predictions:
    """Probabilities that trials give to the same validation images, the best trial first."""

    trial_ids: tuple[str, ...]
    probabilities: NDArray[np.float64]  # [trials, images, classes]
    targets: NDArray[np.int64]  # [images], index into `classes`; or [images, classes] of 1, 0 and -1 (unknown)
    groups: NDArray[np.int64]  # [images], from `group_numbers`
    classes: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """Whether images may have several labels."""
        return self.targets.ndim == 2

    @property
    def losses(self) -> NDArray[np.float64]:
        """What each image has of each trial's loss [trials, images], which is their mean."""
        each = [image_losses(probabilities, self.targets) for probabilities in self.probabilities]
        return np.stack(each) if each else np.empty((0, len(self.targets)))

    @property
    def tempered(self) -> "Predictions":
        """Return each trial's probabilities at the temperature that fits these images best."""
        several = self.multi_label
        logits = [logarithms(each, multi_label=several) for each in self.probabilities]
        heated = [tempered(each, fit_temperature(each, self.targets), multi_label=several) for each in logits]
        return replace(self, probabilities=np.stack(heated) if heated else self.probabilities)

    def of(self, trial_ids: Collection[str]) -> "Predictions":
        """Return those of some of the trials."""
        chosen = [index for index, trial_id in enumerate(self.trial_ids) if trial_id in trial_ids]
        return replace(
            self, trial_ids=tuple(self.trial_ids[i] for i in chosen), probabilities=self.probabilities[chosen]
        )


def predictions_file(run: str | Path, trial_id: str) -> Path:
    """Return where a trial's validation probabilities lie."""
    return Path(run) / "predictions" / f"{trial_id}.parquet"


def write_predictions(
    path: Path,
    validation: pd.DataFrame,
    classes: Sequence[str],
    probabilities: NDArray[np.float64],
    *,
    epoch: int,
    val_loss: float,
) -> None:
    """Write a trial's probabilities [images, classes] of the validation split at its best epoch, with the loss there.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(exist_ok=True)
    schema = _schema(VALIDATION, classes, best_epoch=int(epoch), val_loss=float(val_loss))
    _write(path, schema, validation, probabilities)


def write_tested(
    path: Path,
    tested: pd.DataFrame,
    classes: Sequence[str],
    probabilities: NDArray[np.float64],
    *,
    temperature: Temperature,
) -> None:
    """Write a final model's probabilities [images, classes] of the test split, with the temperature in them."""
    _write(path, _schema(TESTED, classes, temperature=plain(temperature)), tested, probabilities)


def _schema(columns: Sequence[str], classes: Sequence[str], **facts: float | list[float]) -> pa.Schema:
    """Return a schema whose metadata says what the probabilities belong to."""
    types = dict.fromkeys(columns, pa.string()) | {f"probability_{name}": pa.float64() for name in classes}
    return versioned(types, **{name: repr(value) for name, value in facts.items()})


def _write(path: Path, schema: pa.Schema, samples: pd.DataFrame, probabilities: NDArray[np.float64]) -> None:
    texts = schema.names[: -probabilities.shape[1]]
    columns = [pa.array(samples[name], pa.string()) for name in texts] + [pa.array(row) for row in probabilities.T]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, write_page_checksum=True)


def read_predictions(
    run: str | Path, trials: pd.DataFrame, samples: pd.DataFrame, metric: str = "val_loss"
) -> Predictions:
    """Return the probabilities of the best of these rows of the table of trials, without those that don't hold.

    A worker that is killed may leave no file, or that of an epoch that is no longer the best.
    """
    validation = samples[samples["split"] == "val"]
    classes = class_names(samples["label"])
    found = {}
    finite = trials[trials["val_loss"].notna() & trials[metric].notna()]
    losses: pd.Series = loss_like(metric, finite[metric])
    for row in finite.loc[losses.nsmallest(MOST_TRIALS).index].itertuples():
        due = _schema(VALIDATION, classes, best_epoch=int(row.best_epoch), val_loss=float(row.val_loss))
        values = _read(predictions_file(run, row.trial_id), due, validation)
        if values is not None:
            found[row.trial_id] = values
    return Predictions(
        tuple(found),
        np.stack(list(found.values())) if found else np.empty((0, len(validation), len(classes))),
        encoded(validation["label"], classes),
        group_numbers(validation),
        classes,
    )


def group_numbers(samples: pd.DataFrame) -> NDArray[np.int64]:
    """Return each image's group, such as a patient, as a number from 0; an image without one is its own group."""
    numbers, _ = pd.factorize(samples["group"].where(samples["group"].notna(), samples["path"]))
    return np.asarray(numbers, np.int64)


def _read(path: Path, due: pa.Schema, validation: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return probabilities [images, classes]; None if the file hasn't the schema that is due, or other images."""
    try:
        table = read_whole(path)
    except (OSError, pa.ArrowException):
        return None
    version = {b"schema_version": due.metadata[b"schema_version"]}  # an older version's files are the same
    if not table.schema.equals(due) or (table.schema.metadata or {}) | version != due.metadata:
        return None
    if table["path"].to_pylist() != list(validation["path"]):
        return None
    return np.stack([table[name].to_numpy() for name in due.names[len(VALIDATION) :]], axis=1)
