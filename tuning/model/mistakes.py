"""A page of the worst mistakes on the test set, with what spoke for them in the picture."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tuning.data.decoding import decode
from tuning.settings.config import InputError
from tuning.show.page import note, section, still, text
from tuning.show.plots import PLOTS

SHOWN = 24  # mistakes
SIDE = 320  # pixels of a picture
PROBABILITIES = 5  # classes told of an image, the likeliest and the true one
CSS = """
.mistakes { display: grid; gap: 1.75rem 1.5rem; }
.mistakes { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
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
    """Test images of another class than predicted, the most confident mistakes first; of many the first."""

    rows: NDArray[np.int64]  # of the test set
    predicted: NDArray[np.int64]  # class of each
    total: int  # of all mistakes


def worst(targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Mistakes:
    """The mistakes that are shown.

    Args:
        targets: [images], index of the class.
        probabilities: [images, classes].
    """
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
) -> str:
    """The page, in HTML.

    Args:
        title: what the model is called.
        mistakes: from `worst`.
        tested: samples of the test set.
        probabilities: [images, classes].
        classes: names, in the order of the columns.
        pictures: of each mistake, from `picture`.
        maps: of each mistake, 0 to 1 [mistakes, side, side]; null where there are none.
    """
    figures = []
    for place, row in enumerate(mistakes.rows):
        sample = tested.iloc[row]
        both = [_image(pictures[place], f"{sample['label']}: {sample['path']}")]
        if maps is not None:
            both.append(_image(overlaid(pictures[place], maps[place]), "the same with its class-activation map"))
        told = _told(str(sample["label"]), probabilities[row], classes)
        kind = "pictures" if maps is not None else "pictures alone"
        figures.append(
            f'<figure><div class="{kind}">{"".join(both)}</div><figcaption>{told}'
            f'<p class="file">{text(sample["path"])}</p></figcaption></figure>'
        )
    links = " · ".join(f'<a href="{name}">{name.removesuffix(".png")}</a>' for name in (*PLOTS, "README.md"))
    what = f"{mistakes.total:,} of {len(tested):,} test images are taken for another class"
    most = f"; the {len(figures)} most confident mistakes are shown" if len(figures) < mistakes.total else ""
    head = f"<header><h1>{text(title)}: mistakes</h1><p>{text(what + most)}.</p><p>{links}</p></header>"
    shown = "".join(figures) or "<p>There are none.</p>"
    return still(
        f"{title}: mistakes",
        [head, section("mistakes", "The most confident first", _said(maps), f'<div class="mistakes">{shown}</div>')],
        CSS,
    )


def _said(maps: NDArray[np.float32] | None) -> str:
    if maps is None:
        return note("There are no class-activation maps: this model can't be cut below its last stage.")
    return note(
        "The right picture shows where the last stage's gradient times activation speaks for the predicted class, "
        "each by its own highest value. A map tells where the model looked, not whether it was right to."
    )


def _told(label: str, values: NDArray[np.float64], classes: Sequence[str]) -> str:
    """Probabilities of the likeliest classes and the true one."""
    order = [int(place) for place in np.argsort(-values, kind="stable")]
    shown = order[:PROBABILITIES]
    shown += [place for place in order[PROBABILITIES:] if classes[place] == label]
    rows = []
    for place in shown:
        kind = "true" if classes[place] == label else "predicted" if place == order[0] else ""
        word = {"true": " (true)", "predicted": " (predicted)", "": ""}[kind]
        name = f'<dt class="{kind}" title="{text(classes[place])}">{text(classes[place])}{word}</dt>'
        rows.append(f'{name}<dd class="{kind}">{values[place]:.1%}</dd>')
    return f"<dl>{''.join(rows)}</dl>"


def picture(file: str, seen: NDArray[np.uint8], *, fit: str, drop_colour: bool) -> NDArray[np.uint8]:
    """An image larger than the model saw it, in the same shape; as it saw it where the file is gone.

    Args:
        file: of the image.
        seen: decoded at the model's size, [side, side, channels].
        fit, drop_colour: as it was decoded.

    Returns:
        [SIDE, SIDE, 3]
    """
    try:
        pixels, _ = decode(file, SIDE, fit=fit, drop_colour=drop_colour)
    except (InputError, OSError):
        shown = Image.fromarray(seen[:, :, 0] if seen.shape[2] == 1 else seen)
        pixels = np.asarray(shown.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def overlaid(pixels: NDArray[np.uint8], strength: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture [side, side, 3] under its map [side, side]: the stronger, the less of the picture is left."""
    grey = pixels.mean(axis=2, keepdims=True) / 255
    colour = matplotlib.colormaps["inferno"](0.25 + 0.7 * strength)[:, :, :3]
    opaque = 0.65 * strength[:, :, None]
    mixed: NDArray[np.uint8] = (255 * ((1 - opaque) * grey + opaque * colour)).round().astype(np.uint8)
    return mixed


def _image(pixels: NDArray[np.uint8], label: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{SIDE}" height="{SIDE}" alt="{text(label)}">'
