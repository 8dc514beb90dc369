"""What the audit finds of planted copies, how many pairs it calls copies that are none, and how long it takes.

Copies of each kind are made of images drawn at random, and lie beside them. Without --data the images are generated
radiographs, whose drawing takes longest; --data scans generates slices of as many scans. With --slices the images are
instead stacks of neighbouring slices of generated scans, and none is a copy.
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
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import ndimage

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
    """Folder of class folders, manifest, or `scans`; else radiographs are generated."""
    images: int = 1000
    """Originals."""
    copies: int = 50
    """Of each kind."""
    image_size: int = 128
    """Side of the decoded images in pixels."""
    slices: int = 0
    """Of each scan: stacks of slices instead of copies."""


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Without 5% at each of some sides."""
    left, top, right, bottom = rng.integers(0, 2, 4) * 0.05
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round(width - right * width), round(height * (1 - bottom)))
    )


def part(image: Image.Image, rng: np.random.Generator, width: float, places: int = 2) -> Image.Image:
    """A part of this width and height, from a corner; with three places also from the middle or a side."""
    left, top = rng.integers(0, places, 2) / (places - 1) * (1 - width)
    box = np.array([left, top, left + width, top + width]) * [*image.size, *image.size]
    return image.crop(tuple(box.round().astype(int)))


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
    "cropped to 75%": partial(part, width=0.75, places=3),
    "cropped to 60%, a corner": partial(part, width=0.6),
}


def scan(rng: np.random.Generator, slices: int, thickness: float, side: int = SIDE) -> NDArray[np.uint8]:
    """CT-like slices of one body: organs and texture that change from slice to slice, and noise: [slices, side, side].

    Args:
        thickness: of a slice, in half sides of the picture.
    """
    line = np.linspace(-1, 1, side, dtype=np.float32)
    depth, (wide, high) = slices * thickness, rng.uniform((0.75, 0.55), (0.92, 0.75))
    u, v = line + rng.normal(0, 0.03), line[:, None] + rng.normal(0, 0.03)
    n_organs = int(35 * (depth + 1.2))
    radii = np.exp(rng.uniform(np.log(0.03), np.log(0.35), (n_organs, 3)))
    places = rng.uniform((-0.8, -0.8, -0.6), (0.8, 0.8, depth + 0.6), (n_organs, 3)) * (wide, high, 1)
    levels, phase, texture = rng.normal(0, 30, n_organs), rng.uniform(0, 6, 2), np.zeros((slices, side, side))
    for size in (0.02, 0.06):  # as smooth along the body as across it
        sigma = (size / thickness, size * side / 2, size * side / 2)
        noise = ndimage.gaussian_filter(rng.standard_normal(texture.shape), sigma, mode="wrap")
        texture += 9 * noise / noise.std()
    found = np.empty(texture.shape, dtype=np.uint8)
    for number, z in enumerate(np.arange(slices) * thickness):
        from_axis = np.hypot(u / wide / (1 + 0.08 * np.sin(z + phase[0])), v / high / (1 + 0.08 * np.sin(z + phase[1])))
        inside = 90 + texture[number]
        for (x, y, middle), (across, down, along), level in zip(places, radii, levels, strict=True):
            if (size := 1 - ((z - middle) / along) ** 2) > 0:
                distance = np.hypot((u - x) / across, (v - y) / down)
                inside += level * (0.5 - 0.5 * np.tanh((distance - np.sqrt(size)) / 0.12))
        body = 0.5 - 0.5 * np.tanh((from_axis - 1) / 0.03)
        levels_seen = body * inside + 50 * np.exp(-(((from_axis - 0.95) / 0.03) ** 2)) + 8
        found[number] = (levels_seen + rng.normal(0, 3, texture[0].shape)).clip(0, 255)
    return found


def draw(number: int, folder: Path, scans: bool) -> None:
    """One generated radiograph, or one slice of a scan."""
    kind, rng = CLASSES[number % len(CLASSES)], np.random.default_rng([20, number])
    pixels = scan(rng, 1, 0.02)[0] if scans else draw_phantom(kind, rng, SIDE)
    Image.fromarray(pixels).save(folder / kind / f"{number:06d}.png")


def originals(flags: Flags, folder: Path) -> None:
    """Class folders of the originals."""
    if flags.data in (None, "scans"):
        for kind in CLASSES:
            (folder / kind).mkdir()
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            drawn = partial(draw, folder=folder, scans=flags.data is not None)
            pool.map(drawn, range(flags.images), chunksize=50)
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


def stack(flags: Flags, folder: Path) -> None:
    """Slices of scans of several thicknesses, re-encoded, each scan in one class folder."""
    for number in range(flags.images // flags.slices):
        rng = np.random.default_rng([21, number])
        target = folder / CLASSES[number % len(CLASSES)]
        target.mkdir(exist_ok=True)
        for place, pixels in enumerate(scan(rng, flags.slices, rng.uniform(0.005, 0.03))):
            quality = int(rng.integers(70, 95))
            Image.fromarray(pixels).save(target / f"{number:04d}-{place:03d}.jpg", quality=quality)


def report_stacks(found: pd.DataFrame, files: list[str]) -> None:
    """Print how many neighbouring slices are called copies, and how many images are in sequences."""
    scans = [Path(file).stem.split("-") for file in files]
    n_pairs = sum(place != "000" for _, place in scans)
    pairs = found.loc[found["finding"].isin(["exact_duplicate", "near_duplicate"]), ["path_a", "path_b"]]
    ends = [[Path(path).stem.split("-") for path in pair] for pair in pairs.itertuples(index=False)]
    neighbours = [a[0] == b[0] and abs(int(a[1]) - int(b[1])) == 1 for a, b in ends]
    print(f"{'neighbours called copies':<25} {sum(neighbours)} of {n_pairs}")
    print(f"{'others called copies':<25} {len(ends) - sum(neighbours)}")
    sequences = found[found["finding"] == "sequence"]
    print(f"{'sequences':<25} {len(sequences)}, {int(sequences['value'].sum())} of {len(files)} images in them")


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
        (stack if flags.slices else originals)(flags, folder)
        n_originals = sum(1 for _ in folder.glob("*/*"))
        planted = plant(folder, 0 if flags.slices else flags.copies)
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
        if flags.slices:
            report_stacks(checked.audit.to_pandas(), files)
        else:
            report(checked.audit.to_pandas(), planted, n_originals)


if __name__ == "__main__":
    main()
