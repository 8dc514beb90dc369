"""Imports point down through the rooms, Ray and Optuna stay in theirs, and tables open without torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TUNING = Path(__file__).parent.parent / "tuning"

# Each room may import itself and these; the commands, which lie beside the rooms, may import any room.
BELOW = {
    "settings": set(),
    "record": {"settings"},
    "data": {"settings", "record"},
    "checks": {"settings", "record", "data"},
    "training": {"settings", "record", "data"},
    "search": {"settings", "record", "data", "training"},
    "insight": {"settings", "record", "search"},
    "show": {"settings", "record", "search", "insight"},
    "model": {"settings", "record", "data", "checks", "training", "search", "insight", "show"},
}
MODULES = sorted(str(path.relative_to(TUNING).with_suffix("")).replace("/", ".") for path in TUNING.rglob("*.py"))
COMMANDS = {"run_search", "audit", "train_final", "evaluate", "label_issues", "report", "model_folder"}
RAY = {"search.cluster", "search.driver", "search.gpus", "search.trainable", "search.tuner", "search.worker"}
OPTUNA = {"search.optimizer", "insight.analysis"}
TORCHLESS = [
    module
    for module in MODULES
    if module.partition(".")[0] in ("settings", "record", "data", "checks", "insight", "show")
    or module in ("search.finalists", "search.optimizer", "search.stopping", "report", "audit")
]


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of ours, as `room.name` or `name`, and packages of others, that a module imports anywhere in its code."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((TUNING / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "tuning":
                parts = name.split(".")[1:]
                ours.add(".".join(parts[:2]) if parts[0] in BELOW else parts[0])
            else:
                others.add(name.partition(".")[0])
    return ours, others


def test_every_module_is_in_a_room_or_is_a_command():
    rooms = {path.parent.name for path in TUNING.glob("*/*.py")}
    assert rooms == BELOW.keys()
    assert {module for module in MODULES if "." not in module} == COMMANDS | {"__init__", "api"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    ours, others = imports(module)
    room = module.rpartition(".")[0]
    if room:
        assert {name.partition(".")[0] for name in ours} <= BELOW[room] | {room, "__version__"}
    elif module in COMMANDS:
        assert not ours & COMMANDS
    assert "ray" not in others or module in RAY
    assert "optuna" not in others or module in OPTUNA


@pytest.mark.parametrize("room", BELOW)
def test_no_imports_go_in_a_circle_within_a_room(room):
    arrows = {module: imports(module)[0] for module in MODULES if module.startswith(f"{room}.")}
    done: set[str] = set()
    while free := {module for module in arrows.keys() - done if not (arrows[module] & arrows.keys()) - done}:
        done |= free
    assert done == arrows.keys()


@pytest.mark.parametrize("room", BELOW)
def test_a_package_says_its_purpose_and_nothing_more(room):
    tree = ast.parse((TUNING / room / "__init__.py").read_text())
    assert ast.get_docstring(tree) and len(tree.body) == 1


@pytest.mark.slow
def test_tables_and_spaces_open_without_torch_or_ray():
    modules = ", ".join(f"tuning.{module}".removesuffix(".__init__") for module in TORCHLESS)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TUNING.parent)


@pytest.mark.slow
def test_the_driver_starts_without_torch():
    driver = "tuning.run_search, tuning.search.cluster, tuning.search.driver, tuning.training.checking"
    code = f"import sys, {driver}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TUNING.parent)


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_that_wait_leave_the_cores_to_others_unless_the_user_says_otherwise(given, spins):
    code = "import tuning, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    others = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    assert (
        subprocess.run(command, env=others | given, capture_output=True, text=True, check=True).stdout.strip() == spins
    )
