"""Mixup (https://arxiv.org/abs/1710.09412) and CutMix (https://arxiv.org/abs/1905.04899): images mixed with others.

As all of an epoch's random numbers, an image's partner and its share depend on (seed, epoch, image) alone, not on its
batch: so mixed images, too, are the same in trials that differ in learning rate, and their frozen outputs can be kept.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from tuning.settings.augmentation import strengths
from tuning.training.augment import MIX, MIX_X, MIX_Y, PARTNER
from tuning.training.features import to_device


class Mixing(NamedTuple):
    """How each of n images is mixed with another."""

    partners: NDArray[np.int64]  # [n], places among the n
    shares: NDArray[np.float32]  # [n], of the image's own label
    weights: Tensor  # [n, 1, 1, 1], of the image itself outside its box
    boxes: Tensor  # [n, 4]: first and last row, first and last column (exclusive) that the partner fills

    def of(self, images: Tensor, others: Tensor, positions: NDArray[np.int64]) -> Tensor:
        """Return images [batch, channels, side, side] at these positions, mixed with their partners."""
        rows = to_device(positions, self.boxes.device)
        places = torch.arange(images.shape[-1], device=images.device)
        top, bottom, left, right = (self.boxes[rows, edge].view(-1, 1) for edge in range(4))
        down, across = (places >= top) & (places < bottom), (places >= left) & (places < right)
        inside = down[:, None, :, None] & across[:, None, None, :]
        return torch.where(inside, others, torch.lerp(others, images, self.weights[rows]))


def mixing(table: Tensor, policy: str, side: int, device: torch.device) -> Mixing | None:
    """Return how images are mixed; None if the policy mixes none.

    Args:
        table: of the epoch, [n, columns], on the CPU.
        policy: its text, see `settings.augmentation`.
        side: of the images, in pixels.
        device: of the images.
    """
    strength = strengths(policy)
    mixup, cutmix = (strength.get(name, 0.0) for name in ("mixup", "cutmix"))
    if not mixup and not cutmix:
        return None
    numbers = table.numpy().astype(np.float64)
    drawn = numbers[:, MIX]
    cut = drawn < 0.5 if mixup and cutmix else np.full(len(drawn), bool(cutmix))
    drawn = drawn * 2 % 1 if mixup and cutmix else drawn
    alpha = np.where(cut, cutmix, mixup)
    share = betaincinv(alpha, alpha, drawn)
    half = np.where(cut, np.sqrt(1 - share), 0.0)[:, None] * side / 2
    centres = numbers[:, [MIX_Y, MIX_X]] * side
    low, high = (np.clip(np.round(centres + sign * half), 0, side).astype(np.int64) for sign in (-1, 1))
    boxes = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    filled = (high - low).prod(axis=1) / side**2
    weights = np.where(cut, 1.0, share).astype(np.float32)
    return Mixing(
        (numbers[:, PARTNER] * len(numbers)).astype(np.int64),
        np.where(cut, 1 - filled, share).astype(np.float32),
        torch.from_numpy(weights).view(-1, 1, 1, 1).to(device),
        torch.from_numpy(boxes).to(device),
    )
