"""The demo data set: generated frontal chest radiographs in three classes, so that everything runs without a download.

A film is a sum of attenuations (body, lungs, heart, bones, vessels, findings) put through an exposure curve. Anatomy,
pose, exposure and distractors vary alike in every class, and a finding leaves the mean of the lungs unchanged.

Hard on purpose: trained on 360 images of 64 px and tested on 420 others (seeds 0 and 1; standard error of each about
0.02), accuracy was 0.56, 0.53 for logistic regression on 16 x 16 thumbnails, 0.73, 0.68 for a linear head on a frozen
tf_efficientnet_lite0, and 0.86, 0.82 for the same network fine-tuned whole for 6 epochs with AdamW at 1e-3 (0.88, 0.84
at 2e-3; 0.64, 0.69 at 3e-4; 0.39, 0.35 at 0.3; chance is 0.33).
"""

import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuning.settings.config import InputError

VERSION = 1  # of the drawing; images of another version are in another folder
CLASSES = ("normal", "focal_opacity", "diffuse_opacity")

Plane = npt.NDArray[Any]  # float32, (side, side); numpy's own types take its product with a float for float64


class _Chest(NamedTuple):
    """The coordinates of each pixel and of the landmarks of one chest, in about half sides of the film."""

    u: Plane  # to the image right of the patient's midline
    v: Plane  # down from the middle of the chest
    half_width: float  # of the chest inside the ribs
    apex: float  # v of the tops of the lungs
    bases: tuple[float, float]  # v of the two domes of the diaphragm; image left, image right
    medial: float  # distance of the lungs' inner edges from the midline


