"""Class-activation maps: what in a picture speaks for a class, by gradient times activation at the last stage.

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

LEAST_SIDE = 4  # positions of a map, across; where the last stage has fewer, the one before it is taken


def class_maps(
    final: Final, data: Mapping[int, Data], indices: NDArray[np.int64], chosen: NDArray[np.int64], side: int
) -> NDArray[np.float32] | None:
    """What speaks for the chosen classes: 0 to 1, [images, side, side]; of several networks the average.

    Null where no network can be cut, or none has positions left to show.

    Args:
        final: its networks are put on the CPU.
        data: decoded images by size.
        indices: of the images.
        chosen: a class for each.
        side: pixels.
    """
    total, weight = np.zeros((len(indices), side, side), dtype=np.float32), 0.0
    for name, (network, config) in final.networks.items():
        some = data[config.image_size]
        images = preparer(some.images, config.backbone, torch.device("cpu"))(indices, None, "none")
        found = class_map(network.cpu().eval(), config, images, torch.from_numpy(chosen))
        if found is not None:
            total += final.shares[name] * _enlarged(found, side)
            weight += final.shares[name]
    return total / np.float32(weight) if weight else None


def maps_or_tell(
    final: Final, data: Mapping[int, Data], indices: NDArray[np.int64], chosen: NDArray[np.int64], side: int
) -> NDArray[np.float32] | None:
    """`class_maps`; a page of mistakes is worth having without them, so a failure of whichever kind is told."""
    try:
        return class_maps(final, data, indices, chosen, side)
    except Exception as error:
        print(f"no class-activation maps ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def class_map(network: nn.Module, config: TrialConfig, images: Tensor, chosen: Tensor) -> Tensor | None:
    """Where gradient times activation, summed over channels, speaks for a class: [n, height, width], 0 and above.

    Args:
        network: on the CPU, in eval mode.
        config: of the network.
        images: prepared, [n, 3, side, side].
        chosen: [n], a class for each.
    """
    cut = _cut(network, config, images[:1])
    if cut is None:
        return None
    features = cut.prefix(images)
    with torch.enable_grad():
        leaf = features.detach().clone().requires_grad_()
        logits = cut.suffix(leaf * 1)  # the suffix may begin with a layer that works in place
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), leaf)
    product = _positions(network, gradient * leaf.detach())
    return None if product is None else product.sum(dim=3).clamp(min=0)


def _cut(network: nn.Module, config: TrialConfig, image: Tensor) -> Cut | None:
    """The cut nearest to the head whose features have `LEAST_SIDE` positions across, else the one with most."""
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
    """Features as [n, height, width, channels]: of maps in either layout, or of a square of tokens."""
    if features.ndim == 4:
        first = features.shape[2] == features.shape[3]  # pictures are square, so these are height and width
        return features.permute(0, 2, 3, 1) if first else features
    if features.ndim != 3:
        return None
    tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]
    side = round(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(tokens), side, side, -1) if side * side == tokens.shape[1] else None


def _enlarged(maps: Tensor, side: int) -> NDArray[np.float32]:
    """Maps at the pictures' size, the highest value of each 1."""
    large = functional.interpolate(maps[:, None], size=(side, side), mode="bicubic", align_corners=False)[:, 0]
    large = large.clamp(min=0)
    found: NDArray[np.float32] = (large / large.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).numpy()
    return found
