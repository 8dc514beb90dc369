"""Find the pairs of pictures that may be copies, whole or cropped, by their lowest frequencies.

Likeness is the correlation of the frequencies, each divided by its standard deviation over all pictures, so that what
all have in common counts little. Few frequencies of few parts of each picture are compared with all other pictures, and
more frequencies of more parts with those that are most like it.
"""

import itertools
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from tuning.checks.alignment import SIDE, Floats, Halves, Ints, in_batches, resampling

NEIGHBOURS = 8  # candidates of each picture
ZOOMS = 4  # more of them, for a part of it
ALIKE, GAIN = 0.6, 0.1  # likeness from which a part is one, and how much more it is than that of the whole
SHORTLIST = 128
BLOCK = 512  # pictures that are compared with a batch at once: 0.25 MB, which a core's cache holds
FREQUENCIES, FEW = 12, 8  # of the cosine transform, along each side
CUT = 0.05  # of the side; copies cropped by up to this at any side are found first
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


Side: TypeAlias = tuple[float, float]  # of a picture, from where to where


def _along(width: float, places: int) -> list[Side]:
    """Parts of a side."""
    return [(start, start + width) for start in np.linspace(0, 1 - width, places).round(4).tolist()]


WHOLE = (0.0, 1.0)
LITTLE = [WHOLE, (CUT, 1.0), (0.0, 1 - CUT), (CUT, 1 - CUT)]  # of what is cropped a little, if at all
ENDS = [side for width in (0.86, 0.78, 0.7) for side in _along(width, 2)]
SQUARES = [_along(width, places) for width, places in ((0.92, 2), (0.84, 3), (0.75, 5), (0.67, 5), (0.6, 5))]
# Parts of a picture are all that have one of the heights and one of the widths.
PARTS = [*((square, square) for square in SQUARES), (ENDS, [WHOLE]), ([WHOLE], ENDS)]


class Start(NamedTuple):
    """A turned part of a picture."""

    high: Side
    wide: Side
    turn: int  # of `TURNS`


_LITTLE = [Start(high, wide, 0) for high, wide in itertools.product(LITTLE, LITTLE)]
_TURNED = [Start(WHOLE, WHOLE, turn) for turn in range(2, len(TURNS))]
_PARTS = [Start(high, wide, 0) for sides in PARTS for high, wide in itertools.product(*sides)]
TRIED = [*_LITTLE, *_TURNED, *_PARTS]
WHOLES = [*_LITTLE, *(start._replace(turn=1) for start in _LITTLE), *_TURNED]
STARTS = [*WHOLES, *_PARTS, *(start._replace(turn=1) for start in _PARTS)]
_FIRST = [
    *(Start(WHOLE, WHOLE, turn) for turn in range(0, len(TURNS), 2)),
    *_LITTLE[1:],
    *(
        Start(high, wide, 0)
        for square, step in zip(SQUARES[1:], (2, 2, 4, 2), strict=True)
        for high, wide in itertools.product(square[::step], repeat=2)
    ),
    *(start for end in ENDS[2:4] for start in (Start(end, WHOLE, 0), Start(WHOLE, end, 0))),
]
FIRST = [TRIED.index(start) for start in _FIRST]  # compared with all pictures, as they are and mirrored


class Candidates(NamedTuple):
    """Pairs of pictures, `b` most like a turned part of `a`."""

    a: Ints
    b: Ints
    start: Ints  # of `STARTS`


