import copy

import pytest
import timm
import torch
from shared import LARGER

from tuning.training import backbones
from tuning.training.prefix import split

TINY = ("test_resnet", "test_vit", "test_efficientnet")


def _build(backbone, head_dropout=0.0):
    cfg = timm.get_pretrained_cfg(backbone)
    image_size = cfg.input_size[-1] if cfg.fixed_input_size and backbone != "test_vit" else 64
    model = backbones.build(backbone, classes=3, image_size=image_size, head_dropout=head_dropout, seed=0, weights=None)
    _randomize_norms(model)
    return model, backbones.stages(model, image_size), image_size


def _randomize_norms(model):
    """Make batch norms differ from the identity, so that a wrong mode shows."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


def _check_cuts(backbone, depths):
    model, names, image_size = _build(backbone)
    for depth in depths:
        # split itself compares prefix and suffix with the whole, to the bit.
        assert split(model, names, depth, image_size) is not None
    assert split(model, names, 5, image_size) is None


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "mobilenetv4_conv_small"])
def test_a_cut_at_each_depth(backbone):
    _check_cuts(backbone, range(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    ["resnet18", *LARGER],
)
def test_cuts_of_larger_models(backbone):
    _check_cuts(backbone, (0, 3))


@pytest.mark.parametrize(
    ("backbone", "depth"),
    [
        *((backbone, depth) for backbone in TINY for depth in range(5)),
        ("tf_efficientnet_lite0", 3),
        *(pytest.param("resnet18", depth, marks=pytest.mark.slow) for depth in (1, 3)),
    ],
)
def test_training_from_the_prefix_equals_training_the_whole(backbone, depth):
    whole, names, _ = _build(backbone, head_dropout=0.2)
    cut = copy.deepcopy(whole)
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    logits = []
    for model in (whole, cut):
        backbones.unfreeze(model, names, depth, batch_norm="train")
        backbones.train_mode(model)
    parts = split(cut, names, depth, 64)
    features = parts.prefix(images)
    assert not features.requires_grad and len(features) == 6 and (depth or features.ndim == 2)
    for forward in (whole, lambda _: parts.suffix(features.contiguous())):
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
        assert torch.equal(parts.suffix(parts.prefix(images[:1])), whole(images[:1]))
        assert torch.equal(cut(images), whole(images))


def test_several_inputs_cannot_be_cut():
    model, names, _ = _build("hrnet_w18_small")
    assert split(model, names, 2, 64) is None
    assert split(model, names, 0, 64) is not None


def test_a_trained_parameter_used_below_the_cut_forbids_it():
    model, names, _ = _build("test_vit")
    names[0].remove("pos_embed")
    names[4].append("pos_embed")
    assert split(model, names, 1, 64) is None


def test_splitting_leaves_modes_and_modules_alone():
    model, names, _ = _build("test_resnet")
    backbones.unfreeze(model, names, 2, batch_norm="train")
    backbones.train_mode(model)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    split(model, names, 2, 64)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(
        module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module) for module in model.modules()
    )
