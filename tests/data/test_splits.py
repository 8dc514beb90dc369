"""Images that belong together end up in one split, with as few moves as possible."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuning.data.splits import SPLITS, in_one_split, number_units

N = 12
groups = st.lists(st.none() | st.sampled_from("abcde"), min_size=N, max_size=N)
pairs = st.lists(st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)), max_size=6)
splits = st.lists(st.sampled_from(SPLITS), min_size=N, max_size=N)


def in_several_splits(splits, unit):
    """For each image, whether its unit is in more than one split."""
    return [len({other for other, same in zip(splits, unit == number, strict=True) if same}) > 1 for number in unit]


@given(groups, pairs)
def test_units_are_what_is_linked(members, links):
    unit = number_units(members, links)
    reach = [{index} for index in range(N)]
    links = links + [(i, j) for i in range(N) for j in range(N) if members[i] is not None and members[i] == members[j]]
    for _ in range(N):
        for i, j in links:
            reach[i] = reach[j] = reach[i] | reach[j]
    assert all((unit[i] == unit[j]) == (j in reach[i]) for i in range(N) for j in range(N) if i in reach[j] or i < j)


@given(groups, pairs, splits, st.permutations(range(N)))
def test_no_unit_is_in_two_splits_afterwards_and_the_order_does_not_matter(members, links, before, order):
    unit = number_units(members, links)
    after = in_one_split(before, unit)
    assert not any(in_several_splits(after, unit))
    assert all(a == b for a, b, apart in zip(before, after, in_several_splits(before, unit), strict=True) if not apart)
    again = in_one_split([before[index] for index in order], unit[list(order)])
    assert again == [after[index] for index in order]
    for number in set(unit.tolist()):
        rows = np.flatnonzero(unit == number)
        most = max(Counter(before[row] for row in rows).values())
        assert sum(before[row] != after[row] for row in rows) == len(rows) - most


def test_in_a_tie_the_test_set_keeps_its_images():
    unit = number_units(["a", "a", "b", "b", "c", "c", "c", None], [])
    before = ["train", "test", "train", "val", "train", "train", "test", "val"]
    assert in_one_split(before, unit) == ["test", "test", "val", "val", "train", "train", "train", "val"]
