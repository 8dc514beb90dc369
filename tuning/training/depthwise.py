"""The weight gradient of depthwise convolutions on a CPU, many times faster than oneDNN's.

oneDNN has no fast kernel if an output's side is smaller than the filter's (a backbone's last stages on small images):
32 images of 480 channels, 2 x 2, by 5 x 5 filters took 9.2 ms instead of 0.3; EfficientNet-lite0's training step at
64 px went from 343 to 222 ms. Sums over shifted products are faster up to 8 x 8 too (torch 2.14, AVX2, one thread).
"""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Sides = tuple[int, ...]  # rows, columns
FEW = 8  # sums are faster up to this side of an output, for filters larger than 3 x 3


def speed_up(model: nn.Module) -> None:
    """Let a model's plain depthwise convolutions compute their weight gradient here; outputs do not change.

    timm's strided convolutions with "same" padding, which pad their inputs themselves, are left to oneDNN.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels:
            stride, padding, wide = module.stride, module.padding, max(module.kernel_size) > 1
            if wide and isinstance(padding, tuple) and module.padding_mode == "zeros" and module.dilation == (1, 1):
                module._conv_forward = partial(_forward, stride, padding)  # type: ignore[method-assign]


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
        summed = sums_are_faster(gradient.shape[2:], weight.shape[2:])
        wanted = [ctx.needs_input_grad[0], not summed, ctx.needs_input_grad[2] and not summed]
        fixed = [1, 1], False, [0, 0], len(weight)  # dilation, transposed, output padding, groups
        of_inputs, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, inputs, weight, [len(weight)], ctx.stride, ctx.padding, *fixed, wanted
        )
        if summed:  # oneDNN computes the bias's gradient only with the weights'
            of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
            of_weight = weight_gradient(inputs, gradient, weight.shape, ctx.stride, ctx.padding)
        return of_inputs, of_weight, of_bias, None, None


def sums_are_faster(output: torch.Size, kernel: torch.Size) -> bool:
    """Return whether `weight_gradient` is faster than oneDNN, given the sides of output and filter."""
    return min(output) < max(kernel) or (max(kernel) > 3 and max(output) <= FEW)


def weight_gradient(inputs: Tensor, gradient: Tensor, shape: torch.Size, stride: Sides, padding: Sides) -> Tensor:
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
