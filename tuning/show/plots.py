"""Plots of a model's test results: confusion matrix, ROC curves, reliability diagram."""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuning.insight.calibration import BINS, calibration_error
from tuning.record.targets import by_class
from tuning.record.temperature import Floats, Ints, Temperature, logarithms, tempered
from tuning.settings.config import cache_folder
from tuning.settings.words import count

if "matplotlib" not in sys.modules:  # it would write its list of fonts below HOME
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
# isort: split
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CONFUSION, ROC, CALIBRATION = PLOTS = ("confusion.png", "roc.png", "calibration.png")
LABEL = 22  # most characters of a class name
WITH_COUNTS = 40  # most classes for which the confusion matrix shows counts
WITH_NAMES = 100  # most classes for which it shows names
WITH_COLOURS = 8  # most classes whose ROC curves all have colours; with more, the FEW of lowest AUROC have
FEW = 5
LEAST_IMAGES = 5  # in a bin that is part of the line of the reliability diagram
INK, QUIET, LINE = "#1c1e21", "#5c636b", "#d5d8db"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a", "#8b4513")  # Okabe-Ito's first
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "white"),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **{"axes.edgecolor": QUIET, "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold"},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"font.family": "DejaVu Sans", "font.size": 9},  # the font comes with matplotlib
    "text.parse_math": False,  # a class may be called $x$
}


def write_plots(
    folder: Path, classes: Sequence[str], targets: Ints, probabilities: Floats, temperature: Temperature
) -> None:
    """Write `PLOTS` into a folder, from probabilities [images, classes] after scaling by the temperature.

    Targets are class indices [images], or labels [images, classes] of 1, 0 and -1 (unknown).
    """
    several = targets.ndim == 2
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # an emoji in a class name is shown as a box
        names = shortened(classes)
        untempered = tempered(logarithms(probabilities, multi_label=several), 1 / temperature, multi_label=several)
        for name, figure in (
            (CONFUSION, (calls if several else confusion)(names, targets, probabilities)),
            (ROC, roc(names, targets, probabilities)),
            (CALIBRATION, calibration(targets, untempered, probabilities, temperature)),
        ):
            figure.savefig(folder / name, dpi=150)


def shortened(names: Sequence[str]) -> list[str]:
    """Shorten names to one line of at most `LABEL` characters, numbered if two would be equal."""
    visible = ["".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name) for name in names]
    short = [name if len(name) <= LABEL else f"{name[: LABEL - 8]}…{name[-7:]}" for name in visible]
    times = Counter(short)
    return [name if times[name] == 1 else f"{place + 1}: {name}" for place, name in enumerate(short)]


def confusion(names: Sequence[str], targets: Ints, probabilities: Floats) -> Figure:
    """Draw the confusion matrix, coloured by the share of the true class."""
    size = len(names)
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (targets, probabilities.argmax(axis=1)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 0.32 * min(size, WITH_NAMES) + 0.9 if size > WITH_COLOURS else 0.55 * size + 1.1
    figure = Figure(figsize=(max(side + 2.4, 4.5), max(side + 1.9, 3.6)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)  # 1.15: the darkest blue would leave no contrast
    for row, column in np.argwhere(counts) if size <= WITH_COUNTS else ():
        dark = shares[row, column] > 0.6
        colour, number = "white" if dark else INK, f"{counts[row, column]:,}"
        axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=8)
    if size <= WITH_NAMES:
        _name_classes(axes, names)
    else:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"Confusion matrix of {count(len(targets), 'test image')}")
    return figure


