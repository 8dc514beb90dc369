import multiprocessing
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shared import CPU, SOAK, losses, make_data, on_each_device

from tuning.settings.config import InputError, TrialConfig
from tuning.training import features
from tuning.training.features import CHUNK, FeatureCache, HeldOutputs, Key
from tuning.training.finetune import finetune
from tuning.training.frozen import BLOCK, Frozen, Inputs
from tuning.training.models import Models
from tuning.training.outputs import run_folder
from tuning.training.weights import find_weights

KEY = Key("test_resnet", "random 0", 32, 2, "float32", "abc", "light", (0, 1))
FAMILIES = [
    pytest.param("resnet18", marks=pytest.mark.slow),
    pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow),
    pytest.param("densenet121", marks=pytest.mark.slow),
    "test_vit",
    pytest.param("vgg11", marks=pytest.mark.slow),
]
BUDGET = 10**9


def chunks_of(array, size=CHUNK):
    for first in range(0, len(array), size):
        yield torch.from_numpy(array[first : first + size]).permute(0, 3, 1, 2)


@pytest.fixture
def keep_all(monkeypatch):
    """Whatever the machine does meanwhile, reading counts as faster than computing."""
    monkeypatch.setattr(features, "MOST_READING", np.inf)


@pytest.fixture
def store(tmp_path, keep_all):
    return FeatureCache(tmp_path, BUDGET)


@pytest.fixture
def outputs():
    return np.random.default_rng(0).normal(size=(70, 2, 2, 3)).astype(np.float32)


# ---- the outputs, by whatever way they come -------------------------------------------------------------------------


def make_frozen(network, depth, data, store):
    network.begin(depth, batch_norm="train", head_dropout=0.0)
    network.model.eval()
    return Frozen(network, depth, data.images, store)


def everything(inputs, count, size=16):
    return torch.cat(list(inputs.batches(np.arange(count), size)))


@pytest.mark.soak
@pytest.mark.parametrize("backbone", FAMILIES)
def test_cached_derived_and_recomputed_outputs_and_losses_are_equal_to_the_bit(backbone, tmp_path, keep_all):
    data = make_data(count=72, side=64)
    weights = find_weights([backbone], "auto" if "lite" in backbone else "random")[backbone]
    models = Models()
    network = models.get(backbone, classes=2, image_size=64, seed=0, weights=weights, device=CPU)
    table = torch.rand(len(data.train), 13, generator=torch.Generator().manual_seed(0))
    view = (data.train, table, "medium", (0, 1))
    dear = backbone == "vgg11" and not SOAK  # its 130 million weights take seconds a step
    epochs = 1 if dear else 2
    for depth, further in ((0, 3),) if dear else ((0, 3), (2, 3)):
        folder = tmp_path / str(depth)
        folder.mkdir()
        recomputed = everything(make_frozen(network, depth, data, None).inputs(*view), len(data.train))
        make_frozen(network, further, data, FeatureCache(folder, BUDGET)).inputs(*view)
        assert len(list(folder.glob("*.npy"))) == 1
        derived = make_frozen(network, depth, data, FeatureCache(folder, BUDGET))
        derived._prepare = lambda *_: pytest.fail("an image went in, not the outputs of the further cut")
        first = derived.inputs(*view)
        assert first.hits == 0
        cached = make_frozen(network, depth, data, FeatureCache(folder, BUDGET)).inputs(*view)
        assert cached.hits == len(data.train)
        for inputs in (first, cached):
            assert torch.equal(everything(inputs, len(data.train)), recomputed)

        # Losses: without a cache, from a cut further away, and from the trial before.
        config = TrialConfig(
            backbone=backbone,
            unfreeze_depth=depth,
            image_size=64,
            batch_size=24,
            epochs=epochs,
            augmentation="light",
            head_dropout=0.2,
        )
        arguments = {"device": CPU, "weights": weights, "models": models}
        plain = losses(finetune(config, data, **arguments))
        shared = FeatureCache(folder, BUDGET)
        list(finetune(config.model_copy(update={"unfreeze_depth": further}), data, features=shared, **arguments))
        assert losses(finetune(config, data, features=shared, **arguments)) == plain
        again = list(finetune(config, data, features=shared, **arguments))
        assert losses(again) == plain
        assert [row["cache_hits"] for row, _ in again] == [len(data.train)] * epochs


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("held", [False, True])
def test_a_trial_on_cached_outputs_trains_as_one_without(device, held, tmp_path, keep_all):
    """On CUDA within what autocast rounds."""
    config = TrialConfig(backbone="test_resnet", unfreeze_depth=2, image_size=32, batch_size=8, epochs=2)
    store = HeldOutputs(device) if held or device.type != "cpu" else FeatureCache(tmp_path, BUDGET)
    for policy in ("none", "medium", "light mixup=0.4 cutmix=1"):
        plan = config.model_copy(update={"augmentation": policy})
        plain = losses(finetune(plan, make_data(), device=device, weights=None))
        for _ in range(2):
            cached = losses(finetune(plan, make_data(), device=device, weights=None, features=store))
            assert np.array(cached) == pytest.approx(np.array(plain), rel=0 if device.type == "cpu" else 0.05)


