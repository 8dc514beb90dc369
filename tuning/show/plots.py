"""Pictures of what a model does on its test set: confusion, ROC curves, calibration."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tuning.insight.calibration import BINS, calibration_error, logarithms, tempered

CONFUSION, ROC, CALIBRATION = PLOTS = ("confusion.png", "roc.png", "calibration.png")
LABEL = 22  # characters of a class's name that are shown
WITH_COUNTS = 40  # classes, at most, whose counts are written into the confusion matrix
WITH_NAMES = 100  # classes, at most, whose names stand at the confusion matrix
WITH_COLOURS = 8  # classes, at most, whose curves all have colours; of more the lowest FEW do
FEW = 5
LEAST_IMAGES = 5  # in a bin of the calibration plot that the line goes through
INK, QUIET, LINE = "#1c1e21", "#5c636b", "#d5d8db"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a", "#8b4513")  # Okabe-Ito's first
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def write_plots(
    folder: Path,
    classes: Sequence[str],
    targets: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    temperature: float,
) -> None:
    """Write `PLOTS` into a folder.

    Args:
        folder: there already.
        classes: names, in the order of the columns.
        targets: [images], index into `classes`.
        probabilities: [images, classes], with the temperature.
        temperature: that logits were divided by.
    """
    with _styled():
        names = shortened(classes)
        untempered = tempered(logarithms(probabilities), 1 / temperature)
        for name, figure in (
            (CONFUSION, confusion(names, targets, probabilities)),
            (ROC, roc(names, targets, probabilities)),
            (CALIBRATION, calibration(targets, untempered, probabilities, temperature)),
        ):
            figure.savefig(folder / name, dpi=150)


@contextmanager
def _styled() -> Iterator[None]:
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # an emoji in a class's name is shown as a box
        yield


def shortened(names: Sequence[str]) -> list[str]:
    """Names on one line and at most `LABEL` characters long, numbered where they would be the same."""
    visible = ["".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name) for name in names]
    short = [name if len(name) <= LABEL else f"{name[: LABEL - 8]}…{name[-7:]}" for name in visible]
    times = Counter(short)
    return [name if times[name] == 1 else f"{place + 1}: {name}" for place, name in enumerate(short)]


def confusion(names: Sequence[str], targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Figure:
    """The confusion matrix, coloured by the share of the true class."""
    count = len(names)
    counts = np.zeros((count, count), dtype=np.int64)
    np.add.at(counts, (targets, probabilities.argmax(axis=1)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 0.32 * min(count, WITH_NAMES) + 0.9 if count > WITH_COLOURS else 0.55 * count + 1.1
    figure = Figure(figsize=(max(side + 2.4, 4.5), max(side + 1.9, 3.6)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)  # the darkest blue leaves no contrast for its ring
    for row, column in np.argwhere(counts) if count <= WITH_COUNTS else ():
        dark = shares[row, column] > 0.6
        said = f"{counts[row, column]:,}"
        axes.text(column, row, said, ha="center", va="center", color="white" if dark else INK, fontsize=8)
    if count <= WITH_NAMES:
        _name_classes(axes, names)
    else:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"Confusion on {len(targets):,} test images")
    return figure


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows and columns of a matrix, and draw lines between them."""
    count = len(names)
    turned = count > 3 or max(map(len, names)) > 9
    axes.set_xticks(range(count), names, rotation=90 if count > WITH_COLOURS else 40 if turned else 0)
    if turned and count <= WITH_COLOURS:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)


def roc(names: Sequence[str], targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Figure:
    """Each class's ROC curve against the rest; of many classes those with the lowest area stand out."""
    from sklearn.metrics import auc, roc_curve  # takes a second to load

    curves = []
    for place, name in enumerate(names):
        if 0 < (targets == place).sum() < len(targets):
            false, true, _ = roc_curve(targets == place, probabilities[:, place])
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
    said = [f"{area:.3f}  {name}" for area, name, _, _ in coloured]  # a label that begins with _ would be left out
    title = "AUROC" if coloured is curves else f"AUROC, lowest of {len(curves)}"
    legend = figure.legend(lines, said, title=title, alignment="left", loc="outside right center")
    legend.get_title().set_fontweight("bold")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title("Each class against the rest")
    return figure


def calibration(
    targets: NDArray[np.int64],
    untempered: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    temperature: float,
) -> Figure:
    """How often the likeliest class is right, by its probability, before and after the temperature."""
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.2, 1], sharex=True)
    _unit_square(above)
    kinds = ((untempered, "without the temperature", COLOURS[1]), (probabilities, "as predicted", COLOURS[0]))
    lines, said = [], []
    for place, (values, words, colour) in enumerate(kinds):
        confidence, right = values.max(axis=1), values.argmax(axis=1) == targets
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        count = np.bincount(bins, minlength=BINS)
        there, many = count > 0, count >= LEAST_IMAGES
        of_bin = np.maximum(count, 1)
        shown = np.bincount(bins, weights=confidence, minlength=BINS) / of_bin
        share = np.bincount(bins, weights=right, minlength=BINS) / of_bin
        (line,) = above.plot(shown[many], share[many], color=colour, linewidth=1.5, marker="o", markersize=5, zorder=3)
        few = there & ~many
        above.scatter(shown[few], share[few], s=18, facecolor="white", edgecolor=colour, zorder=4)
        width = 0.4 / BINS
        below.bar((np.arange(BINS) + 0.29 + 0.42 * place) / BINS, count, width=width, color=colour)
        lines.append(line)
        said.append(f"{words}: calibration error {calibration_error(values, targets):.3f}")
    above.set(ylabel="share that is right")
    lines.append(above.scatter([], [], s=18, facecolor="white", edgecolor=QUIET))
    said.append(f"fewer than {LEAST_IMAGES} images")
    title = f"Calibration on {len(targets):,} test images, temperature {temperature:.2f}"
    legend = figure.legend(lines, said, title=title, alignment="left", loc="outside upper left")
    legend.get_title().set(fontweight="bold", fontsize=11)
    below.set(xlabel="probability of the likeliest class", ylabel="images")
    below.grid(axis="y", color=LINE, linewidth=0.6)
    below.set_axisbelow(True)
    return figure


def _unit_square(axes: Axes) -> Axes:
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes
