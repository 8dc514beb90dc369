"""The reading of the test set: noted for good, measured, told."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.insight.calibration import calibration_error, tempered
from tuning.insight.intervals import measure
from tuning.record.journal import Journal, read_journal
from tuning.record.predictions import group_numbers
from tuning.settings.config import visible

READINGS = "test_readings.jsonl"  # beside best.yaml: a line for each time that the test set was read


def note_reading(folder: Path, fingerprint: str, trained_on: str, ensemble: bool) -> dict[str, Any]:
    """Record, for good, that this data's test set is read; says the how manieth time it is, and when the first was."""
    path = folder / READINGS
    journal = Journal(path)
    journal.append("test_read", fingerprint=fingerprint, trained_on=trained_on, ensemble=ensemble)
    journal.close()
    times = [event["time"] for event in read_journal(path) if event.get("fingerprint") == fingerprint]
    first, this = (datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds") for time in (times[0], times[-1]))
    return {"number": len(times), "at": this, "first_at": first}


def measured(
    logits: NDArray[Any], temperature: float, samples: pd.DataFrame, classes: tuple[str, ...]
) -> dict[str, Any]:
    """What `metrics.json` says of the test set.

    Args:
        logits: [images, classes].
        temperature: that they are divided by.
        samples: the rows of the test split.
        classes: names, in the order of the columns.
    """
    targets = samples["label"].map({name: place for place, name in enumerate(classes)}).to_numpy(np.int64)
    found = measure(tempered(logits, temperature), targets, group_numbers(samples), classes)
    return found | {"calibration_error_untempered": calibration_error(tempered(logits, 1.0), targets)}


def tell(metrics: dict[str, Any]) -> None:
    """What the screen shows of the figures."""
    validation, tested, reading = metrics["validation"], metrics["test"], metrics["test_reading"]
    if "ensemble" in metrics:
        members = ", ".join(f"{trial_id} {share:.0%}" for trial_id, share in metrics["ensemble"].items())
        print(f"ensemble: {members}")
        if validation is not None:
            print(
                f"val_loss {validation['val_loss']:.4f}, of the best trial alone {validation['best_trial_alone']:.4f} "
                "(each judged on the half of validation that it was not chosen on)"
            )
    elif validation is None:
        print(f"\ntrained on training and validation images together, for {metrics['epochs']} epochs")
    else:
        print(f"\nbest epoch {metrics['epochs']}, val_loss {validation['val_loss']:.4f}")
    if metrics["temperature"]["fitted_on"] is None:
        print("temperature 1: there is no validation to fit it on")
    else:
        print(f"temperature {metrics['temperature']['value']:.2f}, fitted on {metrics['temperature']['fitted_on']}")
    if tested is None:
        print("no test images: nothing was tested")
    else:
        if reading["number"] > 1:
            count = "second reading" if reading["number"] == 2 else f"reading number {reading['number']}"
            print(
                f"{count} of this test set (the first: {reading['first_at']}): whoever chooses between models by it "
                "has no test any more"
            )
        groups = "" if tested["groups"] == tested["images"] else f" of {tested['groups']} groups"
        print(f"test, {tested['images']} images{groups}, with 95% intervals:")
        print(f"  {_figures(tested, 'accuracy', 'balanced_accuracy', 'auroc')}")
        for name, values in tested["classes"].items():
            print(f"  {visible(name)}: {_figures(values, 'sensitivity', 'specificity', 'auroc')}")
        before, after = tested["calibration_error_untempered"], tested["calibration_error"]
        print(f"  calibration error {after:.3f} ({before:.3f} without the temperature)")
    if "error" not in metrics["onnx"]:
        difference, images = metrics["onnx"]["largest_difference"], metrics["onnx"]["images"]
        print(f"model.onnx gives PyTorch's probabilities to {difference:.1g}, on {images} validation images")


def _figures(values: dict[str, Any], *names: str) -> str:
    said = []
    for name in names:
        interval = "" if values[name] is None else " ({:.3f} to {:.3f})".format(*values[f"{name}_95"])
        number = "-" if values[name] is None else f"{values[name]:.3f}"
        said.append(f"{name.replace('_', ' ').replace('auroc', 'AUROC')} {number}{interval}")
    return "  ".join(said)
