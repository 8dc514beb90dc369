"""The model card: what a final model is, what it was made from and how good it is, from the tables alone."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tuning import __version__
from tuning.data.decoding import GREY_LEVELS
from tuning.insight import analysis
from tuning.model.held_out import estimate, few_images, temperature_in_words
from tuning.record import tables
from tuning.record.targets import counted, is_multi_label, unknown_labels
from tuning.settings.documents import read_plan
from tuning.settings.words import count
from tuning.show.frames import duration, number
from tuning.show.page import text
from tuning.show.plots import CALIBRATION, CONFUSION, ROC

CLASSES_SHOWN = 30  # with more classes only the totals are shown
FEW_GROUPS = 100  # a test set with fewer is called small
SETTINGS = ("metric", "fit", "drop_colour", "weights", "final_data", "ensemble", "on_leak")
OVERALL = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "loss": "loss"}
BY_CLASS = {"sensitivity": "sensitivity", "specificity": "specificity", "auroc": "AUROC", "auprc": "AUPRC", "f1": "F1"}
POINTS = ["validation", "threshold", "sensitivity, 95% CI", "specificity, 95% CI", "at a prevalence"]
SUBGROUPS = ["subgroup", "images", "balanced accuracy", "95% CI", "AUROC", "95% CI"]
PICTURES = {CONFUSION: "Confusion matrix", ROC: "ROC curve of each class against the rest"}
USE = """\
## Use

With finetune-search {version}, where `MODEL` is this folder:

```
python tuning/model_folder.py predict MODEL IMAGE FOLDER 'GLOB*.png' --out predictions.csv
```

```python
from tuning.model_folder import load_model

model = load_model("MODEL")
probabilities = model.predict(["film.png"])  # [images, classes], in the order of model.classes
```"""
ONNX = """\
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, which would send events
import numpy as np
import onnxruntime
from PIL import Image


def pixels(file, side):
    image = Image.open(file)
    image.draft({mode}, (2 * side, 2 * side))  # decode a JPEG no larger than needed
    image = image.convert("{colours}")
    {resize}
    return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255


inputs = {{name: pixels("film.png", side) for name, side in {sides}.items()}}
session = onnxruntime.InferenceSession("model.onnx")
(probabilities,) = session.run(["probabilities"], inputs)
print(session.get_modelmeta().custom_metadata_map["classes"], probabilities)"""
# The resizing of `tuning.data.decoding` for each fit, in Pillow's terms.
LANCZOS = "Image.Resampling.LANCZOS, reducing_gap=3.0"
RESIZE = {
    "squash": [f"image = image.resize((side, side), {LANCZOS})"],
    "crop": [
        "short = min(image.size)",
        "left, top = (image.width - short) // 2, (image.height - short) // 2",
        "image = image.crop((left, top, left + short, top + short))",
        f"image = image.resize((side, side), {LANCZOS})",
    ],
    "letterbox": [
        "size = [max(round(length * side / max(image.size)), 1) for length in image.size]",
        f"film, image = image.resize(size, {LANCZOS}), Image.new(image.mode, (side, side))",
        "image.paste(film, ((side - film.width) // 2, (side - film.height) // 2))",
    ],
}
TO_GREY = [
    f"if np.ptp(np.asarray(image), axis=2).max() <= {GREY_LEVELS}:  # grey up to rounding",
    '    image = image.convert("L")',
]


def card(
    model: Path, run: Path, provenance: Mapping[str, Any], samples: pd.DataFrame, audit: pd.DataFrame | None
) -> str:
    """Return the card, in Markdown.

    Args:
        model: its folder, with `config.yaml`, `metrics.json` and perhaps plots.
        run: folder of the best.yaml and perhaps the tables of its run.
        provenance: of the best.yaml, with `final_settings` and whether configuration or data were `changed` from it.
    """
    config = yaml.safe_load((model / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    document = {key: config[key] for key in ("config", "ensemble", "preprocessing") if key in config}
    settings = provenance.get("final_settings", provenance["settings"])
    document["settings"] = {key: settings[key] for key in SETTINGS if key in settings}
    parts = [
        _head(config, metrics, provenance, samples),
        _use(config, metrics["onnx"]),
        _test(model, metrics, "label" if config.get("multi_label", False) else "class"),
        _calibration(model, metrics),
        _data(samples, config["provenance"]["fingerprint"]),
        _audit(audit),
        _search(run, provenance),
        f"## Configuration\n\n````yaml\n{yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}````",
        _limitations(metrics, audit, provenance.get("changed", False), config.get("multi_label", False)),
    ]
    return "\n\n".join(parts) + "\n"


def plain(value: object) -> str:
    """Return anything as Markdown text on one line, with every sign escaped that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text(value))


