"""What belongs together ends in one split, with as few moves as that takes."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuning.checks.leaks import SPLITS, brought_together, torn, units

N = 12
groups = st.lists(st.none() | st.sampled_from("abcde"), min_size=N, max_size=N)
pairs = st.lists(st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)), max_size=6)
splits = st.lists(st.sampled_from(SPLITS), min_size=N, max_size=N)


def together(members, links):
    return units(members, np.array(links, dtype=np.int64).reshape(-1, 2))


@given(groups, pairs)
def test_units_are_what_hangs_together(members, links):
    unit = together(members, links)
    reach = [{index} for index in range(N)]
    links = links + [(i, j) for i in range(N) for j in range(N) if members[i] is not None and members[i] == members[j]]
    for _ in range(N):
        for i, j in links:
            reach[i] = reach[j] = reach[i] | reach[j]
    assert all((unit[i] == unit[j]) == (j in reach[i]) for i in range(N) for j in range(N) if i in reach[j] or i < j)


@given(groups, pairs, splits, st.permutations(range(N)))
def test_no_unit_is_in_two_splits_afterwards_and_the_order_does_not_matter(members, links, before, order):
    unit = together(members, links)
    after = brought_together(before, unit)
    assert not torn(after, unit).any()
    assert all(a == b for a, b, apart in zip(before, after, torn(before, unit), strict=True) if not apart)
    again = brought_together([before[index] for index in order], unit[list(order)])
    assert again == [after[index] for index in order]
    for number in set(unit.tolist()):
        rows = np.flatnonzero(unit == number)
        most = max(Counter(before[row] for row in rows).values())
        assert sum(before[row] != after[row] for row in rows) == len(rows) - most


def test_of_equals_the_test_set_keeps_its_images():
    unit = together(["a", "a", "b", "b", "c", "c", "c", None], [])
    before = ["train", "test", "train", "val", "train", "train", "test", "val"]
    assert brought_together(before, unit) == ["test", "test", "val", "val", "train", "train", "train", "val"]
