import ctypes
import subprocess
import sys

import pytest
import torch
from shared import CPU, losses, make_data

from tuning.settings.config import TrialConfig
from tuning.training import backbones, models
from tuning.training.finetune import finetune
from tuning.training.folding import FOLDED
from tuning.training.models import Models

GIVEN = {"classes": 2, "image_size": 32, "seed": 0, "weights": None, "device": CPU}


def config(**values):
    return TrialConfig(**{"backbone": "test_resnet", "image_size": 32, "batch_size": 8, "epochs": 2} | values)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_resnet"])
def test_a_trials_network_is_folded_and_gives_the_logits_of_a_plain_one(name):
    network = Models().get(name, **GIVEN).model.eval()
    assert sum(type(module) in FOLDED.values() for module in network.modules()) > 10
    plain = backbones.build(name, classes=2, image_size=32, head_dropout=0.0, seed=0, weights=None).eval()
    images = torch.rand(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(network(images), plain(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])
def test_a_network_with_synchronized_batch_norms_has_the_same_tensors_and_logits(name):
    plain, network = Models().get(name, **GIVEN), Models(synchronized=True).get(name, **GIVEN)
    kinds = [type(module).__name__ for module in network.model.modules()]
    assert any(kind.startswith("SyncBatchNorm") for kind in kinds) and not any("BatchNorm2d" in kind for kind in kinds)
    assert network.stages == plain.stages
    assert network.begin(2, batch_norm="train", head_dropout=0.0) == plain.begin(
        2, batch_norm="train", head_dropout=0.0
    )
    images = torch.rand(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = [each.model.eval()(images) for each in (network, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_used_model_trains_as_a_new_one_does():
    kept = Models()
    configs = [
        config(unfreeze_depth=5, learning_rate=0.1, optimizer="sgd"),
        config(unfreeze_depth=2, batch_norm="frozen", head_dropout=0.5),
        config(unfreeze_depth=0, head_dropout=0.3),
        config(backbone="test_vit", unfreeze_depth=1),
        config(unfreeze_depth=5, batch_norm="frozen"),
    ]
    for one in configs:
        used = list(finetune(one, make_data(), device=CPU, weights=None, models=kept))
        new = list(finetune(one, make_data(), device=CPU, weights=None))
        assert losses(used) == losses(new)


def test_a_trial_that_was_left_in_the_middle_leaves_no_trace():
    kept = Models()
    left = finetune(config(unfreeze_depth=5, learning_rate=1.0), make_data(), device=CPU, weights=None, models=kept)
    next(left)
    again = list(finetune(config(unfreeze_depth=1), make_data(), device=CPU, weights=None, models=kept))
    assert losses(again) == losses(finetune(config(unfreeze_depth=1), make_data(), device=CPU, weights=None))


def test_few_models_are_kept_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr(models, "KEPT_MODELS", 2)
    kept = Models()
    first, second = kept.get("test_resnet", **GIVEN), kept.get("test_vit", **GIVEN)
    assert kept.get("test_resnet", **GIVEN) is first
    kept.get("test_efficientnet", **GIVEN)
    assert kept.get("test_resnet", **GIVEN) is first
    assert kept.get("test_vit", **GIVEN) is not second


def test_cuts_are_made_once():
    network = Models().get("test_resnet", **GIVEN)
    assert network.cut(2) is network.cut(2) is not None
    assert network.cut(5) is None


def test_a_latency_is_the_least_so_far_and_leaves_no_trace():
    network = Models().get("test_resnet", **GIVEN)
    network.begin(5, batch_norm="train", head_dropout=0.0)
    network.model.train()
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    latency = network.latency_ms()
    assert latency >= network.latency_ms() > 0 and network.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())


def test_the_head_has_the_trials_dropout():
    network = Models().get("test_resnet", **GIVEN)
    network.begin(0, batch_norm="train", head_dropout=0.5)
    cut = network.cut(0)
    network.model.eval()
    features = cut.prefix(torch.rand(64, 3, 32, 32))
    network.model.train()
    assert not torch.equal(cut.suffix(features), cut.suffix(features))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_used_again():
    """Page faults of twenty tensors of 64 MiB: few once memory is kept, some 16,000 each before."""
    code = """if True:
        import resource, torch
        from tuning.training.device import keep_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(16, 2**20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        before = faults()
        keep_memory()
        faults()
        print(before, faults())
    """
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, printed.split())
    assert after < before / 20