def _table(rows: list[list[Any]], heads: list[str]) -> str:
    """Return a table; columns of numbers are aligned right."""
    right = [all(_numeric(row[place]) for row in rows) for place in range(len(heads))]
    lines = [heads, ["---:" if to_right else "---" for to_right in right]]
    lines += [[plain(cell) if isinstance(cell, str) else number(cell, 3) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(cell: Any) -> bool:
    return not isinstance(cell, str) or re.fullmatch(r"-|-?[\d.,]+(e-?\d+)?", cell) is not None


def _head(
    config: Mapping[str, Any], metrics: Mapping[str, Any], provenance: Mapping[str, Any], samples: pd.DataFrame
) -> str:
    classes, several = config["classes"], config.get("multi_label", False)
    named = ", ".join(map(plain, classes)) if len(classes) <= CLASSES_SHOWN else f"{len(classes)} classes"
    members = config.get("ensemble", {})
    network = f"an ensemble of {count(len(members), 'network')}" if members else plain(config["config"]["backbone"])
    images = int(samples["split"].isin(metrics["trained_on"].split("+")).sum())
    return (
        f"# {plain(provenance.get('run', 'model'))}\n\n"
        f"Image classifier ({named}{'; an image may have several, or none' if several else ''}): {network}, fine-tuned "
        f"on {count(images, 'image')}.\n\n"
        "**Not a medical device.** For research only: base no finding, treatment or triage on it."
    )


def _use(config: Mapping[str, Any], onnx: Mapping[str, Any]) -> str:
    use = USE.format(version=__version__)
    if "error" in onnx:
        return f"{use}\n\n`model.onnx` was not exported: {plain(onnx['error'])}."
    checked = f"largest difference {onnx['largest_difference']:.1g} on {count(onnx['images'], 'validation image')}"
    several = "" if len(config["onnx"]["inputs"]) == 1 else " There is one input for each image size."
    return (
        f"{use}\n\nWithout finetune-search, `model.onnx` gives the same probabilities ({checked}), including "
        "temperature scaling. Its input is RGB from 0 to 1; mean and standard deviation are applied "
        f"inside.{several}\n\n```python\n{_onnx_code(config)}\n```\n\n"
        "Unlike `predict`, this code does not handle EXIF orientation, 16-bit images, transparency or DICOM."
    )


def _onnx_code(config: Mapping[str, Any]) -> str:
    """Return Python that runs the ONNX file on one image."""
    grey = config["preprocessing"]["drop_colour"]
    return ONNX.format(
        mode='"L" if image.mode == "RGB" else None' if grey else None,
        colours="L" if grey else "RGB",
        resize="\n    ".join(RESIZE[config["preprocessing"]["fit"]] + ([] if grey else TO_GREY)),
        sides={name: shape[2] for name, shape in config["onnx"]["inputs"].items()},
    )


def _test(model: Path, metrics: Mapping[str, Any], kind: str) -> str:
    tested, reading = metrics["test"], metrics["test_reading"]
    if tested is None:
        return "## Test results\n\nThere were no test images, so its performance on new images is unknown."
    alone = tested["groups"] == tested["images"]
    groups, unit = ("", "image") if alone else (f" from {count(tested['groups'], 'group')}", "group")
    times = "evaluated once"
    if reading["number"] > 1:
        known = reading.get("known_images", tested["images"])
        times = (
            f"evaluation number {reading['number']} on {'them' if known == tested['images'] else f'{known} of them'}"
        )
    overall = [[words, *_estimate(tested, name)] for name, words in OVERALL.items()]
    parts = [
        f"## Test results\n\n{count(tested['images'], 'image')}{groups}, {times}. "
        f"95% CI: confidence interval, with each {unit} as one observation.",
        _table(overall, ["", "test", "95% CI"]),
    ]
    if len(tested["classes"]) <= CLASSES_SHOWN:
        each = [
            [label, *(cell for name in BY_CLASS for cell in _estimate(values, name))]
            for label, values in tested["classes"].items()
        ]
        parts.append(_table(each, [kind, *(head for words in BY_CLASS.values() for head in (words, "95% CI"))]))
    if points := tested.get("operating_points"):
        parts.append("At thresholds that have these specificities on the validation set:")
        parts.append(_table([_point(point) for point in points], [kind, *POINTS]))
    if (per_group := tested.get("per_group")) and "accuracy" in per_group:
        parts.append(f"{count(per_group['images'], 'group')}, each {plain(per_group['in_words'])}:")
        parts.append(
            _table([[words, *_estimate(per_group, name)] for name, words in OVERALL.items()], ["", "test", "95% CI"])
        )
    if subgroups := tested.get("subgroups"):
        parts.append("By subgroup. " + " ".join(f"{plain(line)}." for line in tested["subgroups_in_words"]))
        parts.append(_table([_subgroup(row) for row in subgroups], SUBGROUPS))
    parts += [f"![{words}]({name})" for name, words in PICTURES.items() if (model / name).exists()]
    if (model / "mistakes.html").exists():
        parts.append("The most confident mistakes: [mistakes.html](mistakes.html). Plots: from `predictions.parquet`.")
    return "\n\n".join(parts)


def _subgroup(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a subgroup."""
    shown = [f"{row['column']}: {row['value']}", f"{row['images']:,}"]
    return shown + [cell for name in ("balanced_accuracy", "auroc") for cell in _estimate(row, name)]


def _point(point: Mapping[str, Any]) -> list[str]:
    """Return the cells of an operating point."""
    shown = [point["class"], f"{point['validation_specificity']:.0%}", number(point["threshold"], 3)]
    shown += [estimate(point, name) for name in ("sensitivity", "specificity")]
    if "prevalence" not in point:
        return [*shown, "-"]
    values = ", ".join(f"{name.upper()} {estimate(point, name)}" for name in ("ppv", "npv"))
    return [*shown, f"{values} at {point['prevalence']:.3g}"]


def _estimate(values: Mapping[str, Any], name: str) -> list[str]:
    """Return a figure and its confidence interval."""
    value, bounds = values[name], values.get(f"{name}_95")
    shown = f"{value:.3f}" if value in (0, 1) else number(value, 3)
    return [shown, "-" if bounds is None else "{:.3f} to {:.3f}".format(*bounds)]


def _calibration(model: Path, metrics: Mapping[str, Any]) -> str:
    value, fitted_on = metrics["temperature"]["value"], metrics["temperature"]["fitted_on"]
    few = few_images(metrics["temperature"])
    fitted = f"fitted on {plain(fitted_on)}{few}" if fitted_on else "not fitted, there are no held-out predictions"
    words, tested = f"## Calibration\n\nTemperature {temperature_in_words(value)}, {fitted}.", metrics["test"]
    if tested is not None:
        before, after = tested["calibration_error_untempered"], tested["calibration_error"]
        words += f" Expected calibration error on the test set: {after:.3f} ({before:.3f} without temperature scaling)."
    return f"{words}\n\n![Calibration]({CALIBRATION})" if (model / CALIBRATION).exists() else words


def _data(samples: pd.DataFrame, fingerprint: str) -> str:
    counts, images = counted(samples), samples["split"].value_counts()
    splits = [name for name in ("train", "val", "test") if name in counts]
    rows = [[str(label), *map(int, row)] for label, row in zip(counts.index, counts[splits].to_numpy(), strict=True)]
    rows = (rows if len(rows) <= CLASSES_SHOWN else []) + [["all", *(int(images[name]) for name in splits)]]
    if samples["group"].isna().all():
        grouped = "No groups (such as patients) were given, so images of one patient may be in several splits."
    else:
        groups = samples.groupby("split")["group"].nunique()
        grouped = f"Groups: {', '.join(f'{int(groups[name]):,} in {name}' for name in splits)}."
    unknown = unknown_labels(samples)
    if len(unknown) <= CLASSES_SHOWN and unknown:
        listed = ", ".join(f"{plain(name)} {number:,}" for name, number in unknown.items())
        grouped = f"Images in which a label is unknown, and left out of loss and figures: {listed}. {grouped}"
    table = _table(rows, ["label" if is_multi_label(samples["label"]) else "class", *splits])
    return f"## Data\n\n{table}\n\n{grouped} Fingerprint: {plain(fingerprint)}."


def _audit(audit: pd.DataFrame | None) -> str:
    if audit is None:
        return "## Data audit\n\nUnknown: these samples have no audit."
    lines = []
    for (severity, finding), rows in audit.groupby(["severity", "finding"], sort=False):
        names_files = rows["path_a"].notna().any()  # which a card must not
        detail = len(rows) if names_files else plain(rows["detail"].str.cat(sep="; "))
        if moved := int(rows["detail"].str.contains("; moved: ").sum()) if names_files else 0:
            detail = f"{detail}, of which {moved} were resolved by moving images into one split"
        lines.append(f"- {severity}: {plain(finding)}: {detail}")
    return "## Data audit\n\n" + ("\n".join(lines) or "No findings.")


def _search(run: Path, provenance: Mapping[str, Any]) -> str:
    settings = provenance["settings"]
    epochs = count(settings["epochs"], "epoch")
    lines = [f"Search space {plain(settings['space'])}, metric `{settings['metric']}`.\n"]
    if (run / "plan.yaml").exists():
        space = read_plan(run)["space"]
        values = {name: analysis.described(spec) for name, spec in space.get("parameters", {}).items()}
        lines += [f"- `{name}`: {plain(value)}" for name, value in (values | space.get("fixed", {})).items()]
    if (run / "trials.parquet").exists():
        trials = tables.read_table(run / "trials.parquet")
        statuses = analysis.searched(trials)["status"]
        ends = ", ".join(f"{times:,} {plain(status)}" for status, times in statuses.value_counts().items())
        spent = f"{count(int(trials['epochs'].sum()), 'epoch')}, {duration(float(trials['seconds'].sum()))} of training"
        ran = f"{count(len(statuses), 'trial')} ({ends}) of up to {epochs}. With probes and finalist runs: {spent}."
    else:
        planned = f"{count(settings['trials'], 'trial')} of up to {epochs}"
        ran = f"Planned: {planned}. What was run is unknown: the run's tables are not beside its best.yaml."
    why = provenance.get("why")
    verdict = f"{plain(provenance.get('verdict'))}: {plain(why)}." if why else "Unknown."
    return "\n".join(["## Search\n", *lines, f"\n{ran}\n\n## Verdict\n\n{verdict}"])


def _limitations(metrics: Mapping[str, Any], audit: pd.DataFrame | None, changed: bool, multi_label: bool) -> str:
    lines = [
        "On images from other sources than those of its data, such as another hospital, device or patient population, "
        "it may do worse; test it there before you rely on it.",
        "It knows nothing but its labels: an image without them may show something else."
        if multi_label
        else "It always predicts one of its classes, even for an image that shows none of them.",
    ]
    tested = metrics["test"]
    if tested is not None and tested["groups"] < FEW_GROUPS:
        lines.append(f"The test set is small ({count(tested['groups'], 'group')}): see the confidence intervals.")
    if tested is not None and metrics["test_reading"]["number"] > 1:
        lines.append("The test set was evaluated before: if models were chosen by it, its figures are too optimistic.")
    if audit is not None and (kinds := tables.warned_shortcuts(audit)):
        lines.append(f"The class can be predicted from {', '.join(kinds)} alone: it may have learnt this shortcut.")
    if changed:
        lines.append(
            "Its configuration or data differs from the search's, so search and verdict describe another model."
        )
    if metrics.get("verdict") in (None, "not enough runs", "no significant difference"):
        lines.append("Its configuration was not shown to be better than the default: its lead may be chance.")
    if metrics.get("verdict") == "nothing beats guessing":
        lines.append("In the search no trial told the classes apart significantly better than guessing.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)
