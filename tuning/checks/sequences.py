"""Tell neighbours in a sequence, such as the slices of one scan, from copies of one image.

Copies differ from what they were made of in their own ways. Linked to what they are most like, they form a star, and
any two of them differ by at most the sum of what each differs from its centre. Slices form a chain, along which the
differences add up: those some links apart differ by many times the largest of the links between.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

from tuning.checks.alignment import Floats, Ints

SHORTEST = 4  # images of a sequence
# Links apart, and times the largest of them from which two images show a sequence: more than 2 for three links, which
# noise can make of a star; eight in a row it can't, and in thin slices noise is most of what differs.
APART = ((3, 2.3), (8, 1.6))
FAR = 1.3  # the same if one of the two is replaced by the next towards the other, for one odd copy is no sequence
NONE = 1e-4  # difference of images that agree wholly
SAME = 1 / 3  # of the larger links of a sequence, below which two of its images are copies


class Sequences(NamedTuple):
    """Which images follow each other."""

    number: Ints  # of each image's sequence; -1 if it is in none
    link: Floats  # how far its images differ from the next, for each sequence: the upper quartile


def sequences(n: int, a: Ints, b: Ints, agreement: Floats, agreement_of: Callable[[Ints, Ints], Floats]) -> Sequences:
    """Return the sequences among images.

    Args:
        n: number of images.
        a, b, agreement: pairs that may follow each other.
        agreement_of: measures other pairs.
    """
    if len(a) < SHORTEST - 1:
        return Sequences(np.full(n, -1), np.empty(0, dtype=np.float32))
    parent, length = _trees(n, a, b, np.maximum(1 - agreement, NONE))
    chained = np.zeros(n, dtype=bool)  # to its parent
    for links, farther in APART:
        low, high, before, largest = _apart(parent, length, links)
        for one, other, times in ((low, high, farther), (parent[low], high, FAR), (low, before, FAR)):
            far = np.flatnonzero(largest > 0)
            largest[far[1 - agreement_of(one[far], other[far]) <= times * largest[far]]] = 0
        low = low[largest > 0]
        for _ in range(links):
            chained[low] = True
            low = parent[low]
    child = np.flatnonzero(chained)
    graph = coo_array((length[child], (child, parent[child])), shape=(n, n))
    number = connected_components(graph, directed=False)[1].astype(np.int64)
    number[np.bincount(number)[number] < SHORTEST] = -1
    there, number[number >= 0] = np.unique(number[number >= 0], return_inverse=True)
    larger = [np.quantile(length[child][number[child] == which], 0.75) for which in range(len(there))]
    # A copy of an image of a sequence belongs to it too. Which of the two is in the chain is chance: their differences
    # to others are equal, and which is less depends on rounding.
    differs = 1 - agreement
    for one, other in ((a, b), (b, a)):
        joins = np.flatnonzero((number[one] >= 0) & (number[other] < 0))
        joins = joins[[differs[pair] <= SAME * larger[number[one[pair]]] for pair in joins]]
        number[other[joins]] = number[one[joins]]
    return Sequences(number, np.array(larger, dtype=np.float32))


def _trees(n: int, a: Ints, b: Ints, differs: Floats) -> tuple[Ints, Floats]:
    """Link images to those they are most like, in trees: the parent of each image, or -1, and how far they differ.

    The root of a tree is an end of it: the first image of a chain, or the last.
    """
    graph = minimum_spanning_tree(coo_array((differs, (a, b)), shape=(n, n)).tocsr())
    tree = (graph + graph.T).tocsr()
    component = connected_components(tree, directed=False)[1]
    parent, length = np.full(n, -1), np.zeros(n, dtype=np.float32)
    some, size = np.unique(component, return_index=True)[1], np.bincount(component)
    for image in some[size >= SHORTEST]:
        end = breadth_first_order(tree, image, directed=False, return_predecessors=False)[-1]
        order, before = breadth_first_order(tree, end, directed=False)
        parent[order[1:]] = before[order[1:]]
    links = tree.tocoo()
    up = parent[links.row] == links.col
    length[links.row[up]] = links.data[up]
    return parent, length


def _apart(parent: Ints, length: Floats, links: int) -> tuple[Ints, Ints, Ints, Floats]:
    """Images so many links apart, the last before the second, and the largest of the links between."""
    low = high = before = np.arange(len(parent))
    largest = np.zeros(len(parent), dtype=np.float32)
    for _ in range(links):
        there = parent[high] >= 0
        low, before, largest = low[there], high[there], largest[there]
        largest, high = np.maximum(largest, length[before]), parent[before]
    return low, high, before, largest
