"""Batch norms in eval mode as part of the convolutions before them, for models that run on a CPU.

In eval mode a batch norm only scales and shifts channels, which the convolution does at little cost with other weights.
That saves a pass over the features forward, and two backward where trained stages keep their statistics
(benchmarks/README.md).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional

from tuning.training.backbones import evaluating

TOLERANCE = 1e-3  # of logits, relative to the largest: folding only rounds otherwise, by about 1e-6
Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


class _Folded(nn.BatchNorm2d):
    """A batch norm whose convolution does its work in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training else input


class _FoldedAct(BatchNormAct2d):  # type: ignore[misc]  # without types
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.act(self.drop(x))  # type: ignore[no-any-return]


FOLDED: dict[type, type] = {nn.BatchNorm2d: _Folded, BatchNormAct2d: _FoldedAct}


def fold(model: nn.Module, stage_names: Sequence[Sequence[str]], image_size: int) -> None:
    """Let convolutions apply the batch norms after them whenever those are in eval mode.

    Parameters and buffers keep their names and values, and gradients reach the weights as before. A pair lies in one
    stage, so that it is never cut. The model stays as it was if something else reads a convolution's output too, which
    shows in the logits.
    """
    if not any(type(module) in FOLDED for module in model.modules()):
        return
    if not (pairs := _pairs(model, stage_names, image_size)):
        return
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    with evaluating(model), _varied([norm for _, norm in pairs]):
        wanted = model(images)
        for conv, norm in pairs:
            conv._conv_forward = partial(_forward, _convolve(conv), norm)  # type: ignore[method-assign]
            norm.__class__ = FOLDED[type(norm)]
        if not (model(images) - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            for conv, norm in pairs:
                conv._conv_forward = conv._conv_forward.args[0]  # type: ignore[method-assign,attr-defined]
                norm.__class__ = type(norm).__mro__[1]


def _convolve(conv: nn.Conv2d) -> Callable[..., Tensor]:
    """Return what computes a convolution; it doesn't refer to it, so a dropped model's memory is free at once."""
    shape = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    return conv.__dict__.get("_conv_forward") or partial(functional.conv2d, **shape)


@contextmanager
def _varied(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    """Change the variances of batch norms meanwhile: an untrained one would change nothing, and so show nothing."""
    variances = [_statistics(norm)[1] for norm in norms]
    kept = [variance.clone() for variance in variances]
    generator = torch.Generator().manual_seed(0)
    for variance in variances:
        variance *= 0.5 + torch.rand(len(variance), generator=generator)
    try:
        yield
    finally:
        for variance, value in zip(variances, kept, strict=True):
            variance.copy_(value)


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def _forward(
    convolve: Callable[..., Tensor], norm: nn.BatchNorm2d, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if norm.training:
        return convolve(inputs, weight, bias)
    mean, variance = _statistics(norm)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias + (-mean if bias is None else bias - mean) * scale
    return convolve(inputs, weight * scale.view(-1, 1, 1, 1), shift)


def _pairs(model: nn.Module, stage_names: Sequence[Sequence[str]], image_size: int) -> list[Pair]:
    """Return the convolutions and batch norms that run once, one after the other, in one stage."""
    stage_of = {name: stage for stage, names in enumerate(stage_names) for name in names}
    names = {module: name for name, module in model.named_modules()}
    last: list[tuple[nn.Conv2d, Tensor, int]] = []  # the convolution that has just run, its output and that's version
    pairs: list[Pair] = []
    calls: dict[nn.Module, int] = {}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        if last and isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None:
            conv, output, version = last.pop()
            stages = [stage_of.get(f"{names[each]}.weight") for each in (conv, module)]
            if inputs[0] is output and output._version == version and stages[0] == stages[1] is not None:
                pairs.append((conv, module))

    def after(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        last.clear()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            last.append((module, output, output._version))

    kinds = (nn.Conv2d, *FOLDED)
    hooks = [m.register_forward_pre_hook(before) for m in model.modules() if type(m) in kinds]
    hooks += [m.register_forward_hook(after) for m in model.modules() if type(m) in kinds]
    try:
        with evaluating(model):
            model(torch.zeros(1, 3, image_size, image_size))
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(calls[module] == 1 for module in pair)]
