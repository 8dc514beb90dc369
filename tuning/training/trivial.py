"""TrivialAugment (Müller and Hutter 2021, https://arxiv.org/abs/2103.10158): one operation on each image of a batch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Largest strengths of its wide space; operations of colour, which radiographs lack, are left out.
ROTATION, SHEAR, SHIFT = math.radians(135), 0.99, 2 * 32 / 224  # the last in half sides
TONE = 0.99  # of brightness, contrast and sharpness
LEAST_BITS = 2  # of posterized images
Change = Callable[[Tensor, Tensor], Tensor]  # of images [batch, channels, side, side], by sizes [batch, 1, 1, 1]


def trivial(images: Tensor, operation: Tensor, size: Tensor) -> Tensor:
    """Return images [batch, channels, side, side], each changed by one operation.

    Args:
        images: in [0, 1]; they are not changed.
        operation: [batch], uniform in [0, 1): which of `OPERATIONS`.
        size: [batch], in [-1, 1]: strength and direction.
    """
    chosen, size = (operation * len(OPERATIONS)).long(), size.view(-1, 1, 1, 1)
    changed = images.clone()
    for place, change in enumerate(OPERATIONS):
        if change is None:
            continue
        mine = chosen == place
        if images.device.type == "cpu":  # elsewhere to look which would wait for the device
            rows = mine.nonzero()[:, 0]
            if len(rows):
                changed[rows] = change(images[rows], size[rows])
        else:
            changed = torch.where(mine.view(-1, 1, 1, 1), change(images, size), changed)
    return changed.clamp_(0, 1)


def _moved(images: Tensor, matrices: Tensor) -> Tensor:
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    edge = 1 - 1 / images.shape[-1]  # the centre of the last pixel: MPS has no padding by the border
    return functional.grid_sample(images, grid.clamp(-edge, edge), align_corners=False)


def _affine(images: Tensor, row: int, column: int, values: Tensor) -> Tensor:
    matrices = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrices[:, row, column] = values.flatten()
    return _moved(images, matrices)


def _rotated(images: Tensor, size: Tensor) -> Tensor:
    angle = size.flatten() * ROTATION
    cos, sin, none = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return _moved(images, torch.stack([cos, -sin, none, sin, cos, none], dim=1).view(-1, 2, 3))


def _blended(images: Tensor, others: Tensor, size: Tensor) -> Tensor:
    """Return images further from others, or nearer to them."""
    return (others + (images - others) * (1 + TONE * size)).clamp(0, 1)


def _contrasted(images: Tensor, size: Tensor) -> Tensor:
    rows = images.mean(dim=3, keepdim=True)  # threads share one mean over all, whose last bit then depends on the batch
    return _blended(images, rows.mean(dim=(1, 2), keepdim=True), size)


def _sharpened(images: Tensor, size: Tensor) -> Tensor:
    padded, side = functional.pad(images, (1, 1, 1, 1), mode="replicate"), images.shape[-1]
    smooth = 4 * images
    for y in range(3):
        for x in range(3):
            smooth = smooth + padded[..., y : y + side, x : x + side]
    return _blended(images, smooth / 13, size)


def _posterized(images: Tensor, size: Tensor) -> Tensor:
    step = 2 ** torch.round((8 - LEAST_BITS) * size.abs())
    return torch.floor(torch.round(images * 255) / step) * step / 255


def _solarized(images: Tensor, size: Tensor) -> Tensor:
    return torch.where(images >= 1 - size.abs(), 1 - images, images)


def _stretched(images: Tensor, size: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


def _equalized(images: Tensor, size: Tensor) -> Tensor:
    values = images.flatten(2).contiguous()
    ranks = torch.searchsorted(values.sort(dim=2).values.contiguous(), values, right=True).float()
    least, count = ranks.amin(dim=2, keepdim=True), values.shape[2]
    spread = (ranks - least) / (count - least).clamp_min(1)
    return torch.where(least < count, spread, values).view_as(images)


OPERATIONS: tuple[Change | None, ...] = (
    None,
    _rotated,
    lambda images, size: _affine(images, 0, 1, SHEAR * size),
    lambda images, size: _affine(images, 1, 0, SHEAR * size),
    lambda images, size: _affine(images, 0, 2, SHIFT * size),
    lambda images, size: _affine(images, 1, 2, SHIFT * size),
    lambda images, size: images * (1 + TONE * size),
    _contrasted,
    _sharpened,
    _posterized,
    _solarized,
    _stretched,
    _equalized,
)
