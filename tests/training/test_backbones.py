from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from shared import LARGER

from tuning.settings.config import InputError
from tuning.settings.values import Weights
from tuning.training import backbones
from tuning.training.weights import find_weights

TINY = ("test_resnet", "test_vit", "test_efficientnet")
FIVE_STAGES = (*TINY, "resnet18", "tf_efficientnet_lite0", "mobilenetv4_conv_small")
FIVE_STAGES_SLOW = (*LARGER, "coatnet_nano_rw_224")


def _build(backbone, image_size=64, classes=3, head_dropout=0.0, seed=0, weights=None):
    if timm.get_pretrained_cfg(backbone).fixed_input_size and backbone != "test_vit":
        image_size = timm.get_pretrained_cfg(backbone).input_size[-1]
    model = backbones.build(
        backbone,
        classes=classes,
        image_size=image_size,
        head_dropout=head_dropout,
        seed=seed,
        weights=Weights(file=weights) if isinstance(weights, Path) else weights,
    )
    return model, image_size


def _images(count, image_size):
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


def _classifier(model):
    return model.get_submodule(model.pretrained_cfg["classifier"])


# ---- build ------------------------------------------------------------------------------------------------------


def test_the_tensors_of_a_lite_package_find_their_places():
    weights = find_weights(["tf_efficientnet_lite0"], "auto")["tf_efficientnet_lite0"]
    model, _ = _build("tf_efficientnet_lite0", weights=weights)
    state = torch.load(weights.file, weights_only=True)
    assert torch.equal(model.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(model.bn2.running_var, state["_bn1.running_var"])


@pytest.mark.slow
def test_the_lite_package_names_a_palace():
    from sklearn.datasets import load_sample_image  # takes 2 s to load

    weights = find_weights(["tf_efficientnet_lite0"], "auto")["tf_efficientnet_lite0"]
    model, _ = _build("tf_efficientnet_lite0", 224, classes=1000, weights=weights)
    state = torch.load(weights.file, weights_only=True)
    _classifier(model)[1].load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    image = torchvision.transforms.functional.center_crop(image, 427)
    image = torchvision.transforms.functional.resize(image, [224, 224], antialias=True)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbones.input_mean_std(model))
    assert mean.unique().tolist() == std.unique().tolist() == [0.5]
    with torch.no_grad():
        assert model.eval()((image - mean) / std).argmax().item() == 698


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_same_seed_same_weights_whatever_the_global_state(backbone):
    torch.manual_seed(5)
    first, _ = _build(backbone)
    before = torch.get_rng_state()
    torch.rand(3)
    second, _ = _build(backbone)
    torch.manual_seed(5)
    _build(backbone)
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    other, _ = _build(backbone, seed=1)
    assert not torch.equal(_classifier(first)[1].weight, _classifier(other)[1].weight)


def test_the_head_does_not_depend_on_the_weights(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.safetensors")
    random, _ = _build("test_resnet", head_dropout=0.3)
    loaded, _ = _build("test_resnet", head_dropout=0.3, weights=tmp_path / "test_resnet.safetensors")
    assert torch.equal(_classifier(random)[1].weight, _classifier(loaded)[1].weight)
    assert not torch.equal(random.conv1[0].weight, loaded.conv1[0].weight)
    assert _classifier(loaded)[0].p == 0.3 and _classifier(loaded)[1].bias.eq(0).all()
    assert loaded.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("file_classes", "suffix"), [(1000, ".safetensors"), (1000, ".pth"), (7, ".pth"), (3, ".safetensors"), (0, ".pth")]
)
def test_weights_are_loaded_whatever_classifier_the_file_has(tmp_path, file_classes, suffix):
    file = tmp_path / f"test_resnet{suffix}"
    source = timm.create_model("test_resnet", num_classes=file_classes)
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    model, _ = _build("test_resnet", weights=file)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items() if "fc." not in key)
    assert _classifier(model)[1].out_features == 3


def test_position_embeddings_are_resampled(tmp_path):
    source = timm.create_model("test_vit")
    save_file(source.state_dict(), tmp_path / "test_vit.safetensors")
    model, _ = _build("test_vit", 64, weights=tmp_path / "test_vit.safetensors")
    assert source.pos_embed.shape[1] == 101 and model.pos_embed.shape[1] == 17
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert model(_images(2, 64)).shape == (2, 3)


@pytest.mark.slow
def test_torchvision_files_are_read(tmp_path):
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18-0.pth")
    model, _ = _build("resnet18", weights=tmp_path / "resnet18-0.pth")
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


@pytest.mark.slow
def test_torchvision_vgg_files_are_mapped(tmp_path):
    source = torchvision.models.vgg16().eval()
    torch.save(source.state_dict(), tmp_path / "vgg16-0.pth")
    model, _ = _build("vgg16", 224, classes=1000, weights=tmp_path / "vgg16-0.pth")
    _classifier(model)[1].load_state_dict(source.classifier[6].state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(_images(1, 224)), source(_images(1, 224)), rtol=1e-3, atol=1e-5)


def test_wrong_files_name_the_file_and_the_first_wrong_key(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    save_file({key: value for key, value in state.items() if "layer2" not in key}, tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match=r"missing\.safetensors .* layer2\.0\.conv1\.weight is missing and \d+ more"):
        _build("test_resnet", weights=tmp_path / "missing.safetensors")
    save_file(state | {"conv1.0.weight": torch.zeros(5, 3, 3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(InputError, match=r"shape\.safetensors .* conv1\.0\.weight has another shape"):
        _build("test_resnet", weights=tmp_path / "shape.safetensors")
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(InputError, match=f"{name} can't be read"):
            _build("test_resnet", weights=tmp_path / name)
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match=r"code\.pth can't be read"):
        _build("test_resnet", weights=tmp_path / "code.pth")
    with pytest.raises(InputError, match="lite1"):
        lite0 = find_weights(["tf_efficientnet_lite0"], "auto")["tf_efficientnet_lite0"]
        _build("tf_efficientnet_lite1", weights=lite0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "content"),
    [
        ("resnet18", lambda: [timm.create_model("resnet18").state_dict()]),
        ("resnet18", lambda: {"state_dict": None, "epoch": 3}),
        ("swin_tiny_patch4_window7_224", lambda: torchvision.models.swin_t().state_dict()),
        ("maxvit_tiny_tf_224", lambda: torchvision.models.maxvit_t(input_size=(224, 224)).state_dict()),
    ],
)
def test_files_that_timm_trips_over_are_faults_of_the_file(tmp_path, backbone, content):
    torch.save(content(), tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"weights: .*odd\.pth .* of " + backbone):
        _build(backbone, 224, weights=tmp_path / "odd.pth")


def test_averaged_weights_are_read_and_other_keys_of_the_modules_are_refused(tmp_path):
    source = timm.create_model("test_resnet")
    torch.save(torch.optim.swa_utils.AveragedModel(source).state_dict(), tmp_path / "averaged.pth")
    model, _ = _build("test_resnet", weights=tmp_path / "averaged.pth")
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items() if "fc." not in key)
    assert model.pretrained_cfg["loaded"].endswith("left out: n_averaged (1 tensor)")
    for file_classes in (1000, 7):
        state = timm.create_model("test_resnet", num_classes=file_classes).state_dict()
        torch.save(state | {"layer2.1.weight": torch.zeros(3)}, tmp_path / "more.pth")  # as of a deeper network
        with pytest.raises(InputError, match=r"more\.pth .* layer2\.1\.weight is unexpected"):
            _build("test_resnet", weights=tmp_path / "more.pth")


@pytest.mark.slow
def test_every_image_size_that_a_backbone_cannot_take_is_a_fault(tmp_path):
    backbones.check("test_resnet", [32, 50], None)
    with pytest.raises(InputError) as caught:  # one that takes no size but its own, and one that takes multiples
        backbones.check("twins_svt_small", [64, 70, 71], None)
    assert [fault.partition(" px")[0] for fault in caught.value.faults] == [
        "image_size: twins_svt_small can't take 70",
        "image_size: twins_svt_small can't take 71",
    ]
    state = timm.create_model("test_resnet").state_dict()
    state["layer1.0.conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"nan\.pth of test_resnet hold NaN or infinity, in layer1\.0\.conv1\.weight"):
        backbones.check("test_resnet", [32], Weights(file=tmp_path / "nan.pth"))
    (tmp_path / "test_resnet.pth").write_text("not weights")
    with pytest.raises(InputError) as caught:
        backbones.check("test_resnet", [32, 64], Weights(file=tmp_path / "test_resnet.pth"))
    assert len(caught.value.faults) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "size"), [("tresnet_m", 50), ("hrnet_w18_small", 100), ("mvitv2_tiny", 100)])
def test_sizes_that_only_a_forward_pass_shows(backbone, size):
    with pytest.raises(InputError, match=f"image_size: {backbone} can't take {size} px"):
        backbones.check(backbone, [size], None)


def test_an_image_size_that_a_model_cannot_take():
    with pytest.raises(InputError, match=r"image_size: .* set image_size to 299"):
        backbones.stages(_build("inception_v3")[0], 64)


# ---- stages -----------------------------------------------------------------------------------------------------


def _check_five_stages(backbone):
    model, image_size = _build(backbone)
    names = backbones.stages(model, image_size)
    classifier = model.pretrained_cfg["classifier"] + "."
    listed = [name for stage in names for name in stage]
    assert len(names) == 5 and all(names)
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters() if not name.startswith(classifier))


@pytest.mark.parametrize("backbone", FIVE_STAGES)
def test_five_stages(backbone):
    _check_five_stages(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FIVE_STAGES_SLOW)
def test_five_stages_of_larger_models(backbone):
    _check_five_stages(backbone)


def test_stages_of_efficientnet_lite_are_by_resolution():
    names = backbones.stages(_build("tf_efficientnet_lite0")[0], 64)
    blocks = [sorted({name.split(".")[1] for name in stage if name.startswith("blocks.")}) for stage in names]
    assert blocks == [["0"], ["1"], ["2"], ["3", "4"], ["5", "6"]]
    assert "conv_stem.weight" in names[0] and "conv_head.weight" in names[4]


def test_stages_of_a_transformer_are_runs_of_blocks():
    names = backbones.stages(_build("test_vit")[0], 64)
    blocks = [sorted({name.split(".")[1] for name in stage if name.startswith("blocks.")}) for stage in names]
    assert blocks == [["0"], ["1", "2"], ["3"], ["4"], ["5"]]
    assert "cls_token" in names[0] and "norm.weight" in names[4]


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilenetv4_conv_small"])
def test_stages_do_not_depend_on_the_image_size(backbone):
    model, _ = _build(backbone)
    assert len({str(backbones.stages(model, size)) for size in (32, 64, 96, 224)}) == 1


# ---- freezing ---------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 5), depth=st.integers(0, 5))
def test_resolved_depth(count, depth):
    stages = [[str(index)] for index in range(count)]
    assert backbones.resolved_depth(stages, depth) == (count if depth == 5 else min(depth, count))


@pytest.mark.parametrize("backbone", TINY)
def test_unfreeze_and_train_mode(backbone):
    model, _ = _build(backbone)
    names = backbones.stages(model, 64)
    for depth in range(6):
        backbones.unfreeze(model, names, depth, batch_norm="train")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        head = {name for name, _ in model.named_parameters() if name not in {name for stage in names for name in stage}}
        assert trained == head.union(*names[5 - depth :])
        backbones.train_mode(model)
        for module_name, module in model.named_modules():
            own = {f"{module_name}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            if own:
                assert module.training == bool(own & trained)
        assert all(module.training for module in _classifier(model).modules())


def test_frozen_batch_norms_keep_statistics_and_affine_weights():
    model, _ = _build("test_resnet")
    names = backbones.stages(model, 64)
    backbones.unfreeze(model, names, 5, batch_norm="frozen")
    backbones.train_mode(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad or norm.bias.requires_grad for norm in norms)
    assert model.layer1[0].conv1.weight.requires_grad
    backbones.unfreeze(model, names, 5, batch_norm="train")
    assert all(norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("backbone", TINY)
def test_parameter_groups(backbone):
    model, _ = _build(backbone)
    names = backbones.stages(model, 64)
    for depth in (0, 1, 3, 5):
        backbones.unfreeze(model, names, depth, batch_norm="train")
        groups = backbones.parameter_groups(
            model, names, depth, learning_rate=0.1, stage_lr_decay=0.5, weight_decay=0.01
        )
        torch.optim.AdamW(groups)  # refuses a parameter given twice
        settings = {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}
        assert len(settings) == sum(parameter.requires_grad for parameter in model.parameters())
        level = {name: max(0, 4 - index) for index, stage in enumerate(names) for name in stage}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = (0.1 * 0.5 ** level.get(name, 0), 0.01 if parameter.ndim > 1 else 0.0)
                assert settings[id(parameter)] == pytest.approx(expected)