def write_phantoms(folder: Path, *, images_per_class: int = 160, side: int = 96, seed: int = 0) -> Path:
    """Write the demo data set once, as class folders of 8-bit grey PNG files without a split; return its folder.

    The images are written beside `folder` and renamed into place, so `folder` is complete or absent whenever the
    process is killed and however many processes write it at once.

    Args:
        folder: of the data set; left as it is if it already holds these images.
        images_per_class: number of images of each of `CLASSES`.
        side: height and width in pixels.
        seed: seeds each image together with its class and number.

    Raises:
        InputError: an argument is out of range, or `folder` holds something else.
    """
    faults = [
        f"phantoms: {name} must be {low} or more, got {value}; give a larger number"
        for name, value, low in (("images_per_class", images_per_class, 1), ("side", side, 32), ("seed", seed, 0))
        if value < low
    ]
    if faults:
        raise InputError(faults)
    if not _is_filled(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            for kind in CLASSES:
                (made / kind).mkdir(parents=True)
                for number in range(images_per_class):
                    Image.fromarray(_numbered(kind, number, side, seed)).save(made / kind / f"{number:04d}.png")
            try:
                os.rename(made, folder)
                return folder
            except OSError:
                if not _is_filled(folder):  # no other process was faster
                    raise
    expected = {f"{kind}/{number:04d}.png" for kind in CLASSES for number in range(images_per_class)}
    if {path.relative_to(folder).as_posix() for path in folder.glob("*/*.png")} == expected and all(
        _same(folder / kind / "0000.png", _numbered(kind, 0, side, seed)) for kind in CLASSES
    ):
        return folder
    raise InputError(
        f"{folder}: must be absent, empty or hold {images_per_class} generated images per class of {side} px from seed "
        f"{seed}, but holds something else; delete it or name another folder"
    )


def _is_filled(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _same(path: Path, pixels: npt.NDArray[np.uint8]) -> bool:
    with Image.open(path) as image:
        found = np.asarray(image, dtype=np.int16)
    # Processors round float32 differently in the last bit, which may move a pixel by one grey level.
    return found.shape == pixels.shape and bool(np.abs(found - pixels).max() <= 2)


def _numbered(kind: str, number: int, side: int, seed: int) -> npt.NDArray[np.uint8]:
    return draw_phantom(kind, np.random.default_rng([seed, CLASSES.index(kind), number]), side)


def draw_phantom(kind: str, rng: np.random.Generator, side: int) -> npt.NDArray[np.uint8]:
    """Draw one chest film: grey levels, (side, side).

    Findings have a random stream of their own: the same generator state draws the same patient and film in each class.

    Args:
        kind: one of `CLASSES`.
        rng: source of all that varies; needs a seed sequence, as the generators of `numpy.random.default_rng` have.
        side: height and width in pixels.

    Raises:
        InputError: there is no such kind.
    """
    if kind not in CLASSES:
        raise InputError(f"phantoms: kind must be one of {', '.join(CLASSES)}, got {kind!r}")
    (finding_rng,) = rng.spawn(1)
    chest = _draw_chest(rng, side)
    lungs = _lungs(chest, rng) * (1 - 0.9 * _heart(chest, rng))
    body = _body(chest, rng)
    film = body * rng.uniform(0.6, 0.68) - lungs * rng.uniform(0.3, 0.4)
    film += _mediastinum(chest, rng) * body
    film += _bones(chest, rng) * body
    film += _vessels(chest, rng) * lungs
    film += _distractors(chest, lungs, rng)
    if kind != "normal":
        opacity = (_focal if kind == "focal_opacity" else _diffuse)(chest, lungs, finding_rng)
        # The lungs are darkened to keep their mean: brightness must not predict the class.
        film += opacity - lungs * float(opacity.sum() / lungs.sum())
    return _exposed(film, rng)


def _draw_chest(rng: np.random.Generator, side: int) -> _Chest:
    """A patient's frame, rotated, shifted and scaled as patients stand."""
    line = np.linspace(-1, 1, side, dtype=np.float32)
    x, y = line[None, :], line[:, None]
    angle, zoom, stretch = rng.normal(0, 0.05), rng.uniform(0.84, 1.08), rng.uniform(0.95, 1.05)
    u = zoom * stretch * (math.cos(angle) * x - math.sin(angle) * y) + rng.normal(0, 0.05)
    v = zoom / stretch * (math.sin(angle) * x + math.cos(angle) * y) + rng.normal(0, 0.06)
    turned = 1 + rng.normal(0, 0.05) * np.clip(4 * u, -1, 1)  # towards one side, so that one lung looks narrower
    base = rng.uniform(0.36, 0.62)
    return _Chest(
        u=u * turned,
        v=v,
        half_width=rng.uniform(0.66, 0.8),
        apex=rng.uniform(-0.8, -0.66),
        bases=(base - rng.uniform(0.0, 0.08), base + rng.uniform(0.0, 0.05)),
        medial=rng.uniform(0.1, 0.16),
    )


def _lungs(chest: _Chest, rng: np.random.Generator) -> Plane:
    """Soft mask of both lungs."""
    roundness, dome = rng.uniform(2.0, 3.2), rng.uniform(0.14, 0.26)
    lungs = np.zeros_like(chest.u)
    for sign, base in zip((-1, 1), chest.bases, strict=True):
        across = chest.u * sign
        inner, outer = _lung_edges(chest, base, chest.v, roundness)
        middle = 0.45 * chest.half_width + 0.05
        floor = base + dome * np.minimum(np.abs((across - middle) / (chest.half_width - middle)), 1.4) ** 2.2
        lungs += _inside(across - inner, 0.018) * _inside(outer - across, 0.015) * _inside(floor - chest.v, 0.013)
    return lungs


def _lung_edges(chest: _Chest, base: float, v: Plane, roundness: float = 2.5) -> tuple[Plane, Plane]:
    """Distance from the midline of a lung's inner and outer edge at each height."""
    from_base = 1 - np.clip((v - chest.apex) / (base + 0.15 - chest.apex), 0, 1)
    inner = chest.medial + 0.1 * from_base * from_base
    outer = inner + (chest.half_width - inner) * np.sqrt(1 - from_base**roundness)
    return inner, outer


def _body(chest: _Chest, rng: np.random.Generator) -> Plane:
    """Soft mask of neck, shoulders and trunk, denser towards the belly."""
    u, v = chest.u, chest.v
    shoulder, flesh = chest.apex - rng.uniform(0.02, 0.12), rng.uniform(0.06, 0.3)
    trunk = chest.half_width + flesh + 0.06 * v
    neck = rng.uniform(0.2, 0.3)
    slope = np.clip((v - shoulder + 0.12) / 0.3, 0, 1)
    arms = rng.uniform(0.1, 0.4) * _bell((v - shoulder - 0.25) / 0.35)
    half_width = neck + (trunk + arms - neck) * slope**0.5
    belly = _inside(v - sum(chest.bases) / 2, 0.12) * rng.uniform(0.04, 0.14)
    return _inside(half_width - np.abs(u), 0.02) * (1 + belly) * (1 - 0.12 * np.minimum((u / trunk) ** 2, 1.5))


def _heart(chest: _Chest, rng: np.random.Generator) -> Plane:
    """Soft mask of the heart, which is mostly on the image right and displaces air."""
    size = rng.uniform(0.8, 1.3)
    centre = (rng.uniform(0.06, 0.14), chest.bases[1] - rng.uniform(0.08, 0.18))
    return _ellipse(chest, centre, (0.35 * size, 0.24 * size + 0.03), rng.uniform(0.45, 0.8), 0.05)


def _mediastinum(chest: _Chest, rng: np.random.Generator) -> Plane:
    """Attenuation of spine, great vessels, windpipe and aortic knob."""
    u, v = chest.u, chest.v
    column = _inside(chest.medial - np.abs(u), 0.03) * rng.uniform(0.07, 0.13)
    spine = _bell(u / 0.075) * (rng.uniform(0.05, 0.1) + 0.015 * np.cos(v * rng.uniform(45, 60)))
    windpipe = _bell((u - 0.01) / 0.04) * _inside(-0.2 - v, 0.05) * rng.uniform(0.03, 0.08)
    knob = _ellipse(chest, (chest.medial, chest.apex + rng.uniform(0.36, 0.46)), (0.08, 0.09), 0.0, 0.1)
    knob *= rng.uniform(0.04, 0.12)
    return column + spine - windpipe + knob


def _bones(chest: _Chest, rng: np.random.Generator) -> Plane:
    """Attenuation of the ribs, behind and in front, and of the collarbones."""
    u, v = chest.u, chest.v
    across = np.abs(u) / chest.half_width
    spacing, start = rng.uniform(0.15, 0.19), rng.uniform(0, 1)
    strength = rng.uniform(0.03, 0.07)
    cage = _inside(1.03 - across, 0.02) * _inside(v - chest.apex + 0.08, 0.04)
    cage *= _inside(chest.bases[1] + 0.25 - v, 0.08)
    tilt = rng.normal(0, 0.04) * u
    behind = v - rng.uniform(0.1, 0.3) * across**2 + 0.12 * across**0.5 + tilt
    front = v + rng.uniform(0.2, 0.35) * across - 0.42 * across**2 + tilt
    ribs = _bands(behind, spacing, start) * _inside(across - 0.12, 0.03)
    ribs += 0.6 * _bands(front, spacing, start + rng.uniform(0, 1)) * _inside(across - 0.45, 0.08)
    rise = rng.uniform(0.15, 0.3)
    line = v - (chest.apex + rng.uniform(0.08, 0.2)) + rise * (across - 0.1) - 0.1 * np.sin(across * 5)
    clavicles = _bell(line / 0.035) * _inside(across - 0.12, 0.02) * _inside(1.15 - across, 0.03)
    bones: Plane = strength * ribs * cage + rng.uniform(0.06, 0.12) * clavicles
    return bones


def _bands(height: Plane, spacing: float, start: float) -> Plane:
    wave: Plane = 0.5 + 0.5 * np.cos(2 * math.pi * (height / spacing + start))
    return wave * wave


def _vessels(chest: _Chest, rng: np.random.Generator) -> Plane:
    """Attenuation of the hila and of the vessels that fan out from them and taper."""
    vessels = np.zeros_like(chest.u)
    strength = rng.uniform(0.05, 0.13)
    for sign in (-1, 1):
        root_u, root_v = sign * (chest.medial + rng.uniform(0.03, 0.08)), rng.uniform(-0.18, -0.02)
        du, dv = sign * (chest.u - root_u), chest.v - root_v
        hilum = _ellipse(chest, (root_u, root_v), (rng.uniform(0.06, 0.1), rng.uniform(0.1, 0.17)), sign * 0.3, 0.5)
        vessels += hilum * rng.uniform(0.03, 0.14)
        for number in range(5):
            angle, length = -1.2 + 0.6 * number + rng.normal(0, 0.15), rng.uniform(0.3, 0.6)
            along = math.cos(angle) * du + math.sin(angle) * dv
            aside = math.cos(angle) * dv - math.sin(angle) * du
            aside = aside - rng.normal(0, 0.25) * along * along
            reach = np.clip(along / length, 0, 1)
            width = 0.022 - 0.014 * reach
            vessels += strength * _bell(aside / width) * np.minimum(8 * reach, 1 - reach)
    return vessels


def _distractors(chest: _Chest, lungs: Plane, rng: np.random.Generator) -> Plane:
    """Attenuation of what only resembles a finding: breasts, nipples, a veil over a lung, vessels end-on."""
    shadow = np.zeros_like(chest.u)
    if rng.random() < 0.4:
        centre_u, centre_v = rng.uniform(0.32, 0.45), rng.uniform(0.15, 0.4)
        radius, strength = rng.uniform(0.25, 0.38), rng.uniform(0.03, 0.1)
        for sign in (-1, 1):
            shadow += strength * _ellipse(chest, (sign * centre_u, centre_v), (radius, radius * 0.9), 0.0, 0.12)
    if rng.random() < 0.4:
        centre_u, centre_v = rng.uniform(0.36, 0.5), rng.uniform(0.1, 0.35)
        for sign in (-1, 1):
            at = (sign * centre_u + rng.normal(0, 0.02), centre_v + rng.normal(0, 0.02))
            shadow += rng.uniform(0.0, 0.14) * _ellipse(chest, at, (0.035, 0.035), 0.0, 0.3)
    if rng.random() < 0.5:
        one_side = _inside(_random_sign(rng) * chest.u, 0.02) * _inside(rng.normal(0, 1) * chest.v, 0.4)
        shadow += rng.uniform(0.02, 0.06) * one_side
    for _ in range(rng.integers(0, 4)):
        at = _place(chest, _random_sign(rng), (0.3, 0.6), (0.1, 0.5), rng)
        shadow += rng.uniform(0.04, 0.12) * _ellipse(chest, at, (0.022, 0.022), 0.0, 0.3)
    return shadow * (0.3 + 0.7 * lungs)


def _focal(chest: _Chest, lungs: Plane, rng: np.random.Generator) -> Plane:
    """Attenuation of one soft-edged opacity inside a lung, or of two."""
    opacity = np.zeros_like(chest.u)
    for _ in range(1 + (rng.random() < 0.2)):
        at = _place(chest, _random_sign(rng), (0.12, 0.85), (0.25, 0.85), rng)
        radius = math.exp(rng.uniform(math.log(0.11), math.log(0.25)))
        radii = (radius * rng.uniform(0.75, 1.3), radius * rng.uniform(0.75, 1.3))
        spot = _ellipse(chest, at, radii, rng.uniform(-1.5, 1.5), rng.uniform(0.1, 0.35))
        opacity += rng.uniform(0.17, 0.45) * spot * (1 + 0.25 * _mottle(rng, len(lungs), 14))
    return opacity * lungs


def _diffuse(chest: _Chest, lungs: Plane, rng: np.random.Generator) -> Plane:
    """Attenuation of faint patches in both lungs, mostly low and towards the chest wall."""
    opacity = np.zeros_like(chest.u)
    strength = rng.uniform(0.06, 0.2)
    for number in range(rng.integers(6, 13)):
        at = _place(chest, 1 if number % 2 else -1, (0.35, 0.95), (0.4, 0.95), rng)
        radii = rng.uniform(0.06, 0.17), rng.uniform(0.06, 0.15)
        opacity += rng.uniform(0.5, 1.0) * _ellipse(chest, at, radii, rng.uniform(-1.5, 1.5), 0.6)
    return strength * np.minimum(opacity, 1.5) * (1 + 0.5 * _mottle(rng, len(lungs), 22)) * lungs


def _random_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _place(
    chest: _Chest, sign: int, height: tuple[float, float], depth: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float]:
    """A point in the lung on one side: `height` from apex 0 to base 1, `depth` from the inner edge 0 to the outer 1."""
    base = chest.bases[(sign + 1) // 2]
    v = chest.apex + rng.uniform(*height) * (base - chest.apex)
    inner, outer = _lung_edges(chest, base, np.array([v], dtype=np.float32))
    return sign * float(inner[0] + rng.uniform(*depth) * (outer[0] - inner[0])), float(v)


def _ellipse(
    chest: _Chest, centre: tuple[float, float], radii: tuple[float, float], angle: float, softness: float
) -> Plane:
    """A rotated ellipse, 1 inside and 0 outside, its edge `softness` radii wide."""
    du, dv = chest.u - centre[0], chest.v - centre[1]
    along = (math.cos(angle) * du + math.sin(angle) * dv) / radii[0]
    aside = (math.cos(angle) * dv - math.sin(angle) * du) / radii[1]
    return _inside(1 - np.sqrt(along * along + aside * aside), softness)


def _inside(distance: Plane, softness: float) -> Plane:
    """1 where `distance` is well above 0, 0 where well below, with a smooth step between."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * softness))


def _bell(distance: Plane) -> Plane:
    """1 where `distance` is 0, falling to nothing at 3."""
    # Cut off before float32 goes subnormal: such numbers made the blur of wide kernels 19 times slower.
    bell: Plane = np.exp(-np.minimum(distance * distance, 40))
    return bell


def _mottle(rng: np.random.Generator, side: int, cells: int) -> Plane:
    """Smooth noise of about unit variance with `cells` lumps across the film."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _exposed(film: Plane, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Attenuation to grey levels: blur, uneven exposure, tone curve, grain."""
    side = len(film)
    pixel = np.arange(side, dtype=np.float32)
    blur: Plane = _bell((pixel[:, None] - pixel) / (side * rng.uniform(0.005, 0.012)))
    blur /= blur.sum(axis=1, keepdims=True)
    slope = np.linspace(-1, 1, side, dtype=np.float32)
    film = blur @ film @ blur.T
    film += rng.normal(0, 0.03) * slope + rng.normal(0, 0.03) * slope[:, None] + 0.008 * _mottle(rng, side, 12)
    grey = rng.uniform(0.95, 1.2) * np.clip(film, 0, None) ** rng.uniform(0.8, 1.5) + rng.uniform(-0.03, 0.08)
    grey += rng.uniform(0.004, 0.014) * rng.standard_normal((side, side), dtype=np.float32)
    return np.clip(np.rint(255 * grey), 0, 255).astype(np.uint8)