def candidates(shapes: Halves) -> tuple[Candidates, Candidates]:
    """Return for each picture those most like it, and those most like a part of it.

    Args:
        shapes: [n, SIDE, SIDE], details of the pictures.
    """
    n = len(shapes)
    (spectra,) = in_batches(lambda some: (_spectra(some, [WHOLE], [WHOLE])[:, 0],), shapes)
    spread = spectra.std(axis=0) + 1e-3
    spectra /= spread
    few = _of_length_one(spectra[:, :FEW, :FEW])
    even, odd = (few[:, :, first::2].reshape(n, -1) for first in (0, 1))
    sought = partial(_neighbours, _of_length_one(spectra), even, odd, spread, shapes)
    b, start, likeness = (values.ravel() for values in in_batches(sought, np.arange(n)))
    a = np.repeat(np.arange(n), len(b) // n)
    zoomed = start >= len(WHOLES)
    return _once(n, a, b, start, likeness, ~zoomed), _once(n, a, b, start, likeness, zoomed & (likeness >= ALIKE))


def _once(n: int, a: Ints, b: Ints, start: Ints, likeness: Floats, chosen: NDArray[np.bool_]) -> Candidates:
    """Of the two directions of a pair the better one."""
    order = np.flatnonzero(chosen)[np.argsort(-likeness[chosen], kind="stable")]
    pair = np.minimum(a, b) * n + np.maximum(a, b)
    once = order[np.unique(pair[order], return_index=True)[1]]
    return Candidates(a[once], b[once], start[once])


def _neighbours(
    spectra: Floats, even: Floats, odd: Floats, spread: Floats, shapes: Halves, chosen: Ints
) -> tuple[Ints, Ints, Floats]:
    """For each of the chosen pictures its candidates, the index of its part, and how alike they are."""
    n = len(spectra)
    tried = _started(shapes[chosen]) / spread
    likeness = _likeness(_of_length_one(tried[:, FIRST, :FEW, :FEW]), even, odd)
    likeness[np.arange(len(chosen)), chosen] = -np.inf
    wanted = min(SHORTLIST, n - 1)
    found = np.argpartition(likeness, n - wanted, axis=1)[:, n - wanted :]
    scores = _scores(_of_length_one(tried), spectra[found])
    whole, part = scores[:, : len(WHOLES)], scores[:, len(WHOLES) :]
    likeness, gained = whole.max(axis=1), part.max(axis=1)
    gained[gained < likeness + GAIN] = -np.inf
    results = []
    for values, best, most, first in ((whole, likeness, NEIGHBOURS, 0), (part, gained, ZOOMS, len(WHOLES))):
        order = np.argsort(-best, axis=1)[:, :most]
        start = np.take_along_axis(values, order[:, None], axis=2).argmax(axis=1) + first
        results.append([np.take_along_axis(found, order, axis=1), start, np.take_along_axis(best, order, axis=1)])
    b, start, score = (np.concatenate(columns, axis=1) for columns in zip(*results, strict=True))
    return b, start, score


def _likeness(tried: Floats, even: Floats, odd: Floats) -> Floats:
    """How alike each picture is to the most similar of the parts `FIRST` of others: [chosen, n].

    A mirrored picture differs only in the sign of its odd frequencies: one product gives both.
    """
    queries = [tried[..., first::2].reshape(*tried.shape[:2], -1).transpose(1, 0, 2).copy() for first in (0, 1)]
    best = np.full((len(tried), len(even)), -np.inf, dtype=np.float32)
    for first in range(0, len(even), BLOCK):
        highest = best[:, first : first + BLOCK]
        columns = [np.ascontiguousarray(values[first : first + BLOCK].T) for values in (even, odd)]
        likeness, mirrored = np.empty((2, *highest.shape), dtype=np.float32)
        for same, other in zip(*queries, strict=True):
            np.matmul(same, columns[0], out=likeness)
            np.abs(np.matmul(other, columns[1], out=mirrored), out=mirrored)
            likeness += mirrored
            np.maximum(highest, likeness, out=highest)
    return best


def _scores(tried: Floats, near: Floats) -> Floats:
    """How alike pictures are to all `STARTS` of others, plain and mirrored: [chosen, starts, near]."""
    even, odd = (
        tried[..., first::2].reshape(*tried.shape[:2], -1)
        @ near[..., first::2].reshape(*near.shape[:2], -1).transpose(0, 2, 1)
        for first in (0, 1)
    )
    plain, mirrored = even + odd, even - odd
    little, parts = len(_LITTLE), len(_LITTLE) + len(_TURNED)
    return np.concatenate([plain[:, :little], mirrored[:, :little], plain[:, little:], mirrored[:, parts:]], axis=1)


def _started(shapes: Halves) -> Floats:
    """Spectra of all `TRIED`: [n, tried, high, wide]."""
    little, parts = _spectra(shapes, LITTLE, LITTLE), [_spectra(shapes, *sides) for sides in PARTS]
    turned = [_turned(little[:, :1], turn) for turn in range(2, len(TURNS))]
    return np.concatenate([little, *turned, *parts], axis=1)


def _spectra(shapes: Halves, highs: list[Side], wides: list[Side]) -> Floats:
    """The lowest frequencies of parts, without the mean: [n, parts, high, wide]."""
    cosines = fft.dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho")[:FREQUENCIES]
    down, across = (
        np.concatenate([cosines @ resampling(SIDE, SIDE, *side) for side in sides]) for sides in (highs, wides)
    )
    low = down @ (shapes.astype(np.float32).reshape(-1, SIDE) @ across.T).reshape(-1, SIDE, len(across))
    parts = low.reshape(-1, len(highs), FREQUENCIES, len(wides), FREQUENCIES).transpose(0, 1, 3, 2, 4)
    found: Floats = parts.reshape(len(shapes), -1, FREQUENCIES, FREQUENCIES)
    found[..., 0, 0] = 0
    return found


def _of_length_one(spectra: Floats) -> Floats:
    found: Floats = spectra / (np.sqrt((spectra**2).sum(axis=(-2, -1), keepdims=True)) + 1e-6)
    return found


def _turned(spectra: Floats, turn: int) -> Floats:
    """Spectra of the turned pictures."""
    matrix = np.array(TURNS[turn])
    x_sign, y_sign = matrix.sum(axis=1)
    odd = np.arange(spectra.shape[-1]) % 2
    signed = spectra * (y_sign**odd)[:, None].astype(np.float32) * (x_sign**odd).astype(np.float32)
    turned: Floats = signed if matrix[0, 0] else signed.swapaxes(-1, -2)
    return turned


def warps() -> Floats:
    """Return for each of `STARTS` the matrix [2, 3] from points in the turned part to the picture, from -1 to 1."""
    found = np.zeros((len(STARTS), 2, 3), dtype=np.float32)
    for warp, ((top, bottom), (left, right), turn) in zip(found, STARTS, strict=True):
        warp[:, :2] = np.diag([right - left, bottom - top]) @ np.array(TURNS[turn])
        warp[:, 2] = left + right - 1, top + bottom - 1
    return found
