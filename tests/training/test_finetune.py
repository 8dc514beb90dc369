import itertools
import math
import mmap
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from shared import CPU, Operations, examples, losses, make_data, on_each_device
from sklearn import metrics
from torch.nn import functional

from tuning.model.folder import build_network
from tuning.record.journal import best_epoch
from tuning.settings.config import TrialConfig
from tuning.training import models
from tuning.training.dataset import Data, placed, preparer
from tuning.training.features import HeldOutputs
from tuning.training.finetune import divergence, ending, finetune, learning_rate_factor, out_of_memory
from tuning.training.models import Models
from tuning.training.scores import calibrated_loss, mean_loss, predict_images, score
from tuning.training.state import State


def config(**values):
    given = {"backbone": "test_resnet", "unfreeze_depth": 5, "image_size": 32, "batch_size": 8, "epochs": 3}
    return TrialConfig(**given | {"learning_rate": 3e-3, "augmentation": "medium", "head_dropout": 0.2} | values)


def train(config, data=None, **arguments):
    return list(finetune(config, data or make_data(), device=CPU, weights=None, **arguments))


@on_each_device
@pytest.mark.parametrize("depth", [2, 5])
def test_it_learns_and_reports(device, depth):
    plan = config(epochs=8, unfreeze_depth=depth, augmentation="none", head_dropout=0.0)
    epochs = list(finetune(plan, make_data(), device=device, weights=None))
    rows = [row for row, _ in epochs]
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert [row["ends"] for row in rows] == [None] * 7 + ["completed"]
    assert rows[-1]["val_loss"] < 0.5 < rows[0]["train_loss"]
    assert rows[-1]["val_accuracy"] >= 0.75 and rows[-1]["val_auroc"] == 1.0
    assert rows[0]["images"] == 32 and rows[0]["micro_batch"] == 8
    for name in ("peak_memory_mb", "gpu_memory_mb"):
        assert (rows[0][name] is not None) == (device.type == "cuda")


