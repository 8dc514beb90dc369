"""The weight gradient of depthwise convolutions on a CPU, two to twenty times faster than oneDNN's.

oneDNN's fast kernel takes filters of at most three columns, and outputs of at least as many rows as the filter has: 32
images of 672 channels, 8 x 8, by 5 x 5 filters took 22 ms, its columns in two parts 9; of 480 channels, 2 x 2, by 5 x 5
filters 9 ms, as sums over shifted products 0.3 (torch 2.14, one thread; benchmarks/README.md).
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Sides = tuple[int, ...]  # rows, columns
COLUMNS = 3  # of filters that oneDNN is fast with
FEW = 8  # with a stride, sums are faster up to this side of an output


def speed_up(model: nn.Module) -> None:
    """Let a model's depthwise convolutions compute their weight gradient here; outputs do not change.

    timm's strided ones with TensorFlow's "same" padding, which may need one more row and column at the end than at the
    start, copy their inputs to pad them; here they get symmetric padding, and the outputs that it adds are dropped.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or type(module) not in (nn.Conv2d, Conv2dSame):
            continue
        depthwise = module.groups == module.in_channels == module.out_channels and max(module.kernel_size) > 1
        if not depthwise or module.dilation != (1, 1) or module.padding_mode != "zeros":
            continue
        if "_conv_forward" in module.__dict__:  # done, or folded
            continue
        if type(module) is Conv2dSame:
            module.__class__ = nn.Conv2d  # which calls `_conv_forward`
            module._conv_forward = partial(_same, module.stride)  # type: ignore[method-assign]
        elif isinstance(module.padding, tuple):
            module._conv_forward = partial(_forward, module.stride, module.padding)  # type: ignore[method-assign]


def _same(stride: Sides, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding, kept = [], []
    for size, step, width in zip(inputs.shape[2:], stride, weight.shape[2:], strict=True):
        outputs = math.ceil(size / step)
        missing = max((outputs - 1) * step + width - size, 0)
        first = missing % 2  # an uneven number of rows is missing: one more output, at the start
        padding.append(missing // 2 + first * step)
        kept.append(slice(first, first + outputs))
    found = _forward(stride, tuple(padding), inputs, weight, bias)
    part = found[:, :, *kept]
    return found if part.shape == found.shape else part.clone()


def _forward(stride: Sides, padding: Sides, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and weight.requires_grad and inputs.ndim == 4 and inputs.device.type == "cpu":
        output: Tensor = _Depthwise.apply(inputs, weight, bias, stride, padding)
        return output
    return functional.conv2d(inputs, weight, bias, stride, padding, 1, len(weight))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(inputs, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        instead = faster(gradient.shape[2:], weight.shape[2:], stride)
        wanted = ctx.needs_input_grad[0], instead is None, ctx.needs_input_grad[2] and instead is None
        of_inputs, of_weight, of_bias = _onednn(inputs, gradient, weight, stride, padding, wanted)
        if instead is not None:
            if ctx.needs_input_grad[2]:  # oneDNN computes the bias's gradient only with the weights'
                of_bias = gradient.sum((0, 2, 3))
            of_weight = instead(inputs, gradient, weight.shape, stride, padding)
        return of_inputs, of_weight, of_bias, None, None


def _onednn(
    inputs: Tensor, gradient: Tensor, weight: Tensor, stride: Sides, padding: Sides, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    """Return the gradients that are wanted: of inputs, weight and bias."""
    fixed = [1, 1], False, [0, 0], len(weight)  # dilation, transposed, output padding, groups
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, inputs, weight, [len(weight)], stride, padding, *fixed, wanted
    )
    return found


def faster(output: Sides, kernel: Sides, stride: Sides) -> Callable[..., Tensor] | None:
    """Return what computes the weight's gradient faster than oneDNN, given the sides of output and filter."""
    if min(output) < max(kernel):
        return summed
    if kernel[1] <= COLUMNS:
        return None
    if max(stride) == 1:
        return by_columns
    return summed if max(output) <= FEW else None


def by_columns(inputs: Tensor, gradient: Tensor, shape: torch.Size, stride: Sides, padding: Sides) -> Tensor:
    """Return oneDNN's gradient of the weights, a few columns of the filters at a time; arguments as of `summed`."""
    weight, width = inputs.new_zeros(shape), shape[3]
    for first in range(0, width, COLUMNS):
        part = weight[..., first : first + COLUMNS]
        left = padding[1] - first  # less than nothing: columns of inputs that no column of this part reads
        right = gradient.shape[3] + part.shape[3] - 1 - inputs.shape[3] - left
        if min(left, right) > -inputs.shape[3]:  # else it reads padding alone
            shifted = functional.pad(inputs, (left, right))
            part.copy_(_onednn(shifted, gradient, part.contiguous(), stride, (padding[0], 0), (False, True, False))[1])
    return weight


def summed(inputs: Tensor, gradient: Tensor, shape: torch.Size, stride: Sides, padding: Sides) -> Tensor:
    """Return for each tap of the filters the sum of its inputs times the gradients of their outputs.

    Args:
        inputs: [n, channels, height, width].
        gradient: of the outputs, [n, channels, height, width].
        shape: of the weights, [channels, 1, height, width].
        stride: rows and columns from one output to the next.
        padding: rows and columns of zeros on each side of the inputs.
    """
    channels, _, *kernel = shape
    taps, sides = inputs.new_zeros(*kernel, channels), (inputs.shape[2:], gradient.shape[2:])
    for tap in product(*map(range, kernel)):
        read, written = [], []  # inputs that the tap reads, and their outputs; padding adds nothing
        for offset, step, pad, size, count in zip(tap, stride, padding, *sides, strict=True):
            first = max(0, -((offset - pad) // step))
            last = min(count, (size - 1 - offset + pad) // step + 1)
            written.append(slice(first, last))
            read.append(slice(first * step + offset - pad, (last - 1) * step + offset - pad + 1, step))
        if all(part.start < part.stop for part in written):
            taps[tap] = (inputs[:, :, *read] * gradient[:, :, *written]).sum((0, 2, 3))
    return taps.permute(2, 0, 1).unsqueeze(1)
