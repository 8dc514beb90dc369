"""Copies of a picture among many: encoded or sized anew, mirrored or turned, brighter or darker, cropped a little.

All chest films look alike, so that a hash or a correlation of small pictures finds hundreds of pairs of other films of
one patient, or of patients in one pose. Here it only proposes candidates. Each is aligned, and then compared
detail by detail: in a copy nearly every part agrees, in a look-alike only what all films have in common.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from tuning.images import parallel_map

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

VERSION = 1  # raised with any change of what is found
SIDE = 64  # of the pictures that are compared, in pixels
NEAR = 0.965  # agreement from which a pair is a copy
ALIKE = 0.9  # and from which it is worth a look, or a copy where nothing else resembles the two
COARSE = 24  # pixels, of a first alignment
LEAST = 0.88  # likeness after an alignment, else a pair is dropped
CROWDED = 0.8  # likeness after the first from which pictures resemble each other
STEPS = 3  # of an alignment
WHITE = 250  # of 255
WINDOW = 12  # pixels
LEAST_WINDOWS = 20  # with details, of some 300
NEIGHBOURS = 8  # candidates of each image
FREQUENCIES = 12  # of the cosine transform, along each side
BLOCK = 256  # images whose neighbours are sought at once
CUT = 0.06  # of the side; where a copy lacks more at one side, it may not be found
CROPS = (  # left, top, right, bottom: parts of an image that others may be copies of
    (0.0, 0.0, 1.0, 1.0),
    (0.025, 0.025, 0.975, 0.975),
    (0.05, 0.05, 0.95, 0.95),
    (CUT, 0.0, 1.0, 1.0),
    (0.0, CUT, 1.0, 1.0),
    (0.0, 0.0, 1 - CUT, 1.0),
    (0.0, 0.0, 1.0, 1 - CUT),
    (CUT, CUT, 1.0, 1.0),
    (0.0, 0.0, 1 - CUT, 1 - CUT),
    (CUT, 0.0, 1.0, 1 - CUT),
    (0.0, CUT, 1 - CUT, 1.0),
)
TURNS = (  # where in the picture x and y of the turned one lie; each second one is the one before, mirrored
    ((1, 0), (0, 1)),
    ((-1, 0), (0, 1)),
    ((1, 0), (0, -1)),
    ((-1, 0), (0, -1)),
    ((0, 1), (1, 0)),
    ((0, 1), (-1, 0)),
    ((0, -1), (1, 0)),
    ((0, -1), (-1, 0)),
)
STARTS = [(crop, turn) for crop in range(len(CROPS)) for turn in (0, 1)] + [(0, turn) for turn in range(2, 8)]


class Pairs(NamedTuple):
    """Pairs of images, each once, `a` before `b`."""

    a: Ints
    b: Ints
    agreement: Floats  # of their details, from ALIKE to 1
    copies: NDArray[np.bool_]  # else look-alikes


def near_duplicates(pictures: Floats) -> Pairs:
    """Pairs whose details agree, each once, with `a` before `b`.

    Args:
        pictures: [n, SIDE, SIDE], grey levels from 0 to 255.
    """
    a, b, warp = _candidates(_details(pictures, SIDE))
    warp, likeness = _in_batches(partial(_align, _details(pictures, COARSE)), a, b, warp)
    alike = np.column_stack([a, b])[likeness >= CROWDED]
    kept = likeness >= LEAST
    a, b, warp = a[kept], b[kept], warp[kept]
    warp, likeness = _in_batches(partial(_align, _details(pictures, SIDE)), a, b, warp)
    kept = (likeness >= LEAST) & _plausible(warp)
    a, b, warp = a[kept], b[kept], warp[kept]
    (agreement,) = _in_batches(partial(_agreement, pictures), a, b, warp)
    kept = agreement >= ALIKE
    a, b, agreement = a[kept], b[kept], agreement[kept]
    # Where nothing else even resembles the two, less is enough.
    others = {pair for pair in map(tuple, alike.tolist())} - set(zip(a.tolist(), b.tolist(), strict=True))
    crowded = np.zeros(len(pictures), dtype=bool)
    crowded[np.array(sorted(others), dtype=np.int64).ravel()] = True
    copies = (agreement >= NEAR) | ~(crowded[a] | crowded[b])
    return Pairs(a, b, agreement, copies)


def _in_batches(function: Callable[..., tuple[Any, ...]], *arrays: NDArray[Any], size: int = 256) -> list[NDArray[Any]]:
    """What a function of rows gives for all of them, computed a few at a time on all cores."""
    batches = [tuple(array[first : first + size] for array in arrays) for first in range(0, len(arrays[0]), size)]
    results = list(parallel_map(lambda batch: function(*batch), batches or [arrays]))
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


# --- Candidates ------------------------------------------------------------------------------------------------------


def _details(pictures: Floats, side: int) -> Floats:
    """Pictures of a smaller side, without their coarse shades, and of equal contrast everywhere."""
    weights = resampling(SIDE, side)

    def details(part: Floats) -> tuple[Floats]:
        small = weights @ part @ weights.T
        band = _blurred(small, max(0.5, side / 64)) - _blurred(small, side / 16)
        local = _blurred(band * band, 3 * side / 32)
        whole = (band * band).mean(axis=(1, 2), keepdims=True)
        return (band / np.sqrt(local + 0.09 * whole + 1e-3),)

    return _in_batches(details, pictures)[0]


def resampling(side: int, wanted: int, start: float = 0.0, stop: float = 1.0) -> Floats:
    """Weights [wanted, side] that average the pixels from `start` to `stop` (parts of the side) into `wanted` ones."""
    edges = np.linspace(start * side, stop * side, wanted + 1)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = overlap.clip(0)
    found: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def _blurred(pictures: Floats, sigma: float) -> Floats:
    found: Floats = ndimage.gaussian_filter(pictures, (0, sigma, sigma), mode="nearest", truncate=2.5)
    return found


def _candidates(details: Floats) -> tuple[Ints, Ints, Floats]:
    """For each image those most like some turned crop of it, and the warp that lays them over each other.

    Likeness is that of the lowest frequencies, each divided by its spread over all images, so that what all have in
    common counts little. A mirrored picture differs only in the sign of its odd frequencies: one product gives both.
    """
    n = len(details)
    spectra = _spectra(details)  # [crops, n, FREQUENCIES, FREQUENCIES]
    even, odd = spectra[0][:, :, 0::2].reshape(n, -1), spectra[0][:, :, 1::2].reshape(n, -1)
    wanted = min(NEIGHBOURS, n - 1)
    neighbours = np.empty((n, wanted), dtype=np.int64)
    for first in range(0, n, BLOCK):
        best = np.full((min(BLOCK, n - first), n), -np.inf, dtype=np.float32)
        for crop, turn in STARTS:
            if turn % 2 == 0:
                query = _turned(spectra[crop][first : first + BLOCK], turn)
                mirrored = query[:, :, 1::2].reshape(len(best), -1) @ odd.T
                np.abs(mirrored, out=mirrored)
                mirrored += query[:, :, 0::2].reshape(len(best), -1) @ even.T
                np.maximum(best, mirrored, out=best)
        best[np.arange(len(best)), np.arange(first, first + len(best))] = -np.inf
        neighbours[first : first + BLOCK] = np.argpartition(best, n - wanted, axis=1)[:, n - wanted :]
    a, b = np.repeat(np.arange(n), wanted), neighbours.ravel()
    start, likeness = _in_batches(partial(_best_start, spectra), a, b, size=4096)
    # Of the two ways round a pair the better one.
    order = np.lexsort((-likeness, np.maximum(a, b), np.minimum(a, b)))
    a, b, start = a[order], b[order], start[order]
    pair = np.minimum(a, b) * n + np.maximum(a, b)
    once = np.unique(pair, return_index=True)[1]
    return a[once], b[once], _warps()[start[once]]


def _spectra(details: Floats) -> Floats:
    spectra = np.empty((len(CROPS), len(details), FREQUENCIES, FREQUENCIES), dtype=np.float32)
    for number, (left, top, right, bottom) in enumerate(CROPS):
        across, down = resampling(SIDE, SIDE, left, right), resampling(SIDE, SIDE, top, bottom)

        def spectrum(part: Floats, across: Floats = across, down: Floats = down) -> tuple[Floats]:
            whole = fft.dctn(down @ part @ across.T, axes=(1, 2), norm="ortho")
            return (whole[:, :FREQUENCIES, :FREQUENCIES],)

        spectra[number] = _in_batches(spectrum, details)[0]
    spectra /= spectra[0].std(axis=0) + 1e-3
    spectra[:, :, 0, 0] = 0
    spectra /= np.sqrt((spectra**2).sum(axis=(2, 3), keepdims=True)) + 1e-6
    return spectra


def _turned(spectra: Floats, turn: int) -> Floats:
    """Spectra of the turned pictures."""
    matrix = np.array(TURNS[turn])
    x_sign, y_sign = matrix.sum(axis=1)
    odd = np.arange(FREQUENCIES) % 2
    signed = spectra * (y_sign**odd)[:, None].astype(np.float32) * (x_sign**odd).astype(np.float32)
    return signed if matrix[0, 0] else signed.transpose(0, 2, 1)


def _best_start(spectra: Floats, a: Ints, b: Ints) -> tuple[Ints, Floats]:
    scores = np.stack(
        [np.einsum("pij,pij->p", _turned(spectra[crop][a], turn), spectra[0][b]) for crop, turn in STARTS]
    )
    best = scores.argmax(axis=0)
    return best, scores[best, np.arange(len(a))]


def _warps() -> Floats:
    """For each of `STARTS` the matrix [2, 3] from places in the turned crop to those in the picture, from -1 to 1."""
    warps = np.zeros((len(STARTS), 2, 3), dtype=np.float32)
    for warp, (crop, turn) in zip(warps, STARTS, strict=True):
        left, top, right, bottom = CROPS[crop]
        warp[:, :2] = np.diag([right - left, bottom - top]) @ np.array(TURNS[turn])
        warp[:, 2] = left + right - 1, top + bottom - 1
    return warps


# --- Alignment -------------------------------------------------------------------------------------------------------


def _grid(side: int) -> Floats:
    """x, y and 1 of each pixel's middle, from -1 to 1: [3, side * side]."""
    middles = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    y, x = np.meshgrid(middles, middles, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), np.ones(side * side, dtype=np.float32)])


