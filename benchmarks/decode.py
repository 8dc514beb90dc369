"""How fast images are decoded, against what the JPEG library alone does with the same files on the same cores.

- library: Pillow's JPEG decoder (libjpeg-turbo) in one thread per core, each image decoded whole and thrown away.
- resized: the same, resized with the product's filter: what the two libraries take for what is wanted.
- product: `images.decode_all` into an empty cache, hashes, scaling while decoding, resizing and writing included.

They are measured in turn, --rounds times.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from tuning.data.images import content_hashes, decode_all, parallel_map
from tuning.data.samples import load_samples


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare decoding with the JPEG library alone."""

    data: str
    """Folder of class folders, or manifest; its JPEG files are taken."""
    image_size: int = 128
    """Side in pixels."""
    rounds: int = 5
    """Measurements of each."""


def library(files: list[str], image_size: int) -> None:
    """Decode each image and nothing else."""
    for _ in parallel_map(load, files):
        pass


def resized(files: list[str], image_size: int) -> None:
    """Decode each image and make it as large as is wanted."""
    for _ in parallel_map(lambda file: load(file).resize((image_size, image_size), Image.Resampling.LANCZOS), files):
        pass


def load(file: str) -> Image.Image:
    with open(file, "rb") as stream:
        image = JpegImageFile(stream)
        image.load()
    return image


def product(files: list[str], image_size: int) -> None:
    """Decode as a search does."""
    with tempfile.TemporaryDirectory() as name:
        hashes = content_hashes(files, Path(name))
        decode_all(files, hashes, image_size, folder=Path(name), disk_cache_bytes=10**12, map=parallel_map)


def seconds(call: Callable[[list[str], int], None], files: list[str], image_size: int) -> float:
    started = time.perf_counter()
    call(files, image_size)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    flags = tyro.cli(Flags)
    files = [file for file in load_samples(flags.data)["file"] if file.lower().endswith((".jpg", ".jpeg"))]
    library(files, flags.image_size)  # the files are in memory from here on
    calls = (library, resized, product)
    rounds = [[seconds(call, files, flags.image_size) for call in calls] for _ in range(flags.rounds)]
    for call, taken in zip(calls, zip(*rounds, strict=True), strict=True):
        rates = [len(files) / each for each in taken]
        shares = [each / ours for each, (*_, ours) in zip(taken, rounds, strict=True)]
        print(
            f"{call.__name__}  {statistics.median(rates):6.0f} images a second ({min(rates):.0f} to {max(rates):.0f}); "
            f"the product's share {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
        )
    print(f"{len(files)} files, {flags.image_size} px, {os.cpu_count()} cores, {flags.rounds} rounds")


if __name__ == "__main__":
    main()
