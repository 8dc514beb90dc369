"""Imports point one way, Ray and Optuna stay in their rooms, and tables open without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TUNING = Path(__file__).parent.parent / "tuning"
MODULES = sorted(path.stem for path in TUNING.glob("*.py") if path.stem != "__init__")

# Each module may import those to its left in its row, and those of rows above that are named.
ALLOWED = {
    "config": set(),
    "events": {"config"},
    "tables": {"config", "events"},
    "storage": {"config"},
    "samples": {"config", "tables", "storage"},
    "phantoms": {"config", "samples"},
    "dicom": {"config"},
    "decoding": {"config", "dicom", "storage"},
    "images": {"config", "tables", "decoding", "storage"},
    "claim": {"config", "storage"},
    "transfer": {"config", "storage", "tables", "claim"},
    "segments": {"config", "storage", "claim"},
    "mirror": {"config", "images", "storage", "tables", "claim", "segments", "transfer"},
    "leaks": set(),
    "alignment": {"images"},
    "duplicates": {"alignment", "decoding"},
    "shortcuts": set(),
    "findings": {"tables", "duplicates", "leaks", "shortcuts"},
    "audit": {"config", "tables", "samples", "decoding", "images", "phantoms"}
    | {"alignment", "duplicates", "findings", "leaks", "shortcuts"},
    "conditions": {"config"},
    "documents": {"config", "conditions"},
    "space": {"config", "conditions", "documents"},
    "cluster": {"config", "decoding", "images"},
    "optimizer": {"config", "space", "tables"},
    "stopping": {"config"},
    "calibration": set(),
    "intervals": {"calibration"},
    "predictions": {"tables"},
    "ensemble": {"intervals", "predictions"},
    "analysis": {"config", "documents", "tables", "space", "optimizer", "calibration", "intervals", "predictions"},
    "overfitting": {"config", "analysis"},
    "spending": {"tables", "analysis"},
    "finalists": {"config", "tables", "analysis"},
    "page": {"config"},
    "remarks": {"analysis", "calibration", "checkpoints", "ensemble", "predictions"},
    "plots": {"calibration"},
    "card": {"__version__", "decoding", "documents", "tables", "analysis", "page", "plots"},
    "mistakes": {"config", "decoding", "page", "plots"},
    "reading": {"config", "tables", "calibration", "intervals", "predictions"},
    "sections": {"config", "documents", "tables", "space", "analysis", "overfitting", "spending", "finalists", "page"}
    | {"remarks", "storage"},
    "report": {"config", "tables", "analysis", "spending", "page", "sections", "mirror", "storage"},
    "augment": {"config"},
    "weights": {"config"},
    "backbones": {"config", "weights"},
    "prefix": {"config", "weights", "backbones"},
    "depthwise": set(),
    "models": {"config", "backbones", "prefix", "depthwise"},
    "features": {"config"},
    "frozen": {"models", "features"},
    "data": {"backbones", "augment", "features", "frozen"},
    "scores": set(),
    "averaging": set(),
    "probe": {"config", "data", "features", "frozen", "models", "scores"},
    "finetune": {"config", "tables", "augment", "averaging", "backbones", "data", "models", "features", "frozen"}
    | {"scores", "probe"},
    "checkpoints": {"config", "tables", "finetune"},
    "trial": {"config", "tables", "samples", "cluster", "images", "data", "models", "features", "probe", "finetune"}
    | {"checkpoints", "predictions", "mirror", "transfer"},
    "model_folder": {"conditions", "config", "documents", "decoding", "backbones", "data", "finetune", "calibration"}
    | {"mirror", "storage", "tables"},
    "track": {"config", "tables"},
    "live": {"config", "tables", "finalists"},
    "progress": {"config", "tables", "live"},
    "summary": {"config", "tables", "analysis", "overfitting", "spending", "finalists", "live", "progress", "remarks"}
    | {"storage"},
    "final": {"config", "tables", "backbones", "checkpoints", "data", "ensemble", "features", "finetune", "predictions"}
    | {"calibration"},
    "export": {"config", "backbones", "calibration", "data", "final"},
    "activation": {"config", "backbones", "data", "prefix", "final"},
    "tuner": {"trial"},
}
COMMANDS = {"search", "run_search", "train_final"}  # may import all of the above
TORCHLESS = ["config", "conditions", "documents", "events", "space", "samples", "tables", "stopping", "finalists"]
TORCHLESS += ["calibration", "intervals", "predictions", "ensemble", "analysis", "overfitting", "spending"]
TORCHLESS += ["page", "remarks", "sections", "report", "plots", "card", "mistakes", "reading"]


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of ours, and packages of others, that a module imports anywhere in its code."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((TUNING / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tuning":
                ours.add(parts[1])
            else:
                others.add(parts[0])
    return ours, others


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    ours, others = imports(module)
    if module in COMMANDS:
        assert not ours & {"run_search", "train_final"}
    else:
        assert ours <= ALLOWED[module]
    assert "ray" not in others or module in ("cluster", "trial", "tuner", "search")
    assert "optuna" not in others or module in ("optimizer", "analysis")


def test_tables_and_spaces_open_without_torch_or_ray():
    modules = ", ".join(f"tuning.{module}" for module in TORCHLESS)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TUNING.parent)