def test_outputs_held_in_memory_are_those_computed_and_make_way_for_others():
    data, models = make_data(), Models()
    network = models.get("test_resnet", classes=2, image_size=32, seed=0, weights=None, device=CPU)
    recomputed = {}
    for depth in (1, 3):
        plain = make_frozen(network, depth, data, None).inputs(data.train)
        recomputed[depth] = everything(plain, len(data.train))
    store = HeldOutputs(CPU, most_bytes=sum(outputs.nbytes for outputs in recomputed.values()))
    for depth, derived in ((3, False), (1, True)):
        frozen = make_frozen(network, depth, data, store)
        if derived:
            frozen._prepare = lambda *_: pytest.fail("an image went in, not the outputs of the further cut")
        first, again = frozen.inputs(data.train), frozen.inputs(data.train)
        assert (first.hits, again.hits) == (0, len(data.train))
        assert torch.equal(everything(again, len(data.train)), recomputed[depth])
    view = (data.train, torch.rand(len(data.train), 13), "medium", (0, 1))
    assert make_frozen(network, 1, data, store).inputs(*view).hits is None  # augmented images' are not held
    make_frozen(network, 1, data, store).inputs(data.val)  # does not fit beside both: the oldest goes
    assert make_frozen(network, 1, data, store).inputs(data.train).hits == len(data.train)
    network.cut(3)
    assert make_frozen(network, 3, data, store).inputs(data.train).hits == 0
    assert make_frozen(network, 1, data, HeldOutputs(CPU, most_bytes=10)).inputs(data.train).hits is None


def test_head_dropout_acts_on_cached_outputs(store):
    """Two passes at depth 0 over the same outputs differ: dropout sits above the cut."""
    data = make_data()
    network = Models().get("test_resnet", classes=2, image_size=32, seed=0, weights=None, device=CPU)
    network.begin(0, batch_norm="train", head_dropout=0.5)
    frozen = Frozen(network, 0, data.images, store)
    network.model.get_submodule("fc" if hasattr(network.model, "fc") else "head").train()
    batch = next(frozen.inputs(data.train).batches(np.arange(32), 32))
    assert not torch.equal(frozen.trained(batch), frozen.trained(batch))


@pytest.mark.parametrize("size", [2, 7, 32, 48, 100, 300])
def test_batches_come_in_order_whatever_their_size(size):
    asked = []

    def fetch(groups):
        for positions in groups:
            asked.append(len(positions))
            yield torch.from_numpy(positions)

    order = np.random.default_rng(0).permutation(1000)
    for chunk in (0, CHUNK, 128):
        batches = list(Inputs(fetch, chunk=chunk).batches(order, size))
        assert torch.equal(torch.cat(batches), torch.from_numpy(order))
        assert all(len(batch) == size for batch in batches[:-1])
    assert max(asked) <= max(2 * BLOCK, size)


def test_a_prefix_pass_always_takes_as_many_images(monkeypatch):
    data = make_data(count=80)
    network = Models().get("test_resnet", classes=2, image_size=32, seed=0, weights=None, device=CPU)
    frozen = make_frozen(network, 1, data, None)
    seen = []
    hook = network.model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    list(frozen.inputs(data.train).batches(np.arange(len(data.train)), 20))
    hook.remove()
    assert set(seen) == {CHUNK}


# ---- files ----------------------------------------------------------------------------------------------------------


def test_outputs_are_written_once_and_read_back(store, outputs):
    kept, there = store.get(KEY, 70, lambda: chunks_of(outputs))
    assert not there and np.array_equal(kept, outputs) and not kept.flags.writeable
    kept, there = store.get(KEY, 70, lambda: pytest.fail("computed twice"))
    assert there and np.array_equal(kept, outputs)
    assert store.find(replace(KEY, moment=(0, 2))) is None


@pytest.mark.parametrize(
    "other",
    [
        {"backbone": "test_vit"},
        {"weights": "random 1"},
        {"image_size": 64},
        {"depth": 1},
        {"images": "abd"},
        {"policy": "medium"},
        {"moment": (1, 1)},
    ],
)
def test_whatever_outputs_depend_on_is_in_their_key(store, outputs, other):
    store.get(KEY, 70, lambda: chunks_of(outputs))
    assert store.find(replace(KEY, **other)) is None


