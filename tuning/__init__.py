"""Hyperparameter search for fine-tuning pretrained image classifiers."""

import os
from importlib import import_module
from typing import Any

from tuning.api import CommandModule
from tuning.training.compiler import load_when_used

__version__ = "0.1.0"

# Read when these libraries are imported, which then write below HOME and send events, onnxruntime at once.
for _variable, _off in (("ORT_DISABLE_TELEMETRY", "1"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
    os.environ.setdefault(_variable, _off)
# OpenMP's threads spin 300,000 times while they wait for each other: where other processes need the cores, too, nearly
# all of the time (benchmarks/README.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

load_when_used()
import_module("tuning.search").__class__ = CommandModule


def __getattr__(name: str) -> Any:
    """Give `load_model` or `InputError`, once it is asked for."""
    if name in ("load_model", "InputError"):
        return getattr(import_module("tuning.model.folder"), name)
    raise AttributeError(f"module 'tuning' has no attribute {name!r}")
