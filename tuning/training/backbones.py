"""Pretrained backbones: built with timm, divided into five stages, frozen to a depth, with parameter groups."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import DropPath
from timm.models import get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from tuning.settings.config import InputError
from tuning.settings.values import DEPTH_ALL, Weights
from tuning.training import state_dicts
from tuning.training.weights import timm_name, unsupported

MIN_TRACED_SIZE = 64  # below it the last stages of stride-32 models have one position, as if pooled


def build(
    backbone: str, *, classes: int, image_size: int, head_dropout: float, seed: int, weights: Weights | None
) -> nn.Module:
    """Build a backbone with a new classifier, `Sequential(Dropout, classifier)`, initialised from (seed, backbone).

    The global random state does not change.

    Args:
        backbone: timm model name.
        classes: number of outputs.
        image_size: side in pixels.
        head_dropout: dropout probability of the classifier's inputs.
        seed: of the classifier, and of everything else if `weights` is None.
        weights: pretrained weights from `find_weights`; None: random weights.

    Returns:
        A model on the CPU: images `[n, 3, image_size, image_size]` to logits `[n, classes]`. Its `pretrained_cfg` holds
        the mean and standard deviation of the images that it expects, and as `loaded` what its weights were made of.

    Raises:
        InputError: the backbone is unknown or unsupported, or the file doesn't hold its weights.
    """
    if fault := unsupported(backbone):
        raise InputError(fault)
    digest = hashlib.sha256(f"{seed} {backbone}".encode()).digest()
    own_seed = int.from_bytes(digest[:8], "big") >> 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own_seed)  # torch.manual_seed would seed the GPUs as well
        loaded = ""
        if weights is None:
            model = _create(backbone, classes, image_size)
        else:
            model, loaded = _load(backbone, image_size, weights)
        if model.num_classes != classes:
            model.reset_classifier(classes)
    name = model.pretrained_cfg["classifier"]
    classifier = model.get_submodule(name)
    if not isinstance(classifier, nn.Linear | nn.Conv2d) or not hasattr(model, "group_matcher"):
        raise InputError(f"backbone: {backbone!r} is not supported: timm gives it no plain classifier or no stages")
    # Standard deviation as in torchvision's heads: small logits, so the first loss is near the class entropy.
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(own_seed))
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
    # timm's own dropout acts before the classifier's module: it would be below the cut at depth 0.
    model.set_submodule(name, nn.Sequential(nn.Dropout(head_dropout), classifier))
    for module in model.modules():
        if isinstance(module, DropPath):  # Swin and others drop paths by default
            module.drop_prob = 0.0
    model.to(memory_format=torch.channels_last)
    given = {} if weights is None else {"mean": weights.mean, "std": weights.std}
    model.pretrained_cfg |= {key: value for key, value in given.items() if value} | {"loaded": loaded}
    model.pretrained_cfg.pop("state_dict", None)  # which timm keeps, a second time
    assert isinstance(model, nn.Module)
    return model


def input_mean_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation, per channel in [0, 1], of the images that a model was pretrained on."""
    cfg: Any = model.pretrained_cfg
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _create(backbone: str, classes: int, image_size: int, overlay: dict[str, Any] | None = None) -> Any:
    """Create a timm model; with `overlay`, entries of its pretrained cfg, timm loads the weights that they name."""
    options = {"num_classes": classes, "drop_rate": 0.0}
    name = timm_name(backbone)
    if get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=overlay is not None, pretrained_cfg_overlay=overlay, **options)
    except AssertionError as error:
        raise InputError(_wrong_size(backbone, image_size, error)) from None


def _wrong_size(backbone: str, image_size: int, error: Exception) -> str:
    cure = f"set image_size to {get_pretrained_cfg(timm_name(backbone)).input_size[-1]} or another multiple of 32"
    reason = str(error).partition("\n")[0] or type(error).__name__
    return f"image_size: {backbone} can't take {image_size} px ({reason}); {cure}"


