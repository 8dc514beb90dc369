"""Pretrained backbones: build with timm, five stages, freeze to a depth, groups of parameters for the optimizer."""

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.layers import DropPath
from timm.models import get_pretrained_cfg, group_parameters, load_state_dict
from torch import Tensor, nn

from tuning.settings.config import DEPTH_ALL, InputError
from tuning.training.weights import PACKAGES, unsupported

MIN_PROBE_SIZE = 64  # below it the last stages of stride-32 models have one position and look pooled


# ---- build ------------------------------------------------------------------------------------------------------


def build(
    backbone: str, *, classes: int, image_size: int, head_dropout: float, seed: int, weights: Path | None
) -> nn.Module:
    """A backbone with a new classifier, `Sequential(Dropout, classifier)`, drawn from (seed, backbone) alone.

    The global random state is left as it was.

    Args:
        backbone: timm model name.
        classes: outputs of the classifier.
        image_size: side in pixels.
        head_dropout: probability that an input of the classifier is dropped in training.
        seed: draws the classifier, and everything else where `weights` is None.
        weights: file of pretrained weights from `find_weights`; None: random weights.

    Returns:
        A model on the CPU: images `[n, 3, image_size, image_size]` to logits `[n, classes]`.

    Raises:
        InputError: the backbone is unknown or unsupported, or the file doesn't hold its weights.
    """
    if fault := unsupported(backbone):
        raise InputError(fault)
    digest = hashlib.sha256(f"{seed} {backbone}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(drawn)  # torch.manual_seed would seed the GPUs as well
        model = _create(backbone, classes, image_size) if weights is None else _load(backbone, image_size, weights)
        if model.num_classes != classes:
            model.reset_classifier(classes)
    name = model.pretrained_cfg["classifier"]
    classifier = model.get_submodule(name)
    if not isinstance(classifier, nn.Linear | nn.Conv2d) or not hasattr(model, "group_matcher"):
        raise InputError(f"backbone: {backbone!r} is not supported: timm gives it no plain classifier or no stages")
    # Standard deviation as in torchvision's heads: small logits, so the first loss is near the class entropy.
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(drawn))
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
    # timm's own dropout acts before the classifier's module, so it would sit below the cut at depth 0.
    model.set_submodule(name, nn.Sequential(nn.Dropout(head_dropout), classifier))
    for module in model.modules():
        if isinstance(module, DropPath):  # Swin and others drop paths by default
            module.drop_prob = 0.0
    model.to(memory_format=torch.channels_last)
    assert isinstance(model, nn.Module)
    return model


