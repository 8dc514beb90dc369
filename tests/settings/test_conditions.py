import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.settings.conditions import fits, holds, parents, parents_first, parse_condition

KNOWN = {"backbone", "unfreeze_depth", "optimizer"}


def outside(name: str, value: object) -> str | None:
    """A space in which the backbone is resnet18 alone."""
    return f"must be resnet18, got {value!r}" if name == "backbone" and value != "resnet18" else None


def faults_of(text: str) -> list[str]:
    faults: list[str] = []
    assert fits(parse_condition(text), KNOWN, outside, "when", faults) == (not faults)
    return faults


@pytest.mark.parametrize(
    ("text", "true_at"),
    [
        ("unfreeze_depth > 1", {2, 3, 4, 5}),
        ("unfreeze_depth >= 1", {1, 2, 3, 4, 5}),
        ("unfreeze_depth < 1", {0}),
        ("unfreeze_depth <= 1", {0, 1}),
        ("unfreeze_depth == all", {5}),
        ("unfreeze_depth != 5", {0, 1, 2, 3, 4}),
        ("unfreeze_depth < all", {0, 1, 2, 3, 4}),
        ("unfreeze_depth in [1, 2, all]", {1, 2, 5}),
        ("unfreeze_depth not in [1, 2]", {0, 3, 4, 5}),
        ("not unfreeze_depth > 1", {0, 1}),
        ("unfreeze_depth > 1 and not unfreeze_depth > 3", {2, 3}),
        ("unfreeze_depth == 0 or unfreeze_depth > 3 and unfreeze_depth < 5", {0, 4}),
        ("(unfreeze_depth == 0 or unfreeze_depth > 3)\n  and unfreeze_depth < 5", {0, 4}),
        ("optimizer == sgd and unfreeze_depth > 3.5", {4, 5}),
        ("optimizer == 'adamw' or unfreeze_depth == 3", {3}),
        ("backbone == vgg16.tv_in1k and unfreeze_depth > 3", {4, 5}),  # timm's tags need no quotes
    ],
)
def test_a_condition_holds_where_it_says(text, true_at):
    condition = parse_condition(text)
    values = {"backbone": "vgg16.tv_in1k", "optimizer": "sgd"}
    assert {depth for depth in range(6) if holds(condition, {**values, "unfreeze_depth": depth})} == true_at


def test_without_one_of_its_parents_a_condition_does_not_hold():
    condition = parse_condition("optimizer == sgd or not unfreeze_depth > 1")
    assert parents(condition) == ["optimizer", "unfreeze_depth"]
    assert holds(condition, {"optimizer": "sgd", "unfreeze_depth": 2})
    assert not holds(condition, {"optimizer": "sgd"}) and not holds(condition, {"unfreeze_depth": 0})
    assert holds(None, {}) and parents(None) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("unfreeze_depth >", "can't be parsed: compare parameters with values"),
        ("", "can't be parsed: "),
        ("optimizer == '\\d'", "can't be parsed: "),  # Python warns of the escape
        ("unfreeze_depth", "can't be parsed at `unfreeze_depth`"),
        ("1 < unfreeze_depth", "can't be parsed at `1 < unfreeze_depth`"),
        ("1 < unfreeze_depth < 3", "can't be parsed at `1 < unfreeze_depth < 3`"),
        ("unfreeze_depth in 3", "can't be parsed at `unfreeze_depth in 3`"),
        ("unfreeze_depth in []", "can't be parsed at `unfreeze_depth in []`"),
        ("unfreeze_depth == [1]", "can't be parsed at `[1]`"),
        ("unfreeze_depth == True", "can't be parsed at `True`"),
        ("unfreeze_depth is 3", "can't be parsed at `unfreeze_depth is 3`"),
        ("unfreeze_depth > 1 + 1", "can't be parsed at `1 + 1`"),
        ("__import__('os').system('true') == 1", "can't be parsed at `__import__"),
        ("not " * 300 + "unfreeze_depth > 1", "must be text of at most 1000 characters"),
        (True, "must be text of at most 1000 characters"),
    ],
)
def test_anything_else_is_refused(text, rule):
    with pytest.raises(ValueError) as caught:
        parse_condition(text)
    assert str(caught.value).startswith(rule)


@given(text=st.text(max_size=30) | st.text("unfreeze_depth <>=!in[](),0123'\".\\andort\n", max_size=40))
def test_any_text_is_a_condition_or_a_value_error(text):
    try:
        condition = parse_condition(text)
    except ValueError:
        return
    faults: list[str] = []
    assert parents(condition)
    assert fits(condition, KNOWN, outside, "when", faults) == (not faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "unfreeze_dept > 1",
            "'unfreeze_dept': is neither in parameters nor in fixed; did you mean unfreeze_depth?",
        ),
        (
            "weight_decay > 1",
            "'weight_decay': is neither in parameters nor in fixed; add it to one of them",
        ),
        ("unfreeze_depth > two", "unfreeze_depth is a number, got the text 'two'; write a number"),
        ("unfreeze_depth == two", "unfreeze_depth: must be an integer, got 'two'"),
        ("unfreeze_depth == 6", "unfreeze_depth: must be less than or equal to 5, got 6"),
        ("backbone > resnet18", "backbone is not a number and has no order; use ==, != or in"),
        ("optimizer in [sgd, adam]", "optimizer: must be 'adamw' or 'sgd', got 'adam'"),
        ("backbone == vgg16", "backbone: must be resnet18, got 'vgg16'; use a value in its range"),
    ],
)
def test_a_condition_that_cannot_be_decided_does_not_fit(text, fault):
    assert faults_of(text) == [f"when: {fault}"]


def test_every_comparison_is_checked():
    assert faults_of("optimizer == sgd and not (unfreeze_depth > 1 or backbone in [resnet18])") == []
    assert len(faults_of("optimizer in [adam, sdg] or not (unfreeze_depth == 6 and learning_rate > 1)")) == 4


def test_parameters_follow_their_parents():
    conditions = {"a": parse_condition("b > 1 and c > 1"), "b": parse_condition("c > 1 or fixed > 1"), "c": None}
    faults: list[str] = []
    assert parents_first(conditions, "x", faults) == ["c", "b", "a"] and not faults


def test_each_cycle_is_a_fault_and_what_hangs_on_it_stays():
    texts = {"a": "b > 1", "b": "a > 1", "c": "c > 1", "d": "a > 1 and e > 1", "e": "f > 1"}
    faults: list[str] = []
    order = parents_first({name: parse_condition(text) for name, text in texts.items()}, "x", faults)
    assert order == ["e", "d"] and len(faults) == 2
    assert "x: c needs c: conditions must not form a cycle; delete one `when`" in faults
    assert any("a needs b needs a" in fault or "b needs a needs b" in fault for fault in faults)
