"""Find copies among many pictures: re-encoded, resized, mirrored, turned, brighter, darker or cropped.

All chest films look alike, so a hash or a correlation of small pictures finds hundreds of pairs of different films of
one patient, or of patients in one pose. Here it only proposes candidates. Each is aligned, and then compared
detail by detail: in a copy nearly every part agrees, in a look-alike only what all films have in common.

A picture that may be a large crop of another is compared with that part of it, enlarged, once it is as blurred.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tuning.checks import alignment
from tuning.checks.alignment import SIDE, Bytes, Floats, Halves, Ints, in_batches, resampling
from tuning.checks.candidates import STARTS, Candidates, candidates, warps
from tuning.checks.sequences import SAME, sequences
from tuning.data.decoding import Pixels

VERSION = 3  # raised with any change of what is found
NEAR = 0.968  # agreement from which a pair is a copy
ALIKE = 0.9  # agreement from which it is a look-alike, or a copy if nothing else resembles the two
COARSE = 24  # pixels, of the first alignment
LEAST = 0.86  # likeness after an alignment below which a pair is dropped
LEAST_PART = 0.94  # the same of a part after the first alignment
PROMISING = (0.88, 0.93)  # agreement at a glance, after a coarse and a fine alignment, below which it is dropped
CROWDED = 0.8  # likeness after the first alignment from which pictures resemble each other
STEADY = 0.1  # the largest change of scale or place between neighbours in a sequence
LINKED = 0.95  # agreement from which a pair may be neighbours in a sequence; one that looks like a copy always may
SIDES = sorted({side for start in STARTS for side in (start.high, start.wide)})
ENLARGED = 4096  # pairs that are enlarged at once: 32 MB


class Pairs(NamedTuple):
    """Pairs of images, each once, `a` before `b`."""

    a: Ints
    b: Ints
    agreement: Floats  # of their details, from ALIKE to 1
    copies: NDArray[np.bool_]
    steps: NDArray[np.bool_]  # pairs of one sequence that are no copies; those that are neither are look-alikes


class _Aligned(NamedTuple):
    """Pairs whose details agree after alignment, by their place among all that were aligned."""

    kept: Ints
    agreement: Floats
    warp: Floats
    alike: Ints  # those that resemble each other after the first alignment


def near_duplicates(pictures: Bytes) -> Pairs:
    """Return the pairs whose details agree.

    Args:
        pictures: [n, SIDE, SIDE], grey levels from 0 to 255.
    """
    n = len(pictures)
    if n < 2:
        none = np.empty(0, dtype=np.int64)
        return Pairs(none, none, none.astype(np.float32), none.astype(bool), none.astype(bool))
    fine = alignment.details(pictures, SIDE)
    wholes, parts = candidates(fine)
    whole = _aligned(pictures, fine, wholes.a, wholes.b, warps()[wholes.start])
    zoomed = _aligned_parts(pictures, parts)
    steady = np.zeros(len(whole.kept) + len(zoomed.kept), dtype=bool)
    steady[: len(whole.kept)] = np.abs(whole.warp - np.eye(2, 3)).max(axis=(1, 2), initial=0) < STEADY
    agreement = np.r_[whole.agreement, zoomed.agreement]
    pair = np.r_[_key(n, wholes, whole.kept), _key(n, parts, zoomed.kept)]
    order = np.argsort(-agreement, kind="stable")
    once = order[np.unique(pair[order], return_index=True)[1]]
    pair, agreement, steady = pair[once], agreement[once], steady[once]
    others = np.setdiff1d(np.r_[_key(n, wholes, whole.alike), _key(n, parts, zoomed.alike)], pair)
    crowded = np.zeros(n, dtype=bool)
    crowded[others // n] = crowded[others % n] = True
    a, b = pair // n, pair % n
    # If nothing else resembles the two, less agreement is enough.
    copies = (agreement >= NEAR) | ~(crowded[a] | crowded[b])
    steps = _steps(pictures, fine, pair, agreement, steady & (copies | (agreement >= LINKED)))
    return Pairs(a, b, agreement, copies & ~steps, steps)


def _key(n: int, pairs: Candidates, chosen: Ints) -> Ints:
    """A number for each of the chosen pairs, in whichever direction it is."""
    a, b = pairs.a[chosen], pairs.b[chosen]
    return np.minimum(a, b) * n + np.maximum(a, b)


def _aligned(pictures: Bytes, fine: Halves, a: Ints, b: Ints, warp: Floats) -> _Aligned:
    """Align pairs of pictures, and keep those whose details agree.

    Args:
        fine: details of the pictures.
    """
    band, kept = alignment.bands(pictures), np.arange(len(a))
    warp, likeness = in_batches(partial(alignment.align, alignment.details(pictures, COARSE)), a, b, warp)
    alike = kept[likeness >= CROWDED]
    kept, warp = _promising(band, a, b, kept, warp, likeness, PROMISING[0])
    warp, likeness = in_batches(partial(alignment.align, fine), a[kept], b[kept], warp)
    kept, warp = _promising(band, a, b, kept, warp, likeness, PROMISING[1])
    (agreement,) = in_batches(partial(alignment.agreement, pictures), a[kept], b[kept], warp)
    agree = agreement >= ALIKE
    return _Aligned(kept[agree], agreement[agree], warp[agree], alike)


def _promising(
    band: NDArray[np.int8], a: Ints, b: Ints, kept: Ints, warp: Floats, likeness: Floats, promising: float
) -> tuple[Ints, Floats]:
    """Those of the kept pairs that may still be copies after an alignment, and their warps."""
    sane = (likeness >= LEAST) & alignment.plausible(warp)
    kept, warp = kept[sane], warp[sane]
    sane = in_batches(partial(alignment.glance, band), a[kept], b[kept], warp)[0] >= promising
    return kept[sane], warp[sane]


def _aligned_parts(pictures: Bytes, pairs: Candidates) -> _Aligned:
    """Align pictures to parts of others, some pairs at a time."""
    none = np.empty(0, dtype=np.int64)
    found, coarse = [_Aligned(none, none.astype(np.float32), _still(0), none)], alignment.details(pictures, COARSE)
    for first in range(0, len(pairs.a), ENLARGED):
        a, b, start = (column[first : first + ENLARGED] for column in pairs)
        (enlarged,) = in_batches(partial(_enlarged, pictures), a, start)
        both = np.concatenate([alignment.details(enlarged, COARSE), coarse[b]])
        number = np.arange(len(a))
        warp, likeness = in_batches(partial(alignment.align, both), number, number + len(a), _still(len(a)))
        kept = np.flatnonzero(likeness >= LEAST_PART)
        (blurred,) = in_batches(partial(_blurred, pictures), b[kept], start[kept])
        left, number = np.concatenate([enlarged[kept], blurred]), np.arange(len(kept))
        aligned = _aligned(left, alignment.details(left, SIDE), number, number + len(kept), warp[kept])
        alike = first + np.flatnonzero(likeness >= CROWDED)
        found.append(_Aligned(first + kept[aligned.kept], aligned.agreement, aligned.warp, alike))
    return _Aligned(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def _enlarged(pictures: Bytes, chosen: Ints, start: Ints) -> tuple[Bytes]:
    """Turned parts of the chosen pictures."""
    weights = np.stack([resampling(SIDE, SIDE, *side) for side in SIDES])
    parts = _resampled(pictures[chosen], weights, start)
    mirrored = np.array([STARTS[index].turn == 1 for index in start], dtype=bool)
    parts[mirrored] = parts[mirrored, :, ::-1]
    return (parts,)


def _blurred(pictures: Bytes, chosen: Ints, start: Ints) -> tuple[Bytes]:
    """The chosen pictures with no more details than a part of another has when it is enlarged."""
    pixels = [round(SIDE * (stop - start)) for start, stop in SIDES]
    weights = np.stack([resampling(few, SIDE) @ resampling(SIDE, few) for few in pixels])
    return (_resampled(pictures[chosen], weights, start),)


def _resampled(pictures: Bytes, weights: Floats, start: Ints) -> Bytes:
    """Apply the weights [sides, SIDE, SIDE] of each part's sides."""
    sides = [[SIDES.index(side) for side in STARTS[index][:2]] for index in start]
    high, wide = np.array(sides, dtype=np.int64).reshape(-1, 2).T
    found: Bytes = (
        (weights[high] @ pictures.astype(np.float32) @ weights[wide].transpose(0, 2, 1)).round().astype(np.uint8)
    )
    return found