def test_two_runs_are_equal_and_another_seed_differs():
    first, again = train(config()), train(config())
    assert losses(first) == losses(again)
    assert losses(first) != losses(train(config(seed=1)))


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_with_mixed_precision_too_what_is_evaluated_is_what_is_deployed(depth, monkeypatch):
    """bfloat16 on a CPU, as on a GPU: losses and probabilities are those of the model in float32."""
    data, plan = make_data(), config(unfreeze_depth=depth, epochs=2)
    in_float32 = losses(train(plan))
    monkeypatch.setattr(models, "mixed_precision", lambda device: torch.bfloat16)
    features = HeldOutputs(CPU)
    epochs = train(plan, data, features=features)
    assert losses(epochs) != in_float32
    state, network = epochs[-1][1](), build_network(plan, 2, None)
    best = {name.removeprefix("best/"): tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
    network.load_state_dict(best, strict=False)
    logits = predict_images(network, preparer(data.images, network, CPU), data.val)
    np.testing.assert_allclose(state.tensors["validation/logits"].numpy(), logits, atol=1e-5)
    at_best = best_epoch(state.history, "val_loss")
    assert at_best["val_loss"] == pytest.approx(mean_loss(logits, data.labels[data.val]), abs=1e-5)


@pytest.mark.parametrize(
    ("half", "batches", "ends"),
    [
        (torch.float16, {2}, "completed"),
        (torch.float16, {2, 3, 7}, "completed"),
        (torch.float16, set(range(100)), "diverged"),
        (None, {2}, "diverged"),
    ],
)
def test_a_batch_that_overflows_in_float16_is_skipped(half, batches, ends, monkeypatch):
    """As GradScaler skips its step; in other precisions a loss that isn't finite is divergence."""
    monkeypatch.setattr(models, "mixed_precision", lambda device: half)
    built, model = _models_with("test_resnet")
    seen = itertools.count()

    def overflow(_module, _inputs, logits):
        return logits * math.inf if torch.is_grad_enabled() and next(seen) in batches else logits

    model.register_forward_hook(overflow)
    rows = [row for row, _ in train(config(head_dropout=0.0, batch_norm="frozen"), models=built)]
    assert rows[-1]["ends"] == ends
    assert ends == "diverged" or all(row["train_loss"] < 10 for row in rows)


@pytest.mark.parametrize(("optimizer", "policy"), [("adamw", "medium"), ("sgd", "medium"), ("sgd", "mixup=0.4")])
def test_resuming_from_a_snapshot_equals_never_having_stopped(optimizer, policy):
    whole = train(config(optimizer=optimizer, augmentation=policy))
    begun = finetune(config(optimizer=optimizer, augmentation=policy), make_data(), device=CPU, weights=None)
    _, snapshot = next(begun)
    state = snapshot()
    rest = train(config(optimizer=optimizer, augmentation=policy), state=State(state.history, state.tensors))
    assert losses(whole)[1:] == losses(rest)
    last, last_again = whole[-1][1](), rest[-1][1]()
    assert last.tensors.keys() == last_again.tensors.keys()
    assert all(torch.equal(last.tensors[name], last_again.tensors[name]) for name in last.tensors)


@pytest.mark.parametrize("policy", ["none", "strong", "crop=0.5 mixup=0.2 cutmix=1"])
def test_no_step_waits_for_the_device(policy):
    """Nothing of a tensor becomes a Python number: on a GPU that waits for all that was asked of it before."""

    def waits(batch_size):
        trial = config(augmentation=policy, batch_size=batch_size, epochs=1, batch_norm="frozen")
        epochs = finetune(trial, make_data(), device=CPU, weights=None, features=HeldOutputs(CPU))
        with Operations() as done:
            next(epochs)
        return sum(name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal") for name in done.names)

    assert waits(4) == waits(16)  # 8 steps of the epoch as 2


@on_each_device
def test_images_held_on_the_device_are_those_that_are_streamed_to_it(device):
    images = make_data().images
    model = timm.create_model("test_resnet")
    streamed = preparer(images, model, device)
    held = preparer(torch.from_numpy(images).to(device), model, device)
    indices, table = np.array([5, 3, 40]), torch.rand(3, 13, generator=torch.Generator().manual_seed(0)).to(device)
    for policy in ("none", "medium"):
        assert torch.equal(streamed(indices, table, policy), held(indices, table, policy))


@on_each_device
def test_images_are_placed_on_a_gpu_where_they_fit(device):
    images = make_data().images
    there = placed(images, device)
    assert isinstance(there, torch.Tensor) if device.type == "cuda" else there is images


def test_only_what_is_unfrozen_changes():
    counts = []
    for depth in (0, 1, 5):
        epochs = train(config(unfreeze_depth=depth, epochs=1))
        counts.append(epochs[0][0]["trained_parameters"])
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("learning_rate", [1e12, 1e30])
def test_a_loss_that_is_not_finite_ends_the_trial_in_its_epoch(learning_rate):
    epochs = train(config(learning_rate=learning_rate, epochs=5, optimizer="sgd"), divergence_factor=math.inf)
    row = epochs[-1][0]
    assert row["ends"] == "diverged"
    assert row["val_loss"] is None and "not finite in epoch" in row["reason"]
    assert all(value is None or math.isfinite(value) for value in row.values() if not isinstance(value, str))


def test_patience_ends_a_trial_that_gets_no_better():
    epochs = train(config(learning_rate=1e-12, epochs=10, augmentation="none"), patience=2)
    assert epochs[-1][0]["ends"] == "converged"
    assert len(epochs) < 10


def test_the_best_weights_are_those_of_the_best_epoch():
    epochs = []
    states = []
    for row, snapshot in finetune(config(epochs=4, learning_rate=0.1), make_data(), device=CPU, weights=None):
        epochs.append(row)
        states.append(snapshot())
    best = min((row["val_loss"], row["epoch"]) for row in epochs if row["val_loss"] is not None)[1]
    for name, tensor in states[best - 1].tensors.items():
        if name.startswith("model/"):
            assert torch.equal(tensor, states[-1].tensors[name.replace("model/", "best/")])


def test_class_weights_and_smoothing_touch_training_alone():
    labels = np.array([0] * 40 + [1] * 8)
    data = make_data()
    data = Data(data.images, labels, np.arange(0, 48, 2), np.arange(1, 24, 2), np.arange(25, 48, 2), data.classes)
    frozen = {"learning_rate": 1e-12, "augmentation": "none", "head_dropout": 0.0, "epochs": 1, "batch_norm": "frozen"}
    plain = train(config(**frozen), data)[0][0]
    weighted = train(config(**frozen, class_weighting="balanced", label_smoothing=0.1), data)[0][0]
    assert plain["val_loss"] == weighted["val_loss"]
    assert plain["train_loss"] != weighted["train_loss"]


def test_a_batch_larger_than_the_set_is_the_set():
    assert train(config(batch_size=500, epochs=1))[0][0]["micro_batch"] == 32


def _fail_above(model, images, times=1):
    """Let the model's next calls with more images fail as a full GPU does."""
    left = [times]

    def fail(_module, inputs):
        if len(inputs[0]) > images and torch.is_grad_enabled() and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(fail)


def _models_with(backbone, seed=0):
    models = Models()
    return models, models.get(backbone, classes=2, image_size=32, seed=seed, weights=None, device=CPU).model


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["medium", "cutmix=1"])
@pytest.mark.parametrize("weighting", ["none", "balanced"])
def test_out_of_memory_halves_the_micro_batch_and_trains_the_same(weighting, policy):
    plan = config(
        backbone="test_vit",
        head_dropout=0.0,
        class_weighting=weighting,
        label_smoothing=0.1,
        optimizer="sgd",
        epochs=2,
        augmentation=policy,
    )
    models, model = _models_with("test_vit")
    _fail_above(model, 4, times=2)
    labels = np.array([0] * 36 + [1] * 12)
    data = replace(make_data(), labels=labels, train=np.arange(8, 48), val=np.array([0, 1, 2, 40]))
    halved, whole = train(plan, data, models=models), train(plan, data)
    assert [row["micro_batch"] for row, _ in halved] == [4, 4]
    assert [row["micro_batch"] for row, _ in whole] == [8, 8]
    assert np.array(losses(halved)) == pytest.approx(np.array(losses(whole)), rel=1e-3)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("HIP error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, memory):
    assert out_of_memory(error) == memory


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray, lambda size: mmap.mmap(-1, size)])
def test_a_machine_without_memory_counts_as_out_of_memory(allocate):
    with pytest.raises(Exception) as raised:
        allocate(10**15)
    assert out_of_memory(raised.value)


