"""The fine-tuning loop, without Ray: `finetune` yields one epoch's row at a time; a caller that asks for no more rows
stops the trial."""

import itertools
import math
import operator
import re
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from tuning.record.journal import LOSSES, SCORES, best_epoch
from tuning.record.targets import constant_loss
from tuning.settings.config import TrialConfig
from tuning.settings.values import DEPTH_ALL, Weights
from tuning.settings.words import count
from tuning.training import backbones
from tuning.training.augment import SHUFFLE, epoch_table
from tuning.training.dataset import Data, train_eval_set
from tuning.training.features import Cache
from tuning.training.frozen import Frozen
from tuning.training.graphs import Passes, Replayed, Targets
from tuning.training.mixing import mixing
from tuning.training.models import Models
from tuning.training.probe import probed_head
from tuning.training.ranks import ALONE, Ranks
from tuning.training.scores import calibrated_loss, class_weights, loss_sum, mean_loss, score, target_weight
from tuning.training.state import Averaged, Row, Snapshot, State, restore, snapshot

MOMENTUM = 0.9
OVERFLOWS = 16  # batches in a row whose loss is not finite in float16, after which the trial has diverged
# Messages of PyTorch's allocators, of CUDA's and ROCm's drivers, of cuBLAS, whose handle no longer fits, and of cuDNN;
# "Cannot allocate memory" is the system's if a file can't be mapped.
OUT_OF_MEMORY = "|".join(
    (
        "(?i:out of memory)",
        "DefaultCPUAllocator",
        "Cannot allocate memory",
        "_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
        "(DEVICE|HOST)_ALLOCATION_FAILED",
        "[Uu]nable to find an engine to execute this computation",
    )
)


def finetune(
    config: TrialConfig,
    data: Data,
    *,
    device: torch.device,
    weights: Weights | None,
    metric: str = "val_loss",
    patience: int | None = None,
    divergence_factor: float = math.inf,
    early_loss_epochs: Collection[int] = (),
    state: State | None = None,
    features: Cache | None = None,
    models: Models | None = None,
    halve: bool = True,
    graphs: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Row, Snapshot]]:
    """Fine-tune one configuration, an epoch at a time.

    Args:
        config: what to train, and how.
        data: decoded images.
        device: where to train, on CUDA with mixed precision; evaluation is in float32, as the model is deployed.
        weights: the backbone's pretrained weights; None: random weights.
        metric: chooses the best epoch.
        patience: epochs without improvement after which the trial has converged; None: no limit.
        divergence_factor: see `divergence`; infinite: only a loss that is not finite ends the trial.
        early_loss_epochs: epochs after which `early_loss` is measured: the calibrated validation loss of weights
            averaged over about an epoch, which ranks unfinished trials better than `val_loss` (benchmarks/README.md);
            if the classifier alone is trained, it is `val_loss`.
        state: to resume from.
        features: caches the outputs of frozen layers for this trial and others; None: each epoch computes them.
        models: keeps the model for the next trial; once that has begun, this generator can't be continued.
        halve: whether half the batch at a time is tried where the whole is out of memory.
        graphs: whether CUDA graphs of the training step are tried, and taken where they are faster.
        ranks: this process's part, if several train this model; out of memory is then an error.

    Yields:
        The epoch's row, and a function that takes a snapshot of the state after it. A row whose `ends` is not None is
        the last.

    Raises:
        InputError: the weight file doesn't fit the backbone.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # The model: frozen below the cut, and the optimizer over the parameters above it.
    models = models or Models()
    shape = {"classes": len(data.classes), "image_size": config.image_size}
    network = models.get(config.backbone, **shape, seed=config.seed, weights=weights, device=device)
    model, stages, precision = network.model, network.stages, network.training_precision()
    depth = backbones.resolved_depth(stages, config.unfreeze_depth)
    changed = network.begin(depth, batch_norm=config.batch_norm, head_dropout=config.head_dropout)
    frozen = Frozen(network, depth, data.images, features)
    rates = {name: getattr(config, name) for name in ("learning_rate", "stage_lr_decay", "weight_decay")}
    groups = backbones.parameter_groups(model, stages, depth, **rates)
    optimizer: torch.optim.Optimizer  # fused: a step of EfficientNet-lite0's tensors takes a CPU 3.6 ms instead of 13.6
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=network.half == torch.float16)

    # The batches: an incomplete last one is dropped; if there are too few images, the batch is the whole set.
    labels = torch.from_numpy(data.labels)
    batch_size = min(config.batch_size, len(data.train))
    own_part = ranks.own(batch_size)
    steps = len(data.train) // batch_size
    class_entropy = constant_loss(data.labels[data.train], len(data.classes))
    if data.multi_label:  # a new head begins at log 2 a label, however rare these are
        class_entropy = max(class_entropy, math.log(2))
    balanced = config.class_weighting == "balanced"
    weighting = class_weights(data.labels[data.train], len(data.classes)).to(device) if balanced else None
    train_eval = train_eval_set(data)

    def backward(batch: Tensor, targets: Sequence[Targets], micro_batch: int) -> Tensor:
        """Return the batch's mean loss; gradients are accumulated over parts of `micro_batch` images.

        Args:
            batch: this rank's images of it.
            targets: of the whole batch.
        """
        weight = reduce(operator.add, [target_weight(wanted, weighting, shares) for wanted, shares in targets])
        own_targets = [(wanted[own_part], None if shares is None else shares[own_part]) for wanted, shares in targets]
        total = torch.zeros((), device=device)
        for first in range(0, len(batch), micro_batch):
            part = slice(first, first + micro_batch)
            with precision:
                logits = trained(batch[part]).float()
                of_part = [(wanted[part], shares if shares is None else shares[part]) for wanted, shares in own_targets]
                losses = [
                    loss_sum(logits, wanted, weighting, config.label_smoothing, shares) for wanted, shares in of_part
                ]
            loss = reduce(operator.add, losses) / weight
            scaler.scale(loss if ranks.size == 1 else loss * ranks.size).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return ranks.total(total)

    # The start, or the state to resume from.
    if config.head_init == "probe" and depth and state is None:
        weight, bias = probed_head(network, data, features)[:2]
        classifier = model.get_submodule(backbones.classifier_name(model))[1]  # type: ignore[index]
        with torch.no_grad():
            classifier.weight.copy_(weight.view_as(classifier.weight))
            classifier.bias.copy_(bias)
    averaged = Averaged(model, changed, steps) if early_loss_epochs and depth else None  # until the last of them
    history: list[Row] = []
    best: dict[str, Tensor] = {}  # the best epoch's part of a snapshot: weights and validation logits
    if state is not None:
        history = list(state.history)
        best, mean = restore(state, model, optimizer, scaler)
        if averaged is not None and len(history) < max(early_loss_epochs):
            averaged.restore(mean, len(history) * steps)
    micro_batch = history[-1]["micro_batch"] if history else batch_size
    latency_ms = network.latency_ms()
    trained = ranks.shared(model, frozen.trained)
    replayable = graphs and ranks.size == 1 and not scaler.is_enabled()
    passes: Passes = Replayed(backward, model.parameters(), device) if replayable else backward

    for epoch in range(len(history) + 1, config.epochs + 1):
        # Train. Shuffling, augmentation and dropout depend on (seed, epoch) alone.
        started, data_before, prefix_before = time.perf_counter(), frozen.data_seconds, frozen.prefix_seconds
        backbones.train_mode(model)
        table = epoch_table(config.seed, epoch, len(data.train))
        order = torch.argsort(table[:, SHUFFLE], stable=True).numpy()[: steps * batch_size]
        mixed = mixing(table, config.augmentation, config.image_size, device)
        inputs = frozen.inputs(data.train, table.to(device), config.augmentation, (config.seed, epoch), mixed)
        torch.manual_seed(config.seed * 1_000_003 + epoch + ranks.rank * 1_000_000_007)
        total, skipped, running = (torch.zeros((), device=device) for _ in range(3))
        own = labels[torch.from_numpy(data.train[order])].to(device)
        targets: list[list[Targets]] = [[(wanted, None)] for wanted in torch.split(own, batch_size)]
        if mixed is not None:
            others = labels[torch.from_numpy(data.train[mixed.partners[order]])].to(device)
            shares = torch.from_numpy(mixed.shares[order]).to(device)
            split = (torch.split(each, batch_size) for each in (own, shares, others, 1 - shares))
            targets = [[(wanted, share), (other, rest)] for wanted, share, other, rest in zip(*split, strict=True)]
        own_order = order.reshape(steps, batch_size)[:, own_part]
        for step, batch in enumerate(inputs.batches(own_order.ravel(), own_order.shape[1])):
            factor = learning_rate_factor(config, epoch - 1 + step / steps)
            for group, rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = rate * factor
            for attempt in itertools.count():
                optimizer.zero_grad(set_to_none=True)
                try:
                    loss = passes(batch, targets[step], micro_batch)
                    break
                except (RuntimeError, MemoryError) as error:
                    tried = ranks.size > 1 or micro_batch < batch_size or (attempt and not halve)
                    if tried or not out_of_memory(error):
                        raise
                optimizer.zero_grad(set_to_none=True)
                models.keep_only(network)
                if features is not None:
                    features.clear()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                if attempt:  # what could be freed was not enough; with batch norm, halves are another model
                    micro_batch = math.ceil(batch_size / 2)
            if scaler.is_enabled():  # float16 may overflow in a batch, whose step is then skipped
                finite = loss.isfinite()
                skipped, running = skipped + ~finite, torch.where(finite, 0, running + 1)
                loss = torch.where(finite | (running >= OVERFLOWS), loss, 0)
            total += loss
            scaler.step(optimizer)
            scaler.update()
            if averaged is not None and epoch <= max(early_loss_epochs):
                averaged.update()
            if step % 16 == 15 and not math.isfinite(float(total)):  # each check waits for the GPU
                break
        train_loss = float(total) / max(steps - int(skipped), 1) if skipped < steps else math.inf
        data_seconds, prefix_seconds = frozen.data_seconds - data_before, frozen.prefix_seconds - prefix_before
        train_seconds = time.perf_counter() - started - data_seconds - prefix_seconds

        # Evaluate, unless the training loss is not finite.
        model.eval()
        measured: Row = dict.fromkeys((*LOSSES, *SCORES, "train_eval_loss", "early_loss"))
        if math.isfinite(train_loss):
            val_logits = ranks.logits(frozen.logits, data.val)
            found = score(val_logits, data.labels[data.val])
            measured |= {f"val_{name}": value for name, value in found.items()}
            train_logits = ranks.logits(frozen.logits, train_eval)
            measured["train_eval_loss"] = mean_loss(train_logits, data.labels[train_eval])
            if averaged is not None and epoch in early_loss_epochs:
                with averaged.in_place():
                    early_logits = ranks.logits(frozen.logits, data.val)
                measured["early_loss"] = calibrated_loss(early_logits, data.labels[data.val])
            elif epoch in early_loss_epochs:
                measured["early_loss"] = measured["val_loss"]

        # Report the row, and whether the trial ends with it. Outputs that are held make way where memory is needed.
        held = 0 if features is None else features.held_bytes
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
            "peak_memory_mb": (torch.cuda.max_memory_reserved(device) - held) / 2**20
            if device.type == "cuda"
            else None,
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
            # On the model's device, until a checkpoint needs them: on a GPU most epochs are followed by none.
            contiguous = torch.contiguous_format
            best = {f"best/{name}": tensors[name].detach().clone(memory_format=contiguous) for name in changed}
            best["validation/logits"] = torch.from_numpy(val_logits)
        mean = {} if averaged is None or epoch >= max(early_loss_epochs) else averaged.mean
        yield row, partial(snapshot, model, changed, best, mean, optimizer, scaler, history)
        if row["ends"] is not None:
            return


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def out_of_memory(error: Exception) -> bool:
    """Return whether the error means that the device, or the machine, is out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(OUT_OF_MEMORY, str(error)) is not None


