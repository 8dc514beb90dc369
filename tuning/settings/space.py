"""Search-space YAML -> parameters, conditions and start points -> `suggest`: the flat dict of one trial."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from tuning.settings.conditions import (
    NUMBERS,
    Condition,
    Value,
    as_number,
    checked,
    fits,
    holds,
    nearest,
    parents,
    parents_first,
    parse_condition,
    show,
)
from tuning.settings.config import PARAMETERS, SETTINGS, InputError, SearchPlan, TrialConfig, without_secrets
from tuning.settings.documents import from_yaml

SHIPPED = Path(__file__).resolve().parents[2] / "search_spaces"
SECTIONS = ("parameters", "fixed", "start", "search")
RANGE_KEYS = ("low", "high", "log", "step")
TYPES = {"categorical": ("choices",), "int": RANGE_KEYS, "float": RANGE_KEYS}
DEFAULTS = {name: field.default for name, field in TrialConfig.model_fields.items() if not field.is_required()}
MOST_STEPS = 10**6


@dataclass(frozen=True)
class Parameter:
    type: str  # a key of TYPES
    choices: tuple[Value, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    when: str | None = None
    condition: Condition | None = None


@dataclass(frozen=True)
class Space:
    """A checked search space. `parameters` stand in the order of suggestion, whatever their order in the file."""

    document: dict[str, Any]
    parameters: dict[str, Parameter]
    fixed: dict[str, Value]
    start: tuple[dict[str, Value], ...]
    search: dict[str, Any]


class Trial(Protocol):
    """What `suggest` calls; an `optuna.Trial` has it."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = ..., log: bool = ...
    ) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = ..., log: bool = ...) -> Any: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


# ---- using a space


def suggest(space: Space, trial: Trial) -> dict[str, Value]:
    """The active parameters of one trial, each drawn after those that its condition names."""
    values: dict[str, Value] = {}
    for name, parameter in space.parameters.items():
        if holds(parameter.condition, {**space.fixed, **values}):
            values[name] = _draw(name, parameter, trial)
    return values


def _draw(name: str, parameter: Parameter, trial: Trial) -> Any:
    low, high, step, log = parameter.low, parameter.high, parameter.step, parameter.log
    if parameter.type == "categorical":
        return trial.suggest_categorical(name, list(parameter.choices))
    if parameter.type == "int":
        return int(trial.suggest_int(name, int(low), int(high), step=int(step or 1), log=log))
    return float(trial.suggest_float(name, low, high, step=step, log=log))


