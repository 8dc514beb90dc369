"""The page of an evaluation on images from elsewhere, with its plots and mistakes."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.model.card import BY_CLASS, OVERALL, PICTURES
from tuning.model.evaluation import COMPARED
from tuning.model.held_out import estimate, few_images, temperature_in_words
from tuning.model.mistakes import mistakes_page, picture, worst
from tuning.record.temperature import Floats, Temperature
from tuning.settings.words import count
from tuning.show.page import note, section, still, table, text
from tuning.show.plots import CALIBRATION, PLOTS, write_plots

PAGE, MISTAKES = "evaluation.html", "mistakes.html"
SHOWN = PICTURES | {CALIBRATION: "Calibration: confidence and accuracy"}
CSS = "\n.plots img { max-width: 100%; height: auto; }\n"


def write_page(
    folder: Path,
    metrics: Mapping[str, Any],
    tested: pd.DataFrame,
    probabilities: Floats,
    targets: NDArray[np.int64],
    classes: Sequence[str],
    images: NDArray[np.uint8],
    rows: NDArray[np.int64],
    *,
    temperature: Temperature,
    shaped: Mapping[str, Any],
) -> None:
    """Write the plots, `mistakes.html` and `evaluation.html` of an evaluation into its folder.

    Args:
        metrics: what `metrics.json` holds.
        tested: samples that were evaluated.
        probabilities: [images, classes].
        targets: class indices [images].
        images: decoded [n, side, side, channels].
        rows: which of these were evaluated.
        temperature: of the model.
        shaped: `fit` and `drop_colour`.
    """
    name = folder.name.removeprefix("evaluation-")
    write_plots(folder, classes, targets, probabilities, temperature)
    mistakes = worst(targets, probabilities)
    pictures = [picture(tested["file"].iloc[row], np.asarray(images[rows[row]]), **shaped) for row in mistakes.rows]
    links = dict.fromkeys([PAGE], "evaluation")
    wrong = mistakes_page(name, mistakes, tested, probabilities, classes, pictures, None, links=links, maps_tried=False)
    (folder / MISTAKES).write_text(wrong, encoding="utf-8", errors="replace")
    here, data, made = metrics["evaluation"], metrics["data"], metrics["made"]
    groups = "" if here["groups"] == here["images"] else f" of {count(here['groups'], 'group')}"
    said = (
        f"{count(here['images'], 'image')}{groups} from {data['place']}, by {metrics['model']['folder']}, {made['at']}."
    )
    body = [
        f"<header><h1>{text(name)}</h1><p>{text(said)}</p></header>",
        section("figures", "Figures", table(_figures(metrics)), note(_calibration(metrics))),
        section("classes", "By class", table(_classes(metrics))),
        section("points", "Operating points", *_points(here)),
        *_per_group(here),
        *_subgroups(here),
        section("shift", "Against the training images", *_shift(metrics)),
        section("plots", "Plots", *(_plot(folder / file, SHOWN[file]) for file in PLOTS)),
        section("data", "Data", *(note(line) for line in metrics["remarks"] or ["All images were evaluated."])),
        f'<p><a href="{MISTAKES}">The most confident mistakes</a></p>',
    ]
    (folder / PAGE).write_text(still(f"{name}: evaluation", body, CSS), encoding="utf-8", errors="replace")


def _change(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return "-"
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(change["difference"], *change["difference_95"])


def _figures(metrics: Mapping[str, Any]) -> pd.DataFrame:
    here, own, changes = metrics["evaluation"], metrics["test"], metrics["differences"]
    rows = [
        {
            "": OVERALL[name],
            "here": estimate(here, name),
            "on its own test set": estimate(own, name),
            "difference": _change(changes.get(name)),
        }
        for name in COMPARED
    ]
    for name, words in (("loss", "cross-entropy"), ("calibration_error", "expected calibration error")):
        rows.append(
            {"": words, "here": estimate(here, name), "on its own test set": estimate(own, name), "difference": "-"}
        )
    return pd.DataFrame(rows)


def _calibration(metrics: Mapping[str, Any]) -> str:
    again = metrics["recalibrated"]
    if again is None:
        return "95% confidence intervals in brackets."
    return (
        f"95% confidence intervals in brackets. With {temperature_in_words(again['temperature_factor'])} times the "
        "model's temperature, "
        f"which fits these images best, their cross-entropy would be {again['loss']:.3f}{few_images(again)}."
    )


def _classes(metrics: Mapping[str, Any]) -> pd.DataFrame:
    own = (metrics["test"] or {}).get("classes", {})
    changes = metrics["differences"].get("classes", {})
    return pd.DataFrame(
        [
            {"class": label, "figure": words, "images": values["images"], "here": estimate(values, name)}
            | {
                "images, own test set": own.get(label, {}).get("images", "-"),
                "on its own test set": estimate(own.get(label), name),
                "difference": _change(changes.get(label, {}).get(name)),
            }
            for label, values in metrics["evaluation"]["classes"].items()
            for name, words in BY_CLASS.items()
        ]
    )


def _points(here: Mapping[str, Any]) -> list[str]:
    if not here["operating_points"]:
        return [note("Unknown: the model, of an older version, has no thresholds.")]
    rows = []
    for point in here["operating_points"]:
        row = {"class": point["class"], "validation specificity": f"{point['validation_specificity']:.0%}"}
        row |= {name: estimate(point, name) for name in ("sensitivity", "specificity")}
        for name in ("ppv", "npv") if "prevalence" in point else ():
            row[f"{name.upper()} at the prevalence"] = f"{estimate(point, name)} at {point['prevalence']:.3g}"
        rows.append(row)
    words = "At the thresholds that have these specificities on the model's validation set. PPV and NPV, the shares of "
    words += (
        "those called positive or negative who are so, depend on the prevalence: give it by --prevalence CLASS=SHARE."
    )
    return [table(pd.DataFrame(rows).fillna("-")), note(words)]


def _per_group(here: Mapping[str, Any]) -> list[str]:
    per_group = here.get("per_group", {})
    if "accuracy" not in per_group:
        return []
    rows = [{"": OVERALL[name], "per group": estimate(per_group, name)} for name in COMPARED]
    rows += [
        {"": f"{label}: {words}", "per group": estimate(values, name)}
        for label, values in per_group["classes"].items()
        for name, words in BY_CLASS.items()
    ]
    said = note(f"{count(per_group['images'], 'group')}, each {per_group['in_words']}.")
    return [section("groups", "Per group", table(pd.DataFrame(rows)), said)]


def _subgroups(here: Mapping[str, Any]) -> list[str]:
    rows = [
        {"": f"{row['column']}: {row['value']}", "images": row["images"], "groups": row["groups"]}
        | {"balanced accuracy": estimate(row, "balanced_accuracy"), "AUROC": estimate(row, "auroc")}
        | {f"{OVERALL[name]} less the rest's": _change(change) for name, change in row["differences"].items()}
        for row in here.get("subgroups", [])
    ]
    if not rows:
        return []
    said = note(". ".join(here["subgroups_in_words"]) + ".")
    return [section("subgroups", "By subgroup", table(pd.DataFrame(rows)), said)]


def _shift(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics["shift"]:
        return [note("Unknown: the model's folder doesn't hold what its training images were like.")]
    rows = [
        {"": each["fact"], "in training": each["trained"], "here": each["here"], "separation": each["separation"]}
        for each in metrics["shift"]
    ]
    told = [each["fact"] for each in metrics["shift"] if each["notable"]]
    words = "Medians, or the most frequent. Separation: the share of images of which this alone tells whether they are "
    words += "from here or from the training set, each set counting half; 0.5 is chance. Another share of the classes "
    words += "changes brightness and the like as well. "
    words += f"Different here: {', '.join(told)}." if told else "No clear difference."
    return [table(pd.DataFrame(rows)), note(words)]


def _plot(path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p class="plots"><img src="data:image/png;base64,{data}" alt="{text(words)}"></p>'
