"""The final model as one ONNX file, compared with PyTorch on real images."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuning.insight.calibration import tempered
from tuning.model.final import Final
from tuning.settings.config import TrialConfig
from tuning.training import backbones
from tuning.training.dataset import Data

CHECKED_IMAGES, CHECKED_DIFFERENCE = 64, 1e-4  # of validation; between probabilities, at most
BATCH = 16  # images at once when it is checked: another number than it was traced with
MODEL = "model.onnx"
CPU = torch.device("cpu")


class Classifier(nn.Module):
    """Pictures to probabilities, as `predict` gives them: normalized, averaged over networks, tempered."""

    def __init__(
        self, networks: Sequence[tuple[nn.Module, TrialConfig]], shares: Sequence[float], temperature: float
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList([network for network, _ in networks])
        self.normal = [backbones.input_mean_std(config.backbone) for _, config in networks]
        self.sizes = sorted({config.image_size for _, config in networks})
        self.inputs = [self.sizes.index(config.image_size) for _, config in networks]
        self.shares, self.temperature = list(shares), temperature

    def forward(self, *images: Tensor) -> Tensor:
        """Probabilities [n, classes] of the same pictures at each of `sizes`: [n, 3, side, side] in 0 to 1."""
        logs = []
        for network, (mean, std), place, share in zip(
            self.networks, self.normal, self.inputs, self.shares, strict=True
        ):
            pixels = images[place]
            centred = (pixels - pixels.new_tensor(mean).view(1, 3, 1, 1)) / pixels.new_tensor(std).view(1, 3, 1, 1)
            logs.append(torch.log_softmax(network(centred), dim=1) + float(np.log(share)))
        mixture = torch.logsumexp(torch.stack(logs), dim=0) if len(logs) > 1 else logs[0]
        return torch.softmax(mixture / self.temperature, dim=1)


def export_or_tell(
    path: Path, final: Final, data: Mapping[int, Data], *, temperature: float, described: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the model as ONNX and compare it with PyTorch on validation images.

    The model is worth more than its second form, so a failure of whichever kind is told, not raised.

    Args:
        path: of the new file.
        final: its networks are put on the CPU.
        data: decoded images by size.
        temperature: of the probabilities.
        described: for the file's metadata: numbers and lists go as JSON.

    Returns:
        For `metrics.json`: the largest difference between probabilities, and of how many images; or the error.
    """
    try:
        write_onnx(path, list(final.networks.values()), list(final.shares.values()), temperature, described)
        some = {size: _first_of_validation(each) for size, each in data.items()}
        wanted = tempered(final.logits(some, "val", CPU), temperature)
        difference = float(np.abs(run_onnx(path, some) - wanted).max())
        if not difference <= CHECKED_DIFFERENCE:
            raise RuntimeError(f"its probabilities differ from PyTorch's by {difference:.2g}")
    except Exception as error:
        path.unlink(missing_ok=True)
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"{path.name} could not be made ({reason}); the model is whole without it", file=sys.stderr)
        return {"error": reason}
    return {"largest_difference": difference, "images": len(wanted)}


def write_onnx(
    path: Path,
    networks: Sequence[tuple[nn.Module, TrialConfig]],
    shares: Sequence[float],
    temperature: float,
    described: Mapping[str, Any],
) -> None:
    """Write networks as one ONNX file that gives `probabilities`, for any number of images at once.

    Its input is `images`, float32 [batch, 3, side, side] in 0 to 1; of networks of several sizes `images_<side>` each.
    """
    model = Classifier([(network.cpu().eval(), config) for network, config in networks], shares, temperature).eval()
    examples = tuple(torch.rand(2, 3, side, side) for side in model.sizes)
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")  # by the exporter, while it traces
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")  # twice, of several inputs
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
    """Inputs and output of the file, for `config.yaml` and its metadata."""
    sizes = sorted({config.image_size for _, config in final.networks.values()})
    return {
        "inputs": {name: ["batch", 3, side, side] for name, side in zip(input_names(sizes), sizes, strict=True)},
        "input": "float32, RGB from 0 to 1; mean and std are applied inside",
        "output": "probabilities, [batch, classes], with the temperature",
    }


def input_names(sizes: Sequence[int]) -> list[str]:
    """Names of the inputs, by the sides of their images."""
    return ["images"] if len(sizes) == 1 else [f"images_{side}" for side in sizes]


def run_onnx(path: Path, data: Mapping[int, Data]) -> NDArray[np.float64]:
    """Probabilities [images, classes] that an ONNX file gives to the validation images."""
    import onnxruntime  # takes a tenth of a second to load

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    sizes = sorted(data)
    count = len(data[sizes[0]].val)
    found = []
    for start in range(0, count, BATCH):
        given = {}
        for name, size in zip(input_names(sizes), sizes, strict=True):
            each = data[size]
            pixels = np.asarray(each.images[each.val[start : start + BATCH]], dtype=np.float32) / 255
            given[name] = np.repeat(pixels, 3 // pixels.shape[3], axis=3).transpose(0, 3, 1, 2).copy()
        found.append(session.run(["probabilities"], given)[0])
    return np.concatenate(found).astype(np.float64)


def _first_of_validation(data: Data) -> Data:
    return Data(data.images, data.labels, data.train, data.val[:CHECKED_IMAGES], data.test, data.classes)
