"""Evaluation on the held-out test set: recorded for good, scored and printed."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from tuning.insight.calibration import calibration_error
from tuning.insight.intervals import measure
from tuning.insight.operating import Thresholds, at
from tuning.insight.per_group import By, measured
from tuning.insight.subgroups import compared, in_words
from tuning.record.journal import Journal, read_journal
from tuning.record.predictions import group_numbers
from tuning.record.subgroups import subgroups_of
from tuning.record.targets import encoded
from tuning.record.temperature import Floats, Ints, Temperature, tempered
from tuning.settings.config import visible
from tuning.settings.words import count

# For a temperature: a fit to a calibrated model of two classes was off by over a quarter in one of four sets of 100
# images, and in one of two sets of 50 (200 simulated sets each).
FEW_IMAGES = 100
READINGS = "test_readings.jsonl"  # beside best.yaml: one line for each evaluation on the test set
HASH_DIGITS = 16  # of an image's sha256 in that file


def record_evaluation(
    folder: Path, fingerprint: str, trained_on: str, ensemble: bool, hashes: Sequence[str]
) -> dict[str, Any]:
    """Record, for good, an evaluation on a test set; return its number among those that share an image with it.

    Args:
        folder: of best.yaml, which holds all evaluations of its models.
        fingerprint: of the whole data.
        trained_on: split or splits.
        ensemble: whether several networks are evaluated.
        hashes: sha256 of each test image's file, in hex.

    Returns:
        `number`, `at`, `first_at` (the times of this evaluation and of the first of them) and `known_images`: how many
        of the images earlier evaluations had.
    """
    path, images = folder / READINGS, sorted({each[:HASH_DIGITS] for each in hashes})
    journal = Journal(path)
    journal.append("test_read", fingerprint=fingerprint, trained_on=trained_on, ensemble=ensemble, images=images)
    journal.close()
    *before, this = read_journal(path)
    known: set[str] = set()
    times = []
    for event in before:  # an older version recorded no images
        same = event.get("images") or (images if event.get("fingerprint") == fingerprint else [])
        if shared := set(images).intersection(same):
            known |= shared
            times.append(event["time"])
    first, last = (
        datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
        for time in (min(times, default=this["time"]), this["time"])
    )
    in_both = sum(each[:HASH_DIGITS] in known for each in hashes)
    return {"number": 1 + len(times), "at": last, "first_at": first, "known_images": in_both}


def score_test_set(
    logits: NDArray[Any],
    temperature: Temperature,
    samples: pd.DataFrame,
    classes: tuple[str, ...],
    thresholds: Thresholds,
    prevalence: Mapping[str, float],
    per_group: By | None = None,
) -> dict[str, Any]:
    """Return the test set's part of `metrics.json`.

    Args:
        logits: [images, classes].
        temperature: fitted on validation.
        samples: of the test split.
        classes: names.
        thresholds: of `operating.thresholds`.
        prevalence: of classes where the model is to be used.
        per_group: how figures per group are made, if they are asked for.
    """
    targets, groups = encoded(samples["label"], classes), group_numbers(samples)
    several = targets.ndim == 2
    probabilities = tempered(logits, temperature, multi_label=several)
    return {
        **measure(probabilities, targets, groups, classes),
        "calibration_error_untempered": calibration_error(tempered(logits, 1.0, multi_label=several), targets),
        "operating_points": at(thresholds, probabilities, targets, groups, classes, prevalence),
        **by_subgroup(probabilities, targets, groups, samples),
        **measured(probabilities, targets, groups, classes, per_group),
    }


def by_subgroup(probabilities: Floats, targets: Ints, groups: Ints, samples: pd.DataFrame) -> dict[str, Any]:
    """Return the figures by the subgroups that samples have, if they have any; arguments as in `intervals.measure`."""
    columns, lines = subgroups_of(samples)
    if not columns and not lines:
        return {}
    rows, comparisons = compared(probabilities, targets, groups, columns)
    return {"subgroups": rows, "subgroups_in_words": in_words(rows, comparisons) + lines}


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print what `metrics.json` holds."""
    validation, tested, temperature = metrics["validation"], metrics["test"], metrics["temperature"]
    if "ensemble" in metrics:
        print("ensemble:", ", ".join(f"{trial_id} {share:.0%}" for trial_id, share in metrics["ensemble"].items()))
        if validation is not None:
            print(
                f"val_tempered_loss {validation['val_tempered_loss']:.4f}, a single trial "
                f"{validation['best_trial_alone']:.4f} "
                "(cross-validated: chosen on one half of the validation set, scored on the other)"
            )
    elif validation is None:
        print(f"\ntrained on the training and validation sets for {count(metrics['epochs'], 'epoch')}")
    else:
        print(f"\nbest epoch {metrics['epochs']}, val_loss {validation['val_loss']:.4f}")
    if temperature["fitted_on"] is None:
        print("temperature 1: not fitted, there are no held-out predictions")
    else:
        value = temperature_in_words(temperature["value"])
        print(f"temperature {value}, fitted on {temperature['fitted_on']}{few_images(temperature)}")
    if tested is None:
        print("no test images: the model was not tested")
    else:
        _print_test(tested, metrics["test_reading"])
    if "error" not in metrics["onnx"]:
        difference, images = metrics["onnx"]["largest_difference"], count(metrics["onnx"]["images"], "validation image")
        print(f"model.onnx agrees with PyTorch within {difference:.1g} on {images}")


