"""Class-activation maps: the parts of an image that speak for a class, by gradient times activation at the last stage.

HiResCAM (Draelos & Carin 2020, https://arxiv.org/abs/2011.08891).
"""

import sys
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tuning.model.final import Final
from tuning.settings.config import TrialConfig
from tuning.training import backbones
from tuning.training.dataset import Data, preparer
from tuning.training.prefix import Cut, split

LEAST_SIDE = 4  # positions across a map; if the last stage has fewer, an earlier stage is used


def class_maps(
    final: Final, data: Mapping[int, Data], indices: NDArray[np.int64], chosen: NDArray[np.int64], side: int
) -> NDArray[np.float32] | None:
    """Return maps [images, side, side], 0 to 1, for the class chosen for each image, averaged over an ensemble.

    Return None if none of the networks, which are moved to the CPU, can be cut at a stage with more than one position.
    Any failure is printed and gives None too, because the page of mistakes is useful without maps.
    """
    total, weight = np.zeros((len(indices), side, side), dtype=np.float32), 0.0
    try:
        for name, (network, config) in final.networks.items():
            some = data[config.image_size]
            images = preparer(some.images, network, torch.device("cpu"))(indices, None, "none")
            found = class_map(network.cpu().eval(), config, images, torch.from_numpy(chosen))
            if found is not None:
                total += final.shares[name] * _enlarged(found, side)
                weight += final.shares[name]
    except Exception as error:
        print(f"class-activation maps could not be computed ({type(error).__name__}: {error})", file=sys.stderr)
        return None
    return total / np.float32(weight) if weight else None


def class_map(network: nn.Module, config: TrialConfig, images: Tensor, chosen: Tensor) -> Tensor | None:
    """Return gradient times activation, summed over channels and clamped at 0: [n, height, width].

    Args:
        network: in eval mode.
        images: prepared, [n, 3, side, side].
        chosen: [n], a class for each image.
    """
    cut = _cut(network, config, images[:1])
    if cut is None:
        return None
    features = cut.prefix(images)
    with torch.enable_grad():
        leaf = features.detach().clone().requires_grad_()
        logits = cut.suffix(leaf * 1)  # the suffix may begin with an in-place layer
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)
    product = _positions(network, gradient * leaf.detach())
    return None if product is None else product.sum(dim=3).clamp(min=0)


def _cut(network: nn.Module, config: TrialConfig, image: Tensor) -> Cut | None:
    """Return the cut nearest to the head with `LEAST_SIDE` positions across, else the one with the most."""
    stages = backbones.stages(network, config.image_size)
    best, most = None, 1
    for depth in range(1, len(stages)):
        cut = split(network, stages, depth, config.image_size)
        positions = None if cut is None else _positions(network, cut.prefix(image))
        if positions is not None and positions.shape[1] > most:
            best, most = cut, positions.shape[1]
        if most >= LEAST_SIDE:
            break
    return best


def _positions(network: nn.Module, features: Tensor) -> Tensor | None:
    """Return features as [n, height, width, channels]: from maps in either layout, or from a square of tokens."""
    if features.ndim == 4:
        channels_first = features.shape[2] == features.shape[3]  # images are square, so these are height and width
        return features.permute(0, 2, 3, 1) if channels_first else features
    if features.ndim != 3:
        return None
    tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]
    side = round(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(tokens), side, side, -1) if side * side == tokens.shape[1] else None


def _enlarged(maps: Tensor, side: int) -> NDArray[np.float32]:
    """Resize maps to the image's size and scale each to a maximum of 1."""
    large = functional.interpolate(maps[:, None], size=(side, side), mode="bicubic", align_corners=False)[:, 0]
    large = large.clamp(min=0)
    found: NDArray[np.float32] = (large / large.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).numpy()
    return found
