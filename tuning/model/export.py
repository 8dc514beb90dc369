"""The final model as one ONNX file, compared with PyTorch on real images."""

import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tuning.model.final import Final
from tuning.record.temperature import Temperature, tempered
from tuning.training import backbones
from tuning.training.dataset import Data

CHECKED_IMAGES, CHECKED_DIFFERENCE = 64, 1e-4  # validation images; largest difference between probabilities
BATCH = 16  # of the comparison: another size than the model was traced with
MODEL, OPSET = "model.onnx", 18


class Classifier(nn.Module):
    """Images to the probabilities that `predict` gives: normalisation, ensemble average and temperature included."""

    def __init__(self, final: Final, temperature: Temperature, multi_label: bool = False) -> None:
        super().__init__()
        self.networks = nn.ModuleList([network for network, _ in final.networks.values()])
        configs = [config for _, config in final.networks.values()]
        self.normal = [backbones.input_mean_std(network) for network, _ in final.networks.values()]
        self.sizes = sorted({config.image_size for config in configs})
        self.inputs = [self.sizes.index(config.image_size) for config in configs]
        self.shares, self.multi_label = list(final.shares.values()), multi_label
        self.temperature = torch.as_tensor(temperature, dtype=torch.float32)

    def forward(self, *images: Tensor) -> Tensor:
        """Probabilities [n, classes] of the same images at each of `sizes`: [n, 3, side, side] in 0 to 1."""
        outputs = []
        members = zip(self.networks, self.normal, self.inputs, self.shares, strict=True)
        for network, (mean, std), place, share in members:
            pixels = images[place]
            centred = (pixels - pixels.new_tensor(mean).view(1, 3, 1, 1)) / pixels.new_tensor(std).view(1, 3, 1, 1)
            logits = network(centred)
            if self.multi_label:
                logs = [functional.logsigmoid(logits), functional.logsigmoid(-logits)]
            else:
                logs = [torch.log_softmax(logits, dim=1)]
            outputs.append(torch.stack(logs) + float(np.log(share)))
        mixture = torch.logsumexp(torch.stack(outputs), dim=0) if len(outputs) > 1 else outputs[0]
        if self.multi_label:
            return torch.sigmoid((mixture[0] - mixture[1]) / self.temperature)
        return torch.softmax(mixture[0] / self.temperature, dim=1)


def export(
    path: Path, final: Final, data: Mapping[int, Data], *, temperature: Temperature, described: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the model as ONNX with `described` as metadata, and compare it with PyTorch on validation images.

    Tracing comes first; what it can't write, or writes wrongly, `torch.export` tries, which takes ten seconds longer.

    Return, for `metrics.json`, the largest difference between probabilities and the number of images, or the error: the
    model is usable without ONNX, so any failure is printed, never raised. The networks are moved to the CPU.
    """
    some = {size: dataclasses.replace(each, val=each.val[:CHECKED_IMAGES]) for size, each in data.items()}
    several = any(each.multi_label for each in data.values())
    wanted = tempered(final.logits(some, "val", torch.device("cpu")), temperature, multi_label=several)
    for traced in (True, False):
        try:
            write_onnx(path, final, temperature, described, multi_label=several, traced=traced)
            difference = float(np.abs(run_onnx(path, some) - wanted).max())
            if not difference <= CHECKED_DIFFERENCE:
                raise RuntimeError(f"its probabilities differ from PyTorch's by {difference:.2g}")
            return {"largest_difference": difference, "images": len(wanted)}
        except Exception as error:
            path.unlink(missing_ok=True)
            reason = _reason(error)
    print(f"{path.name} could not be exported ({reason}); the model is complete without it", file=sys.stderr)
    return {"error": reason}


def _reason(error: BaseException) -> str:
    """Return what failed, in a line: torch wraps it in errors that tell its developers what to do next."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def write_onnx(
    path: Path,
    final: Final,
    temperature: Temperature,
    described: Mapping[str, Any],
    *,
    multi_label: bool = False,
    traced: bool = True,
) -> None:
    """Write an ONNX file that gives `probabilities`, for any batch size, by tracing or by `torch.export`.

    Its input is `images`, float32 [batch, 3, side, side] in 0 to 1, or one `images_<side>` for each of several sizes.
    """
    model = Classifier(final, temperature, multi_label).cpu().eval()
    examples = tuple(torch.rand(2, 3, side, side) for side in model.sizes)
    inputs, output = input_names(model.sizes), "probabilities"
    named: dict[str, Any] = {"input_names": inputs, "output_names": [output]}
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        if traced:
            warnings.simplefilter("always")
            axes = {name: {0: "batch"} for name in (*inputs, output)}
            with _silent():
                torch.onnx.export(model, examples, path, dynamo=False, dynamic_axes=axes, opset_version=OPSET, **named)
            if any(each.category.__name__ == "TracerWarning" for each in warned):
                raise RuntimeError("what depends on the values of an image would become constant")
            program = onnx.load(path)
        else:
            shapes = {"images": tuple({0: torch.export.Dim("batch")} for _ in examples)}
            exported = torch.onnx.export(model, examples, dynamo=True, dynamic_shapes=shapes, verbose=False, **named)
            assert exported is not None
            program = exported.model_proto
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    onnx.helper.set_model_props(program, text)
    onnx.save(program, path)


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what C++ prints: torch shows the whole graph of what tracing can't write, whatever `verbose` says."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def interface(final: Final) -> dict[str, Any]:
    """Return the file's inputs and output, for `config.yaml` and its metadata."""
    sizes = sorted({config.image_size for _, config in final.networks.values()})
    return {
        "inputs": {name: ["batch", 3, side, side] for name, side in zip(input_names(sizes), sizes, strict=True)},
        "input": "float32, RGB from 0 to 1; mean and std are applied inside",
        "output": "probabilities, [batch, classes], with the temperature",
    }


def input_names(sizes: Sequence[int]) -> list[str]:
    """Return the names of the inputs, by image size."""
    return ["images"] if len(sizes) == 1 else [f"images_{side}" for side in sizes]


def run_onnx(path: Path, data: Mapping[int, Data]) -> NDArray[np.float64]:
    """Return an ONNX file's probabilities [images, classes] of the validation images."""
    import onnxruntime  # takes a tenth of a second to load

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    sizes = sorted(data)
    found = []
    for start in range(0, len(data[sizes[0]].val), BATCH):
        inputs = {}
        for name, size in zip(input_names(sizes), sizes, strict=True):
            each = data[size]
            pixels = np.asarray(each.images[each.val[start : start + BATCH]], dtype=np.float32) / 255
            inputs[name] = np.repeat(pixels, 3 // pixels.shape[3], axis=3).transpose(0, 3, 1, 2).copy()
        found.append(session.run(["probabilities"], inputs)[0])
    return np.concatenate(found).astype(np.float64)
