"""Validation probabilities of trials at their best epochs: workers write them, the tables say whether they hold."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tuning.record.tables import predictions_schema, read_whole, replacing, tested_schema

MOST_TRIALS = 200  # are read at once: the best, by validation loss


@dataclass(frozen=True)
class Predictions:
    """Probabilities that trials give to the same validation images, the trial of the least loss first."""

    trial_ids: tuple[str, ...]
    probabilities: NDArray[np.float64]  # [trials, images, classes]
    targets: NDArray[np.int64]  # [images], index into `classes`
    groups: NDArray[np.int64]  # [images], 0, 1, ...: one for each patient, say; without groups one for each image
    classes: tuple[str, ...]

    @property
    def true(self) -> NDArray[np.float64]:
        """Probability [trials, images] of the class that each image has; never 0, so that it has a logarithm."""
        images = np.arange(len(self.targets))
        return np.maximum(self.probabilities[:, images, self.targets], np.finfo(np.float64).tiny)

    def of(self, trial_ids: Collection[str]) -> "Predictions":
        """Those of some of the trials."""
        chosen = [index for index, trial_id in enumerate(self.trial_ids) if trial_id in trial_ids]
        return replace(
            self, trial_ids=tuple(self.trial_ids[i] for i in chosen), probabilities=self.probabilities[chosen]
        )


def predictions_file(run: str | Path, trial_id: str) -> Path:
    """Where a trial's validation probabilities lie."""
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
    """Write a trial's probabilities.

    Args:
        path: of `predictions_file`.
        validation: the samples of the validation split.
        classes: names, in the order of the columns.
        probabilities: [images, classes].
        epoch: the trial's best.
        val_loss: at this epoch, as the tables will have it.

    Raises:
        OSError: they can't be written.
    """
    schema = predictions_schema(classes, epoch=epoch, val_loss=val_loss)
    path.parent.mkdir(exist_ok=True)
    _write(path, schema, validation[["path", "label"]], probabilities)


def write_tested(
    path: Path,
    tested: pd.DataFrame,
    classes: Sequence[str],
    probabilities: NDArray[np.float64],
    *,
    temperature: float,
) -> None:
    """Write a final model's probabilities.

    Args:
        path: of the table.
        tested: the samples of the test split.
        classes: names, in the order of the columns.
        probabilities: [images, classes], with the temperature.
        temperature: that logits were divided by.
    """
    schema = tested_schema(classes, temperature=temperature)
    _write(path, schema, tested[["path", "label", "split"]], probabilities)


def _write(path: Path, schema: pa.Schema, known: pd.DataFrame, probabilities: NDArray[np.float64]) -> None:
    columns = [pa.array(known[name], pa.string()) for name in known] + [pa.array(values) for values in probabilities.T]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, write_page_checksum=True)


def read_predictions(run: str | Path, trials: pd.DataFrame, samples: pd.DataFrame) -> Predictions:
    """The probabilities of the best trials; trials whose file is missing, or not of their best epoch, are left out.

    A worker that is killed may leave the file of an epoch that is no longer the best.

    Args:
        run: its folder.
        trials: rows of the table.
        samples: the run's.
    """
    validation = samples[samples["split"] == "val"]
    classes = tuple(sorted(samples["label"].unique()))
    found = {}
    for row in trials[trials["val_loss"].notna()].nsmallest(MOST_TRIALS, "val_loss").itertuples():
        values = _read(predictions_file(run, row.trial_id), validation, classes, int(row.best_epoch), row.val_loss)
        if values is not None:
            found[row.trial_id] = values
    return Predictions(
        tuple(found),
        np.stack(list(found.values())) if found else np.empty((0, len(validation), len(classes))),
        np.array([classes.index(label) for label in validation["label"]], dtype=np.int64),
        group_numbers(validation),
        classes,
    )


def group_numbers(samples: pd.DataFrame) -> NDArray[np.int64]:
    """A number from 0 for each group, such as a patient; images of no group are each one of their own."""
    numbers, _ = pd.factorize(samples["group"].where(samples["group"].notna(), samples["path"]))
    found: NDArray[np.int64] = numbers.astype(np.int64)
    return found


def _read(
    path: Path, validation: pd.DataFrame, classes: Sequence[str], epoch: int, val_loss: float
) -> NDArray[np.float64] | None:
    """Probabilities [images, classes]; null where the file isn't of these images, this epoch and this loss."""
    try:
        table = read_whole(path)
    except (OSError, pa.ArrowException):
        return None
    due = predictions_schema(classes, epoch=epoch, val_loss=val_loss)
    version = {b"schema_version": due.metadata[b"schema_version"]}  # an older one's files are the same
    if not table.schema.equals(due) or (table.schema.metadata or {}) | version != due.metadata:
        return None
    if table["path"].to_pylist() != list(validation["path"]):
        return None
    return np.stack([table[f"probability_{name}"].to_numpy() for name in classes], axis=1)