def calls(names: Sequence[str], targets: Ints, probabilities: Floats) -> Figure:
    """Draw the confusion matrix of each label as a row, coloured by the shares of its positives and negatives."""
    heads = ("true positive", "false negative", "false positive", "true negative")
    called = probabilities > 0.5
    counts = np.stack(
        [((targets == there) & (called == yes)).sum(axis=0) for there in (1, 0) for yes in (True, False)], axis=1
    )
    sides = np.repeat(np.maximum(counts.reshape(-1, 2, 2).sum(axis=2), 1), 2, axis=1)
    size = len(names)
    figure = Figure(figsize=(6.4, max(0.32 * min(size, WITH_NAMES) + 1.6, 2.4)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts / sides, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for row, column in np.ndindex(*counts.shape) if size <= WITH_COUNTS else ():
        colour = "white" if counts[row, column] / sides[row, column] > 0.6 else INK
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(heads)), heads)
    axes.set_yticks(range(size) if size <= WITH_NAMES else [], names if size <= WITH_NAMES else [])
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Known labels of {count(len(targets), 'test image')}, positive from a probability of 0.5")
    return figure


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows and columns of a matrix, and draw lines between them."""
    size = len(names)
    turned = size > 3 or max(map(len, names)) > 9
    axes.set_xticks(range(size), names, rotation=90 if size > WITH_COLOURS else 40 if turned else 0)
    if turned and size <= WITH_COLOURS:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), names)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)


def roc(names: Sequence[str], targets: Ints, probabilities: Floats) -> Figure:
    """Draw the ROC curve of each class against the rest; of many classes, those of lowest AUROC stand out."""
    from sklearn.metrics import auc, roc_curve  # takes a second to load

    curves, cells = [], by_class(targets, len(names))
    for place, name in enumerate(names):
        known = cells[:, place] >= 0
        there = cells[known, place] == 1
        if 0 < there.sum() < len(there):
            false, true, _ = roc_curve(there, probabilities[known, place])
            curves.append((auc(false, true), name, false, true))
    coloured = curves if len(curves) <= WITH_COLOURS else sorted(curves, key=lambda curve: curve[0])[:FEW]
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = _unit_square(figure.subplots())
    for _, _, false, true in curves if coloured is not curves else []:
        axes.plot(false, true, color=LINE, linewidth=0.9)
    lines = [
        axes.plot(false, true, color=colour, linewidth=1.7)[0]
        for (_, _, false, true), colour in zip(coloured, COLOURS, strict=False)
    ]
    labels = [f"{area:.3f}  {name}" for area, name, _, _ in coloured]  # a label that begins with _ would be left out
    title = "AUROC" if coloured is curves else f"AUROC, lowest of {len(curves)}"
    legend = figure.legend(lines, labels, title=title, alignment="left", loc="outside right center")
    legend.get_title().set_fontweight("bold")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title("ROC curve of each label" if targets.ndim == 2 else "ROC curve of each class against the rest")
    return figure


def calibration(targets: Ints, untempered: Floats, probabilities: Floats, temperature: Temperature) -> Figure:
    """Draw accuracy against confidence before and after temperature scaling, with the number of images below.

    Of labels, it is the frequency of what has a probability, of all labels together.
    """
    several = targets.ndim == 2
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.2, 1], sharex=True)
    _unit_square(above)
    kinds = ((untempered, "before temperature scaling", COLOURS[1]), (probabilities, "after", COLOURS[0]))
    lines, labels = [], []
    for place, (values, words, colour) in enumerate(kinds):
        if several:
            confidence, right = values[targets >= 0], targets[targets >= 0] == 1
        else:
            confidence, right = values.max(axis=1), values.argmax(axis=1) == targets
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        images = np.bincount(bins, minlength=BINS)
        x = np.bincount(bins, weights=confidence, minlength=BINS) / np.maximum(images, 1)
        y = np.bincount(bins, weights=right, minlength=BINS) / np.maximum(images, 1)
        many = images >= LEAST_IMAGES
        few = (images > 0) & ~many
        (line,) = above.plot(x[many], y[many], color=colour, linewidth=1.5, marker="o", markersize=5, zorder=3)
        above.scatter(x[few], y[few], s=18, facecolor="white", edgecolor=colour, zorder=4)
        width = 0.4 / BINS
        below.bar((np.arange(BINS) + 0.29 + 0.42 * place) / BINS, images, width=width, color=colour)
        lines.append(line)
        error = calibration_error(confidence[:, None], right[:, None].astype(np.int64)) if several else None
        error = calibration_error(values, targets) if error is None else error
        labels.append(f"{words}: expected calibration error {error:.3f}")
    above.set(ylabel="frequency" if several else "accuracy")
    lines.append(above.scatter([], [], s=18, facecolor="white", edgecolor=QUIET))
    labels.append(f"bin of fewer than {LEAST_IMAGES} {'predictions' if several else 'images'}")
    title = f"Calibration on {count(len(targets), 'test image')}, "
    title += "all labels together" if several else f"temperature {temperature:.2f}"
    legend = figure.legend(lines, labels, title=title, alignment="left", loc="outside upper left")
    legend.get_title().set(fontweight="bold", fontsize=11)
    below.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    if several:
        below.set(xlabel="probability of a label", ylabel="predictions")
    below.grid(axis="y", color=LINE, linewidth=0.6)
    below.set_axisbelow(True)
    return figure


def _unit_square(axes: Axes) -> Axes:
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes
