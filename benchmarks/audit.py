"""What the audit finds of planted copies, how many pairs it calls copies that are none, and how long it takes.

Copies of each kind are made of images drawn at random, and lie beside them. Without --data the images are generated
radiographs, whose drawing takes longest.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from tuning.checks import audit
from tuning.data import images, samples
from tuning.data.phantoms import CLASSES, draw_phantom
from tuning.data.splits import number_units
from tuning.settings.config import SearchPlan, cache_folder

SIDE = 96  # of generated radiographs, in pixels


@dataclasses.dataclass(frozen=True)
class Flags:
    """Plant copies and look for them."""

    data: str | None = None
    """Folder of class folders, or manifest; else radiographs are generated."""
    images: int = 1000
    """Originals."""
    copies: int = 50
    """Of each kind."""
    image_size: int = 128
    """Side of the decoded images in pixels."""


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Without 5% at each of some sides."""
    left, top, right, bottom = rng.integers(0, 2, 4) * 0.05
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round(width - right * width), round(height * (1 - bottom)))
    )


def annotated(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    image = image.convert("L")
    draw, (width, height) = ImageDraw.Draw(image), image.size
    draw.text((0.05 * width, 0.05 * height), "SUPINE", fill=255, font_size=height / 12)
    x, y = rng.uniform(0.2, 0.6, 2)
    draw.line([x * width, y * height, (x + 0.2) * width, (y + 0.2) * height], fill=255, width=max(1, width // 60))
    return image


KINDS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "equal pixels": lambda image, rng: image,
    "re-encoded": lambda image, rng: image,
    "resized": lambda image, rng: image.resize([round(side * rng.uniform(0.5, 0.9)) for side in image.size]),
    "flipped": lambda image, rng: ImageOps.mirror(image),
    "upside down": lambda image, rng: ImageOps.flip(image),
    "turned by 90": lambda image, rng: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 2": lambda image, rng: image.rotate(rng.choice([-2, 2]), Image.Resampling.BICUBIC),
    "brighter": lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.uniform(1.1, 1.4)),
    "darker": lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 0.9)),
    "more contrast": lambda image, rng: ImageEnhance.Contrast(image).enhance(rng.uniform(1.2, 1.5)),
    "cropped": cropped,
    "annotated": annotated,
    "flipped, cropped, darker": lambda image, rng: ImageEnhance.Brightness(
        cropped(ImageOps.mirror(image), rng)
    ).enhance(0.8),
}


def draw(number: int, folder: Path) -> None:
    """One generated radiograph."""
    kind = CLASSES[number % len(CLASSES)]
    pixels = draw_phantom(kind, np.random.default_rng([20, number]), SIDE)
    Image.fromarray(pixels).save(folder / kind / f"{number:06d}.png")


def originals(flags: Flags, folder: Path) -> None:
    """Class folders of the originals."""
    if flags.data is None:
        for kind in CLASSES:
            (folder / kind).mkdir()
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            pool.map(partial(draw, folder=folder), range(flags.images), chunksize=50)
        return
    table = samples.load_samples(flags.data)
    chosen = np.random.default_rng(0).permutation(len(table))[: flags.images]
    for number, (file, label) in enumerate(table.iloc[chosen][["file", "label"]].itertuples(index=False)):
        (folder / label).mkdir(exist_ok=True)
        os.symlink(file, folder / label / f"{number:06d}{Path(file).suffix}")


def plant(folder: Path, copies: int) -> pd.DataFrame:
    """Copies of each kind, named after their originals; returns path of original, path and kind of each."""
    rng = np.random.default_rng(1)
    files = sorted(folder.glob("*/*"))
    rows = []
    for number, (kind, change) in enumerate(KINDS.items()):
        for index in rng.choice(len(files), min(copies, len(files)), replace=False):
            image = Image.open(files[index])
            copy = change(image if image.mode in ("L", "RGB") else image.convert("RGB"), rng)
            target = files[index].with_name(f"{files[index].stem}-{number}{'.png' if number == 0 else '.jpg'}")
            copy.save(target, quality=int(rng.integers(70, 95)))
            rows.append((files[index].relative_to(folder).as_posix(), target.relative_to(folder).as_posix(), kind))
    return pd.DataFrame(rows, columns=["original", "copy", "kind"])


def report(found: pd.DataFrame, planted: pd.DataFrame, n_originals: int) -> None:
    """Print recall by kind and false pairs: those of different originals."""
    pairs = found[found["finding"].isin(["exact_duplicate", "near_duplicate"])][["path_a", "path_b"]]
    paths = sorted({*planted["copy"], *planted["original"], *pairs["path_a"], *pairs["path_b"]})
    number = {path: index for index, path in enumerate(paths)}
    # A copy of two identical images is listed as one of the first.
    unit = number_units([None] * len(paths), pairs.map(number.__getitem__).to_numpy(np.int64))
    hits = unit[planted["original"].map(number)] == unit[planted["copy"].map(number)]
    for kind, hit in pd.Series(hits).groupby(planted["kind"].to_numpy(), sort=False):
        print(f"{kind:<25} {hit.sum()} of {len(hit)}")
    original = dict(zip(planted["copy"], planted["original"], strict=True))
    ends = {frozenset(original.get(path, path) for path in pair) for pair in pairs.itertuples(index=False)}
    false = sorted(" and ".join(sorted(pair)) for pair in ends if len(pair) > 1)
    print(f"{'pairs of originals':<25} {len(false)}, {1000 * len(false) / n_originals:.2f} in 1,000")
    for pair in false[:5]:
        print(f"  {pair}")
    print(f"{'look-alikes':<25} {(found['finding'] == 'look_alike').sum()}")


def main() -> None:
    """Measure and print."""
    flags = tyro.cli(Flags)
    with tempfile.TemporaryDirectory() as name:
        os.environ["FINETUNE_SEARCH_CACHE"] = f"{name}/cache"
        folder = Path(name) / "images"
        folder.mkdir()
        originals(flags, folder)
        n_originals = sum(1 for _ in folder.glob("*/*"))
        planted = plant(folder, flags.copies)
        plan = SearchPlan(name="audit", data=str(folder), on_leak="warn")

        started = time.perf_counter()
        files = list(samples.load_samples(str(folder))["file"])
        hashes = images.content_hashes(files, cache_folder())
        limits = {"folder": cache_folder(), "disk_cache_bytes": 10**12}
        images.decode_all(files, hashes, flags.image_size, **limits, map=images.parallel_map)
        print(f"{len(files)} images, {n_originals} of them originals, at {flags.image_size} px")
        print(f"decoding                  {time.perf_counter() - started:.1f} s")
        for step in ("audit beyond decoding", "a second time"):
            started, cpu_started = time.perf_counter(), time.process_time()
            checked = audit.load_checked(plan, [flags.image_size])
            cpu_s = time.process_time() - cpu_started
            print(f"{step:<25} {time.perf_counter() - started:.1f} s, {cpu_s:.1f} s of all cores")
        assert checked.audit is not None
        report(checked.audit.to_pandas(), planted, n_originals)


if __name__ == "__main__":
    main()