def check(backbone: str, sizes: Sequence[int], weights: Weights | None) -> str:
    """Check that a backbone can be built with its weights, and takes images of these sizes, in pixels.

    Returns:
        What the weights were made of, in words; empty if they are random or timm's own.

    Raises:
        InputError: as `build` does, or each size that it can't take.
    """
    faults: list[str] = []
    model, loaded = None, ""
    for size in sizes:
        try:
            if model is None or get_pretrained_cfg(timm_name(backbone)).fixed_input_size:
                model = build(backbone, classes=2, image_size=size, head_dropout=0.0, seed=0, weights=weights)
                odd = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
                if odd:
                    where = "random weights" if weights is None else str(weights.file)
                    raise InputError(f"weights: {where} of {backbone} hold NaN or infinity, in {odd[0]}")
                loaded = str(model.pretrained_cfg["loaded"])  # type: ignore[index]
            stages(model, size)
            _pass(model, size)
        except InputError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    if faults:
        raise InputError(faults)
    return loaded


def _load(backbone: str, image_size: int, weights: Weights) -> tuple[Any, str]:
    """Create a model with the weights of a file, and say in words what of the file is in it.

    Nothing but the classifier's may be missing or have another shape. See `state_dicts.fitted` for what the file may
    have besides.
    """
    cfg, file = get_pretrained_cfg(timm_name(backbone)), weights.file
    classes = cfg.num_classes or 1
    try:
        state = state_dicts.read(file)
        if (ordered := state_dicts.of_package(backbone, state)) is not None:
            model = _create(backbone, classes, image_size)
            model.load_state_dict(dict(zip(model.state_dict(), ordered, strict=True)))
            return model, ""
        if not state:
            raise InputError(f"weights: {file} holds no tensors")
        with torch.device("meta"):
            blank = _create(backbone, classes, image_size)
        try:
            state, said = state_dicts.fitted(state, blank, cfg)
        except InputError as error:
            raise InputError(f"weights: {file} {error}") from None
        # timm's own loading renames keys and resamples position embeddings; strict because it only logs missing keys.
        overlay = {"state_dict": state, "custom_load": False, "num_classes": classes, "label_offset": 0}
        try:
            return _create(backbone, classes, image_size, overlay), said
        except RuntimeError as error:
            wrong = _wrong_keys(str(error))
            if not wrong:
                raise
            faulty = [key for key in wrong if not key.startswith(f"{cfg.classifier}.")]
            if faulty:
                more = f" and {len(faulty) - 1:,} more" if len(faulty) > 1 else ""
                raise InputError(
                    f"weights: {file} doesn't hold the weights of {backbone}: {faulty[0]} {wrong[faulty[0]]}{more}; "
                    "copy timm's own file of this model"
                ) from None
        # timm drops the file's classifier, and is no longer strict, if the number of classes differs.
        return _create(backbone, classes, image_size, overlay | {"num_classes": 0}), said
    except InputError:
        raise
    except Exception as error:  # any: timm's functions for a model suppose the keys of its own files
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"weights: {file} can't be read as a state dict of {backbone} ({type(error).__name__}: {reason}); "
            "copy timm's own file of this model, as .safetensors or a plain PyTorch state dict"
        ) from error


def _wrong_keys(message: str) -> dict[str, str]:
    """Return the wrong keys in the message of torch's strict `load_state_dict`, each with its fault."""
    wrong: dict[str, str] = {}
    for kind, keys in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", message):
        wrong |= dict.fromkeys(re.findall(r'"([^"]+)"', keys), f"is {kind.lower()}")
    for key, shapes in re.findall(r"size mismatch for (\S+): (.*)", message):
        wrong[key] = "has another shape: " + shapes.rstrip(".")
    return wrong


# ---- stages -----------------------------------------------------------------------------------------------------


def stages(model: nn.Module, image_size: int) -> list[list[str]]:
    """Divide the parameters into at most five stages, by timm's coarse groups and their output resolutions.

    Groups that are norms alone or pooled join the group before them. If more than five are left, neighbours of equal
    resolution merge if that gives five, else the groups are split into five runs, longer runs first.

    Returns:
        Names of the parameters of each stage, the stage nearest to the input first, without the classifier.

    Raises:
        InputError: the model can't take images of this size.
    """
    classifier = classifier_name(model)
    replaced = model.get_submodule(classifier)
    model.set_submodule(classifier, replaced[1])  # type: ignore[index]
    try:  # Inception's matcher looks for timm's own classifier
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
            joined[-1][0].extend(names)
        else:
            joined.append((names, resolution))
    if len(joined) <= DEPTH_ALL:
        return [names for names, _ in joined]
    runs = [list(run) for _, run in groupby(joined, key=itemgetter(1))]
    if len(runs) != DEPTH_ALL:
        runs = [[joined[index] for index in run] for run in np.array_split(np.arange(len(joined)), DEPTH_ALL)]
    return [[name for names, _ in run for name in names] for run in runs]


def classifier_name(model: nn.Module) -> str:
    """Return the name of the module that holds dropout and classifier."""
    return str(model.pretrained_cfg["classifier"])  # type: ignore[index]


def _positions(model: nn.Module, image_size: int) -> list[tuple[str, int]]:
    """Return weights in order of execution, each with the number of positions in its module's output for one image."""
    fixed = model.pretrained_cfg.get("fixed_input_size")  # type: ignore[union-attr,operator]
    size = image_size if fixed else max(image_size, MIN_TRACED_SIZE)
    executed: list[tuple[str, int]] = []

    def record(name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            # Elements per channel: for NCHW, NHWC, tokens and windows alike.
            executed.append((name + ".weight", output.numel() // len(module.weight)))  # type: ignore[arg-type]

    hooks = [
        module.register_forward_hook(partial(record, name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    try:
        _pass(model, size)
    finally:
        for hook in hooks:
            hook.remove()
    return executed


def _pass(model: nn.Module, image_size: int) -> None:
    """Send a black image through the model; raise InputError if it can't take this size."""
    try:
        with evaluating(model):
            model(zero_images(model, 1, image_size))
    except Exception as error:  # any: each architecture fails in its own way
        raise InputError(_wrong_size(str(model.pretrained_cfg["architecture"]), image_size, error)) from error  # type: ignore[index]


def zero_images(model: nn.Module, count: int, image_size: int) -> Tensor:
    """Return black images `[count, 3, image_size, image_size]` on the model's device, channels last."""
    zeros = torch.zeros(count, 3, image_size, image_size, device=next(model.parameters()).device)
    return zeros.contiguous(memory_format=torch.channels_last)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode, without gradients; afterwards each module is in its own mode again."""
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
    """Return the number of trained stages: 5 means all, and there may be fewer."""
    return min(depth, len(stage_names))


def trained_names(model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int) -> set[str]:
    """Return the names of the classifier's parameters and those of the last `depth` stages."""
    classifier = classifier_name(model) + "."
    frozen = len(stage_names) - resolved_depth(stage_names, depth)
    names = {name for name, _ in model.named_parameters() if name.startswith(classifier)}
    return names.union(*stage_names[frozen:])


def unfreeze(model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int, *, batch_norm: str) -> None:
    """Unfreeze the classifier and the last `depth` stages (5 is all), and freeze the rest.

    If `batch_norm` is `frozen`, not `train`, the affine weights of every batch norm are frozen too.
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
    """Put the classifier and modules that own an unfrozen parameter in train mode, all others in eval mode.

    So frozen batch norms keep their statistics, and nothing below the classifier is random.
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
    """Group the trained parameters of an unfrozen model by learning rate and weight decay, for `torch.optim`.

    The classifier and the last stage have `learning_rate`; `stage_lr_decay` is its factor for each stage further from
    the head. Parameters of one dimension (biases and norms) have no weight decay.

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
