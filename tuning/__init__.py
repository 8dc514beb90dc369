"""Hyperparameter search for fine-tuning pretrained image classifiers."""

import os

from tuning.training.compiler import load_when_used

__version__ = "0.1.0"

# Read when these libraries are imported, which then write below HOME and send events, onnxruntime at once.
for _variable, _off in (("ORT_DISABLE_TELEMETRY", "1"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
    os.environ.setdefault(_variable, _off)

load_when_used()