def _margin(side: int) -> int:
    return round(side * 6 / SIDE)  # pixels whose details the frame has shaped


def _align(details: Floats, a: Ints, b: Ints, warp: Floats) -> tuple[Floats, Floats]:
    """Better affine warps from the places in `b` to those in `a`, and the correlation of their details under them.

    Gauss-Newton steps, inverse compositional: Baker and Matthews 2004, Lucas-Kanade 20 years on.
    """
    side = details.shape[1]
    grid, margin = _grid(side), _margin(side)
    inner = np.zeros((side, side), dtype=bool)
    inner[margin:-margin, margin:-margin] = True
    fixed = details[b].reshape(len(b), -1)
    down, across = (
        slope.reshape(len(b), -1) * np.float32(side / 2) * inner.ravel()
        for slope in np.gradient(details[b], axis=(1, 2))
    )
    slopes = np.stack(
        [*(across * part for part in grid), *(down * part for part in grid)], axis=1
    )  # [pairs, 6, pixels]
    hessian = slopes @ slopes.transpose(0, 2, 1)
    ridge = np.trace(hessian, axis1=1, axis2=2)[:, None, None] * np.eye(6, dtype=np.float32)
    inverse = np.linalg.inv(hessian + 2e-4 * ridge + 1e-3 * np.eye(6, dtype=np.float32))
    scale = np.sqrt((fixed**2).mean(axis=1, keepdims=True))
    step = np.zeros((len(b), 3, 3), dtype=np.float32)
    for _ in range(STEPS):
        moved, valid = _sampled(details, a, warp, grid, margin)
        moved, goal = _normal(moved, valid & inner.ravel()), _normal(fixed, valid & inner.ravel())
        found = (inverse @ (slopes @ ((moved - goal) * scale)[:, :, None]))[:, :, 0].clip(-0.1, 0.1)
        step[:] = np.eye(3)
        step[:, :2] += found.reshape(-1, 2, 3)
        warp = (warp @ np.linalg.inv(step)).astype(np.float32)
    moved, valid = _sampled(details, a, warp, grid, margin)
    valid &= inner.ravel()
    likeness = (_normal(moved, valid) * _normal(fixed, valid)).sum(axis=1) / valid.sum(axis=1).clip(1)
    return warp, likeness


