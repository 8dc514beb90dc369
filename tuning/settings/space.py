"""A checked search space: its parameters, conditions and start points, and the configurations that it allows."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from tuning.settings.conditions import Condition, Value, comparisons, holds, parents
from tuning.settings.config import TrialConfig

Key: TypeAlias = frozenset[tuple[str, Value]]  # of parameters
MOST_CONFIGURATIONS = 10_000  # that are listed
DEFAULTS = {name: field.default for name, field in TrialConfig.model_fields.items() if not field.is_required()}


@dataclass(frozen=True)
class Parameter:
    type: str  # categorical, int or float
    choices: tuple[Value, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    when: str | None = None
    condition: Condition | None = None


@dataclass(frozen=True)
class Space:
    """A checked search space. `parameters` are in the order of suggestion, whatever their order in the file."""

    document: dict[str, Any]
    parameters: dict[str, Parameter]
    fixed: dict[str, Value]
    start: tuple[dict[str, Value], ...]
    search: dict[str, Any]
    enqueue: tuple[dict[str, Value], ...] = ()  # tried after the start points, as if the sampler had suggested them
    portfolio: tuple[dict[str, Value], ...] = ()  # likewise after those, until some trials have a value


def suggest(space: Space, trial: Any) -> dict[str, Value]:
    """Return the active parameters of one trial, as an `optuna.Trial` suggests them, each after its parents."""

    def suggested(name: str, parameter: Parameter) -> Value:
        low, high, step, log = parameter.low, parameter.high, parameter.step, parameter.log
        if parameter.type == "categorical":
            choice: Value = trial.suggest_categorical(name, list(parameter.choices))
            return choice
        if parameter.type == "int":
            return int(trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log))
        return float(trial.suggest_float(name, low, high, step=step, log=log))

    return _active(space, suggested)


def middle(space: Space, wanted: Mapping[str, Any]) -> dict[str, Value]:
    """Return the active parameters of a trial near `wanted`; those not named there are in the middle of their range."""

    def nearest(name: str, parameter: Parameter) -> Value:
        if parameter.type == "categorical":
            return wanted[name] if wanted.get(name) in parameter.choices else parameter.choices[0]
        low, high, step = parameter.low, parameter.high, parameter.step
        if parameter.type == "int":
            return int(min(max(wanted.get(name, low + (high - low) / 2 // (step or 1) * (step or 1)), low), high))
        center = math.sqrt(low * high) if parameter.log else (low + high) / 2
        center = low + (center - low) // step * step if step else center
        return float(min(max(wanted.get(name, center), low), high))

    return _active(space, nearest)


def _active(space: Space, value: Callable[[str, Parameter], Value]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, parameter in space.parameters.items():
        if holds(parameter.condition, {**space.fixed, **values}):
            values[name] = value(name, parameter)
    return values


def active(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that are parameters of the space and whose condition holds.

    A parameter whose parent is inactive, or missing from `values`, is inactive.
    """
    kept: dict[str, Any] = {}
    for name, parameter in space.parameters.items():
        if name in values and holds(parameter.condition, {**space.fixed, **kept}):
            kept[name] = values[name]
    return kept


def trial_values(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed values and the active ones of `params`: a `TrialConfig` without epochs and seed."""
    return {**space.fixed, **active(space, params)}


def backbones(space: Space) -> list[str]:
    """Return every backbone that a trial can have."""
    return [str(value) for value in _possible(space, "backbone")]


def image_sizes(space: Space) -> list[int]:
    """Return every image size, in pixels, that a trial can have, in ascending order."""
    return sorted({int(value) for value in _possible(space, "image_size")})


def largest(space: Space, name: str) -> float:
    """Return the largest value of a number that a trial can have."""
    parameter = space.parameters.get(name)
    if parameter is None:
        return float(space.fixed.get(name, DEFAULTS[name]))
    return max(float(value) for value in parameter.choices or (parameter.high,))


def sizes_of_backbones(space: Space) -> dict[str, list[int]]:
    """Return each backbone with the image sizes, in pixels and ascending, that a trial of it can have."""
    names = ["backbone", "image_size"]
    for name in names:  # grows by the parents of those that it holds
        condition = space.parameters[name].condition if name in space.parameters else None
        names += [parent for parent in parents(condition) if parent not in names]
    found: dict[str, set[int]] = {}
    for params in _combined(space, names, lambda name: _telling(space, name)) or []:
        values = DEFAULTS | space.fixed | params
        found.setdefault(str(values["backbone"]), set()).add(int(values["image_size"]))
    return {backbone: sorted(sizes) for backbone, sizes in found.items()}


def configurations(space: Space) -> list[dict[str, Value]] | None:
    """Return the active parameters of every trial that a space allows; None if there are over 10,000."""
    return _combined(space, list(space.parameters), lambda name: _every(space.parameters[name]), MOST_CONFIGURATIONS)


def same(params: Mapping[str, Value]) -> Key:
    """Return a key that is equal for equal parameters, whatever the rounding of a range with a step."""
    rounded = {name: float(f"{value:.12g}") if isinstance(value, float) else value for name, value in params.items()}
    return frozenset(rounded.items())


def _combined(
    space: Space, names: Collection[str], values: Callable[[str], list[Value] | None], most: float = math.inf
) -> list[dict[str, Value]] | None:
    """Combine the values of the parameters named wherever they are active; None if there are more than `most`."""
    found: list[dict[str, Value]] = [{}]
    for name, parameter in space.parameters.items():
        if name not in names:
            continue
        each, grown = values(name), list[dict[str, Value]]()
        for params in found:
            if not holds(parameter.condition, {**space.fixed, **params}):
                grown.append(params)
            elif each is None or len(grown) + len(each) > most:
                return None
            else:
                grown += [params | {name: value} for value in each]
        found = grown
    return found


def _every(parameter: Parameter) -> list[Value] | None:
    """Every value of a parameter; None if there are too many."""
    low, high, step = parameter.low, parameter.high, parameter.step or (1 if parameter.type == "int" else None)
    if parameter.type == "categorical":
        return list(parameter.choices)
    if step is None or (high - low) / step > MOST_CONFIGURATIONS:
        return [low] if low == high else None
    first, each = Fraction(str(low)), Fraction(str(step))  # 3 * 0.1 is above 0.3, and Optuna would refuse it
    values = [first + place * each for place in range(int((Fraction(str(high)) - first) / each) + 1)]
    return [int(value) if parameter.type == "int" else float(value) for value in values]


def _telling(space: Space, name: str) -> list[Value]:
    """Every value of a parameter or, of a long range, those between which the conditions that compare it can change."""
    parameter = space.parameters[name]
    if name in ("backbone", "image_size") or parameter.type == "categorical":
        return _every(parameter) or []
    conditions = [other.condition for other in space.parameters.values()]
    compared = [one for condition in conditions for one in comparisons(condition) if one.name == name]
    ends = {float(value) for one in compared for value in one.values} | {parameter.low, parameter.high}
    step = 1.0 if parameter.type == "int" else 0.0
    near = {end + sign * (step or abs(end) * 1e-9) for end in ends for sign in (-1, 0, 1)}
    inside = sorted(value for value in near if parameter.low <= value <= parameter.high)
    return [int(value) if step else value for value in inside]


def _possible(space: Space, name: str) -> list[Value]:
    parameter = space.parameters.get(name)
    if parameter is None:
        return [space.fixed[name] if name in space.fixed else DEFAULTS[name]]
    values = list(parameter.choices)
    if parameter.type == "int":
        values = list(range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1)))
    return values if parameter.when is None else [*values, DEFAULTS[name]]
