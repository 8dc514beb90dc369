"""Images that belong together, as one patient's or as copies of each other, and where they lie in several splits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SPLITS = ("test", "val", "train")  # of equals, the first keeps a unit: what is tested on never shrinks by a tie


def units(groups: Sequence[str | None], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers from 0 that are the same for images of one group, for copies, and for all that hang together by them.

    Args:
        groups: of each image; None where it has none.
        pairs: [m, 2], indices of images that are copies of each other.
    """
    first: dict[str, int] = {}
    same = [(index, first.setdefault(group, index)) for index, group in enumerate(groups) if group is not None]
    edges = np.array([*same, *pairs.tolist()], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(groups), len(groups)))
    found: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


def torn(splits: Sequence[str], unit: NDArray[np.int64]) -> NDArray[np.bool_]:
    """For each image, whether its unit is in more than one split."""
    counts = _counts(splits, unit)
    lies: NDArray[np.bool_] = ((counts > 0).sum(axis=1) > 1)[unit]
    return lies


def brought_together(splits: Sequence[str], unit: NDArray[np.int64]) -> list[str]:
    """Splits with each unit in the one that holds most of its images, so that few move; see `SPLITS` for ties."""
    home = _counts(splits, unit).argmax(axis=1)
    return [SPLITS[index] for index in home[unit]]


def _counts(splits: Sequence[str], unit: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images of each unit in each of `SPLITS`."""
    counts = np.zeros((int(unit.max(initial=-1)) + 1, len(SPLITS)), dtype=np.int64)
    np.add.at(counts, (unit, np.array([SPLITS.index(split) for split in splits], dtype=np.int64)), 1)
    return counts
