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
from tuning.record import tables
from tuning.settings.documents import read_plan
from tuning.show.page import duration, number, text
from tuning.show.plots import CALIBRATION, CONFUSION, ROC

CLASSES_SHOWN = 30  # of more only the counts of images are told
FEW_GROUPS = 100  # in the test set: below it the limits say that it is small
SETTINGS = ("metric", "fit", "drop_colour", "weights", "final_data", "ensemble", "on_leak")
# What `decoding` does for each fit, in Pillow's words.
LANCZOS = "Image.Resampling.LANCZOS, reducing_gap=3.0"
RESHAPED = {
    "squash": [f"image = image.resize((side, side), {LANCZOS})"],
    "crop": [
        "least = min(image.size)",
        "left, top = (image.width - least) // 2, (image.height - least) // 2",
        "image = image.crop((left, top, left + least, top + least))",
        f"image = image.resize((side, side), {LANCZOS})",
    ],
    "letterbox": [
        "size = [max(round(length * side / max(image.size)), 1) for length in image.size]",
        f"film, image = image.resize(size, {LANCZOS}), Image.new(image.mode, (side, side))",
        "image.paste(film, ((side - film.width) // 2, (side - film.height) // 2))",
    ],
}


def card(
    model: Path, run: Path, provenance: Mapping[str, Any], samples: pd.DataFrame, audit: pd.DataFrame | None
) -> str:
    """The card, in Markdown.

    Args:
        model: its folder, with `config.yaml` and `metrics.json`; told are its plots, if they lie there.
        run: folder of the best.yaml; of its tables those are used that there are.
        provenance: of the best.yaml; `changed` in it says whether another configuration or other data was trained.
        samples: what it was trained and tested on.
        audit: of these samples; null where there was none.
    """
    config = yaml.safe_load((model / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    parts = [
        _head(config, metrics, provenance, samples),
        _use(model, config, metrics),
        _tested(model, metrics),
        _calibrated(model, metrics),
        _data(samples, config["provenance"]["fingerprint"]),
        _audit(audit),
        _search(run, provenance),
        _configuration(config, provenance),
        _limits(metrics, audit, provenance.get("changed", False)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(value: object) -> str:
    """Anything as Markdown text on one line, with nothing in it that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text(value))


def _listed(rows: list[list[Any]], heads: list[str]) -> str:
    """A table; numbers stand to the right."""
    right = [all(not isinstance(row[place], str) for row in rows) for place in range(len(heads))]
    lines = [heads, ["---:" if to_right else "---" for to_right in right]]
    cells = [[plain(cell) if isinstance(cell, str) else number(cell, 3) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *cells])


def _head(
    config: Mapping[str, Any], metrics: Mapping[str, Any], provenance: Mapping[str, Any], samples: pd.DataFrame
) -> str:
    classes = config["classes"]
    named = ", ".join(map(plain, classes)) if len(classes) <= CLASSES_SHOWN else f"{len(classes)} classes"
    members = config.get("ensemble", {})
    what = config["config"]["backbone"] if not members else f"an ensemble of {len(members)} fine-tuned networks"
    images = int(samples["split"].isin(metrics["trained_on"].split("+")).sum())
    return (
        f"# {plain(provenance.get('run', 'model'))}\n\n"
        f"Tells {named} apart: {plain(what)}, fine-tuned on {images:,} images.\n\n"
        "**Not a medical device.** It is made for research; no finding, treatment or triage may rest on it."
    )


def _use(model: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    onnx = metrics["onnx"]
    command = "python tuning/model_folder.py predict MODEL IMAGE FOLDER 'GLOB*.png' --out predictions.csv"
    told = (
        f"## Use\n\nWith finetune-search {__version__}, where `MODEL` is this "
        f"folder:\n\n```\n{command}\n```\n\n"
        '```python\nfrom tuning.model_folder import load_model\n\nmodel = load_model("MODEL")\n'
        'probabilities = model.predict(["film.png"])  # [images, classes], in the order of model.classes\n```'
    )
    if "error" in onnx:
        return f"{told}\n\nThere is no `model.onnx`: {plain(onnx['error'])}."
    checked = f"to {onnx['largest_difference']:.1g} on {onnx['images']} validation images"
    several = "" if len(config["onnx"]["inputs"]) == 1 else " It has an input for each size that a network wants."
    return (
        f"{told}\n\nOr with nothing of this project: `model.onnx` gives the same probabilities, temperature included "
        f"({checked}). It takes pictures as RGB in 0 to 1; mean and standard deviation are applied inside.{several}\n\n"
        f"```python\n{_with_onnx(config)}\n```\n\nThis leaves out what `predict` does for EXIF orientation, 16 bits, "
        "transparency and DICOM."
    )


def _with_onnx(config: Mapping[str, Any]) -> str:
    """Python that runs the ONNX file on one picture."""
    shaping = config["preprocessing"]
    sides = {name: shape[2] for name, shape in config["onnx"]["inputs"].items()}
    mode = '"L" if image.mode == "RGB" else None' if shaping["drop_colour"] else "None"
    grey = [
        f"if np.ptp(np.asarray(image), axis=2).max() <= {GREY_LEVELS}:  # grey, but for rounding",
        '    image = image.convert("L")',
    ]
    return "\n".join(
        [
            "import numpy as np\nimport onnxruntime\nfrom PIL import Image\n\n",
            "def pixels(file, side):",
            "    image = Image.open(file)",
            f"    image.draft({mode}, (2 * side, 2 * side))  # a JPEG is decoded no larger than it needs to be",
            f'    image = image.convert("{"L" if shaping["drop_colour"] else "RGB"}")',
            *(f"    {line}" for line in RESHAPED[shaping["fit"]] + ([] if shaping["drop_colour"] else grey)),
            '    return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255\n\n',
            f'given = {{name: pixels("film.png", side) for name, side in {sides}.items()}}',
            'session = onnxruntime.InferenceSession("model.onnx")',
            '(probabilities,) = session.run(["probabilities"], given)',
            'print(session.get_modelmeta().custom_metadata_map["classes"], probabilities)',
        ]
    )


def _tested(model: Path, metrics: Mapping[str, Any]) -> str:
    tested, reading = metrics["test"], metrics["test_reading"]
    if tested is None:
        return "## Test\n\nThere were no test images: how good it is on new images isn't known."
    alone = tested["groups"] == tested["images"]
    groups, unit = ("", "image") if alone else (f" of {tested['groups']:,} groups", "group")
    times = "once" if reading["number"] == 1 else f"before: this is reading number {reading['number']}"
    rows = [
        [FIGURES.get(name, name), tested[name], _interval(tested, name)]
        for name in ("accuracy", "balanced_accuracy", "auroc", "loss")
    ]
    parts = [
        f"## Test\n\n{tested['images']:,} images{groups}, read {times}. Intervals are of 95%, by {unit}.",
        _listed(rows, ["", "test", "95%"]),
    ]
    if len(tested["classes"]) <= CLASSES_SHOWN:
        figures = ("sensitivity", "specificity", "auroc")
        each = [
            [name, *(part for figure in figures for part in (values[figure], _interval(values, figure)))]
            for name, values in tested["classes"].items()
        ]
        parts.append(_listed(each, ["class", "sensitivity", "95%", "specificity", "95%", "AUROC", "95%"]))
    parts += [f"![{words}]({name})" for name, words in PICTURES.items() if (model / name).exists()]
    if (model / "mistakes.html").exists():
        parts.append("The worst mistakes: [mistakes.html](mistakes.html). All plots come from `predictions.parquet`.")
    return "\n\n".join(parts)


FIGURES = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}
PICTURES = {CONFUSION: "Confusion matrix", ROC: "ROC curve of each class against the rest"}


def _interval(values: Mapping[str, Any], name: str) -> str:
    bounds = values.get(f"{name}_95")
    return "-" if bounds is None else "{:.3f} to {:.3f}".format(*bounds)


def _calibrated(model: Path, metrics: Mapping[str, Any]) -> str:
    temperature, tested = metrics["temperature"], metrics["test"]
    fitted = f", fitted on {plain(temperature['fitted_on'])}" if temperature["fitted_on"] else ": nothing to fit it on"
    said = f"## Calibration\n\nTemperature {temperature['value']:.2f}{fitted}."
    if tested is None:
        return said
    before, after = tested["calibration_error_untempered"], tested["calibration_error"]
    shown = f"\n\n![Calibration]({CALIBRATION})" if (model / CALIBRATION).exists() else ""
    return (
        f"{said} Expected calibration error on the test set: {after:.3f}, without the temperature {before:.3f}.{shown}"
    )


def _data(samples: pd.DataFrame, fingerprint: str) -> str:
    counts = samples.groupby(["label", "split"]).size().unstack(fill_value=0)
    splits = [name for name in ("train", "val", "test") if name in counts]
    rows = [[str(label), *map(int, row)] for label, row in zip(counts.index, counts[splits].to_numpy(), strict=True)]
    total = [["all", *(int(counts[name].sum()) for name in splits)]]
    groups = samples.groupby("split")["group"].nunique()
    within = (
        "No groups (such as patients) were given, so images of one may lie in several splits."
        if samples["group"].isna().all()
        else "Groups: " + ", ".join(f"{int(groups[name]):,} in {name}" for name in splits) + "."
    )
    shown = (rows if len(rows) <= CLASSES_SHOWN else []) + total
    return f"## Data\n\n{_listed(shown, ['class', *splits])}\n\n{within} Fingerprint: {plain(fingerprint)}."


def _audit(audit: pd.DataFrame | None) -> str:
    if audit is None:
        return "## Audit\n\nNot known: these samples have no audit beside them."
    lines = []
    for (severity, finding), rows in audit.groupby(["severity", "finding"], sort=False):
        told = len(rows) if rows["path_a"].notna().any() else rows["detail"].str.cat(sep="; ")  # no file's name
        lines.append(f"- {severity}: {plain(finding)}: {plain(told)}")
    return "## Audit\n\n" + ("\n".join(lines) or "Nothing was found.")


def _search(run: Path, provenance: Mapping[str, Any]) -> str:
    settings = provenance["settings"]
    lines = [f"Space {plain(settings['space'])}, metric `{settings['metric']}`.\n"]
    if (run / "plan.yaml").exists():
        space = read_plan(run)["space"]
        given = {name: analysis.described(spec) for name, spec in space.get("parameters", {}).items()} | space.get(
            "fixed", {}
        )
        lines += [f"- `{name}`: {plain(value)}" for name, value in given.items()]
    if (run / "trials.parquet").exists():
        trials = tables.read_table(run / "trials.parquet")
        mine = analysis.searched(trials)
        ends = ", ".join(f"{count:,} {plain(status)}" for status, count in mine["status"].value_counts().items())
        spent = duration(float(trials["seconds"].sum()))
        lines.append(
            f"\n{len(mine):,} trials ({ends}) of up to {settings['epochs']} epochs. With probes and finalists' runs: "
            f"{int(trials['epochs'].sum()):,} epochs, {spent} of training."
        )
    else:
        planned = f"{settings['trials']} trials of up to {settings['epochs']} epochs"
        lines.append(f"\nPlanned were {planned}. What ran isn't known: no tables of the run lie beside its best.yaml.")
    why = provenance.get("why")
    verdict = f"{plain(provenance.get('verdict'))}: {plain(why)}." if why else "Not known."
    return "## Search\n\n" + "\n".join(lines) + f"\n\n## Verdict\n\n{verdict}"


def _configuration(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    document = {key: config[key] for key in ("config", "ensemble", "preprocessing") if key in config}
    settings = {key: provenance["settings"][key] for key in SETTINGS if key in provenance["settings"]}
    told = yaml.safe_dump(document | {"settings": settings}, sort_keys=False, allow_unicode=True)
    return f"## Configuration\n\n````yaml\n{told}````"


def _limits(metrics: Mapping[str, Any], audit: pd.DataFrame | None, changed: bool) -> str:
    lines = [
        "Training and test images come from the same sources. On films of another hospital, device or group of "
        "patients it may do worse; test it there before anything rests on it.",
        "It always names one of its classes, also for what is none of them.",
    ]
    tested = metrics["test"]
    if tested is not None and tested["groups"] < FEW_GROUPS:
        lines.append(f"The test set is small ({tested['groups']} groups): look at the intervals.")
    if tested is not None and metrics["test_reading"]["number"] > 1:
        lines.append("The test set had been read before: who chooses between models by it has no test any more.")
    if audit is not None:
        shortcuts = audit[(audit["severity"] == "warn") & audit["finding"].str.startswith("shortcut_")]
        kinds = sorted(shortcuts["finding"].str.removeprefix("shortcut_").unique())
        if kinds:
            lines.append(f"The class can be told from {', '.join(kinds)} alone: it may have learnt that.")
    if changed:
        lines.append("The configuration or the data is another than the search's, of which search and verdict speak.")
    if metrics.get("verdict") in (None, "not enough runs"):
        lines.append("The configuration was not compared with the default again: it may be the luckiest of many.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
