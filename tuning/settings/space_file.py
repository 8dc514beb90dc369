"""Search-space YAML -> `Space`, with every fault of the file in one error."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

from tuning.settings.conditions import NUMBERS, Value, checked, fits, holds, parents, parents_first, parse_condition
from tuning.settings.config import PARAMETERS, SETTINGS, InputError, SearchPlan, TrialConfig, without_secrets
from tuning.settings.documents import read_yaml
from tuning.settings.space import DEFAULTS, Parameter, Space, active, trial_values
from tuning.settings.words import as_number, nearest, show

SHIPPED = Path(__file__).resolve().parents[2] / "search_spaces"
PORTFOLIO = Path(__file__).with_name("portfolio.yaml")
LISTS = ("start", "enqueue", "portfolio")  # of points
SECTIONS = {"parameters": dict, "fixed": dict, **dict.fromkeys(LISTS, list), "search": dict}
RANGE_KEYS = ("low", "high", "log", "step")
TYPES = {"categorical": ("choices",), "int": RANGE_KEYS, "float": RANGE_KEYS}
MOST_STEPS = 10**6
NEAR = 2.0  # half the step of the learning rates that the portfolio was learnt from


def load(name_or_path: str) -> Space:
    """Read a shipped space by its name, such as `quick`, or a YAML file by its path.

    Raises:
        InputError: no such name or file, or everything that is wrong in the file.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    cure = f"; give the name of a shipped space ({', '.join(shipped)}) or the path of a YAML file"
    if name_or_path in shipped:
        path = SHIPPED / f"{name_or_path}.yaml"
    elif name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path or "\\" in name_or_path:
        path = Path(name_or_path)
    else:
        close = nearest(name_or_path, shipped)
        raise InputError(f"--space {name_or_path}: no such space{close}{cure.replace('; g', ' G') if close else cure}")
    document, faults = read_yaml(path, cure)
    return parse(document, str(path), faults)


def parse(document: object, where: str, faults: Sequence[str] = ()) -> Space:
    """Check a search space given as nested dicts and lists; `where` is their origin, for the messages.

    Raises:
        InputError: `faults`, which were found while reading it, and all others.
    """
    faults = list(faults)
    if not isinstance(document, dict) or not document:
        what = "is empty" if document is None or document == {} else f"must be a mapping, got {show(document)}"
        raise InputError([*faults, f"{where}: {what}; write a mapping of {', '.join(SECTIONS)}"])
    for key in document:
        if key not in SECTIONS:
            faults.append(f"{where}: {show(key)}: no such section{nearest(key, SECTIONS)}; use {', '.join(SECTIONS)}")
    declared, held, *listed, settings = (_section(document, key, where, faults) for key in SECTIONS)
    _check_names(declared, f"{where}: parameters", faults)
    _check_names(held, f"{where}: fixed", faults)
    if "backbone" not in declared and "backbone" not in held:
        faults.append(f"{where}: backbone: is missing; add it to parameters, or `fixed: {{backbone: resnet18}}`")

    fixed: dict[str, Value] = {}
    for name in PARAMETERS:
        if name in held and name in declared:
            faults.append(f"{where}: {name}: is in both parameters and fixed; delete one of them")
        elif name in held:
            value = checked(TrialConfig, name, held[name], f"{where}: fixed.{name}", faults)
            if value is not None:
                fixed[name] = value

    known = {name for name in PARAMETERS if name in declared or name in held}
    space = Space(_plain(document), _parameters(declared, known, f"{where}: parameters", faults), fixed, (), {})
    unsure = known - space.parameters.keys() - fixed.keys()
    points: dict[str, Any] = {
        name: _points(space, section, unsure, f"{where}: {name}", faults)
        for name, section in zip(LISTS, listed, strict=True)
    }
    for before, name in combinations(LISTS, 2):
        for index, point in enumerate(points[name]):
            if point in points[before] and not unsure:
                same = f"equals {before}[{points[before].index(point)}] once completed; delete one of them"
                faults.append(f"{where}: {name}[{index}]: {same}")
    search = _search(settings, where, faults)
    if faults:
        raise InputError(faults)
    return replace(space, **points, search=search)


