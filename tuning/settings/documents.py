"""YAML files of users and runs, read with the line of every fault; the checked plan of a run."""

import math
from pathlib import Path
from typing import Any

import yaml

from tuning.settings.config import InputError, SearchPlan, build
from tuning.settings.words import show

NEEDED = ("name", "data", "space", "trials", "epochs", "seed", "metric")  # settings that all versions have
MOST_NODES = 100_000  # of one file, counting those that aliases repeat


def read_yaml(path: Path, cure: str = "") -> tuple[object, list[str]]:
    """Return the content of a YAML file, and its duplicate keys as faults.

    Raises:
        InputError: it can't be read, for which `cure` ends the message, or is not valid YAML.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is not None and _size(root, {}) > MOST_NODES:
            raise InputError(f"{path}: aliases (*name) give a cycle, or over {MOST_NODES:,} values; write them out")
        document = None if root is None else loader.construct_document(root)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1}: not UTF-8 text; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        inside = "flow mapping" in str(error.context)
        quoted = "; inside braces, quote a value that has commas or brackets" if inside else ""
        raise InputError(f"{path}: {place}not valid YAML: {error.problem or error.context}{quoted}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise InputError(f"{path}: line {line}, column {column}: not valid YAML: {error.reason}; delete it") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; write it flatter") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}){cure}") from None
    except InputError:
        raise
    except (ValueError, OverflowError) as error:  # a path with a null byte; "\\UFFFFFFFF", which PyYAML lets through
        raise InputError(f"{path}: can't be read ({error}){cure}") from None
    return document, [f"{path}: {fault}" for fault in loader.repeated]


class _Loader(yaml.SafeLoader):
    """Collects duplicate keys, of which PyYAML would keep the last, and reports the line of every bad value."""

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
                    before = f"is already in line {first[key.value]}"
                    self.repeated.append(f"line {line}: {show(key.value)} {before}; delete one of them")
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
    """Return the number of nodes from this one down, with those of aliases; infinite if an alias contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts if isinstance(part, yaml.Node))
    return sizes[id(node)]


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: the file can't be read, or has other content.
    """
    document, faults = read_yaml(path)
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        faults.append(f"{path}: is damaged: must be a mapping with names as keys; restore it from a copy")
    if faults:
        raise InputError(faults)
    return document  # type: ignore[return-value]


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan.yaml of a run, with `settings` and `provenance` checked; `space_file.parse` checks its `space`.

    Settings of an older version are left as they are, and those that it lacks are not added.

    Raises:
        InputError: the folder is not a run, or the file is damaged.
    """
    path = folder / "plan.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: has no plan.yaml; give the folder of a run, such as results/NAME")
    document = read_mapping(path)
    check_parts(document, path, {"settings": dict, "space": dict, "provenance": dict})
    check_parts(document["provenance"], path, {"fingerprint": str})
    settings = document["settings"]
    if missing := [key for key in NEEDED if key not in settings]:
        raise InputError(f"{path}: is damaged: settings lack {', '.join(missing)}; restore it from a copy")
    plan_in(document, path)
    return document


def plan_in(document: dict[str, Any], path: Path) -> SearchPlan:
    """Return those settings of a plan.yaml that this version has; raise InputError for each wrong value."""
    settings = document["settings"]
    return build(SearchPlan, {key: settings[key] for key in SearchPlan.model_fields if key in settings}, str(path))


def check_parts(document: dict[str, Any], path: Path, parts: dict[str, type]) -> None:
    """Check that a document has each of the keys with a value of its type; raise InputError if not."""
    words: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    faults = [
        f"{path}: is damaged: {key} must be {words[kind]}, got {show(document.get(key))}; restore it from a copy"
        for key, kind in parts.items()
        if not isinstance(document.get(key), kind)
    ]
    if faults:
        raise InputError(faults)