def input_mean_std(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, per channel in [0, 1], of the images that a backbone was pretrained on."""
    cfg = get_pretrained_cfg(backbone)
    return tuple(cfg.mean), tuple(cfg.std)


def _create(backbone: str, classes: int, image_size: int, overlay: dict[str, Any] | None = None) -> Any:
    """A timm model; with `overlay`, entries of the pretrained cfg, one whose weights timm loads as they say."""
    size = {"img_size": image_size} if get_pretrained_cfg(backbone).fixed_input_size else {}
    try:
        return timm.create_model(
            backbone,
            pretrained=overlay is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=classes,
            drop_rate=0.0,
            **size,
        )
    except AssertionError as error:
        raise InputError(
            f"image_size: {backbone} can't take {image_size} px: {error}; {_size_cure(backbone)}"
        ) from None


def _size_cure(backbone: str) -> str:
    return f"set image_size to {get_pretrained_cfg(backbone).input_size[-1]} or another multiple of 32"


def _load(backbone: str, image_size: int, file: Path) -> Any:
    """A model with the weights of `file`; only a classifier may be missing from it or have another shape."""
    classes = get_pretrained_cfg(backbone).num_classes or 1
    # timm's own loading renames keys and resamples position embeddings; strict because it only logs missing keys.
    overlay = {"file": str(file), "custom_load": False, "num_classes": classes, "label_offset": 0}
    try:
        if backbone.partition(".")[0] in PACKAGES and "_conv_stem.weight" in (
            state := load_state_dict(str(file), weights_only=True)
        ):
            model = _create(backbone, classes, image_size)
            # The packages' tensors stand in the order of timm's state dict, under other names.
            model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
            return model
        try:
            return _create(backbone, classes, image_size, overlay)
        except RuntimeError as error:
            classifier = f"{get_pretrained_cfg(backbone).classifier}."
            wrong = _wrong_keys(str(error))
            faulty = [key for key in wrong if not key.startswith(classifier) and not wrong[key].startswith("unex")]
            if not wrong:
                raise
            if faulty:
                more = f" and {len(faulty) - 1} more" if len(faulty) > 1 else ""
                raise InputError(
                    f"weights: {file} must hold the weights of {backbone}: {faulty[0]} {wrong[faulty[0]]}{more}; "
                    "copy timm's own file of this model"
                ) from None
        # A number of classes that differs makes timm drop the file's classifier.
        return _create(backbone, classes, image_size, overlay | {"num_classes": 0})
    except InputError:
        raise
    except (RuntimeError, KeyError, ValueError, OSError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"weights: {file} can't be read as a state dict of {backbone} ({type(error).__name__}: {reason}); "
            "copy timm's own file of this model, as .safetensors or a plain PyTorch state dict"
        ) from error


def _wrong_keys(message: str) -> dict[str, str]:
    """Keys and what is wrong with them, read from the message of torch's strict `load_state_dict`."""
    wrong: dict[str, str] = {}
    for kind, keys in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", message):
        wrong |= dict.fromkeys(re.findall(r'"([^"]+)"', keys), "is missing" if kind == "Missing" else "is unexpected")
    for key, shapes in re.findall(r"size mismatch for (\S+): (.*)", message):
        wrong[key] = "has another shape: " + shapes.rstrip(".")
    return wrong


# ---- stages -----------------------------------------------------------------------------------------------------


def stages(model: nn.Module, image_size: int) -> list[list[str]]:
    """At most five stages of parameters, by timm's coarse groups and their output resolutions.

    Groups that are norms alone or pooled join the group before them. Where more than five are left, neighbours of
    equal resolution merge if that gives five, else the groups are split into five runs, longer runs first.

    Args:
        model: from `build`.
        image_size: side in pixels.

    Returns:
        Names of the parameters of each stage, the stage nearest to the input first, without the classifier.

    Raises:
        InputError: the model can't take images of this size.
    """
    classifier = classifier_name(model)
    replaced = model.get_submodule(classifier)
    model.set_submodule(classifier, replaced[1])  # type: ignore[index]
    try:  # Inception's matcher looks for the classifier as timm made it
        coarse = group_parameters(model, model.group_matcher(coarse=True)).values()  # type: ignore[operator]
    finally:
        model.set_submodule(classifier, replaced)
    groups = [kept for names in coarse if (kept := [name for name in names if not name.startswith(classifier + ".")])]
    parameters = dict(model.named_parameters())
    positions = _positions(model, image_size)

    joined: list[tuple[list[str], int]] = []  # names, positions of the last module with more than one
    for names in groups:
        members = set(names)
        resolution = next((count for name, count in reversed(positions) if name in members and count > 1), 0)
        norms_alone = all(parameters[name].ndim <= 1 for name in names)
        if joined and (norms_alone or resolution == 0):
            joined[-1] = (joined[-1][0] + names, joined[-1][1])
        else:
            joined.append((names, resolution))
    if len(joined) <= DEPTH_ALL:
        return [names for names, _ in joined]

    merged: list[tuple[list[str], int]] = []
    for names, resolution in joined:
        if merged and merged[-1][1] == resolution:
            merged[-1] = (merged[-1][0] + names, resolution)
        else:
            merged.append((names, resolution))
    if len(merged) == DEPTH_ALL:
        return [names for names, _ in merged]
    runs = np.array_split(np.arange(len(joined)), DEPTH_ALL)
    return [[name for index in run for name in joined[index][0]] for run in runs]


def classifier_name(model: nn.Module) -> str:
    """Name of the module that holds dropout and classifier."""
    return str(model.pretrained_cfg["classifier"])  # type: ignore[index]


def _positions(model: nn.Module, image_size: int) -> list[tuple[str, int]]:
    """Weights in order of execution, each with the number of positions in its module's output for one image."""
    fixed = model.pretrained_cfg.get("fixed_input_size")  # type: ignore[union-attr,operator]
    size = image_size if fixed else max(image_size, MIN_PROBE_SIZE)
    executed: list[tuple[str, int]] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                # Counting elements per channel serves NCHW, NHWC, tokens and windows alike.
                executed.append((name + ".weight", output.numel() // len(module.weight)))  # type: ignore[arg-type]

        return hook

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    try:
        with evaluating(model):
            model(zero_images(model, 1, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        cure = _size_cure(str(model.pretrained_cfg["architecture"]))  # type: ignore[index]
        raise InputError(f"image_size: this model can't take {size} px ({error}); {cure}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return executed


def zero_images(model: nn.Module, count: int, image_size: int) -> Tensor:
    """Black images `[count, 3, image_size, image_size]` on the model's device, channels last."""
    zeros = torch.zeros(count, 3, image_size, image_size, device=next(model.parameters()).device)
    return zeros.contiguous(memory_format=torch.channels_last)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


# ---- freezing ---------------------------------------------------------------------------------------------------


def resolved_depth(stage_names: Sequence[Sequence[str]], depth: int) -> int:
    """The number of stages that are trained: 5 means all, of which there may be fewer."""
    return min(depth, len(stage_names))


def trained_names(model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int) -> set[str]:
    """Names of the classifier's parameters and those of the last `depth` stages."""
    classifier = classifier_name(model) + "."
    frozen = len(stage_names) - resolved_depth(stage_names, depth)
    names = {name for name, _ in model.named_parameters() if name.startswith(classifier)}
    return names.union(*stage_names[frozen:])


def unfreeze(model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int, *, batch_norm: str) -> None:
    """Let the classifier and the last `depth` stages have gradients, and nothing else.

    Args:
        model: changed in place.
        stage_names: from `stages`.
        depth: stages counted from the head; 5 is all.
        batch_norm: `train`, or `frozen` to keep the affine weights of every batch norm.
    """
    above = trained_names(model, stage_names, depth)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in above)
    if batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """Put the classifier, and modules that own a parameter to be trained, in train mode; all others in eval mode.

    So frozen batch norms keep their statistics, and nothing below the classifier draws random numbers.
    """
    model.eval()
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    model.get_submodule(classifier_name(model)).train()


def parameter_groups(
    model: nn.Module,
    stage_names: Sequence[Sequence[str]],
    depth: int,
    *,
    learning_rate: float,
    stage_lr_decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for `torch.optim`: the trained parameters by learning rate and weight decay.

    Args:
        model: after `unfreeze`; only parameters that require gradients are taken.
        stage_names: from `stages`.
        depth: stages counted from the head; 5 is all.
        learning_rate: of the classifier and of the last stage.
        stage_lr_decay: factor for each stage further from the head.
        weight_decay: 0 for parameters of one dimension (biases and norms).

    Returns:
        Groups with `params`, `lr` and `weight_decay`, from the head downwards.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(reversed(stage_names))[: resolved_depth(stage_names, depth)]
    levels = [trained_names(model, stage_names, 0).union(*trained[:1]), *map(set, trained[1:])]
    groups = []
    for level, names in enumerate(levels):
        for decay, flat in ((weight_decay, False), (0.0, True)):
            chosen = [value for name, value in parameters.items() if name in names and (value.ndim <= 1) == flat]
            if chosen:
                rate = learning_rate * stage_lr_decay**level
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups
