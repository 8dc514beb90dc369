"""The ONNX file gives what PyTorch gives, for one network and for several, and says how it wants its images."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from shared import make_data
from torch import nn

from tuning.model.export import Classifier, _reason, export, run_onnx, write_onnx
from tuning.model.final import Final, folded_network
from tuning.record.temperature import tempered
from tuning.settings.config import TrialConfig
from tuning.training import backbones
from tuning.training.folding import FOLDED

CPU = torch.device("cpu")
ODD = "<script>alert(1)</script>, \"a\" 'b'\n😷"


def built(name, size, seed=0):
    config = TrialConfig(backbone=name, image_size=size, seed=seed)
    network = backbones.build(name, classes=2, image_size=size, head_dropout=0.3, seed=seed, weights=None)
    with torch.no_grad():
        network.get_classifier()[1].weight.mul_(50)
    return network.eval(), config


def final_of(*members):
    total = len(members) * (len(members) + 1) / 2
    shares = {str(number): (number + 1) / total for number in range(len(members))}
    return Final(dict(zip(shares, members, strict=True)), shares, None, {})


DATA = {32: make_data(side=32), 64: make_data(side=64)}


def pictures(data):
    pixels = torch.from_numpy(data.images[data.val]).permute(0, 3, 1, 2) / 255
    return pixels.repeat(1, 3, 1, 1)


@pytest.mark.parametrize(
    "members", [[("test_resnet", 32)], [("test_resnet", 32), ("test_efficientnet", 64), ("test_resnet", 32)]]
)
def test_what_is_exported_is_what_predict_gives(members):
    final = final_of(*(built(*member, seed=number) for number, member in enumerate(members)))
    data = {size: DATA[size] for _, size in members}
    wanted = tempered(final.logits(data, "val", CPU), 1.7)
    model = Classifier(final, 1.7).eval()
    with torch.no_grad():
        found = model(*(pictures(data[size]) for size in model.sizes)).numpy()
    assert np.allclose(found, wanted, atol=1e-6) and np.ptp(wanted) > 0.01


def test_a_folded_network_is_written_by_tracing(tmp_path):
    config = TrialConfig(backbone="tf_efficientnet_lite0", image_size=32)  # with strided convolutions that pad
    network = folded_network(config, 2, None).eval()
    assert any(type(module) in FOLDED.values() for module in network.modules())
    final = Final({"": (network, config)}, {"": 1.0}, None, {})
    data = {32: DATA[32]}
    write_onnx(tmp_path / "model.onnx", final, 1.7, {})
    wanted = tempered(final.logits(data, "val", CPU), 1.7)
    assert np.allclose(run_onnx(tmp_path / "model.onnx", data), wanted, atol=1e-5)
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Conv" in kinds and not kinds & {"BatchNormalization", "Sqrt", "Reciprocal"}  # nothing is left to compute


@pytest.mark.slow
def test_onnx_and_pytorch_agree(tmp_path):
    final = final_of(built("test_resnet", 32), built("test_efficientnet", 64))
    path = tmp_path / "model.onnx"
    described = {"classes": ["dark", ODD], "layout": "NCHW", "temperature": 1.7}
    result = export(path, final, DATA, temperature=1.7, described=described)
    assert result["largest_difference"] < 1e-5 and result["images"] == 8
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["layout"] == "NCHW" and metadata["temperature"] == "1.7"
    assert json.loads(metadata["classes"]) == ["dark", ODD]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(given.name, given.shape) for given in session.get_inputs()] == [
        (f"images_{side}", ["batch", 3, side, side]) for side in (32, 64)
    ]
    for count in (1, 3):
        given = {f"images_{side}": np.zeros((count, 3, side, side), np.float32) for side in (32, 64)}
        (found,) = session.run(["probabilities"], given)
        assert found.shape == (count, 2) and np.allclose(found.sum(axis=1), 1)


class Branching(nn.Module):
    """What no exporter can trace: a branch on the values of an image."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def forward(self, images):
        return images.mean((2, 3))[:, :2] if images.sum().item() > 3 else images.amax((2, 3))[:, :2]


@pytest.mark.slow
def test_a_failed_export_is_reported(tmp_path, capsys):
    final = final_of((Branching(), TrialConfig(backbone="test_resnet", image_size=32)))
    result = export(tmp_path / "model.onnx", final, {32: DATA[32]}, temperature=1.0, described={})
    assert result["error"] and not list(tmp_path.iterdir())
    assert "model.onnx could not be exported" in capsys.readouterr().err


def test_the_reason_of_a_failed_export_is_its_cause():
    cause = ValueError("only 4D queries are supported\nTraceback")
    try:
        try:
            raise cause
        except ValueError as error:
            raise RuntimeError("\x1b[96mFailed to convert\x1b[0m\nNext steps:") from error
    except RuntimeError as error:
        assert _reason(error) == "ValueError: only 4D queries are supported"
    assert _reason(RuntimeError("\x1b[96mno\x1b[0m way")) == "RuntimeError: no way"