def test_too_large_outputs_are_not_kept_nor_tried_again(tmp_path, outputs):
    store = FeatureCache(tmp_path, 2 * outputs.nbytes - 1)
    assert store.get(KEY, 70, lambda: chunks_of(outputs)) is None
    assert store.get(replace(KEY, moment=(0, 2)), 70, lambda: pytest.fail("tried again")) is None
    assert not list(tmp_path.glob("*.n*"))


def test_outputs_that_are_sooner_computed_than_read_are_not_kept(tmp_path, monkeypatch):
    large, asked = np.zeros((CHUNK, 4, 4), dtype=np.float32), []
    clock, read = [0.0], FeatureCache._read

    def slow_read(*arguments):
        read(*arguments)
        clock[0] += 1.0

    monkeypatch.setattr(FeatureCache, "_read", slow_read)
    monkeypatch.setattr(features, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def chunks():
        for number in range(20):
            asked.append(number)
            yield torch.from_numpy(large)

    assert FeatureCache(tmp_path, BUDGET).get(KEY, 20 * CHUNK, chunks) is None
    assert asked == [0, 1, 2]  # the rest was not computed in vain
    assert not list(tmp_path.glob("*.n*"))


def test_the_least_recently_used_go_first(tmp_path, outputs, keep_all):
    store = FeatureCache(tmp_path, 3 * outputs.nbytes)
    keys = [replace(KEY, moment=(0, epoch)) for epoch in range(4)]
    for index, key in enumerate(keys[:2]):
        store.get(key, 70, lambda: chunks_of(outputs))
        os.utime(store._path(key), (index, index))
    held = store.find(keys[1])
    assert store.find(keys[0]) is not None  # so the second is the older one now
    store.get(keys[2], 70, lambda: chunks_of(outputs))
    assert [store.find(key) is not None for key in keys] == [True, False, True, False]
    assert np.array_equal(held, outputs)  # a reader keeps what was evicted meanwhile


def _write(folder, outputs, done, pause):
    def chunks():
        done.put("computing")
        for chunk in chunks_of(outputs):
            time.sleep(pause)
            yield chunk

    found = FeatureCache(folder, BUDGET).get(KEY, len(outputs), chunks)
    done.put(found is not None and np.array_equal(found[0], outputs))


def _start(folder, outputs, pause):
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    process = context.Process(target=_write, args=(folder, outputs, done, pause))
    process.start()
    return process, done


def test_two_processes_that_want_the_same_compute_it_once(tmp_path, outputs, keep_all):
    both = [_start(tmp_path, outputs, 0.1) for _ in range(2)]
    reports = []
    for process, done in both:
        process.join()
        while not done.empty():
            reports.append(done.get())
        done.close()
    assert sorted(map(str, reports)) == ["True", "True", "computing"]


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path, outputs, keep_all):
    process, done = _start(tmp_path, outputs, 30)
    assert done.get() == "computing"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = FeatureCache(tmp_path, BUDGET)
    assert store.find(KEY) is None
    kept, there = store.get(KEY, 70, lambda: chunks_of(outputs))
    assert not there and np.array_equal(kept, outputs)
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_the_cache_not_the_trial(store, tmp_path, outputs):
    store._path(KEY).with_suffix(".new").symlink_to("/dev/full")
    assert store.get(KEY, 70, lambda: chunks_of(outputs)) is None


@pytest.mark.parametrize("folder", ["/proc/nowhere/features", "file"])
def test_a_folder_that_cannot_be_costs_the_cache_not_the_trial(tmp_path, outputs, folder):
    (tmp_path / "file").touch()
    store = FeatureCache(tmp_path / folder, BUDGET)
    assert store.find(KEY) is None
    assert store.get(KEY, 70, lambda: chunks_of(outputs)) is None


def test_augmented_outputs_are_kept_only_where_others_may_use_them(tmp_path, outputs, keep_all):
    store = FeatureCache(tmp_path, BUDGET, augmented=False)
    assert store.get(KEY, 70, lambda: pytest.fail("computed")) is None
    assert store.get(replace(KEY, policy="none", moment=None), 70, lambda: chunks_of(outputs)) is not None


def test_a_second_process_on_a_run_is_refused(tmp_path):
    with run_folder(tmp_path, tmp_path / "run"), pytest.raises(InputError, match="another process"):
        with run_folder(tmp_path, tmp_path / "run"):
            pass


def test_a_runs_folder_is_empty_and_goes_with_it_and_with_dead_ones(tmp_path):
    dead = tmp_path / "features" / "dead-12345678"
    dead.mkdir(parents=True)
    (tmp_path / "features" / "dead-12345678.lock").touch()
    with run_folder(tmp_path, tmp_path / "alive") as alive:
        assert not dead.exists()
        (alive / "x.npy").touch()
        with run_folder(tmp_path, tmp_path / "other"):
            assert (alive / "x.npy").exists()
    assert not list((tmp_path / "features").iterdir())
