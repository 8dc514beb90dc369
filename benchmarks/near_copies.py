"""How many bits of an image's outline its copies change, and how many tell it from other images.

By these `evaluate.py` takes an image for a near copy of one that the model was made from.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from numpy.typing import NDArray
from PIL import Image

from benchmarks.sets import manifest
from tuning.model.evaluation import NEAR_BITS, outlines

SETS = ("xrays-covid", "rare", "digits", "patches")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure how alike the outlines of copies and of other images are."""

    xrays: str | None = None
    """Folder of the chest X-rays."""
    out: str = "results/near_copies"
    """Folder of the images."""
    image_size: int = 64
    """Side to which images are decoded, in pixels."""


def compressed(image: Image.Image, quality: int = 60) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as JPEG of quality 60": compressed,
    "half the size, JPEG of quality 75": lambda image: compressed(image.reduce(2), 75),
    "15% brighter": lambda image: image.point(lambda value: min(255, int(value * 1.15 + 5))),
    "cropped by 1% at each side": lambda image: image.crop(
        (image.width // 100, image.height // 100, image.width - image.width // 100, image.height - image.height // 100)
    ),
}


def bits(images: list[Image.Image], side: int) -> NDArray[np.bool_]:
    decoded = np.stack([np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX)) for image in images])
    found = outlines(decoded[..., None], np.arange(len(decoded)))
    return np.array([np.unpackbits(np.frombuffer(bytes.fromhex(each or "00" * 32), np.uint8)) for each in found]) > 0


def main() -> None:
    """Print, for each set, quantiles of the differing bits."""
    flags = tyro.cli(Flags)
    for name in SETS:
        files = pd.read_csv(manifest(name, Path(flags.out), flags.xrays))["path"]
        images = [Image.open(file).convert("L") for file in files]
        own = bits(images, flags.image_size)
        signs = own.astype(np.float32) * 2 - 1
        apart = (own.shape[1] - signs @ signs.T) / 2
        np.fill_diagonal(apart, np.inf)
        nearest = apart.min(axis=1)
        least, hundredth = np.quantile(nearest, [0, 0.01])
        near = int((nearest <= NEAR_BITS).sum())
        print(f"{name}: {len(files)} images; to the nearest other: least {least:.0f}, 1% {hundredth:.0f}; near: {near}")
        for change, made in CHANGES.items():
            changed = (own != bits([made(image) for image in images], flags.image_size)).sum(axis=1)
            found = (changed <= NEAR_BITS).mean()
            print(f"  {change}: median {np.median(changed):.0f}, most {changed.max()}; found {found:.1%}")


if __name__ == "__main__":
    main()
