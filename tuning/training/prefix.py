"""Cut a model into its frozen prefix, whose outputs can be cached, and its trained suffix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuning.training.backbones import classifier_name, evaluating, resolved_depth, trained_names, zero_images

Calls = list[tuple[nn.Module, tuple[int, ...] | None]]  # modules and the shapes of their outputs


class _CutReached(Exception):
    """Ends a forward pass at the cut; its argument is the features there."""


@dataclass(frozen=True)
class Cut:
    """A model in two parts, each run in its modules' current modes: `suffix(prefix(images))` equals `model(images)`."""

    prefix: Callable[[Tensor], Tensor]  # images [n, 3, side, side] to features [n, ...], without gradients
    suffix: Callable[[Tensor], Tensor]  # features to logits [n, classes]
    stop: Callable[[Callable[[], Any]], Tensor]  # runs a forward pass, without gradients, up to the cut: its features


def split(model: nn.Module, stage_names: Sequence[Sequence[str]], depth: int, image_size: int) -> Cut | None:
    """Cut a model into its frozen prefix and its trained suffix.

    The cut is the input of the first module, in order of execution, whose parameters all lie above the frozen part;
    at depth 0 it is the classifier's. The suffix is the model's own forward pass, in which the modules below the cut
    return empty placeholders of the right shape. It is checked on random images before it is returned.

    The features of a cut can be computed from those of a cut further from the head:
    `nearer.stop(lambda: further.suffix(features))`.

    Returns:
        The cut; None if nothing is frozen or the model can't be cut.
    """
    if resolved_depth(stage_names, depth) == len(stage_names):
        return None
    parameters = dict(model.named_parameters())
    above = {parameters[name] for name in trained_names(model, stage_names, depth)}
    classifier = model.get_submodule(classifier_name(model))
    cut, calls, features = _trace(model, zero_images(model, 2, image_size), None if depth else classifier, above)
    if cut is None or not isinstance(features, Tensor) or len(features) != 2:
        return None
    if depth and any(shape is None or shape[0] % 2 for _, shape in calls):
        return None
    # A trained parameter that is used below the cut, a register token for example, would get no gradient.
    below = {inner for module, _ in calls for inner in module.modules()}
    for module in model.modules():
        if module not in below and (module is cut or cut not in set(module.modules())):
            above -= set(module.parameters())
    if above:
        return None
    channels_last = features.ndim == 4 and not features.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def stop(forward: Callable[[], Any]) -> Tensor:
        def reach(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _CutReached(inputs[0])

        hook = cut.register_forward_pre_hook(reach)
        try:
            with torch.no_grad():
                forward()
        except _CutReached as reached:
            return reached.args[0]  # type: ignore[no-any-return]
        finally:
            hook.remove()
        raise RuntimeError("the forward pass did not reach the cut")

    def prefix(images: Tensor) -> Tensor:
        # Standardized convolutions (NFNet) keep the layout of their input, and the layout decides the rounding.
        return stop(lambda: model(images.contiguous(memory_format=torch.channels_last)))

    def suffix(features: Tensor) -> Tensor:
        # Cached features may return in another memory layout, in which kernels round differently.
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

        hook = cut.register_forward_pre_hook(enter, prepend=True)  # before a `stop` on the same module
        skipped = {module for module, _ in calls}
        for module in skipped:
            module.forward = skip(module)
        try:
            return model(placeholder((2, 3, image_size, image_size)))  # type: ignore[no-any-return]
        finally:
            hook.remove()
            for module in skipped:
                del module.forward

    whole = Cut(prefix, suffix if depth else classifier, stop)
    return whole if _equal(model, whole, image_size) else None


def _trace(
    model: nn.Module, images: Tensor, target: nn.Module | None, above: set[nn.Parameter]
) -> tuple[nn.Module | None, Calls, Any]:
    """Run to the cut: `target`, or the first module whose parameters are all in `above`.

    Returns:
        The module at the cut, the outermost calls that ended before it, and its input.
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

    hooks = [module.register_forward_pre_hook(before) for module in model.modules()]
    hooks += [module.register_forward_hook(after) for module in model.modules()]
    features = None
    try:
        with evaluating(model):
            model(images)
    except _CutReached as reached:
        features = reached.args[0]
    finally:
        for hook in hooks:
            hook.remove()
    return (cut[0] if cut else None), calls, features


def _equal(model: nn.Module, cut: Cut, image_size: int) -> bool:
    """Check that prefix and suffix give the model's logits on random images in eval mode, on the CPU to the bit."""
    device = next(model.parameters()).device
    images = torch.rand(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    with evaluating(model):
        parts, whole = cut.suffix(cut.prefix(images)), model(images)
    # CUDA may choose another kernel for the same convolution.
    tolerance = 0.0 if device.type == "cpu" else 1e-3
    return parts.shape == whole.shape and bool((parts - whole).abs().max() <= tolerance * whole.abs().max())
