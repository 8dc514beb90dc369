"""Find copies among many pictures: re-encoded, resized, mirrored, turned, brighter, darker or slightly cropped.

All chest films look alike, so a hash or a correlation of small pictures finds hundreds of pairs of different films of
one patient, or of patients in one pose. Here it only proposes candidates. Each is aligned, and then compared
detail by detail: in a copy nearly every part agrees, in a look-alike only what all films have in common.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import fft

from tuning.checks import alignment
from tuning.checks.alignment import SIDE, Bytes, Floats, Halves, Ints, in_batches, resampling
from tuning.data.decoding import Pixels

VERSION = 1  # raised with any change of what is found
NEAR = 0.968  # agreement from which a pair is a copy
ALIKE = 0.9  # agreement from which it is a look-alike, or a copy if nothing else resembles the two
COARSE = 24  # pixels, of the first alignment
LEAST = 0.86  # likeness after an alignment below which a pair is dropped
PROMISING = (0.84, 0.92)  # agreement at a glance, after a coarse and a fine alignment, below which it is dropped
CROWDED = 0.8  # likeness after the first alignment from which pictures resemble each other
NEIGHBOURS = 8  # candidates of each image
BLOCK = 2_500_000  # pairs per batch of a core: 20 MB
FREQUENCIES = 12  # of the cosine transform, along each side
CUT = 0.05  # of the side; copies cropped by up to this at any side are found, others not always
PARTS = ((0.0, 1.0), (CUT, 1.0), (0.0, 1 - CUT), (CUT, 1 - CUT))  # of a side that others may be copies of
TURNS = (  # where x and y of the turned picture lie in the original; every second one mirrors the one before
    ((1, 0), (0, 1)),
    ((-1, 0), (0, 1)),
    ((1, 0), (0, -1)),
    ((-1, 0), (0, -1)),
    ((0, 1), (1, 0)),
    ((0, 1), (-1, 0)),
    ((0, -1), (1, 0)),
    ((0, -1), (-1, 0)),
)
STARTS = [  # part of the height, part of the width, turn
    *itertools.product(range(len(PARTS)), range(len(PARTS)), (0, 1)),
    *((0, 0, turn) for turn in range(2, len(TURNS))),
]


class Pairs(NamedTuple):
    """Pairs of images, each once, `a` before `b`."""

    a: Ints
    b: Ints
    agreement: Floats  # of their details, from ALIKE to 1
    copies: NDArray[np.bool_]  # others are look-alikes


def near_duplicates(pictures: Bytes) -> Pairs:
    """Return the pairs whose details agree.

    Args:
        pictures: [n, SIDE, SIDE], grey levels from 0 to 255.
    """
    n = len(pictures)
    if n < 2:
        none = np.empty(0, dtype=np.int64)
        return Pairs(none, none, none.astype(np.float32), none.astype(bool))
    fine, band = alignment.details(pictures, SIDE), alignment.bands(pictures)
    a, b, warp = _candidates(fine)
    warp, likeness = in_batches(partial(alignment.align, alignment.details(pictures, COARSE)), a, b, warp)
    alike = (a * n + b)[likeness >= CROWDED]
    a, b, warp = _promising(band, a, b, warp, likeness, PROMISING[0])
    warp, likeness = in_batches(partial(alignment.align, fine), a, b, warp)
    a, b, warp = _promising(band, a, b, warp, likeness, PROMISING[1])
    (agree,) = in_batches(partial(alignment.agreement, pictures), a, b, warp)
    kept = agree >= ALIKE
    a, b, agree = a[kept], b[kept], agree[kept]
    # If nothing else resembles the two, less agreement is enough.
    others = np.setdiff1d(alike, a * n + b)
    crowded = np.zeros(n, dtype=bool)
    crowded[others // n] = crowded[others % n] = True
    copies = (agree >= NEAR) | ~(crowded[a] | crowded[b])
    a, b = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((b, a))
    return Pairs(a[order], b[order], agree[order], copies[order])


def _promising(
    band: NDArray[np.int8], a: Ints, b: Ints, warp: Floats, likeness: Floats, promising: float
) -> tuple[Ints, Ints, Floats]:
    """Pairs that may still be copies after an alignment."""
    kept = (likeness >= LEAST) & alignment.plausible(warp)
    a, b, warp = a[kept], b[kept], warp[kept]
    kept = in_batches(partial(alignment.glance, band), a, b, warp)[0] >= promising
    return a[kept], b[kept], warp[kept]


def bars_of(shown: Pixels, facts: pd.DataFrame) -> Ints:
    """Return how many rows and columns letterboxing left black on either side of each image."""
    side = shown.shape[1]
    longer, shorter = (facts[["width", "height"]].agg(which, axis=1).to_numpy() for which in ("max", "min"))
    bars = (side - np.round(shorter * side / longer).clip(1).astype(np.int64)) // 2
    wide = np.array([not image[:bar].any() for image, bar in zip(shown, bars, strict=True)])  # EXIF may have turned it
    found: Ints = np.where(wide[:, None], [1, 0], [0, 1]) * bars[:, None]
    return found


def shrunk(shown: Pixels, rows: Ints, side: int, *, grey: bool = False, bars: Sequence[int] | Ints = (0, 0)) -> Bytes:
    """Resize some of the images [n, side, side, channels]; with `grey` to one channel.

    Args:
        bars: rows and columns of an image that are left out on either side.
    """
    was = shown.shape[1]
    down, across = (resampling(was, side, bar / was, 1 - bar / was) for bar in bars)

    def some(rows: Ints) -> tuple[Bytes]:
        channels = shown[rows].astype(np.float32).transpose(0, 3, 1, 2)
        channels = channels.mean(axis=1, keepdims=True) if grey else channels
        return ((down @ channels @ across.T).transpose(0, 2, 3, 1).round().astype(np.uint8),)

    return in_batches(some, rows)[0]


def _candidates(shapes: Halves) -> tuple[Ints, Ints, Floats]:
    """For each image those most like some turned crop of it, and the warp between them.

    Likeness is the correlation of the lowest frequencies, each divided by its standard deviation over all images, so
    that what all have in common counts little.
    """
    n = len(shapes)
    (spectra,) = in_batches(lambda part: (_spectra(part)[:, 0, 0],), shapes)
    spread = spectra.std(axis=0) + 1e-3
    spectra = _of_length_one(spectra / spread)
    even, odd = (np.ascontiguousarray(spectra[:, :, first::2].reshape(n, -1)) for first in (0, 1))
    sought = partial(_neighbours, spectra, even, odd, spread, shapes)
    few = max(16, min(128, BLOCK // n))
    neighbours, start, likeness = in_batches(sought, np.arange(n), size=few)
    a, b = np.repeat(np.arange(n), neighbours.shape[1]), neighbours.ravel()
    # Of the two directions of a pair the better one.
    order = np.lexsort((-likeness.ravel(), np.maximum(a, b), np.minimum(a, b)))
    a, b, start = a[order], b[order], start.ravel()[order]
    pair = np.minimum(a, b) * n + np.maximum(a, b)
    once = np.unique(pair, return_index=True)[1]
    return a[once], b[once], _warps()[start[once]]


def _neighbours(
    spectra: Floats, even: Floats, odd: Floats, spread: Floats, shapes: Halves, chosen: Ints
) -> tuple[Ints, Ints, Floats]:
    """For each of the chosen images those most like a turned crop of it, the crop's index, and how alike they are.

    A mirrored picture differs only in the sign of its odd frequencies: one product gives both.
    """
    n = len(spectra)
    crops = _of_length_one(_spectra(shapes[chosen]) / spread)
    best = np.full((len(chosen), n), -np.inf, dtype=np.float32)
    for high, wide, turn in STARTS:
        if turn % 2 == 0:
            query = _turned(crops[:, high, wide], turn)
            likeness = query[:, :, 1::2].reshape(len(chosen), -1) @ odd.T
            np.abs(likeness, out=likeness)
            likeness += query[:, :, 0::2].reshape(len(chosen), -1) @ even.T
            np.maximum(best, likeness, out=best)
    best[np.arange(len(chosen)), chosen] = -np.inf
    wanted = min(NEIGHBOURS, n - 1)
    found = np.argpartition(best, n - wanted, axis=1)[:, n - wanted :]
    starts = [_turned(crops[:, high, wide], turn).reshape(len(chosen), -1) for high, wide, turn in STARTS]
    near = spectra[found].reshape(*found.shape, -1)
    scores = np.stack(starts, axis=1) @ near.transpose(0, 2, 1)  # [chosen, starts, neighbours]
    return found, scores.argmax(axis=1), scores.max(axis=1)


def _spectra(shapes: Halves) -> Floats:
    """The lowest frequencies of crops, without the mean: [n, parts of the height, parts of the width, high, wide]."""
    cosines = fft.dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho")[:FREQUENCIES]
    parts = np.concatenate([cosines @ resampling(SIDE, SIDE, *part) for part in PARTS])
    low = parts @ (shapes.astype(np.float32).reshape(-1, SIDE) @ parts.T).reshape(-1, SIDE, len(parts))
    crops: Floats = low.reshape(-1, len(PARTS), FREQUENCIES, len(PARTS), FREQUENCIES).transpose(0, 1, 3, 2, 4)
    crops[..., 0, 0] = 0
    return crops


def _of_length_one(spectra: Floats) -> Floats:
    found: Floats = spectra / (np.sqrt((spectra**2).sum(axis=(-2, -1), keepdims=True)) + 1e-6)
    return found


def _turned(spectra: Floats, turn: int) -> Floats:
    """Spectra of the turned pictures."""
    matrix = np.array(TURNS[turn])
    x_sign, y_sign = matrix.sum(axis=1)
    odd = np.arange(FREQUENCIES) % 2
    signed = spectra * (y_sign**odd)[:, None].astype(np.float32) * (x_sign**odd).astype(np.float32)
    turned: Floats = signed if matrix[0, 0] else signed.transpose(0, 2, 1)
    return turned


def _warps() -> Floats:
    """For each of `STARTS` the matrix [2, 3] from points in the turned crop to the picture, from -1 to 1."""
    warps = np.zeros((len(STARTS), 2, 3), dtype=np.float32)
    for warp, (high, wide, turn) in zip(warps, STARTS, strict=True):
        (left, right), (top, bottom) = PARTS[wide], PARTS[high]
        warp[:, :2] = np.diag([right - left, bottom - top]) @ np.array(TURNS[turn])
        warp[:, 2] = left + right - 1, top + bottom - 1
    return warps
