"""`when:` conditions: parse, evaluate, check; and the check of a single value, which a whole space needs as well."""

import ast
import graphlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel

from tuning.settings.config import STRUCTURED, TrialConfig, check_value
from tuning.settings.values import DEPTH_ALL
from tuning.settings.words import LARGEST_INT, SCALARS, nearest, show

NUMBERS = {name: kind.__name__ for name, kind in get_type_hints(TrialConfig).items() if kind in (int, float)}
Value = str | int | float

ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
CONDITION_RULE = (
    "compare parameters with values by ==, !=, <, <=, >, >=, in [..] or not in [..], joined by and, or, not: "
    "`optimizer == sgd and unfreeze_depth in [1, 2]`"
)
LONGEST_CONDITION = 1000  # characters: keeps the syntax tree shallow


@dataclass(frozen=True)
class Comparison:
    name: str
    operator: type[ast.cmpop]
    values: tuple[Value, ...]  # one, or those of the list after `in`


@dataclass(frozen=True)
class Junction:
    word: str  # and, or, not
    parts: tuple["Comparison | Junction", ...]


Condition = Comparison | Junction


# ---- parsing


def parse_condition(text: Any) -> Condition:
    """Parse a condition such as `optimizer == sgd and unfreeze_depth > 1`; raise ValueError with the rule it breaks."""
    if not isinstance(text, str) or len(text) > LONGEST_CONDITION:
        raise ValueError(f"must be text of at most {LONGEST_CONDITION} characters: {CONDITION_RULE}")
    try:
        tree = ast.parse(" ".join(text.split()), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"can't be parsed: {CONDITION_RULE}") from None
    return _joined(tree.body)


def _joined(node: ast.expr) -> Condition:
    match node:
        case ast.BoolOp(op=op, values=parts):
            return Junction("and" if isinstance(op, ast.And) else "or", tuple(map(_joined, parts)))
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return Junction("not", (_joined(part),))
        case ast.Compare(ast.Name(name), [ast.In() | ast.NotIn() as op], [ast.List([_, *_] as listed)]):
            return Comparison(name, type(op), tuple(_literal(name, item) for item in listed))
        case ast.Compare(ast.Name(name), [op], [right]) if isinstance(op, (ast.Eq, ast.NotEq, *ORDER)):
            return Comparison(name, type(op), (_literal(name, right),))
    raise ValueError(f"can't be parsed at `{ast.unparse(node)}`: {CONDITION_RULE}")


def _literal(name: str, node: ast.expr) -> Value:
    match node:
        case ast.Constant(value=str() | int() | float() as value) if not isinstance(value, bool):
            word: Value = value
        case ast.Name() | ast.Attribute(value=ast.Name()):  # timm's names may have a dot: vgg16.tv_in1k
            word = ast.unparse(node)
        case _:
            raise ValueError(f"can't be parsed at `{ast.unparse(node)}`: {CONDITION_RULE}")
    return DEPTH_ALL if name == "unfreeze_depth" and word == "all" else word


# ---- evaluating


def parents(condition: Condition | None) -> list[str]:
    """Return the names of the parameters that a condition compares, in its order, with repeats."""
    return [comparison.name for comparison in comparisons(condition)]


def comparisons(condition: Condition | None) -> list[Comparison]:
    """Return the comparisons of a condition, in its order."""
    if isinstance(condition, Junction):
        return [comparison for part in condition.parts for comparison in comparisons(part)]
    return [] if condition is None else [condition]


def holds(condition: Condition | None, values: Mapping[str, Any]) -> bool:
    """Return whether a condition holds: never if `values` lacks one of its parents, always if it is None."""
    if condition is None:
        return True
    return all(name in values for name in parents(condition)) and _decided(condition, values)


def _decided(condition: Condition, values: Mapping[str, Any]) -> bool:
    if isinstance(condition, Junction):
        parts = [_decided(part, values) for part in condition.parts]
        return {"and": all(parts), "or": any(parts), "not": not parts[0]}[condition.word]
    value, order = values[condition.name], ORDER.get(condition.operator)
    if order:
        return order(value, condition.values[0])
    return (value in condition.values) == (condition.operator in (ast.Eq, ast.In))


# ---- checking


def fits(
    condition: Condition | None,
    known: set[str],
    outside: Callable[[str, Value], str | None],
    place: str,
    faults: list[str],
) -> bool:
    """Return whether a condition can be decided; append what prevents it to `faults`.

    `known` parameters can be compared; `outside` returns the rule that keeps a value out of one's range, or None.
    """
    before = len(faults)
    for comparison in comparisons(condition):
        name = comparison.name
        if name not in known:
            cure = nearest(name, known) or "; add it to one of them"
            faults.append(f"{place}: {show(name)}: is neither in parameters nor in fixed{cure}")
            continue
        for value in comparison.values:
            if comparison.operator in ORDER:
                if name not in NUMBERS:
                    faults.append(f"{place}: {name} is not a number and has no order; use ==, != or in")
                elif isinstance(value, str):
                    faults.append(f"{place}: {name} is a number, got the text {show(value)}; write a number")
            elif (value := checked(TrialConfig, name, value, f"{place}: {name}", faults)) is not None:
                if rule := outside(name, value):
                    faults.append(f"{place}: {name}: {rule}; use a value in its range")
    return len(faults) == before


def parents_first(conditions: Mapping[str, Condition | None], place: str, faults: list[str]) -> list[str]:
    """Return the names of parameters, each after its parents; those in a cycle are left out and added to `faults`."""
    remaining = dict(conditions)
    while True:
        graph = {
            name: [parent for parent in parents(condition) if parent in remaining]
            for name, condition in remaining.items()
        }
        try:
            return list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            cycle = error.args[1][::-1]
            faults.append(f"{place}: {' needs '.join(cycle)}: conditions must not form a cycle; delete one `when`")
            remaining = {name: condition for name, condition in remaining.items() if name not in cycle}


# ---- single values


def checked(model: type[BaseModel], key: str, value: Any, place: str, faults: list[str]) -> Any:
    """Return a value that the model's rule accepts; if it breaks the rule, append that to `faults` and return None."""
    try:
        if type(value) not in SCALARS and not (key in STRUCTURED and isinstance(value, dict | list)):
            raise ValueError(f"must be a number or a word, got {show(value)}")
        if type(value) is int and abs(value) > LARGEST_INT:
            raise ValueError(f"must be from -2**53 to 2**53, got {show(value)}")
        return check_value(model, key, value)
    except ValueError as error:
        cure = ""
        if type(value) is bool:
            cure = "; YAML reads yes, no, on and off as true and false: quote a word, or write a number"
        elif value is None:
            cure = "; YAML reads ~, null and an empty value as None: write a value, or quote the word"
        faults.append(f"{place}: {error}{cure}")
        return None
