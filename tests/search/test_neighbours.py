import math

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spaces import suggested

from tuning.search import neighbours
from tuning.search.neighbours import APART, LEAST_KNOWN, near_best
from tuning.search.optimizer import Optimizer
from tuning.settings.space import suggest
from tuning.settings.space_file import parse

SPACE = parse(
    {
        "parameters": {
            "backbone": {"type": "categorical", "choices": ["resnet18", "vgg16", "densenet121"]},
            "unfreeze_depth": {"type": "int", "low": 0, "high": 5},
            "image_size": {"type": "categorical", "choices": [64, 224, 128]},
            "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
            "head_dropout": {"type": "float", "low": 0.0, "high": 0.3, "step": 0.1},
            "batch_size": {"type": "int", "low": 4, "high": 64, "log": True},
            "stage_lr_decay": {"type": "float", "low": 0.3, "high": 1.0, "when": "unfreeze_depth > 1"},
        }
    },
    "test",
)
SIZES = {"image_size": {"type": "int", "low": 32, "high": 320, "step": 32}}
ONE = parse({"parameters": SIZES, "fixed": {"backbone": "test_resnet", "unfreeze_depth": 0}}, "one")
NONE = parse({"parameters": {}, "fixed": {"backbone": "test_resnet", "unfreeze_depth": 0}}, "none")


def drawn(count, seed=0, space=SPACE):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [suggest(space, study.ask()) for _ in range(count)]


def distance(params):
    """From the best of the space."""
    apart = abs(math.log10(params["learning_rate"]) + 3) + abs(params["unfreeze_depth"] - 2) / 2
    return apart + (params["backbone"] != "vgg16") + abs(params["head_dropout"] - 0.2)


@given(st.integers(0, 10_000), st.integers(LEAST_KNOWN, 30))
def test_a_neighbour_lies_in_the_space_and_is_unlike_all_tried(seed, count):
    tried = drawn(count, seed)
    found = near_best(SPACE, [(distance(each), each) for each in tried], tried, np.random.default_rng(seed))
    assert found is not None
    whole = {"stage_lr_decay": 0.5} | found  # what a change makes active is left to the sampler
    assert suggested(SPACE, **whole).items() >= found.items()
    codes = neighbours._codes(SPACE, [found, *tried])
    assert np.abs(codes[1:] - codes[0]).max(axis=1).min() >= APART


def test_some_parameters_are_those_of_one_of_the_best_and_the_forest_chooses_well():
    tried = drawn(40)
    known = sorted([(distance(each), each) for each in tried], key=lambda each: each[0])
    found = [near_best(SPACE, known, tried, np.random.default_rng(seed)) for seed in range(60)]
    assert len({str(sorted(each.items())) for each in found}) > 30
    for each in found:
        kept = [sum(each.get(name) == value for name, value in params.items()) for _, params in known[:3]]
        assert max(kept) >= 1
    changed = [neighbours._changed(SPACE, known[seed % 3][1], np.random.default_rng(seed)) for seed in range(60)]
    assert np.median([distance(each) for each in found]) < np.median([distance(each) for each in changed])


def test_the_order_of_what_is_known_does_not_matter():
    tried = drawn(20)
    known = [(round(distance(each)), each) for each in tried]  # with ties
    found = [near_best(SPACE, each, tried, np.random.default_rng(0)) for each in (known, known[::-1])]
    assert found[0] == found[1]


def test_with_few_known_or_all_tried_there_is_none():
    tried = drawn(LEAST_KNOWN - 1)
    assert near_best(SPACE, [(0.0, each) for each in tried], tried, np.random.default_rng(0)) is None
    every = [{"image_size": size} for size in range(32, 321, 32)]
    known = [(each["image_size"] / 100, each) for each in every]
    assert near_best(ONE, known[4:], every[4:], np.random.default_rng(0)) is None
    assert near_best(ONE, [*known[:2], *known[3:]], every[:2] + every[3:], np.random.default_rng(0)) == every[2]
    assert near_best(ONE, known, every, np.random.default_rng(0)) is None
    assert near_best(NONE, [(0.5, {})] * 10, [{}] * 10, np.random.default_rng(0)) is None


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_most_suggestions_are_neighbours_if_the_sampler_is_tpe(sampler, monkeypatch):
    asked = []
    monkeypatch.setattr("tuning.search.optimizer.near_best", lambda *given: asked.append(given))
    bridge = Optimizer(ONE, seed=0, metric="val_loss", sampler=sampler, local_search=True)
    for number in range(100):
        bridge.ask(number)
    assert 55 <= len(asked) <= 85 if sampler == "tpe" else not asked
