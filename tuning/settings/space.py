"""A checked search space: its parameters, conditions and start points, and the configurations that it allows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuning.settings.conditions import Condition, Value, holds
from tuning.settings.config import TrialConfig

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


def _possible(space: Space, name: str) -> list[Value]:
    parameter = space.parameters.get(name)
    if parameter is None:
        return [space.fixed[name] if name in space.fixed else DEFAULTS[name]]
    values = list(parameter.choices)
    if parameter.type == "int":
        values = list(range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1)))
    return values if parameter.when is None else [*values, DEFAULTS[name]]
