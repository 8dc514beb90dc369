"""Policies of one's own in a space file, on the command line, and in what a search writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.settings.augmentation import POLICIES, STRENGTHS, strengths, written
from tuning.settings.config import TrialConfig, check_value
from tuning.settings.space_file import InputError, parse

SPACE = {
    "parameters": {
        "augmentation": {
            "type": "categorical",
            "choices": ["none", "light", "medium flip=0", {"name": "mine", "rotate": 7, "flip": 0}],
        }
    },
    "fixed": {"backbone": "test_resnet"},
    "start": [{"augmentation": {"name": "mine", "rotate": 7, "flip": 0}}],
}


def test_choices_are_words_strengths_and_mappings():
    space = parse(SPACE, "space")
    assert space.parameters["augmentation"].choices == ("none", "light", "medium flip=0", "mine: rotate=7 flip=0")
    assert space.start[0]["augmentation"] == "mine: rotate=7 flip=0"
    assert strengths("medium flip=0") == POLICIES["medium"] | {"flip": 0.0}
    assert strengths("mine: rotate=7 flip=0") == {"rotate": 7.0, "flip": 0.0}
    again = parse(space.document, "plan.yaml")
    assert again.parameters == space.parameters and again.start == space.start


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "mediun",
            "or strengths such as `medium flip=0`, got 'mediun'; did you mean medium?",
        ),
        ({"rotat": 7}, "has no strength 'rotat': use flip, rotate"),
        ("light rotate=200", "rotate: must be a number from 0 to 180, got '200'"),
        ({"flip": 2}, "flip: must be a number from 0 to 1, got 2"),
        ({"flip": True}, "flip: must be a number from 0 to 1, got True"),
        ("light medium", "must be none, light, medium, strong, or strengths such as"),
        ("flip=1 light", "must be none, light, medium, strong, or strengths such as"),
        ("flip=1 flip=0", "must give each strength once"),
        ("", "must be none, light, medium, strong, or strengths such as"),
        ({"name": "light", "flip": 0}, "name: must be a word of letters"),
        ({"name": "x"}, "must give strengths (flip, rotate"),
        (["light"], "must be none, light, medium, strong, or a mapping of strengths"),
    ],
)
def test_a_wrong_policy_is_one_clear_error(value, said):
    with pytest.raises(ValueError) as error:
        check_value(TrialConfig, "augmentation", value)
    assert said in str(error.value)
    document = {**SPACE, "start": [], "parameters": {"augmentation": {"type": "categorical", "choices": [value]}}}
    with pytest.raises(InputError, match=r"space: parameters.augmentation.choices\[0\]"):
        parse(document, "space")


def test_the_command_line_takes_a_text_or_yaml():
    assert check_value(TrialConfig, "augmentation", "medium flip=0", text=True) == "medium flip=0"
    assert check_value(TrialConfig, "augmentation", "{base: light, rotate: 9}", text=True) == "light rotate=9"


@given(
    st.dictionaries(st.sampled_from(sorted(STRENGTHS)), st.floats(0, 0.5), min_size=1),
    st.none() | st.sampled_from(sorted(POLICIES)),
    st.none() | st.just("mine"),
)
def test_what_is_written_means_what_was_given(given_strengths, base, name):
    named = {"base": base, "name": name}
    text = written(given_strengths | {key: value for key, value in named.items() if value is not None})
    wanted = (POLICIES[base] if base else {}) | given_strengths
    assert strengths(text) == pytest.approx(wanted, rel=1e-4, abs=1e-9) and written(text) == text
