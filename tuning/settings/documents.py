"""YAML files that people and runs write: read with every fault told by its line, and a run's plan checked."""

import math
from pathlib import Path
from typing import Any

import yaml

from tuning.settings.conditions import show
from tuning.settings.config import InputError, SearchPlan, build

NEEDED = ("name", "data", "space", "trials", "epochs", "seed", "metric")  # settings that every version had
MOST_NODES = 100_000  # of one file, those that aliases repeat counted each time


def from_yaml(content: bytes, where: str) -> tuple[object, list[str]]:
    """What a YAML file holds, and keys that stand in it twice, as faults.

    Args:
        content: of the file.
        where: what it comes from, for the messages.

    Raises:
        InputError: it can't be read.
    """
    try:
        text = content.decode("utf-8-sig")
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None and _size(root, {}) > MOST_NODES:
            raise InputError(
                f"{where}: holds itself, or more than {MOST_NODES:,} values, by aliases (*name); write it out"
            )
        document = None if root is None else loader.construct_document(root)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1}: not UTF-8 text; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        inside = "flow mapping" in str(error.context)
        cure = "; inside braces a value that has commas or brackets needs quotes" if inside else ""
        raise InputError(f"{where}: {place}not valid YAML: {error.problem or error.context}{cure}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise InputError(f"{where}: line {line}, column {column}: not valid YAML: {error.reason}; delete it") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; write it flatter") from None
    return document, [f"{where}: {fault}" for fault in loader.repeated]


class _Loader(yaml.SafeLoader):
    """Collects repeated keys, of which PyYAML would keep the last, and gives every bad value its line."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in first:
                    self.repeated.append(
                        f"line {line}: {show(key.value)} stands already in line {first[key.value]}; delete one of them"
                    )
                first.setdefault(key.value, line)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # PyYAML lets the errors of int(), date() and the like through: 2024-02-31, !!bool maybe.
            problem = f"can't be read as {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Nodes below this one and itself; an alias counts as what it stands for, one for what it stands in without end."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts if isinstance(part, yaml.Node))
    return sizes[id(node)]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        InputError: it can't be read, or holds anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    document, faults = from_yaml(content, str(path))
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        faults.append(f"{path}: is damaged: must be a mapping of names; restore it from a copy")
    if faults:
        raise InputError(faults)
    return document  # type: ignore[return-value]


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan.yaml of a run, with `settings` and `provenance` checked; its `space` is for `space.parse`.

    Settings that an older version had are left as they are, and those that it lacked are not filled in.

    Raises:
        InputError: the folder is not that of a run, or the file is damaged.
    """
    path = folder / "plan.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: no plan.yaml there; give the folder of a run, like results/NAME")
    document = read_mapping(path)
    check_parts(document, path, {"settings": dict, "space": dict, "provenance": dict})
    check_parts(document["provenance"], path, {"fingerprint": str})
    settings = document["settings"]
    if lost := [key for key in NEEDED if key not in settings]:
        raise InputError(f"{path}: is damaged: settings lack {', '.join(lost)}; restore it from a copy")
    plan_in(document, path)
    return document


def plan_in(document: dict[str, Any], path: Path) -> SearchPlan:
    """The settings of a plan.yaml as this version knows them.

    Raises:
        InputError: those that are wrong.
    """
    settings = document["settings"]
    return build(SearchPlan, {key: settings[key] for key in SearchPlan.model_fields if key in settings}, str(path))


def check_parts(document: dict[str, Any], path: Path, parts: dict[str, type]) -> None:
    """Each of the keys must be there with a value of its type.

    Raises:
        InputError: those that are not.
    """
    words: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    faults = [
        f"{path}: is damaged: {key} must be {words[kind]}, got {show(document.get(key))}; restore it from a copy"
        for key, kind in parts.items()
        if not isinstance(document.get(key), kind)
    ]
    if faults:
        raise InputError(faults)
