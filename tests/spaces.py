"""Spaces that tests of spaces share, and random ones."""

import optuna
import pytest
import yaml
from hypothesis import strategies as st

from tuning.settings.config import PARAMETERS, InputError
from tuning.settings.space import Space, suggest
from tuning.settings.space_file import parse

optuna.logging.set_verbosity(optuna.logging.WARNING)

SMALL = """
parameters:
  backbone: {type: categorical, choices: [resnet18, vgg16]}
  stage_lr_decay: {type: float, low: 0.3, high: 1.0, when: unfreeze_depth > 1}
  unfreeze_depth: {type: int, low: 0, high: 5}
  learning_rate: {type: float, low: 1.0e-5, high: 1.0e-1, log: true}
fixed: {batch_size: 16, optimizer: sgd}
"""


def document(text: str = SMALL) -> dict:
    return yaml.safe_load(text)


def changed(section: str, **entries) -> dict:
    """The small space with some entries of one section replaced."""
    plain = document()
    plain[section] = {**plain.get(section, {}), **entries}
    return plain


def faults_of(plain: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse(plain, "my.yaml")
    return caught.value.faults


def ask(seed: int = 0) -> optuna.Trial:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()


def suggested(space: Space, **values) -> dict:
    return suggest(space, optuna.trial.FixedTrial(values))


# ---- random spaces

WORDS = {
    "backbone": ["resnet18", "vgg16.tv_in1k", "no"],
    "optimizer": ["adamw", "sgd"],
    "schedule": ["constant", "cosine"],
    "class_weighting": ["none", "balanced"],
    "head_init": ["random", "probe"],
    "batch_norm": ["train", "frozen"],
    "augmentation": ["none", "light", "medium", "strong"],
}
INTS = {"unfreeze_depth": (0, 5), "batch_size": (2, 512), "image_size": (32, 1024)}
FLOATS = {
    "learning_rate": (1e-9, 10.0),
    "stage_lr_decay": (1e-3, 1.0),
    "warmup_epochs": (0.0, 30.0),
    "weight_decay": (0.0, 10.0),
    "label_smoothing": (0.0, 0.999),
    "head_dropout": (0.0, 0.999),
}


def values_of(name: str) -> st.SearchStrategy:
    if name in WORDS:
        return st.sampled_from(WORDS[name])
    if name in INTS:
        return st.integers(*INTS[name])
    return st.floats(*FLOATS[name])


@st.composite
def specs(draw, name: str) -> dict:
    values = values_of(name)
    if name in WORDS or draw(st.booleans()):
        choices = draw(st.lists(values, min_size=1, max_size=4, unique=True))
        if name == "unfreeze_depth":
            choices = ["all" if choice == 5 else choice for choice in choices]
        return {"type": "categorical", "choices": choices}
    low, high = sorted(draw(st.lists(values, min_size=2, max_size=2, unique=True)))
    spec = {"type": "int" if name in INTS else "float", "low": low, "high": high}
    if low > 0 and draw(st.booleans()):
        spec["log"] = True
    elif name in INTS and draw(st.booleans()):
        spec["step"] = draw(st.sampled_from([step for step in range(1, high - low + 1) if (high - low) % step == 0]))
    return spec


@st.composite
def conditions(draw, parents: dict) -> str:
    """A condition over parameters by their declarations (a dict), or fixed values."""
    name = draw(st.sampled_from(sorted(parents)))
    spec = parents[name]
    if not isinstance(spec, dict):
        value = repr(spec)
    elif spec["type"] == "categorical":
        value = repr(draw(st.sampled_from(spec["choices"])))
    else:
        value = repr(draw(st.sampled_from([spec["low"], spec["high"]])))
    operators = ["==", "!=", "in", "not in"] + (["<", "<=", ">", ">="] if name not in WORDS else [])
    operator = draw(st.sampled_from(operators))
    right = f"[{value}]" if operator.endswith("in") else value
    first = f"{name} {operator} {right}"
    joint = draw(st.sampled_from(["", "not", "and", "or"]))
    if joint in ("", "not"):
        return f"{joint} {first}".strip()
    return f"({first} {joint} {draw(conditions(parents))})"


@st.composite
def documents(draw) -> dict:
    names = draw(st.permutations(PARAMETERS))
    parameters, fixed = {}, {}
    for name in names:
        role = draw(st.sampled_from(["parameter", "fixed"] + ["absent"] * (name != "backbone")))
        if role == "fixed":
            fixed[name] = draw(values_of(name))
        elif role == "parameter":
            spec = draw(specs(name))
            if (parameters or fixed) and name != "backbone" and draw(st.booleans()):
                spec["when"] = draw(conditions({**parameters, **fixed}))
            parameters[name] = spec
    shuffled = draw(st.permutations(sorted(parameters)))
    return {"parameters": {name: parameters[name] for name in shuffled}, "fixed": fixed}
