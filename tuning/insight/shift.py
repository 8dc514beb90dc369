"""How images from elsewhere differ from those that a model was trained on: brightness, size, format."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ks_2samp

NUMBERS = ("brightness", "contrast", "width", "height", "longer / shorter side", "bytes per pixel")
WORDS = ("colour mode", "file format")
NOTABLE = 0.75  # separation from which a difference is told
P_VALUE = 0.01 / len((*NUMBERS, *WORDS))  # of a difference that is told: one in a hundred of equal sets has any
AT_ONCE = 2**24  # pixels


class Shift(NamedTuple):
    """A difference between two sets of images."""

    fact: str
    trained: str  # median, or the most frequent word with its share
    here: str
    separation: float  # share of images whose set is guessed from the fact, each set counting half; 0.5: by chance
    notable: bool  # whether that is clearly more than chance, and much


def described(images: NDArray[np.uint8], rows: NDArray[np.int64], facts: pd.DataFrame) -> pd.DataFrame:
    """Return what is compared, for some of the images.

    Args:
        images: decoded [n, side, side, channels].
        rows: of the images.
        facts: of all of them, from `images.read_facts`.
    """
    size = max(1, AT_ONCE // int(np.prod(images.shape[1:])))
    light = np.concatenate([_light(images[rows[first : first + size]]) for first in range(0, len(rows), size)])
    facts = facts.iloc[rows]
    width, height = (facts[name].to_numpy(np.float64) for name in ("width", "height"))
    return pd.DataFrame(
        {
            "brightness": light[:, 0].round(3),
            "contrast": light[:, 1].round(3),
            "width": width,
            "height": height,
            "longer / shorter side": np.maximum(width, height) / np.minimum(width, height),
            "bytes per pixel": (facts["bytes"].to_numpy(np.float64) / (width * height)).round(2),
            "colour mode": facts["mode"].to_numpy(),
            "file format": facts["format"].to_numpy(),
        }
    )


def _light(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean and the standard deviation of each image's grey levels [n, 2]."""
    grey = np.asarray(pixels, dtype=np.float32).mean(axis=3)
    return np.stack([grey.mean(axis=(1, 2)), grey.std(axis=(1, 2))], axis=1).astype(np.float64)


def shifts(trained: pd.DataFrame, here: pd.DataFrame) -> list[Shift]:
    """Return the differences between two tables of `described`, the largest first.

    The best guess from a number is by the largest difference of the two distribution functions (Kolmogorov and
    Smirnov), from a word by that of its two shares.
    """
    found = []
    for fact in (*NUMBERS, *WORDS):
        sides = [trained[fact], here[fact]]
        if fact in WORDS:
            words = {word: number for number, word in enumerate(sorted(set(sides[0]) | set(sides[1])))}
            shares = [each.value_counts(normalize=True) for each in sides]
            distance = float(1 - np.minimum(*(share.reindex(list(words), fill_value=0) for share in shares)).sum())
            shown = [f"{share.index[0]} ({share.iloc[0]:.0%})" for share in shares]
            p_value = float(ks_2samp(*(each.map(words) for each in sides)).pvalue)
        else:
            distance, p_value = map(float, ks_2samp(*sides)[:2])
            shown = [f"{each.median():,.0f}" if each.median() >= 100 else f"{each.median():.3g}" for each in sides]
        separation = 0.5 + distance / 2
        notable = separation >= NOTABLE and p_value <= P_VALUE
        found.append(Shift(fact, shown[0], shown[1], separation, notable))
    return sorted(found, key=lambda shift: -shift.separation)
