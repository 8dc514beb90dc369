"""A page of the most confident mistakes on the test set, with their class-activation maps."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tuning.data.decoding import decode
from tuning.record.targets import SIGN, is_multi_label, named, shown
from tuning.settings.config import InputError
from tuning.settings.words import count
from tuning.show.page import note, section, still, text
from tuning.show.plots import CALIBRATION, CONFUSION, ROC

SHOWN = 24  # mistakes
SIDE = 320  # pixels of an image
PROBABILITIES = 5  # classes shown for an image; the true one is always added
LINKS = {CONFUSION: "confusion matrix", ROC: "ROC curves", CALIBRATION: "calibration", "README.md": "model card"}
MAPS = (
    "Each right image shows the class-activation map of the predicted class, or of the label that is most wrong "
    "(gradient times activation at the last stage), scaled to its own maximum. It shows what the model looked at, not "
    "whether that was a good reason."
)
CSS = """
.mistakes { display: grid; grid: auto / repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.75rem 1.5rem; }
.mistakes figure { margin: 0; min-width: 0; break-inside: avoid; }
.mistakes .pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; border-radius: 8px; overflow: hidden; }
.mistakes .pictures.alone { grid-template-columns: minmax(0, 50%); }
.mistakes img { display: block; width: 100%; height: auto; background: #000; }
.mistakes figcaption { font-size: 0.875rem; padding-top: 0.5rem; overflow-wrap: anywhere; }
.mistakes figcaption p { margin: 0; }
.mistakes .file { color: var(--quiet); font-size: 0.8125rem; }
.mistakes dl { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 1rem; margin: 0.3rem 0; }
.mistakes dt { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.mistakes dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.mistakes .true { font-weight: 650; color: var(--good); }
.mistakes .predicted { font-weight: 650; }
"""


class Mistakes(NamedTuple):
    """The `SHOWN` most confident misclassified test images, the most confident first."""

    rows: NDArray[np.int64]  # of the test set
    predicted: NDArray[np.int64]  # class of each; of several labels the one that is most wrong
    total: int  # number of all mistakes


def worst(targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Mistakes:
    """Find the most confident mistakes among targets and probabilities [images, classes].

    Targets are class indices [images], or labels [images, classes] of 1, 0 and -1 (unknown): then each label that is
    called wrongly makes an image a mistake.
    """
    if targets.ndim == 2:
        errors = np.where(targets >= 0, np.abs(probabilities - (targets == 1)), 0.0)
        wrong = np.flatnonzero((errors > 0.5).any(axis=1))
        rows = wrong[np.argsort(-errors[wrong].max(axis=1), kind="stable")][:SHOWN]
        return Mistakes(rows, errors[rows].argmax(axis=1), len(wrong))
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    rows = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:SHOWN]
    return Mistakes(rows, predicted[rows], len(wrong))


def mistakes_page(
    title: str,
    mistakes: Mistakes,
    tested: pd.DataFrame,
    probabilities: NDArray[np.float64],
    classes: Sequence[str],
    pictures: Sequence[NDArray[np.uint8]],
    maps: NDArray[np.float32] | None,
    *,
    links: Mapping[str, str] = LINKS,
    maps_tried: bool = True,
) -> str:
    """Return the page, in HTML.

    Args:
        tested: samples of the test set.
        probabilities: [images, classes].
        pictures: of each mistake, from `picture`.
        maps: of each mistake, 0 to 1 [mistakes, side, side]; None if they could not be computed.
        links: words by file.
        maps_tried: whether maps were to be shown.
    """
    figures = []
    for place, row in enumerate(mistakes.rows):
        sample = tested.iloc[row]
        images = [image(pictures[place], f"{shown(str(sample['label']))}: {sample['path']}")]
        if maps is not None:
            images.append(image(overlaid(pictures[place], maps[place]), "the same under its class-activation map"))
        kind = "pictures" if maps is not None else "pictures alone"
        figures.append(
            f'<figure><div class="{kind}">{"".join(images)}</div><figcaption>'
            f"{_probabilities(str(sample['label']), probabilities[row], classes)}"
            f'<p class="file">{text(sample["path"])}</p></figcaption></figure>'
        )
    linked = " · ".join(f'<a href="{name}">{words}</a>' for name, words in links.items())
    wrong = "with a wrong label" if is_multi_label(tested["label"]) else "misclassified"
    summary = f"{mistakes.total:,} of {count(len(tested), 'test image')} {wrong}"
    most = f"; the {len(figures)} most confident mistakes are shown" if len(figures) < mistakes.total else ""
    head = f"<header><h1>{text(title)}: mistakes</h1><p>{text(summary + most)}.</p><p>{linked}</p></header>"
    listed = "<p>There are none.</p>"
    if figures:
        lacking = "Class-activation maps could not be computed for this model." if maps_tried else ""
        explained = note(MAPS if maps is not None else lacking)
        listed = f'{explained}<div class="mistakes">{"".join(figures)}</div>'
    return still(f"{title}: mistakes", [head, section("mistakes", "Most confident mistakes first", listed)], CSS)


def _probabilities(label: str, values: NDArray[np.float64], classes: Sequence[str]) -> str:
    """List the probabilities of the most probable classes and of those that are true."""
    order = [int(place) for place in np.argsort(-values, kind="stable")]
    several, rows = label.startswith(SIGN), []
    true = {name for name, there in named(label).items() if there} if several else {label}
    for place in order[:PROBABILITIES] + [place for place in order[PROBABILITIES:] if classes[place] in true]:
        called = values[place] > 0.5 if several else place == order[0]
        kind = "true" if classes[place] in true else "predicted" if called else ""
        name = text(classes[place])
        words = f"{name} ({kind})" if kind else name
        rows.append(f'<dt class="{kind}" title="{name}">{words}</dt><dd class="{kind}">{values[place]:.1%}</dd>')
    return f"<dl>{''.join(rows)}</dl>"


def picture(file: str, seen: NDArray[np.uint8], *, fit: str, drop_colour: bool) -> NDArray[np.uint8]:
    """Return an image [SIDE, SIDE, 3]: decoded again from its file or, if it cannot be read, enlarged from `seen`."""
    try:
        pixels, _ = decode(file, SIDE, fit=fit, drop_colour=drop_colour)
    except (InputError, OSError):
        shown = Image.fromarray(seen[:, :, 0] if seen.shape[2] == 1 else seen)
        pixels = np.asarray(shown.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def overlaid(pixels: NDArray[np.uint8], strength: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay a map [side, side] over an image [side, side, 3], more opaque where it is stronger."""
    from matplotlib import colormaps  # after `show.plots`, which sets where matplotlib may write

    grey = pixels.mean(axis=2, keepdims=True) / 255
    colour = colormaps["inferno"](0.25 + 0.7 * strength)[:, :, :3]
    opaque = 0.65 * strength[:, :, None]
    mixed: NDArray[np.uint8] = (255 * ((1 - opaque) * grey + opaque * colour)).round().astype(np.uint8)
    return mixed


def image(pixels: NDArray[np.uint8], label: str) -> str:
    """Return an image [SIDE, SIDE, 3] as HTML; `label` is for screen readers."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{SIDE}" height="{SIDE}" alt="{text(label)}">'
