import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.search.stopping import Rungs, compared_value, stop_reason, stratum
from tuning.settings.config import SearchPlan


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
        assert goes_on == (better < max(1, len(seen) // factor))


def test_who_leads_overall_is_kept_though_its_stratum_would_stop_it():
    rungs = Rungs(grace_epochs=1, reduction_factor=3, epochs=9)
    for number, value in enumerate([0.5, 0.6, 0.7, 0.8]):
        rungs.decide(f"h{number}", 1, value, "head")
    assert rungs.decide("a", 1, 0.1, "all").verdict == "continue"
    kept = rungs.decide("b", 1, 0.2, "all")
    assert (kept.verdict, kept.stratum, kept.cutoff) == ("kept", "all", 0.1)
    assert rungs.decide("c", 1, 0.9, "all").verdict == "stop"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10) | st.none() | st.just(math.nan)), max_size=40),
    st.integers(2, 4),
)
def test_strata_stop_no_trial_that_one_stratum_would_not_and_never_the_leader(entries, factor):
    strata, flat = (Rungs(grace_epochs=1, reduction_factor=factor, epochs=9) for _ in range(2))
    best = math.inf
    for number, (kind, value) in enumerate(entries):
        verdict = strata.decide(f"t{number}", 1, value, kind).verdict
        if flat.decide(f"t{number}", 1, value).verdict == "continue":
            assert verdict in ("continue", "kept")
        if value is not None and not math.isnan(value) and value <= best:
            best = value
            assert verdict != "stop"


def test_rungs_read_again_decide_the_same():
    first, again = (Rungs(grace_epochs=1, reduction_factor=3, epochs=9) for _ in range(2))
    for number, value in enumerate([0.5, None, 0.3, 0.4]):
        decision = first.decide(f"t{number}", 1, value, "head")
        again.enter(f"t{number}", decision.rung, decision.stratum, decision.value)
    assert first.decide("new", 1, 0.35, "head") == again.decide("new", 1, 0.35, "head")


@pytest.mark.parametrize(
    ("strata", "depth", "expected"),
    [
        ("none", 2, "all"),
        ("unfrozen", 0, "head"),
        ("unfrozen", 5, "all"),
        ("backbone", 2, "lite0"),
        ("both", 2, "lite0 part"),
    ],
)
def test_strata(strata, depth, expected):
    assert stratum(strata, {"backbone": "lite0", "unfreeze_depth": depth}) == expected


@pytest.mark.parametrize(
    ("losses", "best", "last", "mean"),
    [
        ([0.4], 0.4, 0.4, 0.4),
        ([0.9, 0.3, 0.5], 0.3, 0.5, 0.4),
        ([0.9, None, 0.5], 0.5, 0.5, 0.7),
        ([0.9, None], 0.9, None, None),
        ([None], None, None, None),
    ],
)
def test_what_is_compared(losses, best, last, mean):
    found = [compared_value(losses, compared) for compared in ("best", "last", "mean")]
    assert found == [best, last, pytest.approx(mean)]


@pytest.mark.parametrize(("value", "words"), [(0.5, "0.5"), (0.40001, "0.40001"), (0.4 + 1e-12, "0.400000000001")])
def test_the_reason_shows_in_what_digits_the_values_differ(value, words):
    decision = {"value": value, "cutoff": 0.4, "rung": 2, "stratum": "all"}
    reason = stop_reason(SearchPlan(name="x"), decision)
    assert reason == f"early_loss {words} after epoch 2 is worse than the cut-off 0.4"


def test_head_only_trials_are_compared_with_all_and_stop_no_others():
    """They show more after an epoch than others, and gain less later."""
    head, whole = ({"backbone": "lite0", "unfreeze_depth": depth} for depth in (0, 5))
    rungs = Rungs(grace_epochs=1, reduction_factor=2, epochs=9)

    def verdict(name, value, config):
        return rungs.decide(name, 1, value, stratum("head", config)).verdict

    assert [verdict(f"h{number}", 0.5, head) for number in range(3)] == ["continue"] * 3
    assert verdict("h3", 0.6, head) == "stop"
    assert verdict("a", 0.9, whole) == "continue" and verdict("b", 1.0, whole) == "stop"
    assert verdict("c", 0.4, whole) == "continue" and verdict("h4", 0.55, head) == "stop"
    assert verdict("h5", 0.45, head) == "continue"
