"""Augmentation: pure, batched, on the images' device, from random numbers fixed by (seed, epoch, sample)."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tuning.settings.augmentation import strengths
from tuning.training.trivial import trivial

# Columns of an epoch's table: the first shuffles the samples, the others belong to one transform each. Those of later
# transforms are drawn by a generator of their own, so that the first are what they always were.
COLUMNS, LATER = 13, 10
SHUFFLE, FLIP, ROTATE, SHIFT_X, SHIFT_Y, SCALE, BRIGHTNESS = range(7)
CONTRAST, BLUR, ERASE, ERASE_X, ERASE_Y, ERASE_SIZE = range(7, COLUMNS)
CROP_AREA, CROP_SHAPE, CROP_X, CROP_Y, OPERATION, SIZE = range(COLUMNS, COLUMNS + 6)
PARTNER, MIX, MIX_X, MIX_Y = range(COLUMNS + 6, COLUMNS + LATER)

MOVES = ("flip", "rotate", "shift", "scale", "crop")
CROP_RATIO = 4 / 3  # largest ratio of a crop's sides
BLUR_SUM = 256  # of the binomial filter's weights, along both axes


def epoch_table(seed: int, epoch: int, samples: int) -> Tensor:
    """Return all random numbers of an epoch except dropout's: float32 [samples, columns] in [0, 1), on the CPU.

    Trials with the same seed get the same table, so they see the same batches and augmented views.
    """
    first, later = np.random.default_rng([seed, epoch]), np.random.default_rng([seed, epoch, 1])
    drawn = [rng.random((samples, width), np.float32) for rng, width in ((first, COLUMNS), (later, LATER))]
    return torch.from_numpy(np.concatenate(drawn, axis=1))


def augment(images: Tensor, table: Tensor, policy: str) -> Tensor:
    """Augment a batch.

    Args:
        images: float [batch, channels, side, side] in [0, 1].
        table: the images' rows of the epoch's table, [batch, columns], on the same device.
        policy: its text, see `settings.augmentation`.

    Returns:
        Augmented images of the same shape, in [0, 1].
    """
    strength = strengths(policy)
    if not any(value for name, value in strength.items() if name not in ("mixup", "cutmix")):  # see `mixing`
        return images
    moves = any(strength.get(name) for name in MOVES)
    images = _move(images, table, strength) if moves else images.clone()
    if strength.get("trivial"):
        images = trivial(images, table[:, OPERATION], (2 * table[:, SIZE] - 1) * strength["trivial"])
    signed = 2 * table - 1

    def column(index: int, name: str) -> Tensor:
        return (signed[:, index] * strength.get(name, 0.0)).view(-1, 1, 1, 1)

    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast, brightness = 1 + column(CONTRAST, "contrast"), 1 + column(BRIGHTNESS, "brightness")
    images.mul_(contrast).add_(mean * (brightness - contrast))  # in place, here and below: passes cost the time
    if strength.get("blur"):
        share = (table[:, BLUR] * strength["blur"]).view(-1, 1, 1, 1)
        blurred = _blurred(images)
        images.mul_(1 - share).addcmul_(blurred, share / BLUR_SUM)
    if strength.get("erase"):
        images = torch.where(_erased(images, table, strength["erase"]), mean, images)
    return images.clamp_(0, 1)


def _move(images: Tensor, table: Tensor, strength: dict[str, float]) -> Tensor:
    """Flip, rotate, shift and scale in one bilinear resampling; outside the image its border is repeated."""
    signed = 2 * table - 1
    angle = signed[:, ROTATE] * math.radians(strength.get("rotate", 0.0))
    scale = 1 + signed[:, SCALE] * strength.get("scale", 0.0)
    flip = torch.where(table[:, FLIP] < strength.get("flip", 0.0), -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = 2 * strength.get("shift", 0.0)
    shift_x, shift_y = shift * signed[:, SHIFT_X], shift * signed[:, SHIFT_Y]
    rows = torch.stack([cos * flip, -sin, shift_x, sin * flip, cos, shift_y], dim=1)
    if strength.get("crop"):
        rows = _cropped(rows, table, strength["crop"])
    grid = functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return sampled(images, grid, border=images.device.type != "mps")


def _cropped(rows: Tensor, table: Tensor, left_out: float) -> Tensor:
    """Return affine rows [batch, 6] that see only a part of the image: a rectangle within it, anywhere."""
    area = 1 - left_out * table[:, CROP_AREA]
    shape = torch.exp((2 * table[:, CROP_SHAPE] - 1) * math.log(CROP_RATIO))
    sides = torch.stack([(area * shape).sqrt(), (area / shape).sqrt()], dim=1).clamp_max(1)
    centres = (1 - sides) * (2 * table[:, CROP_X : CROP_Y + 1] - 1)
    cropped = rows.view(-1, 2, 3) * sides.view(-1, 2, 1)
    cropped[:, :, 2] += centres
    return cropped.view(-1, 6)


def sampled(images: Tensor, grid: Tensor, *, border: bool) -> Tensor:
    """Sample at a grid, with the border repeated; without `border`, which MPS lacks, by keeping the grid inside."""
    if not border:
        edge = 1 - 1 / images.shape[-1]  # the centre of the last pixel
        grid = grid.clamp(-edge, edge)
    return functional.grid_sample(images, grid, padding_mode="border" if border else "zeros", align_corners=False)


def _blurred(images: Tensor) -> Tensor:
    """Return `BLUR_SUM` times each channel, blurred by a 5-pixel binomial filter: sums of neighbours, four times."""
    # Not a convolution, whose last bit depends on the batch size.
    for axis, edge in ((2, (0, 0, 2, 2)), (3, (2, 2, 0, 0))):
        images = functional.pad(images, edge, mode="replicate")
        for _ in range(4):
            side = images.shape[axis] - 1
            images = images.narrow(axis, 0, side) + images.narrow(axis, 1, side)
    return images


def _erased(images: Tensor, table: Tensor, probability: float) -> Tensor:
    """Return a mask [batch, 1, side, side]: a square of 0.1 to 0.5 of the side, in some of the images."""
    side = images.shape[-1]
    position = (torch.arange(side, device=images.device) + 0.5) / side
    half = (0.05 + 0.2 * table[:, ERASE_SIZE]).view(-1, 1)
    across = (position - table[:, ERASE_X].view(-1, 1)).abs() < half
    down = (position - table[:, ERASE_Y].view(-1, 1)).abs() < half
    chosen = (table[:, ERASE] < probability).view(-1, 1, 1, 1)
    return (down[:, None, :, None] & across[:, None, None, :]) & chosen
