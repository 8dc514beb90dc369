"""The fine-tuning loop. It knows nothing of Ray: `finetune` yields one epoch's row at a time, and whoever asks for no
more rows stops the trial."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tuning.record.journal import best_epoch
from tuning.settings.config import DEPTH_ALL, TrialConfig
from tuning.training import backbones
from tuning.training.augment import SHUFFLE, epoch_table
from tuning.training.averaging import Averaged
from tuning.training.dataset import Data, preparer, train_eval_set
from tuning.training.features import FeatureCache
from tuning.training.frozen import Frozen, Inputs, Prepare, mixed_precision
from tuning.training.models import Models
from tuning.training.probe import probed_head
from tuning.training.scores import calibrated_loss, score

MOMENTUM = 0.9
EVALUATION_BATCH = 64
EVALUATION_VECTORS = 4096  # a batch where the classifier alone is trained
Row = dict[str, Any]


@dataclass(frozen=True)
class State:
    """All that a trial needs to go on from the end of an epoch; every tensor is a copy on the CPU."""

    history: list[Row]
    tensors: dict[str, Tensor]  # model/<name>, best/<name>, averaged/<name>, optimizer/<parameter>/<key>, and
    # validation/logits: of the best epoch, float32 [validation images, classes]


def finetune(
    config: TrialConfig,
    data: Data,
    *,
    device: torch.device,
    weights: Path | None,
    metric: str = "val_loss",
    patience: int | None = None,
    divergence_factor: float = math.inf,
    early_loss_epochs: Collection[int] = (),
    state: State | None = None,
    features: FeatureCache | None = None,
    models: Models | None = None,
) -> Iterator[tuple[Row, Callable[[], State]]]:
    """Fine-tune one configuration, an epoch at a time.

    Args:
        config: what to train, and how.
        data: decoded images.
        device: where to train; on CUDA with mixed precision.
        weights: the backbone's weight file; null draws random ones.
        metric: chooses the best epoch.
        patience: epochs without a better one after which the trial has converged; null: never.
        divergence_factor: see `divergence`; infinite: only a loss that is not finite ends the trial.
        early_loss_epochs: after which `early_loss` is measured: the validation loss of weights averaged over about an
            epoch, calibrated. It ranks unfinished trials better than the loss itself, but where the classifier alone
            is trained: there it is the loss itself; see benchmarks/README.md.
        state: where to go on from.
        features: keeps the outputs of frozen layers for this trial and others; null: they are computed in each epoch.
        models: keeps the model for the next trial. A trial that uses it ends the one before.

    Yields:
        The epoch's row, and a function that takes a snapshot of the state after it. A row whose `ends` is not null is
        the last.

    Raises:
        InputError: the weight file doesn't fit the backbone.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # The model: frozen below the cut, and the optimizer over what is above it.
    models = models or Models()
    network = models.get(
        config.backbone,
        classes=len(data.classes),
        image_size=config.image_size,
        seed=config.seed,
        weights=weights,
        device=device,
    )
    model, stages = network.model, network.stages
    depth = backbones.resolved_depth(stages, config.unfreeze_depth)
    changed = network.begin(depth, batch_norm=config.batch_norm, head_dropout=config.head_dropout)
    groups = backbones.parameter_groups(
        model,
        stages,
        depth,
        learning_rate=config.learning_rate,
        stage_lr_decay=config.stage_lr_decay,
        weight_decay=config.weight_decay,
    )
    optimizer: torch.optim.Optimizer  # fused: a step of EfficientNet-lite0's tensors takes a CPU 3.6 ms instead of 13.6
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    autocast = mixed_precision(device)
    scaled = device.type == "cuda" and autocast.fast_dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    # The batches: an incomplete last one is dropped; with too few images the batch is the whole set.
    labels = torch.from_numpy(data.labels)
    batch_size = min(config.batch_size, len(data.train))
    steps = len(data.train) // batch_size
    frequencies = np.bincount(data.labels[data.train], minlength=len(data.classes)) / len(data.train)
    class_entropy = float(-(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum())
    class_weights = None
    if config.class_weighting == "balanced":
        inverse = 1 / np.maximum(frequencies, 1 / len(data.train)) / len(data.classes)
        class_weights = torch.tensor(inverse, dtype=torch.float32, device=device)
    train_eval = train_eval_set(data)
    frozen = Frozen(
        network,
        depth,
        preparer(data.images, config.backbone, device),
        autocast,
        device,
        features,
        backbone=config.backbone,
        weights=f"random {config.seed}" if weights is None else str(weights),
    )

    def backward(batch: Tensor, targets: Tensor, micro_batch: int) -> Tensor:
        """The batch's mean loss; its gradients are accumulated over parts of `micro_batch` images."""
        weight = len(targets) if class_weights is None else class_weights[targets].sum()
        total = torch.zeros((), device=device)
        for inputs, wanted in zip(torch.split(batch, micro_batch), torch.split(targets, micro_batch), strict=True):
            with autocast:
                logits = frozen.trained(inputs)
                smoothing = config.label_smoothing
                loss = functional.cross_entropy(
                    logits.float(), wanted, weight=class_weights, label_smoothing=smoothing, reduction="sum"
                )
            loss = loss / weight
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    # Where to begin, or to go on from.
    if config.head_init == "probe" and depth and state is None:
        weight, bias = probed_head(network, config, data, device=device, weights=weights, features=features)[:2]
        classifier = model.get_submodule(backbones.classifier_name(model))[1]  # type: ignore[index]
        with torch.no_grad():
            classifier.weight.copy_(weight.view_as(classifier.weight))
            classifier.bias.copy_(bias)
    averaged = Averaged(model, changed, steps) if early_loss_epochs and depth else None  # until the last of them
    history: list[Row] = []
    best: dict[str, Tensor] = {}  # the best epoch's snapshot: weights, and logits of validation
    if state is not None:
        history = list(state.history)
        best, mean = _restore(state, model, optimizer, scaler)
        if averaged is not None and len(history) < max(early_loss_epochs):
            averaged.restore(mean, len(history) * steps)
    micro_batch = history[-1]["micro_batch"] if history else batch_size
    latency_ms = network.latency_ms(autocast)

    for epoch in range(len(history) + 1, config.epochs + 1):
        # Train. Shuffling, views and dropout depend on (seed, epoch) alone, not on what came before.
        started, data_before, prefix_before = time.perf_counter(), frozen.data_seconds, frozen.prefix_seconds
        backbones.train_mode(model)
        table = epoch_table(config.seed, epoch, len(data.train))
        order = torch.argsort(table[:, SHUFFLE], stable=True).numpy()[: steps * batch_size]
        inputs = frozen.inputs(data.train, table, config.augmentation, (config.seed, epoch))
        torch.manual_seed(config.seed * 1_000_003 + epoch)
        total = torch.zeros((), device=device)
        targets = torch.split(labels[torch.from_numpy(data.train[order])].to(device), batch_size)
        for step, batch in enumerate(inputs.batches(order, batch_size)):
            factor = learning_rate_factor(config, epoch - 1 + step / steps)
            for group, rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = rate * factor
            while True:
                optimizer.zero_grad(set_to_none=True)
                try:
                    total += backward(batch, targets[step], micro_batch)
                    break
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error) or micro_batch < batch_size:
                        raise
                micro_batch = math.ceil(batch_size / 2)
                models.keep_only(network)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            scaler.step(optimizer)
            scaler.update()
            if averaged is not None and epoch <= max(early_loss_epochs):
                averaged.update()
            if step % 16 == 15 and not math.isfinite(float(total)):  # each look waits for the GPU
                break
        train_loss = float(total) / steps
        data_seconds, prefix_seconds = frozen.data_seconds - data_before, frozen.prefix_seconds - prefix_before
        train_seconds = time.perf_counter() - started - data_seconds - prefix_seconds

        # Evaluate, unless the loss is lost already.
        model.eval()
        measured: Row = dict.fromkeys(
            ("val_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc", "train_eval_loss", "early_loss")
        )
        if math.isfinite(train_loss):
            val_logits = logits_of(frozen, data.val, autocast)
            found = score(val_logits, data.labels[data.val])
            measured |= {f"val_{name}": value for name, value in found.items()}
            train_eval_logits = logits_of(frozen, train_eval, autocast)
            measured["train_eval_loss"] = score(train_eval_logits, data.labels[train_eval])["loss"]
            if averaged is not None and epoch in early_loss_epochs:
                with averaged.in_place():
                    early_logits = logits_of(frozen, data.val, autocast)
                measured["early_loss"] = calibrated_loss(early_logits, data.labels[data.val])
            elif epoch in early_loss_epochs:
                measured["early_loss"] = measured["val_loss"]

        # The row, and whether the trial ends with it.
        row: Row = {
            "epoch": epoch,
            "train_loss": _finite(train_loss),
            **{name: _finite(value) for name, value in measured.items()},
            "learning_rate": optimizer.param_groups[0]["lr"],
            "images": (step + 1) * batch_size,
            "seconds": (seconds := time.perf_counter() - started),
            "data_seconds": (data_seconds := frozen.data_seconds - data_before),
            "prefix_seconds": (prefix_seconds := frozen.prefix_seconds - prefix_before),
            "train_seconds": train_seconds,
            "evaluate_seconds": seconds - data_seconds - prefix_seconds - train_seconds,
            "cache_hits": inputs.hits,
            "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
            "gpu_memory_mb": torch.cuda.mem_get_info(device)[1] / 2**20 if device.type == "cuda" else None,
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "latency_ms": latency_ms,
            "unfreeze_depth": DEPTH_ALL if depth == len(stages) else depth,
        }
        history = [*history, row]
        row["ends"], row["reason"] = ending(
            history,
            epochs=config.epochs,
            metric=metric,
            patience=patience,
            class_entropy=class_entropy,
            divergence_factor=divergence_factor,
        )
        if best_epoch(history, metric) is row:
            tensors = model.state_dict()
            best = {f"best/{name}": tensors[name].detach().cpu().clone() for name in changed}
            best["validation/logits"] = torch.from_numpy(val_logits)
        mean = {} if averaged is None or epoch >= max(early_loss_epochs) else averaged.mean
        yield row, partial(_snapshot, model, changed, best, mean, optimizer, scaler, history)
        if row["ends"] is not None:
            return


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    said = (
        "DefaultCPUAllocator",
        "Cannot allocate memory",  # of the system: a file can't be mapped
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in said)