def _steps(
    pictures: Bytes, fine: Halves, pair: Ints, agreement: Floats, linked: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which pairs are of one sequence, and no copies.

    Args:
        pair: keys, in order.
        linked: whether they may follow each other; neither is then mirrored, moved or cropped.
    """
    n = len(pictures)
    a, b = pair // n, pair % n

    def agreement_of(one: Ints, other: Ints) -> Floats:
        wanted = np.minimum(one, other) * n + np.maximum(one, other)
        place = np.searchsorted(pair, wanted).clip(max=len(pair) - 1)
        unknown = pair[place] != wanted
        found: Floats = agreement[place]
        one, other = one[unknown], other[unknown]
        warp, _ = in_batches(partial(alignment.align, fine), one, other, _still(len(one)))
        (found[unknown],) = in_batches(partial(alignment.agreement, pictures), one, other, warp)
        return found

    number, link = sequences(n, a[linked], b[linked], agreement[linked], agreement_of)
    steps: NDArray[np.bool_] = (number[a] == number[b]) & (number[a] >= 0)
    steps[steps] = 1 - agreement[steps] > SAME * link[number[a[steps]]]
    return steps


def _still(n: int) -> Floats:
    """Warps that change nothing: [n, 2, 3]."""
    return np.repeat(np.eye(2, 3, dtype=np.float32)[None], n, axis=0)


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
