import math

from hypothesis import given
from hypothesis import strategies as st

from tuning.stopping import Rungs


def test_rungs_grow_by_the_reduction_factor_and_end_before_the_last_epoch():
    assert Rungs(grace_epochs=1, reduction_factor=3, epochs=9).rungs == [1, 3]
    assert Rungs(grace_epochs=2, reduction_factor=3, epochs=9).rungs == [2, 6]
    assert Rungs(grace_epochs=4, reduction_factor=2, epochs=4).rungs == []


def test_nothing_is_decided_between_rungs():
    assert Rungs(grace_epochs=2, reduction_factor=3, epochs=9).decide("a", 1, 0.5) is None


def test_the_worse_of_two_stops():
    rungs = Rungs(grace_epochs=1, reduction_factor=3, epochs=9)
    assert rungs.decide("a", 1, 0.5).verdict == "continue"
    decision = rungs.decide("b", 1, 0.6)
    assert (decision.verdict, decision.value, decision.cutoff) == ("stop", 0.6, 0.5)
    assert rungs.decide("c", 1, 0.4).verdict == "continue"


def test_a_missing_value_is_worse_than_any():
    rungs = Rungs(grace_epochs=1, reduction_factor=3, epochs=9)
    assert rungs.decide("a", 1, 5.0).verdict == "continue"
    assert rungs.decide("b", 1, None).verdict == "stop"
    assert rungs.decide("c", 1, 6.0).verdict == "stop"


def test_a_trial_that_comes_again_is_judged_by_its_latest_value():
    rungs = Rungs(grace_epochs=1, reduction_factor=3, epochs=9)
    rungs.decide("a", 1, 0.1)
    rungs.decide("a", 1, 0.9)
    assert rungs.decide("b", 1, 0.5).verdict == "continue"


def test_strata_are_judged_apart():
    rungs = Rungs(grace_epochs=1, reduction_factor=3, epochs=9)
    rungs.decide("a", 1, 0.1, "head")
    assert rungs.decide("b", 1, 0.9, "all").verdict == "continue"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(2, 5))
def test_whoever_is_among_the_best_share_goes_on(values, factor):
    rungs = Rungs(grace_epochs=1, reduction_factor=factor, epochs=9)
    seen: list[float] = []
    for number, value in enumerate(values):
        seen.append(value)
        goes_on = rungs.decide(f"t{number}", 1, value).verdict == "continue"
        better = sum(other < value for other in seen)
        assert goes_on == (better < math.ceil(len(seen) / factor))