def learning_rate_factor(config: TrialConfig, epochs: float) -> float:
    """The share of the peak learning rate after so many epochs (fractions count): linear warm-up, then the schedule."""
    if epochs < config.warmup_epochs:
        return (epochs + 1e-3) / (config.warmup_epochs + 1e-3)
    if config.schedule == "constant":
        return 1.0
    progress = (epochs - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def ending(
    history: list[Row],
    *,
    epochs: int,
    metric: str,
    patience: int | None,
    class_entropy: float,
    divergence_factor: float,
) -> tuple[str | None, str | None]:
    """How and why a trial ends with the last row of its history; nulls where it goes on. Arguments as in `finetune`."""
    epoch, best_row = len(history), best_epoch(history, metric)
    losses = [row["val_loss"] for row in history]
    reason = divergence(history[-1]["train_loss"], losses, class_entropy=class_entropy, factor=divergence_factor)
    if reason is not None:
        return "diverged", reason
    if epoch == epochs:
        return "completed", f"all {epoch} epochs"
    if patience is not None and best_row is not None and epoch - best_row["epoch"] >= patience:
        return "converged", f"no epoch better than {best_row['epoch']} for {patience} epoch{'s' * (patience > 1)}"
    return None, None


def divergence(
    train_loss: float | None, val_losses: list[float | None], *, class_entropy: float, factor: float
) -> str | None:
    """Why a trial has diverged, with the numbers, or null.

    A loss that is not finite (null here) counts at once. A validation loss over `factor` times the entropy of the class
    frequencies (nats), or over `factor` times the trial's best so far (floored at a tenth of that entropy), counts when
    it happens in two epochs running: batch norm's statistics lag at first.

    Args:
        train_loss: of the last epoch.
        val_losses: of every epoch so far.
        class_entropy: what predicting the class frequencies would cost.
        factor: infinite: only a loss that is not finite counts.
    """
    if train_loss is None:
        return f"the training loss was not finite in epoch {len(val_losses)}"
    if val_losses[-1] is None:
        return f"the validation loss was not finite in epoch {len(val_losses)}"
    if len(val_losses) < 2 or math.isinf(factor):
        return None
    last = [loss for loss in val_losses[-2:] if loss is not None]
    best = min(loss for loss in val_losses if loss is not None)
    for limit, what in (
        (class_entropy, "the class entropy"),
        (max(best, class_entropy / 10), "its own best"),
    ):
        if len(last) == 2 and min(last) > factor * limit:
            return (
                f"val_loss {last[0]:.4g} and {last[1]:.4g} in two epochs running, over {factor:g} x {limit:.4g}, {what}"
            )
    return None


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor], batches: Iterable[Tensor], autocast: torch.autocast
) -> NDArray[np.float32]:
    """Logits [n, classes], on the CPU; `forward` is a model in eval mode, or its trained part."""
    logits = []
    for batch in batches:
        with autocast:
            logits.append(forward(batch).float().cpu())
    return torch.cat(logits).numpy()