class _Middle:
    """A trial that has the values wanted where they can be had, and the middle of everything else."""

    def __init__(self, wanted: Mapping[str, Any]):
        self._wanted = wanted

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> Any:
        middle = math.sqrt(low * high) if log else (low + high) / 2
        value = self._wanted.get(name, middle if step is None else low + (middle - low) // step * step)
        return min(max(value, low), high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any:
        return min(max(self._wanted.get(name, low + (high - low) // 2 // step * step), low), high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self._wanted.get(name, choices[0])
        return value if value in choices else choices[0]


def middle(space: Space, wanted: Mapping[str, Any]) -> dict[str, Value]:
    """The parameters of a trial that has the values wanted where the space allows them, and middling ones elsewhere."""
    return suggest(space, _Middle(wanted))


def active(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are parameters of the space and whose condition holds.

    A parameter whose parent is inactive, or not among `values`, is inactive.
    """
    kept: dict[str, Any] = {}
    for name, parameter in space.parameters.items():
        if name in values and holds(parameter.condition, {**space.fixed, **kept}):
            kept[name] = values[name]
    return kept


def trial_values(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Fixed values and the active ones of `params`: the fields of a `TrialConfig`, without epochs and seed."""
    return {**space.fixed, **active(space, params)}


def fix(space: Space, values: Mapping[str, Any]) -> Space:
    """The space with some parameters held at one value, as `--set batch_size=16` does.

    They leave `parameters` and the start points for `fixed`; what thereby becomes inactive leaves the start points too,
    what becomes active enters them with its default, and start points that become equal are merged.

    Raises:
        InputError: an unknown name, a value that `TrialConfig` refuses, a start point that can't be completed.
    """
    declared = space.document.get("parameters") or {}
    document = {
        **space.document,
        "parameters": {name: spec for name, spec in declared.items() if name not in values},
        "fixed": {**(space.document.get("fixed") or {}), **values},
        "start": [],
    }
    fixed = parse(document, "--set")
    faults: list[str] = []
    start: list[dict[str, Value]] = []
    for index, point in enumerate(space.start):
        completed = _complete(
            fixed.parameters, fixed.fixed, set(), active(fixed, point), f"--set: start[{index}]", faults
        )
        if completed not in start:
            start.append(completed)
    if faults:
        raise InputError(faults)
    return replace(fixed, document=_plain({**document, "start": start}), start=tuple(start))


def backbones(space: Space) -> list[str]:
    """Every backbone that a trial can have."""
    return [str(value) for value in _possible(space, "backbone")]


def image_sizes(space: Space) -> list[int]:
    """Every image size, in pixels, that a trial can have, in ascending order."""
    return sorted({int(value) for value in _possible(space, "image_size")})


def _possible(space: Space, name: str) -> list[Value]:
    parameter = space.parameters.get(name)
    if parameter is None:
        return [space.fixed[name] if name in space.fixed else DEFAULTS[name]]
    values = list(parameter.choices)
    if parameter.type == "int":
        values = list(range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1)))
    return values if parameter.when is None else [*values, DEFAULTS[name]]


# ---- reading a space


def load(name_or_path: str) -> Space:
    """A shipped space by its name, such as `quick`, or that of a YAML file.

    Raises:
        InputError: no such name or file, or everything that is wrong in the file.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if name_or_path in shipped:
        path = SHIPPED / f"{name_or_path}.yaml"
    elif name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or "\\" in name_or_path:
        path = Path(name_or_path)
    else:
        raise InputError(
            f"--space {name_or_path}: no shipped space has this name{nearest(name_or_path, shipped)}; "
            f"shipped are {', '.join(shipped)}; a file of your own is given by its path, ending in .yaml"
        )
    where = str(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{where}: no such file; give the path of a YAML file, or the name of a shipped space: {', '.join(shipped)}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: can't be read ({error}); give the path of a YAML file") from None
    document, faults = from_yaml(content, where)
    return parse(document, where, faults)


def parse(document: object, where: str, faults: Sequence[str] = ()) -> Space:
    """A checked space from the plain document that a YAML file holds.

    Args:
        document: nested dicts and lists.
        where: what the document comes from, for the messages.
        faults: those already found in reading it.

    Raises:
        InputError: these faults and all others.
    """
    faults = list(faults)
    if not isinstance(document, dict) or not document:
        what = "is empty" if document is None or document == {} else f"must be a mapping, got {show(document)}"
        raise InputError([*faults, f"{where}: {what}; write a mapping of {', '.join(SECTIONS)}"])
    for key in document:
        if key not in SECTIONS:
            faults.append(f"{where}: {show(key)}: no such section{nearest(key, SECTIONS)}; use {', '.join(SECTIONS)}")
    sections = {key: _section(document, key, dict, where, faults) for key in ("parameters", "fixed", "search")}
    declared, fixed_declared = sections["parameters"], sections["fixed"]
    for key in ("parameters", "fixed"):
        _check_names(sections[key], f"{where}: {key}", faults)
    if "backbone" not in declared and "backbone" not in fixed_declared:
        faults.append(f"{where}: backbone: must be among the parameters or fixed; add `fixed: {{backbone: resnet18}}`")

    fixed: dict[str, Value] = {}
    for name in PARAMETERS:
        if name in fixed_declared and name in declared:
            faults.append(f"{where}: {name}: stands under parameters and under fixed; delete one of them")
        elif name in fixed_declared:
            value = checked(TrialConfig, name, fixed_declared[name], f"{where}: fixed.{name}", faults)
            if value is not None:
                fixed[name] = value

    known = {name for name in PARAMETERS if name in declared or name in fixed_declared}
    parameters = _parameters(declared, known, f"{where}: parameters", faults)
    points = _section(document, "start", list, where, faults)
    start = _start(points, parameters, fixed, known - set(parameters) - set(fixed), where, faults)
    search = _search(sections["search"], where, faults)
    if faults:
        raise InputError(faults)
    return Space(_plain(document), parameters, fixed, start, search)


def _section(document: dict[Any, Any], key: str, kind: type, where: str, faults: list[str]) -> Any:
    section = document.get(key)
    if section is not None and not isinstance(section, kind):
        rule = "a mapping; write one `name: ..`" if kind is dict else "a list; write one `- {name: value}`"
        faults.append(f"{where}: {key}: must be {rule} a line, got {show(section)}")
    return section if isinstance(section, kind) else kind()


def _check_names(names: Iterable[Any], place: str, faults: list[str]) -> None:
    for name in names:
        if name in PARAMETERS:
            continue
        cure = "; it belongs under search" if name in SETTINGS else nearest(name, PARAMETERS)
        faults.append(f"{place}: {show(name)}: no such parameter{cure or '; known are ' + ', '.join(PARAMETERS)}")


def _search(section: dict[Any, Any], where: str, faults: list[str]) -> dict[str, Any]:
    search: dict[str, Any] = {}
    for key, value in section.items():
        here = f"{where}: search.{key}"
        if key in SETTINGS:
            search[key] = checked(SearchPlan, key, value, here, faults)
        elif key in SearchPlan.model_fields:
            faults.append(f"{here}: is not a setting of a space; give it on the command line: --{key}")
        elif key in PARAMETERS:
            faults.append(f"{here}: is a parameter; put it under parameters or fixed")
        else:
            faults.append(f"{where}: search: {show(key)}: no such setting{nearest(key, SETTINGS)}")
    return search


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str):  # what search.optuna_storage says goes to plan.yaml
        return without_secrets(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---- one parameter


def _parameters(declared: dict[Any, Any], known: set[str], place: str, faults: list[str]) -> dict[str, Parameter]:
    """The faultless parameters, in the order of suggestion."""
    parameters = {}
    for name in PARAMETERS:
        if name in declared and (parameter := _parameter(name, declared[name], f"{place}.{name}", faults)):
            parameters[name] = parameter

    def outside(name: str, value: Value) -> str | None:
        return _outside(parameters[name], value) if name in parameters else None

    conditions = {
        name: parameter.condition
        for name, parameter in parameters.items()
        if fits(parameter.condition, known, outside, f"{place}.{name}.when", faults)
    }
    return {name: parameters[name] for name in parents_first(conditions, place, faults)}


def _parameter(name: str, spec: Any, place: str, faults: list[str]) -> Parameter | None:
    if not isinstance(spec, dict):
        faults.append(f"{place}: must be a mapping such as {{type: float, low: 0.0, high: 0.5}}, got {show(spec)}")
        return None
    before = len(faults)
    kind = spec["type"] if isinstance(spec.get("type"), str) else ""
    fitting = ["categorical", NUMBERS[name]] if name in NUMBERS else ["categorical"]
    if "type" not in spec:
        faults.append(f"{place}: has no type; add `type: {fitting[-1]}`")
    elif kind not in TYPES:
        close = nearest(kind, TYPES)
        faults.append(f"{place}.type: must be one of {', '.join(TYPES)}, got {show(spec['type'])}{close}")
    elif kind not in fitting:
        faults.append(
            f"{place}.type: must be {' or '.join(fitting)} for {name}, got {kind}; write `type: {fitting[-1]}`"
        )
    allowed = ("type", *TYPES.get(kind, ("choices", *RANGE_KEYS)), "when")
    for key in spec:
        if key not in allowed:
            close = nearest(key, allowed)
            faults.append(f"{place}: {show(key)}: no such key here{close}; use {', '.join(allowed)}")

    parts: dict[str, Any] = {}
    if kind == "categorical":
        parts["choices"] = _choices(name, spec, place, faults)
    elif kind in fitting:
        parts.update(_range(name, kind, spec, place, faults))
    if "when" in spec:
        if name == "backbone":
            faults.append(f"{place}.when: every trial needs a backbone, got {show(spec['when'])}; delete it")
        try:
            parts.update(when=spec["when"], condition=parse_condition(spec["when"]))
        except ValueError as error:
            faults.append(f"{place}.when: {error}, got {show(spec['when'])}")
    return Parameter(kind, **parts) if len(faults) == before else None


def _choices(name: str, spec: dict[Any, Any], place: str, faults: list[str]) -> tuple[Value, ...]:
    listed = spec.get("choices")
    if not isinstance(listed, list) or not listed:
        got = f"got {show(listed)}" if "choices" in spec else "but is missing"
        faults.append(f"{place}.choices: must be a list of at least one value, {got}; write `choices: [.., ..]`")
        return ()
    values = [checked(TrialConfig, name, value, f"{place}.choices[{i}]", faults) for i, value in enumerate(listed)]
    for index, value in enumerate(values):
        if value is not None and value in values[:index]:
            faults.append(f"{place}.choices[{index}]: {show(value)} stands there already; delete one of them")
    return tuple(values)


def _range(name: str, kind: str, spec: dict[Any, Any], place: str, faults: list[str]) -> dict[str, Any]:
    bounds: list[Any] = []
    for key in ("low", "high"):
        if key not in spec:
            faults.append(f"{place}: has no {key}; add `{key}: ..`, type {kind} needs low and high")
        bounds.append(checked(TrialConfig, name, spec[key], f"{place}.{key}", faults) if key in spec else None)
    low, high = bounds
    log: Any = spec.get("log", False)
    step: Any = spec.get("step")
    ordered = low is not None and high is not None and low < high
    if low is not None and high is not None and not ordered:
        faults.append(f"{place}: low must be below high, got low {low} and high {high}; put a single value under fixed")
    if type(log) is not bool:
        faults.append(f"{place}.log: must be true or false, got {show(log)}")
    elif log and low is not None and low <= 0:
        faults.append(f"{place}.low: log needs low above 0, got {low}; raise low or delete log")
    if "step" not in spec:
        return {"low": low, "high": high, "log": log}
    if log is True:
        faults.append(f"{place}: step and log exclude each other, got step {show(step)}; delete one of them")
    elif type(step) not in ((int,) if kind == "int" else (int, float)) or not 0 < step < math.inf:
        number = as_number(step)
        cure = f"; write {number}" if number else ""
        what = "a whole number" if kind == "int" else "a number"
        faults.append(f"{place}.step: must be {what} above 0, got {show(step)}{cure}")
    elif ordered:
        steps = (Fraction(str(high)) - Fraction(str(low))) / Fraction(str(step))
        if steps > MOST_STEPS:
            faults.append(f"{place}.step: must cut low to high into {MOST_STEPS} steps or fewer, got {step}; raise it")
        elif steps.denominator != 1:
            end = float(Fraction(str(low)) + int(steps) * Fraction(str(step)))
            cure = f"; write `high: {int(end) if kind == 'int' else end}`" if end > low else ""
            faults.append(f"{place}.step: must divide high - low = {high} - {low} without rest, got {step}{cure}")
    return {"low": low, "high": high, "log": log, "step": step}


def _outside(parameter: Parameter, value: Any) -> str | None:
    """The rule that keeps a value, itself fit for `TrialConfig`, out of the parameter's range; none if it is inside."""
    if parameter.type == "categorical":
        listed = ", ".join(map(str, parameter.choices))
        rule = f"must be one of {listed}, got {show(value)}{nearest(value, parameter.choices)}"
        return None if value in parameter.choices else rule
    if not parameter.low <= value <= parameter.high:
        return f"must lie between low {parameter.low} and high {parameter.high}, got {value}"
    steps = (value - parameter.low) / parameter.step if parameter.step else 0
    # Optuna's own tolerance: 3 * 0.1 lies on a grid of tenths.
    off_grid = abs(steps - round(steps)) >= 1e-8
    return f"must be low {parameter.low} plus steps of {parameter.step}, got {value}" if off_grid else None


# ---- start points


def _start(
    points: list[Any],
    parameters: Mapping[str, Parameter],
    fixed: Mapping[str, Value],
    unsure: set[str],
    where: str,
    faults: list[str],
) -> tuple[dict[str, Value], ...]:
    start: list[dict[str, Value]] = []
    for index, point in enumerate(points):
        here = f"{where}: start[{index}]"
        if not isinstance(point, dict):
            faults.append(f"{here}: must be a mapping such as {{learning_rate: 0.001}}, got {show(point)}")
            continue
        before = len(faults)
        completed = _complete(parameters, fixed, unsure, point, here, faults)
        if len(faults) == before and not unsure and completed in start:
            faults.append(f"{here}: is the same as start[{start.index(completed)}] once completed; delete one of them")
        start.append(completed)
    return tuple(start)


def _complete(
    parameters: Mapping[str, Parameter],
    fixed: Mapping[str, Value],
    unsure: set[str],
    point: Mapping[Any, Any],
    place: str,
    faults: list[str],
) -> dict[str, Value]:
    """A start point with every active parameter in it.

    Args:
        unsure: names whose own declaration is faulty: nothing that hangs on them is judged.
    """
    _check_names([name for name in point if name not in fixed], place, faults)
    for name in PARAMETERS:
        if name in point and name in fixed:
            faults.append(f"{place}.{name}: is fixed at {show(fixed[name])}; delete it here")
        elif name in point and name not in parameters and name not in unsure:
            faults.append(f"{place}.{name}: is not among the parameters; declare it there, or delete it here")
    values: dict[str, Value] = {}
    unsure = set(unsure)
    for name, parameter in parameters.items():
        here = f"{place}.{name}"
        if unsure.intersection(parents(parameter.condition)):
            unsure.add(name)
        elif not holds(parameter.condition, {**fixed, **values}):
            if name in point:
                faults.append(f"{here}: is inactive here, for it needs `{parameter.when}`; delete it here")
        else:
            value = checked(TrialConfig, name, point[name], here, faults) if name in point else DEFAULTS.get(name)
            rule = None if value is None else _outside(parameter, value)
            if name not in point and (value is None or rule):
                default = "it has no default" if value is None else f"its default {rule}"
                faults.append(f"{here}: is missing, and {default}; give it a value here")
            elif rule:
                faults.append(f"{here}: {rule}; change it here or widen the parameter")
            if value is None or rule:
                unsure.add(name)
            else:
                values[name] = value
    return values
