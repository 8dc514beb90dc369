"""Checkpoints as people have them: loaded as a whole and told, or refused; never half of them in silence."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from tuning.settings.config import InputError
from tuning.settings.values import Weights
from tuning.training import backbones
from tuning.training.weights import find_weights

EXTRA = {"decoder.0.weight": torch.zeros(3), "decoder.0.bias": torch.zeros(3)}
WRAPPED = {
    "plain": (lambda state: state, ""),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, ""),
    "model": (lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.ones(())}}}}, ""),
    "another entry": (lambda state: {"model_state_dict": state, "loss": torch.tensor(0.3)}, ""),
    "before PyTorch counted batches": (lambda state: without_head(drop(state, "num_batches_tracked")), ""),
    "DataParallel": (lambda state: prefixed(state, "module."), ""),
    "compiled": (lambda state: prefixed(state, "_orig_mod.module."), ""),
    "Lightning": (lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}}, "'model.'"),
    "a part": (lambda state: prefixed(state, "net.encoder.") | EXTRA, "'net.encoder.'; left out: decoder (2 tensors)"),
    "another head": (lambda state: without_head(state) | EXTRA, "left out: decoder (2 tensors)"),
    "no head": (lambda state: without_head(state), ""),
}


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def drop(state, end):
    return {key: tensor for key, tensor in state.items() if not key.endswith(end)}


def without_head(state):
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


def build(file, backbone="test_resnet", **normal):
    shape = {"classes": 3, "image_size": 32, "head_dropout": 0.0, "seed": 0}
    return backbones.build(backbone, **shape, weights=Weights(file=file, **normal))


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_checkpoint_is_loaded_whatever_wraps_it(tmp_path, wrapping):
    wrap, said = WRAPPED[wrapping]
    source = timm.create_model("test_resnet", num_classes=7).state_dict()
    torch.save(wrap(source), tmp_path / "mine.pth")
    model = build(tmp_path / "mine.pth")
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in without_head(source).items())
    told = model.pretrained_cfg["loaded"]
    assert told.endswith(said) and bool(told) == bool(said)
    assert not told or told.startswith(f"{len(without_head(source))} tensors; ")


def test_a_stem_of_one_channel_sees_grey_images_as_before(tmp_path):
    source = timm.create_model("test_resnet", in_chans=1, num_classes=0).eval()
    torch.save(source.state_dict(), tmp_path / "grey.pth")
    model = build(tmp_path / "grey.pth")
    assert "its conv1.0 of one channel shared among three" in model.pretrained_cfg["loaded"]
    grey = torch.rand(2, 1, 32, 32)
    with backbones.evaluating(model), torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(grey.expand(-1, 3, -1, -1)), source.forward_features(grey), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"layer4.1.conv1.weight": torch.zeros(3)}, r"layer4\.1\.conv1\.weight is unexpected"),
        (lambda state: {key: state[key] for key in list(state)[5:]}, r"is missing"),
        (lambda state: prefixed(state, "model.") | {"model.layer3.9.weight": torch.zeros(3)}, "is unexpected"),
        (lambda state: {"student": state, "teacher": state}, "holds 2 state dicts: student, teacher; keep one"),
        (lambda state: {"epoch": 3}, "holds no tensors"),
        (
            lambda state: prefixed(state, "teacher.") | prefixed(state, "student."),
            "networks: teacher., student.; keep one",
        ),
    ],
)
def test_what_would_be_half_loaded_is_refused(tmp_path, change, said):
    torch.save(change(timm.create_model("test_resnet").state_dict()), tmp_path / "mine.pth")
    with pytest.raises(InputError, match=said):
        build(tmp_path / "mine.pth")


def test_mean_and_standard_deviation_are_those_of_the_file(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "mine.pth")
    model = build(tmp_path / "mine.pth", mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert backbones.input_mean_std(model) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert (
        backbones.input_mean_std(build(tmp_path / "mine.pth", mean=(0.4,)))[1]
        == timm.get_pretrained_cfg("test_resnet").std
    )


def test_a_tag_of_the_users_own_leaves_the_network_as_it_is(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "mine.pth")
    mine, plain = (build(tmp_path / "mine.pth", name) for name in ("test_resnet.mine", "test_resnet"))
    assert mine.state_dict().keys() == plain.state_dict().keys() and "state_dict" not in mine.pretrained_cfg
    assert torch.equal(mine.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)


def test_a_link_to_a_file_without_a_suffix_is_read_by_the_links(tmp_path):
    """As the Hugging Face cache keeps files."""
    (tmp_path / "blob").mkdir()
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "blob" / "0a1b2c")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob" / "0a1b2c")
    found = find_weights(["test_resnet"], {"test_resnet": Weights(file=tmp_path / "model.safetensors")})
    assert backbones.build(
        "test_resnet", classes=2, image_size=32, head_dropout=0.0, seed=0, weights=found["test_resnet"]
    )


def test_a_package_of_weights_is_read_by_its_timm_tag():
    name = "tf_efficientnet_lite0.in1k"
    weights = find_weights([name], "auto")[name]
    assert backbones.build(name, classes=2, image_size=32, head_dropout=0.0, seed=0, weights=weights)