def test_a_halved_micro_batch_stays_after_a_resume():
    models, model = _models_with("test_resnet")
    _fail_above(model, 4, times=2)
    begun = finetune(config(), make_data(), device=CPU, weights=None, models=models)
    row, snapshot = next(begun)
    assert row["micro_batch"] == 4
    assert train(config(), state=snapshot())[-1][0]["micro_batch"] == 4


def test_out_of_memory_once_drops_other_trials_models_and_changes_nothing_else():
    models, model = _models_with("test_resnet")
    models.get("test_vit", classes=2, image_size=32, seed=0, weights=None, device=CPU)
    plan = config(head_dropout=0.0, batch_norm="frozen")
    _fail_above(model, 4)
    epochs = train(plan, models=models)
    assert {row["micro_batch"] for row, _ in epochs} == {8} and len(models._networks) == 1
    assert losses(epochs) == losses(train(plan))


def test_out_of_memory_with_half_the_batch_is_the_trials_end():
    models, model = _models_with("test_resnet")
    _fail_above(model, 3, times=3)
    with pytest.raises(torch.OutOfMemoryError):
        train(config(), models=models)


@pytest.mark.parametrize(
    ("losses", "factor", "diverged"),
    [
        ([0.5, 0.6], 10, False),
        ([None], 10, True),
        ([0.5, None], math.inf, True),
        ([20.0], 10, False),
        ([20.0, 20.0], 10, True),
        ([20.0, 0.5, 20.0], 10, False),
        ([0.5, 8.0, 8.0], 10, True),
        ([0.5, 8.0, 8.0], math.inf, False),
        ([0.001, 0.5, 0.5], 10, False),
        ([0.001, 0.9, 0.9], 10, True),
    ],
)
def test_divergence(losses, factor, diverged):
    reason = divergence(0.5, losses, class_entropy=math.log(2), factor=factor)
    assert (reason is not None) == diverged


def test_a_training_loss_that_is_not_finite_is_divergence():
    assert divergence(None, [0.5, None], class_entropy=0.7, factor=10) == "the training loss was not finite in epoch 2"


@pytest.mark.parametrize(
    ("losses", "patience", "reason"),
    [
        ([0.5], None, "all 1 epoch"),
        ([0.5, 0.4], None, "all 2 epochs"),
        ([0.4, 0.5], 1, "no improvement on epoch 1 for 1 epoch"),
        ([0.4, 0.5, 0.5], 2, "no improvement on epoch 1 for 2 epochs"),
        ([0.6, 9.0, 8.0], None, "val_loss 9 and 8 in two consecutive epochs, over 10 x 0.7, the class entropy"),
        ([0.5, 6.0, 5.5], None, "val_loss 6 and 5.5 in two consecutive epochs, over 10 x 0.5, its own best"),
    ],
)
def test_reasons_hold_the_numbers(losses, patience, reason):
    rows = [{"epoch": epoch, "train_loss": 0.5, "val_loss": loss} for epoch, loss in enumerate(losses, start=1)]
    epochs = len(losses) if reason.startswith("all") else 9
    given = {"epochs": epochs, "metric": "val_loss", "patience": patience}
    assert ending(rows, **given, class_entropy=0.7, divergence_factor=10)[1] == reason


