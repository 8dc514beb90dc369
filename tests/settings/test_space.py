import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shared import examples
from spaces import ask, changed, document, documents, faults_of

from tuning.settings.config import InputError, TrialConfig, build
from tuning.settings.space import (
    DEFAULTS,
    active,
    backbones,
    configurations,
    image_sizes,
    middle,
    same,
    sizes_of_backbones,
    suggest,
    trial_values,
)
from tuning.settings.space_file import fix, load, parse

# ---- conditions


def test_what_hangs_on_something_inactive_is_inactive_even_where_its_condition_could_hold():
    head_dropout = {"type": "float", "low": 0.0, "high": 0.5, "when": "stage_lr_decay > 0.5 or unfreeze_depth == 0"}
    space = parse(changed("parameters", head_dropout=head_dropout), "x")
    values = {"backbone": "vgg16", "learning_rate": 1e-3, "stage_lr_decay": 0.9, "head_dropout": 0.1}
    assert set(values) - set(active(space, {**values, "unfreeze_depth": 0})) == {"stage_lr_decay", "head_dropout"}
    assert active(space, {**values, "unfreeze_depth": 2}) == {**values, "unfreeze_depth": 2}


def test_the_order_in_the_file_changes_no_draw():
    plain = document()
    turned = {**plain, "parameters": dict(reversed(plain["parameters"].items()))}
    for seed in range(3):
        draws = [suggest(parse(each, "x"), ask(seed)) for each in (plain, turned)]
        assert list(draws[0].items()) == list(draws[1].items())


# ---- types and `all`


def test_all_is_five_wherever_it_stands():
    depth = {"type": "categorical", "choices": [0, 2, "all"]}
    plain = changed("parameters", unfreeze_depth=depth)
    plain["start"] = [{"backbone": "vgg16", "unfreeze_depth": "all"}]
    space = parse(plain, "x")
    assert space.parameters["unfreeze_depth"].choices == (0, 2, 5)
    assert space.start[0]["unfreeze_depth"] == 5
    assert parse(changed("parameters", unfreeze_depth={"type": "int", "low": 0, "high": "all"}), "x")
    assert parse({"fixed": {"backbone": "vgg16", "unfreeze_depth": "all"}}, "x").fixed["unfreeze_depth"] == 5
    assert fix(space, {"unfreeze_depth": "all"}).fixed["unfreeze_depth"] == 5


def test_steps_and_logarithms_reach_optuna():
    parameters = {
        "head_dropout": {"type": "float", "low": 0.0, "high": 0.3, "step": 0.1},
        "batch_size": {"type": "int", "low": 16, "high": 64, "step": 16},
        "image_size": {"type": "int", "low": 32, "high": 512, "log": True},
        "label_smoothing": {"type": "categorical", "choices": [0, 0.1]},
    }
    trial = ask()
    suggest(parse({"parameters": parameters, "fixed": {"backbone": "resnet18"}}, "x"), trial)
    assert trial.distributions == {
        "head_dropout": optuna.distributions.FloatDistribution(0.0, 0.3, step=0.1),
        "batch_size": optuna.distributions.IntDistribution(16, 64, step=16),
        "image_size": optuna.distributions.IntDistribution(32, 512, log=True),
        "label_smoothing": optuna.distributions.CategoricalDistribution((0.0, 0.1)),
    }


def test_a_drawn_value_is_accepted_as_a_start_point_though_its_float_is_off_the_grid():
    plain = changed("parameters", head_dropout={"type": "float", "low": 0.0, "high": 0.5, "step": 0.1})
    plain["start"] = [{"backbone": "vgg16", "head_dropout": 3 * 0.1}]
    assert parse(plain, "x").start[0]["head_dropout"] == pytest.approx(0.3)
    plain["start"][0]["head_dropout"] = 0.25
    assert faults_of(plain) == [
        "my.yaml: start[0].head_dropout: must be low 0.0 plus a multiple of 0.1, got 0.25; "
        "change it, or widen the parameter's range"
    ]


# ---- what can occur


def test_every_backbone_and_image_size_that_can_occur():
    space = parse(document(), "x")
    assert backbones(space) == ["resnet18", "vgg16"] and image_sizes(space) == [224]
    assert backbones(fix(space, {"backbone": "vgg16"})) == ["vgg16"]
    assert image_sizes(fix(space, {"image_size": 96})) == [96]
    stepped = {"type": "int", "low": 64, "high": 128, "step": 32}
    assert image_sizes(parse(changed("parameters", image_size=stepped), "x")) == [64, 96, 128]
    sometimes = {"type": "categorical", "choices": [320, 64], "when": "unfreeze_depth == 0"}
    assert image_sizes(parse(changed("parameters", image_size=sometimes), "x")) == [64, 224, 320]