def fix(space: Space, values: Mapping[str, Any]) -> Space:
    """Return the space with some parameters held at one value, as by `--set batch_size=16`.

    They move from `parameters` and the start points to `fixed`. Parameters that become inactive are removed from the
    start points, those that become active are added with their default, and equal start points are merged; likewise
    in `enqueue` and `portfolio`.

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
    for name in LISTS[1:]:
        document.pop(name, None)
    fixed = parse(document, "--set")
    faults: list[str] = []
    lists: dict[str, Any] = {}
    seen: list[dict[str, Value]] = []
    for name in LISTS:
        completed = [
            _complete(fixed, set(), active(fixed, point), f"--set: {name}[{index}]", faults)
            for index, point in enumerate(getattr(space, name))
        ]
        lists[name] = tuple(point for index, point in enumerate(completed) if point not in [*seen, *completed[:index]])
        seen += completed
    if faults:
        raise InputError(faults)
    document |= {name: list(points) for name, points in lists.items() if name == "start" or name in space.document}
    return replace(fixed, document=_plain(document), **lists)


def with_portfolio(space: Space) -> Space:
    """Return the space with the points of the shipped portfolio that lie inside it.

    The first is the start point of a space that has none. A space with points of its own to try, in `enqueue` or
    `portfolio`, keeps them.
    """
    if not {"enqueue", "portfolio"}.isdisjoint(space.document):
        return space
    portfolio, _ = read_yaml(PORTFOLIO, "")
    assert isinstance(portfolio, dict)
    inside: list[dict[str, Value]] = []
    for point in portfolio["portfolio"]:
        outside: list[str] = []
        completed = _complete(space, set(), active(space, {**DEFAULTS, **point}), "", outside)
        whole = {**DEFAULTS, **trial_values(space, completed)}
        same = not outside and all(whole.get(name) == value for name, value in point.items())
        if same and completed not in inside and not any(_near(completed, other) for other in space.start):
            inside.append(completed)
    if not inside:
        return space
    if space.start:
        return replace(space, document={**space.document, "portfolio": _plain(inside)}, portfolio=tuple(inside))
    document = {**space.document, "start": _plain(inside[:1]), "portfolio": _plain(inside[1:])}
    return replace(space, document=document, start=tuple(inside[:1]), portfolio=tuple(inside[1:]))


def is_same(space: Space, recorded: Mapping[str, Any]) -> bool:
    """Whether a run's space, as its plan.yaml has it, is this one, whichever portfolio was then added to it."""
    added = {"enqueue", "portfolio"} - space.document.keys()
    added = set() if len(added) < 2 else added if space.start else added | {"start"}
    documents = [
        {name: part for name, part in document.items() if part and name not in added}
        for document in (space.document, recorded)
    ]
    return documents[0] == documents[1]