def _sampled(
    details: Floats, chosen: Ints, warp: Floats, grid: Floats, margin: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Values of the chosen pictures where a warp puts the pixels, and which pixels it puts inside their margin."""
    side = details.shape[1]
    x, y = np.moveaxis((warp @ grid + 1) * np.float32(side / 2) - np.float32(0.5), 1, 0)
    valid = (x >= margin) & (x <= side - 1 - margin) & (y >= margin) & (y <= side - 1 - margin)
    x, y = x.clip(0, side - 1.001), y.clip(0, side - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    x -= left
    y -= top
    corner = chosen[:, None] * side**2 + top * side + left
    flat = details.reshape(-1)
    upper = flat[corner] * (1 - x) + flat[corner + 1] * x
    lower = flat[corner + side] * (1 - x) + flat[corner + side + 1] * x
    return upper + y * (lower - upper), valid


def _normal(values: Floats, valid: NDArray[np.bool_]) -> Floats:
    """Values less their mean over the valid ones, by their spread; 0 elsewhere."""
    weight = valid.astype(np.float32)
    count = weight.sum(axis=1, keepdims=True).clip(1)
    values = (values - (values * weight).sum(axis=1, keepdims=True) / count) * weight
    return values / (np.sqrt((values**2).sum(axis=1, keepdims=True) / count) + 1e-6)


def _plausible(warp: Floats) -> NDArray[np.bool_]:
    """Whether warps are those of a copy: hardly skewed, by at most a quarter larger or smaller, mostly overlapping."""
    sizes = np.linalg.svd(warp[:, :, :2], compute_uv=False)
    return (sizes > 0.75).all(axis=1) & (sizes < 1.33).all(axis=1) & (np.abs(warp[:, :, 2]) < 0.4).all(axis=1)


# --- Agreement -------------------------------------------------------------------------------------------------------


def _agreement(pictures: Floats, a: Ints, b: Ints, warp: Floats) -> tuple[Floats]:
    """Median correlation of the details in small windows of an aligned pair.

    A median, since a copy may have a letter or an arrow drawn on it; windows without details say nothing. Pixels that
    are white in only one of the two were blown out when it was made brighter.
    """
    x, y = np.moveaxis((warp @ _grid(SIDE) + 1) * (SIDE / 2) - 0.5, 1, 0)
    moved = np.empty((len(a), SIDE, SIDE), dtype=np.float32)
    for picture, chosen, across, down in zip(moved, a, x, y, strict=True):
        ndimage.map_coordinates(pictures[chosen], [down, across], picture.reshape(-1), order=3, mode="nearest")
    fixed = pictures[b]
    valid = ((x >= 0) & (x <= SIDE - 1) & (y >= 0) & (y <= SIDE - 1)).reshape(moved.shape)
    blown = ndimage.maximum_filter((moved >= WHITE) != (fixed >= WHITE), (1, 3, 3))
    weight = (ndimage.minimum_filter(valid, (1, 3, 3), mode="constant") & ~blown).astype(np.float32)
    moved, fixed = (_band(picture, weight) for picture in (moved, fixed))

    def over(values: Floats) -> Floats:
        sums = ndimage.uniform_filter(values * weight, (0, WINDOW, WINDOW), mode="constant")
        found: Floats = sums[:, WINDOW // 2 : -WINDOW // 2 : 3, WINDOW // 2 : -WINDOW // 2 : 3].reshape(len(a), -1)
        return found

    count = over(np.ones_like(moved)) + 1e-6
    mean_moved, mean_fixed = over(moved) / count, over(fixed) / count
    var_moved, var_fixed = over(moved**2) / count - mean_moved**2, over(fixed**2) / count - mean_fixed**2
    correlation = (over(moved * fixed) / count - mean_moved * mean_fixed) / np.sqrt(
        (var_moved + 1e-6) * (var_fixed + 1e-6)
    )
    telling = count > 0.5
    for var in (var_moved, var_fixed):
        telling &= var > 0.1 * (var * count).sum(axis=1, keepdims=True) / count.sum(axis=1, keepdims=True)
    few = telling.sum(axis=1) < LEAST_WINDOWS
    correlation[~telling | few[:, None]] = np.nan
    correlation[few] = 0.0
    return (np.nanmedian(correlation, axis=1).astype(np.float32),)


def _band(pictures: Floats, weight: Floats) -> Floats:
    """Details between 0.7 and 2 pixels, of weighted pixels alone."""
    fine, coarse = (_blurred(pictures * weight, sigma) / (_blurred(weight, sigma) + 1e-3) for sigma in (0.7, 2.0))
    return (fine - coarse) * weight
