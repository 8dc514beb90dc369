"""Suggestions near the best configurations so far, of which a random forest predicts the best.

Close to an optimum most parameters are right and one or two are not; a density of each parameter, as TPE has, seldom
draws that. Like SMAC (Lindauer et al. 2022, https://jmlr.org/papers/v23/21-0888.html) this ranks neighbours of the best
by a forest's predictions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuning.settings.conditions import Value
from tuning.settings.space import Parameter, Space, active

Params = Mapping[str, Value]
SHARE = 0.7  # of the suggestions; the others are the sampler's
LEAST_KNOWN = 8  # configurations with a value
MOST_KNOWN = 200  # of which the forest learns: the best
BEST = 3  # configurations of which neighbours are drawn
DRAWN = 30  # neighbours
ALSO_CHANGED = 0.3  # probability of each parameter besides the one that is changed in any case
STEP = 0.25  # of a number's range: the standard deviation of a change
APART = 0.1  # of a number's range: those that are nearer are not tried again
TREES = 30


def near_best(
    space: Space, known: Sequence[tuple[float, Params]], tried: Sequence[Params], rng: np.random.Generator
) -> dict[str, Value] | None:
    """Return a neighbour of one of the best configurations that is unlike all tried ones; None if none was drawn.

    Args:
        known: values, lower being better, and parameters of configurations.
        tried: parameters of all configurations that are known, or will be.
    """
    if len(known) < LEAST_KNOWN or not space.parameters:
        return None
    known = sorted(known, key=lambda each: (each[0], str(sorted(each[1].items()))))[:MOST_KNOWN]
    drawn = [_changed(space, known[int(rng.integers(BEST))][1], rng) for _ in range(DRAWN)]
    codes, others = _codes(space, drawn), _codes(space, tried)
    unlike = [place for place, code in enumerate(codes) if np.abs(others - code).max(axis=1).min() >= APART]
    if not unlike:
        return None
    from sklearn.ensemble import RandomForestRegressor  # takes a second to load

    forest = RandomForestRegressor(TREES, random_state=int(rng.integers(2**31)))
    forest.fit(_codes(space, [params for _, params in known]), np.linspace(0, 1, len(known)))  # the ranks
    predicted = np.stack([tree.predict(codes[unlike]) for tree in forest.estimators_])
    return drawn[unlike[int(np.argmin(predicted.mean(axis=0) - predicted.std(axis=0)))]]


def _changed(space: Space, params: Params, rng: np.random.Generator) -> dict[str, Value]:
    """Change one parameter, and perhaps others; what a change makes active is left to the sampler."""
    names = [name for name in space.parameters if name in params]
    certain, values = int(rng.integers(len(names))), dict(params)
    for place, name in enumerate(names):
        if rng.random() < ALSO_CHANGED or place == certain:
            values[name] = _near(space.parameters[name], values[name], rng)
    return active(space, values)


def _near(parameter: Parameter, value: Any, rng: np.random.Generator) -> Value:
    """Change a value: a number by a step, a choice that is no number to any other."""
    low, high, choices, step = parameter.low, parameter.high, parameter.choices, float(rng.normal(0, STEP))
    if parameter.type == "categorical" and not _is_ordered(choices):
        others = [choice for choice in choices if choice != value]
        return others[int(rng.integers(len(others)))] if others else value
    if parameter.type == "categorical":
        ordered, steps = sorted(choices), max(round(abs(step) * (len(choices) - 1)), 1)
        return ordered[min(max(ordered.index(value) + int(math.copysign(steps, step)), 0), len(ordered) - 1)]
    place = _place(parameter, value) + step
    found = low * (high / low) ** place if parameter.log else low + place * (high - low)
    if each := parameter.step or (parameter.type == "int"):
        found = value + (round((found - value) / each) or math.copysign(1, step)) * each
    found = min(max(found, low), high)
    return round(found) if parameter.type == "int" else float(found)


def _codes(space: Space, configurations: Sequence[Params]) -> NDArray[np.float64]:
    """Return vectors: the place of each number in its range, 0 or 1 for every other choice; -1 if inactive."""
    columns = []
    for name, parameter in space.parameters.items():
        given = [params.get(name) for params in configurations]
        if parameter.type != "categorical" or _is_ordered(parameter.choices):
            columns.append([-1.0 if value is None else _place(parameter, value) for value in given])
        else:
            columns += [[float(value == choice) for value in given] for choice in parameter.choices]
    return np.array(columns).T


def _place(parameter: Parameter, value: Any) -> float:
    """Return where a number is in its range, from 0 to 1."""
    low, high = parameter.low, parameter.high
    if parameter.type == "categorical":
        return sorted(parameter.choices).index(value) / max(len(parameter.choices) - 1, 1)
    if low == high:
        return 0.0
    return math.log(value / low) / math.log(high / low) if parameter.log else (value - low) / (high - low)


def _is_ordered(choices: Sequence[Value]) -> bool:
    return all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices)