def test_the_schedule_warms_up_and_ends_at_nothing():
    plan = config(epochs=10, warmup_epochs=2.0)
    factors = [learning_rate_factor(plan, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert factors[0] < 0.01 and factors[1] == pytest.approx(0.5, abs=0.01)
    assert factors[2:] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate_factor(config(schedule="constant"), 2.9) == 1.0


def test_scores():
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=np.float32))
    found = score(logits, np.array([0, 1, 1]))
    assert found["loss"] == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["auroc"] == 1.0
    assert score(logits, np.array([1, 1, 1]))["auroc"] is None
    assert set(score(np.full((3, 2), np.nan, dtype=np.float32), np.array([0, 1, 1])).values()) == {None}


@st.composite
def _logits_and_targets(draw):
    classes, count = draw(st.integers(2, 4)), draw(st.integers(8, 30))
    logits = draw(arrays(np.float32, (count, classes), elements=st.sampled_from([-2, 0, 0.5, 3])))
    return logits, np.array(draw(st.permutations([index % classes for index in range(count)])))


@pytest.mark.slow
@given(_logits_and_targets())
def test_scores_are_those_of_scikit_learn(example):
    logits, targets = example
    found = score(logits, targets)
    probabilities = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    shown = probabilities[:, 1] if logits.shape[1] == 2 else probabilities
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(targets, shown, multi_class="ovr"))
    predicted = logits.argmax(axis=1)
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(targets, predicted))
    assert found["loss"] == pytest.approx(metrics.log_loss(targets, probabilities), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 2, 5])
def test_early_loss_is_measured_where_it_is_asked_for_and_changes_nothing(depth):
    plan = config(unfreeze_depth=depth, epochs=4)
    plain, measured = train(plan), train(plan, early_loss_epochs=[1, 3])
    assert losses(plain) == losses(measured)
    assert [row["early_loss"] is not None for row, _ in measured] == [True, False, True, False]
    assert all(row["early_loss"] is None for row, _ in plain)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
def test_early_loss_is_the_same_from_any_checkpoint(after):
    plan = config(epochs=4)
    whole = train(plan, early_loss_epochs=[1, 2, 3])
    begun = finetune(plan, make_data(), device=CPU, weights=None, early_loss_epochs=[1, 2, 3])
    state = [next(begun)[1]() for _ in range(after)][-1]
    rest = train(plan, state=state, early_loss_epochs=[1, 2, 3])
    assert [row["early_loss"] for row, _ in rest] == [row["early_loss"] for row, _ in whole[after:]]


@examples(25)  # each takes a tenth of a second
@given(arrays(np.float32, (30, 3), elements=st.floats(-20, 20, width=32)), st.floats(0.1, 10), st.floats(-5, 5))
def test_calibration_undoes_scale_and_shift_and_never_hurts(logits, scale, shift):
    logits += np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)  # never all alike
    targets = np.arange(30) % 3
    best = calibrated_loss(logits, targets)
    changed = calibrated_loss((logits * scale + [0, shift, -shift]).astype(np.float32), targets)
    assert changed == pytest.approx(best, abs=5e-3)
    plain = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets), label_smoothing=1 / 32)
    assert 0 < best <= float(plain) + 1e-3


def test_calibration_of_separated_classes_and_of_logits_that_are_not_finite():
    targets = np.arange(30) % 2
    logits = np.stack([-targets, targets], axis=1).astype(np.float32)
    found = [calibrated_loss(logits * scale, targets) for scale in (1e-3, 1.0, 1e3)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-3) and 0.01 < found[0] < 0.3
    assert calibrated_loss(np.full((4, 2), np.nan, np.float32), targets[:4]) is None


def test_rare_labels_are_no_divergence():
    data = make_data(count=96)
    rng = np.random.default_rng(0)
    labels = (rng.random((96, 14)) < 0.01).astype(np.int64)
    labels[:4] = 1
    config = TrialConfig(backbone="test_resnet", learning_rate=1e-5, image_size=32, batch_size=8, epochs=3)
    several = replace(data, labels=labels, classes=tuple("abcdefghijklmn"))
    rows = [row for row, _ in finetune(config, several, device=CPU, weights=None, divergence_factor=10.0)]
    assert rows[-1]["ends"] == "completed" and rows[0]["val_loss"] > 0.3