def _near(point: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    """Whether two points differ in nothing but the learning rate, and in that by a factor of less than `NEAR`."""
    rates = [float(each.get("learning_rate", 1.0)) for each in (point, other)]
    same = {**point, "learning_rate": 0} == {**other, "learning_rate": 0}
    return same and max(rates) < NEAR * min(rates)


def _section(document: dict[Any, Any], key: str, where: str, faults: list[str]) -> Any:
    section, kind = document.get(key), SECTIONS[key]
    if section is not None and not isinstance(section, kind):
        rule, line = ("a mapping", "name: ..") if kind is dict else ("a list", "- {name: value}")
        faults.append(f"{where}: {key}: must be {rule}, got {show(section)}; write lines like `{line}`")
    return section if isinstance(section, kind) else kind()


def _check_names(names: Iterable[Any], place: str, faults: list[str]) -> None:
    for name in names:
        if name not in PARAMETERS:
            cure = "; it belongs under search" if name in SETTINGS else nearest(name, PARAMETERS)
            faults.append(f"{place}: {show(name)}: no such parameter{cure or '; use ' + ', '.join(PARAMETERS)}")


def _search(section: dict[Any, Any], where: str, faults: list[str]) -> dict[str, Any]:
    search: dict[str, Any] = {}
    for key, value in section.items():
        here = f"{where}: search.{key}"
        if key in SETTINGS:
            search[key] = checked(SearchPlan, key, value, here, faults)
        elif key in SearchPlan.model_fields:
            faults.append(f"{here}: can't be set in a space; give it on the command line: --{key}")
        elif key in PARAMETERS:
            faults.append(f"{here}: is a parameter; move it to parameters or fixed")
        else:
            faults.append(f"{where}: search: {show(key)}: no such setting{nearest(key, SETTINGS)}")
    return search


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str):  # plan.yaml records it, and search.optuna_storage may hold a password
        return without_secrets(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---- one parameter


def _parameters(declared: dict[Any, Any], known: set[str], place: str, faults: list[str]) -> dict[str, Parameter]:
    """Return the parameters without faults, in the order of suggestion."""
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
    if kind not in fitting:
        got = show(spec["type"]) if "type" in spec else "nothing"
        cure = nearest(kind, fitting) or f"; write `type: {fitting[-1]}`"
        faults.append(f"{place}.type: must be {' or '.join(fitting)} for {name}, got {got}{cure}")
    allowed = ("type", *TYPES.get(kind, ("choices", *RANGE_KEYS)), "when")
    for key in spec:
        if key not in allowed:
            faults.append(f"{place}: {show(key)}: no such key{nearest(key, allowed)}; use {', '.join(allowed)}")

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
        got = ("an empty list" if listed == [] else show(listed)) if "choices" in spec else "nothing"
        faults.append(f"{place}.choices: must be a list of one or more values, got {got}; write `choices: [.., ..]`")
        return ()
    values = [checked(TrialConfig, name, value, f"{place}.choices[{i}]", faults) for i, value in enumerate(listed)]
    for index, value in enumerate(values):
        if value is not None and value in values[:index]:
            faults.append(f"{place}.choices[{index}]: {show(value)} is listed twice; delete one of them")
    return tuple(values)


def _range(name: str, kind: str, spec: dict[Any, Any], place: str, faults: list[str]) -> dict[str, Any]:
    bounds: list[Any] = []
    for key in ("low", "high"):
        if key not in spec:
            faults.append(f"{place}: has no {key}; add `{key}: ..`, which type {kind} needs")
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
        faults.append(f"{place}.low: must be above 0 with log, got {low}; raise low or delete log")
    if "step" not in spec:
        return {"low": low, "high": high, "log": log}
    if log is True:
        faults.append(f"{place}: step and log exclude each other, got step {show(step)}; delete one of them")
    elif type(step) not in ((int,) if kind == "int" else (int, float)) or not 0 < step < math.inf:
        number = as_number(step)
        cure = f"; write {number}" if number else ""
        what = "an integer" if kind == "int" else "a number"
        faults.append(f"{place}.step: must be {what} above 0, got {show(step)}{cure}")
    elif ordered:
        steps = (Fraction(str(high)) - Fraction(str(low))) / Fraction(str(step))
        if steps > MOST_STEPS:
            faults.append(
                f"{place}.step: must divide low to high into at most {MOST_STEPS:,} steps, got {step}; raise it"
            )
        elif steps.denominator != 1:
            end = float(Fraction(str(low)) + int(steps) * Fraction(str(step)))
            cure = f"; write `high: {int(end) if kind == 'int' else end}`" if end > low else ""
            faults.append(f"{place}.step: must divide high - low = {high} - {low} evenly, got {step}{cure}")
    return {"low": low, "high": high, "log": log, "step": step}


def _outside(parameter: Parameter, value: Any) -> str | None:
    """Return the rule that keeps a value, valid for `TrialConfig`, out of the parameter's range; None if inside."""
    if parameter.type == "categorical":
        listed = ", ".join(map(str, parameter.choices))
        rule = f"must be one of {listed}, got {show(value)}{nearest(value, parameter.choices)}"
        return None if value in parameter.choices else rule
    if not parameter.low <= value <= parameter.high:
        return f"must be between low {parameter.low} and high {parameter.high}, got {value}"
    steps = (value - parameter.low) / parameter.step if parameter.step else 0
    # Optuna's own tolerance: 3 * 0.1 is on a grid of tenths.
    off_grid = abs(steps - round(steps)) >= 1e-8
    return f"must be low {parameter.low} plus a multiple of {parameter.step}, got {value}" if off_grid else None


# ---- start points


def _points(
    space: Space, points: list[Any], unsure: set[str], place: str, faults: list[str]
) -> tuple[dict[str, Value], ...]:
    """Return completed points; `place` is their section, for the messages."""
    found: list[dict[str, Value]] = []
    for index, point in enumerate(points):
        here = f"{place}[{index}]"
        if not isinstance(point, dict):
            faults.append(f"{here}: must be a mapping such as {{learning_rate: 0.001}}, got {show(point)}")
            continue
        before = len(faults)
        completed = _complete(space, unsure, point, here, faults)
        if len(faults) == before and not unsure and completed in found:
            other = f"{place.rpartition(' ')[2]}[{found.index(completed)}]"
            faults.append(f"{here}: equals {other} once completed; delete one of them")
        found.append(completed)
    return tuple(found)


def _complete(
    space: Space, unsure: set[str], point: Mapping[Any, Any], place: str, faults: list[str]
) -> dict[str, Value]:
    """Return a start point with every active parameter; what depends on `unsure`, names with faults, is not judged."""
    _check_names([name for name in point if name not in space.fixed], place, faults)
    for name in PARAMETERS:
        if name in point and name in space.fixed:
            faults.append(f"{place}.{name}: is fixed at {show(space.fixed[name])}; delete it here")
        elif name in point and name not in space.parameters and name not in unsure:
            faults.append(f"{place}.{name}: is not in parameters; add it there, or delete it here")
    values: dict[str, Value] = {}
    unsure = set(unsure)
    for name, parameter in space.parameters.items():
        here = f"{place}.{name}"
        if unsure.intersection(parents(parameter.condition)):
            unsure.add(name)
        elif not holds(parameter.condition, {**space.fixed, **values}):
            if name in point:
                faults.append(f"{here}: is inactive, since `{parameter.when}` does not hold; delete it here")
        else:
            value = checked(TrialConfig, name, point[name], here, faults) if name in point else DEFAULTS.get(name)
            rule = None if value is None else _outside(parameter, value)
            if name not in point and (value is None or rule):
                default = "it has no default" if value is None else f"its default {rule}"
                faults.append(f"{here}: is missing, and {default}; give it a value")
            elif rule:
                faults.append(f"{here}: {rule}; change it, or widen the parameter's range")
            if value is None or rule:
                unsure.add(name)
            else:
                values[name] = value
    return values