def learning_rate_factor(config: TrialConfig, epochs: float) -> float:
    """Return the factor of the peak learning rate after `epochs` (fractions count): linear warm-up, then schedule."""
    if epochs < config.warmup_epochs:
        return (epochs + 1e-3) / (config.warmup_epochs + 1e-3)
    if config.schedule == "constant":
        return 1.0
    progress = (epochs - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def ending(
    rows: list[Row], *, epochs: int, metric: str, patience: int | None, class_entropy: float, divergence_factor: float
) -> tuple[str | None, str | None]:
    """Return how and why a trial ends with the last of its rows, or Nones. Arguments as in `finetune`."""
    epoch, best_row = len(rows), best_epoch(rows, metric)
    losses = [row["val_loss"] for row in rows]
    reason = divergence(rows[-1]["train_loss"], losses, class_entropy=class_entropy, factor=divergence_factor)
    if reason is not None:
        return "diverged", reason
    if epoch == epochs:
        return "completed", f"all {count(epochs, 'epoch')}"
    if patience is not None and best_row is not None and epoch - best_row["epoch"] >= patience:
        return "converged", f"no improvement on epoch {best_row['epoch']} for {count(patience, 'epoch')}"
    return None, None


def divergence(
    train_loss: float | None, val_losses: list[float | None], *, class_entropy: float, factor: float
) -> str | None:
    """Return why a trial has diverged, with the numbers, or None.

    A loss that is not finite (None here) counts at once. A validation loss over `factor` times the entropy of the class
    frequencies, or over `factor` times the trial's best so far (at least a tenth of that entropy), counts in two
    consecutive epochs: batch norm's statistics lag at first.

    Args:
        train_loss: of the last epoch.
        val_losses: of every epoch so far.
        class_entropy: the loss (nats) of predicting the class frequencies.
        factor: infinite: only a loss that is not finite counts.
    """
    if train_loss is None:
        return f"the training loss was not finite in epoch {len(val_losses)}"
    before, loss = [None, *val_losses][-2:]
    if loss is None:
        return f"the validation loss was not finite in epoch {len(val_losses)}"
    if before is None or math.isinf(factor):
        return None
    best = min(value for value in val_losses if value is not None)
    for limit, name in ((class_entropy, "the class entropy"), (max(best, class_entropy / 10), "its own best")):
        if min(before, loss) > factor * limit:
            losses = f"val_loss {before:.4g} and {loss:.4g} in two consecutive epochs"
            return f"{losses}, over {factor:g} x {limit:.4g}, {name}"
    return None