def predict_images(network: nn.Module, prepare: Prepare, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [n, classes] of a whole network for images as they are; the network is put in eval mode."""
    network.eval()
    batches = Inputs(lambda part: prepare(part, None, "none")).batches(indices, EVALUATION_BATCH)
    return predict(network, batches, torch.autocast("cpu", enabled=False))


def logits_of(frozen: Frozen, indices: NDArray[np.int64], autocast: torch.autocast) -> NDArray[np.float32]:
    """Logits [n, classes] of a set of images as they are."""
    size = EVALUATION_VECTORS if frozen.head_only else EVALUATION_BATCH
    return predict(frozen.trained, frozen.inputs(indices).batches(np.arange(len(indices)), size), autocast)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _snapshot(
    model: nn.Module,
    changed: list[str],
    best: dict[str, Tensor],
    mean: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: list[Row],
) -> State:
    tensors = model.state_dict()
    saved = {f"model/{name}": tensors[name] for name in changed}
    saved |= best
    saved |= {f"averaged/{name}": tensor for name, tensor in mean.items()}
    for index, values in optimizer.state_dict()["state"].items():
        saved |= {f"optimizer/{index}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    if scaler.is_enabled():
        saved |= {f"scaler/{name}": torch.tensor(scaler.state_dict()[name]) for name in ("scale", "_growth_tracker")}
    return State(
        list(history),
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in saved.items()},
    )


def _restore(
    state: State, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put a snapshot back; returns the best epoch's part of it and the averaged weights."""
    best: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}, "scaler": {}}
    for name, tensor in state.tensors.items():
        part, _, rest = name.partition("/")
        if part in ("best", "validation"):
            best[name] = tensor
        else:
            parts[part][rest] = tensor
    model.load_state_dict(parts["model"], strict=False)
    slots: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:  # fused optimizers take it to be laid out in memory as the parameter is
            tensor = torch.empty_like(parameter, device="cpu").copy_(tensor)
        slots.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {name: value.item() for name, value in parts["scaler"].items()})
    return best, parts["averaged"]