def temperature_in_words(value: float | list[float]) -> str:
    """Return a temperature; of several labels the lowest and the highest."""
    return f"{min(value):.2f} to {max(value):.2f} by label" if isinstance(value, list) else f"{value:.2f}"


def few_images(temperature: dict[str, Any]) -> str:
    """Return the end of a sentence on a temperature that was fitted on few images; empty if they were enough."""
    images = temperature.get("images", FEW_IMAGES)
    return "" if images >= FEW_IMAGES else f" ({count(images, 'image')}: too few for a reliable temperature)"


def _print_test(tested: dict[str, Any], reading: dict[str, Any]) -> None:
    if reading["number"] > 1:
        some = "" if reading["known_images"] == tested["images"] else f"{count(reading['known_images'], 'image')} of "
        print(
            f"evaluation number {reading['number']} on {some}this test set (the first: {reading['first_at']}): if you "
            "choose between models by it, its figures are too optimistic"
        )
    groups = "" if tested["groups"] == tested["images"] else f" from {count(tested['groups'], 'group')}"
    print(f"test set of {count(tested['images'], 'image')}{groups}, 95% confidence intervals in brackets:")
    print(f"  {_figures(tested, 'accuracy', 'balanced_accuracy', 'auroc')}")
    for name, values in tested["classes"].items():
        print(f"  {visible(name)}: {_figures(values, 'sensitivity', 'specificity', 'auroc')}")
    print_predictive_values(tested)
    print_per_group(tested)
    before, after = tested["calibration_error_untempered"], tested["calibration_error"]
    print(f"  expected calibration error {after:.3f} ({before:.3f} without temperature scaling)")
    for line in tested.get("subgroups_in_words", []):
        print(f"  {visible(line)}")


def print_predictive_values(figures: Mapping[str, Any]) -> None:
    """Print PPV and NPV at the prevalences that were given."""
    for point in figures.get("operating_points", []):
        if "prevalence" in point and point["sensitivity"] is not None:
            values = ", ".join(f"{name.upper()} {estimate(point, name)}" for name in ("ppv", "npv"))
            at = (
                f"{point['validation_specificity']:.0%} specificity on validation, prevalence {point['prevalence']:.3g}"
            )
            print(f"  {visible(point['class'])} at {at}: {values}")


def print_per_group(figures: Mapping[str, Any]) -> None:
    """Print the figures per group, if there are any."""
    if "per_group" in figures:
        per_group = figures["per_group"]
        print(f"  per group, {per_group['in_words']}: {_figures(per_group, 'accuracy', 'balanced_accuracy', 'auroc')}")


def _figures(values: Mapping[str, Any], *names: str) -> str:
    words = (name.replace("_", " ").replace("auroc", "AUROC") for name in names)
    return "  ".join(f"{word} {estimate(values, name)}" for word, name in zip(words, names, strict=True))


def estimate(values: Mapping[str, Any] | None, name: str) -> str:
    """Return a figure of `intervals.measure` with its 95% confidence interval, each only if there is one."""
    if values is None or values.get(name) is None:
        return "-"
    bounds = values.get(f"{name}_95")
    return f"{values[name]:.3f}" + ("" if bounds is None else " ({:.3f} to {:.3f})".format(*bounds))