def test_the_middle_has_what_is_wanted_where_the_space_allows_it():
    space = parse(
        {
            "parameters": {
                "backbone": {"type": "categorical", "choices": ["resnet18", "vgg16"]},
                "unfreeze_depth": {"type": "int", "low": 1, "high": 5},
                "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
                "stage_lr_decay": {"type": "float", "low": 0.3, "high": 1.0, "when": "unfreeze_depth > 1"},
                "batch_size": {"type": "int", "low": 8, "high": 64, "step": 8},
            }
        },
        "test",
    )
    found = middle(space, {"backbone": "vgg16", "unfreeze_depth": 0})
    assert found == {"backbone": "vgg16", "unfreeze_depth": 1, "learning_rate": pytest.approx(1e-3), "batch_size": 32}
    assert middle(space, {"backbone": "x", "unfreeze_depth": 2})["stage_lr_decay"] == pytest.approx(0.65)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_grouped_tpe_learns_from_a_conditional_space():
    space = load("quick")
    sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=0, n_startup_trials=5)
    study = optuna.create_study(sampler=sampler)
    for point in space.start:
        study.enqueue_trial(point)
    for number in range(25):
        trial = study.ask()
        values = suggest(space, trial)
        assert number >= len(space.start) or values == space.start[number]
        assert {type(value) for value in values.values()} <= {str, int, float}
        build(TrialConfig, trial_values(space, values), "suggestion")
        study.tell(trial, values["learning_rate"])


# ---- general rules


@examples(25)
@given(plain=documents(), seed=st.integers(0, 2**31 - 1))
def test_any_suggestion_is_a_trial_config_and_a_start_point(plain, seed):
    space = parse(plain, "x")
    values = suggest(space, ask(seed))
    config = build(TrialConfig, trial_values(space, values), "suggestion")
    assert active(space, values) == values
    assert config.backbone in backbones(space) and config.image_size in image_sizes(space)
    for name in set(space.parameters) - set(values):
        assert getattr(config, name) == DEFAULTS[name]
    again = parse({**plain, "start": [values]}, "x")
    assert again.start == (values,)
    assert again == parse(again.document, "x") == parse(yaml.safe_load(yaml.safe_dump(again.document)), "x")


@examples(25)
@given(plain=documents(), data=st.data())
def test_fixing_a_suggestion_leaves_only_that_config(plain, data):
    space = parse(plain, "x")
    values = suggest(space, ask(data.draw(st.integers(0, 99))))
    names = data.draw(st.lists(st.sampled_from(sorted(values)), unique=True)) if values else []
    held = fix(parse({**plain, "start": [values]}, "x"), {name: values[name] for name in names})
    assert not set(names) & set(held.parameters)
    assert trial_values(held, held.start[0]) == trial_values(space, values)
    assert held == parse(held.document, "x")


# ---- all that a space allows


def test_the_image_sizes_of_each_backbone_are_those_that_conditions_allow():
    size = {"type": "categorical", "choices": [64, 96], "when": "backbone == vgg16 and learning_rate > 1.0e-2"}
    space = parse(changed("parameters", image_size=size), "x")
    assert sizes_of_backbones(space) == {"resnet18": [224], "vgg16": [64, 96, 224]}
    deep = {"type": "int", "low": 64, "high": 128, "step": 32, "when": "unfreeze_depth == 3"}
    space = parse(changed("parameters", image_size=deep), "x")
    assert sizes_of_backbones(space) == {"resnet18": [64, 96, 128, 224], "vgg16": [64, 96, 128, 224]}
    never = {"type": "int", "low": 64, "high": 128, "when": "batch_size > 16"}
    space = parse(changed("parameters", image_size=never), "x")
    assert sizes_of_backbones(space) == {"resnet18": [224], "vgg16": [224]}


@given(documents(), st.integers(0, 2**20))
@examples(25)
def test_no_trial_has_another_backbone_and_image_size(document, seed):
    try:
        space = parse(document, "x")
    except InputError:
        return
    values = DEFAULTS | trial_values(space, suggest(space, ask(seed)))
    assert values["image_size"] in sizes_of_backbones(space)[values["backbone"]]


def test_the_configurations_of_a_finite_space_are_listed():
    parameters = {
        "unfreeze_depth": {"type": "categorical", "choices": [0, 1]},
        "head_dropout": {"type": "float", "low": 0.0, "high": 0.3, "step": 0.1, "when": "unfreeze_depth == 1"},
        "batch_size": {"type": "int", "low": 8, "high": 9},
    }
    space = parse({"parameters": parameters, "fixed": {"backbone": "resnet18"}}, "x")
    every = configurations(space)
    assert len(every) == len(set(map(same, every))) == 2 * (1 + 4)
    drawn = {same(suggest(space, ask(seed))) for seed in range(200)}
    assert drawn == set(map(same, every))
    assert configurations(parse(document(), "x")) is None  # learning rates without end
    parameters["batch_size"] |= {"high": 5000}
    assert configurations(parse({"parameters": parameters, "fixed": {"backbone": "resnet18"}}, "x")) is None
    assert configurations(parse({"fixed": {"backbone": "resnet18"}}, "x")) == [{}]
