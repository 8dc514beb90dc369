"""The final model as one ONNX file, compared with PyTorch on real images."""

import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuning.model.final import Final
from tuning.record.temperature import tempered
from tuning.training import backbones
from tuning.training.dataset import Data

CHECKED_IMAGES, CHECKED_DIFFERENCE = 64, 1e-4  # validation images; largest difference between probabilities
BATCH = 16  # of the comparison: another size than the model was traced with
MODEL = "model.onnx"


class Classifier(nn.Module):
    """Images to the probabilities that `predict` gives: normalisation, ensemble average and temperature included."""

    def __init__(self, final: Final, temperature: float) -> None:
        super().__init__()
        self.networks = nn.ModuleList([network for network, _ in final.networks.values()])
        configs = [config for _, config in final.networks.values()]
        self.normal = [backbones.input_mean_std(config.backbone) for config in configs]
        self.sizes = sorted({config.image_size for config in configs})
        self.inputs = [self.sizes.index(config.image_size) for config in configs]
        self.shares, self.temperature = list(final.shares.values()), temperature

    def forward(self, *images: Tensor) -> Tensor:
        """Probabilities [n, classes] of the same images at each of `sizes`: [n, 3, side, side] in 0 to 1."""
        logs = []
        members = zip(self.networks, self.normal, self.inputs, self.shares, strict=True)
        for network, (mean, std), place, share in members:
            pixels = images[place]
            centred = (pixels - pixels.new_tensor(mean).view(1, 3, 1, 1)) / pixels.new_tensor(std).view(1, 3, 1, 1)
            logs.append(torch.log_softmax(network(centred), dim=1) + float(np.log(share)))
        mixture = torch.logsumexp(torch.stack(logs), dim=0) if len(logs) > 1 else logs[0]
        return torch.softmax(mixture / self.temperature, dim=1)


def export(
    path: Path, final: Final, data: Mapping[int, Data], *, temperature: float, described: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the model as ONNX with `described` as metadata, and compare it with PyTorch on validation images.

    Return, for `metrics.json`, the largest difference between probabilities and the number of images, or the error: the
    model is usable without ONNX, so any failure is printed, never raised. The networks are moved to the CPU.
    """
    try:
        write_onnx(path, final, temperature, described)
        some = {size: dataclasses.replace(each, val=each.val[:CHECKED_IMAGES]) for size, each in data.items()}
        wanted = tempered(final.logits(some, "val", torch.device("cpu")), temperature)
        difference = float(np.abs(run_onnx(path, some) - wanted).max())
        if not difference <= CHECKED_DIFFERENCE:
            raise RuntimeError(f"its probabilities differ from PyTorch's by {difference:.2g}")
    except Exception as error:
        path.unlink(missing_ok=True)
        reason = _reason(error)
        print(f"{path.name} could not be exported ({reason}); the model is complete without it", file=sys.stderr)
        return {"error": reason}
    return {"largest_difference": difference, "images": len(wanted)}


def _reason(error: BaseException) -> str:
    """Return what failed, in a line: torch wraps it in errors that tell its developers what to do next."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def write_onnx(path: Path, final: Final, temperature: float, described: Mapping[str, Any]) -> None:
    """Write an ONNX file that gives `probabilities`, for any batch size.

    Its input is `images`, float32 [batch, 3, side, side] in 0 to 1, or one `images_<side>` for each of several sizes.
    """
    model = Classifier(final, temperature).cpu().eval()
    examples = tuple(torch.rand(2, 3, side, side) for side in model.sizes)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")  # by the exporter's tracing
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")  # if there are several inputs
        program = torch.onnx.export(
            model,
            examples,
            dynamo=True,
            dynamic_shapes={"images": tuple({0: batch} for _ in examples)},
            input_names=input_names(model.sizes),
            output_names=["probabilities"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    )
    program.save(path, external_data=False)


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
