"""A model on labelled images from elsewhere: its figures there, beside those of its own test set, and what differs."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from scipy import fft

from tuning.data.decoding import DECODER_VERSION
from tuning.insight.shift import NUMBERS, WORDS
from tuning.model.folder import Ensemble, Model
from tuning.record.tables import read_table, replacing, versioned
from tuning.record.temperature import Floats, Ints, fit_temperature, image_losses, logarithms, plain, tempered

KNOWN_IMAGES = "known_images.parquet"  # in a model folder
HASHES = ("sha256", "pixels_sha256")  # of file and decoded pixels
OUTLINE_SIDE, FREQUENCIES = 64, 16  # pixels of an image whose cosine transform is its outline, and how many of it
NEAR_BITS = 20  # of an outline's 256 that may differ in a near copy (measured: benchmarks/README.md, "Near copies")
COMPARED = ("accuracy", "balanced_accuracy", "auroc")
BY_CLASS = ("sensitivity", "specificity", "auroc", "auprc", "f1")


def known_images(
    splits: Sequence[str],
    hashes: Sequence[str],
    facts: pd.DataFrame,
    described: pd.DataFrame,
    shapes: Sequence[str | None],
) -> pa.Table:
    """Return what a model folder keeps of its images: hashes and facts, in the hashes' order; no names and no pixels.

    Args:
        splits: of each image.
        hashes: sha256 of each file, in hex.
        facts: of `images.read_facts`.
        described: of `shift.described`.
        shapes: of `outlines`.
    """
    types = {**dict.fromkeys(("split", *HASHES, "outline"), pa.string()), **dict.fromkeys(NUMBERS, pa.float64())}
    types |= dict.fromkeys(WORDS, pa.string())
    columns = {"split": splits, "sha256": hashes, "pixels_sha256": facts["pixels_sha256"], **described}
    columns["outline"] = shapes
    arrays = [pa.array(columns[name], kind) for name, kind in types.items()]
    schema = versioned(types, decoder=str(DECODER_VERSION))
    return pa.Table.from_arrays(arrays, schema=schema).sort_by("sha256")


def write_known_images(folder: Path, table: pa.Table) -> None:
    """Write the table of `known_images` into a model folder."""
    with replacing(folder / KNOWN_IMAGES) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_known_images(folder: Path) -> tuple[pd.DataFrame | None, bool]:
    """Return the table of `known_images`, None of a model of an older version; and whether images decode as they did.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / KNOWN_IMAGES
    if not path.exists():
        return None, True
    table = read_table(path)
    metadata = pq.read_schema(path).metadata or {}
    return table, metadata.get(b"decoder") == str(DECODER_VERSION).encode()


def copies(known: pd.DataFrame, hashes: Sequence[str], facts: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which images have the bytes or the decoded pixels of one of the known ones."""
    same = pd.Series(hashes).isin(set(known["sha256"])) | facts["pixels_sha256"].isin(set(known["pixels_sha256"]))
    found: NDArray[np.bool_] = same.to_numpy(np.bool_)
    return found


def outlines(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> list[str | None]:
    """Return a perceptual hash of each image, which a copy nearly shares that was resized or compressed again.

    It says, in hex, which of the lowest frequencies of the image's cosine transform are above their median (as pHash,
    with 256 bits). None of an image without detail.

    Args:
        images: decoded [images, height, width, channels].
        rows: of the images.
    """
    found: list[str | None] = []
    for row in rows:
        grey = Image.fromarray(images[row].mean(axis=-1).astype(np.uint8))
        pixels = np.asarray(grey.resize((OUTLINE_SIDE, OUTLINE_SIDE), Image.Resampling.LANCZOS), dtype=np.float32)
        low = fft.dctn(pixels, norm="ortho")[:FREQUENCIES, :FREQUENCIES].ravel()
        low[0] = 0.0  # brightness
        bits = np.packbits(low > np.median(low))
        found.append(bits.tobytes().hex() if pixels.std() >= 1 else None)
    return found


def near_copies(known: pd.DataFrame, found: Sequence[str | None]) -> NDArray[np.bool_]:
    """Return which images nearly have the outline of a known one; none if the model is of an older version."""
    near = np.zeros(len(found), dtype=bool)
    if "outline" not in known or not (there := known["outline"].dropna().tolist()):
        return near
    of_known = _words(there)
    for place, outline in enumerate(found):
        if outline is not None:
            near[place] = np.bitwise_count(of_known ^ _words([outline])).sum(axis=1).min() <= NEAR_BITS
    return near


def _words(found: Sequence[str]) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(found)), dtype=np.uint64).reshape(len(found), -1)


def image_sizes(model: Model | Ensemble) -> list[int]:
    """Return the sides of the images that a model takes, in pixels."""
    if isinstance(model, Model):
        return [model.config.image_size]
    return sorted({size for member in model.members for size in image_sizes(member)})


def shaping(model: Model | Ensemble) -> dict[str, Any]:
    """Return `fit` and `drop_colour`, by which a model's images are decoded."""
    while isinstance(model, Ensemble):
        model = model.members[0]
    return {"fit": model.fit, "drop_colour": model.drop_colour}


def outputs(
    model: Model | Ensemble, images: Mapping[int, NDArray[np.uint8]], rows: NDArray[np.int64]
) -> tuple[Floats, Floats | None]:
    """Return a model's probabilities [rows, classes], and how unlike its training images each is, as `Model.look`.

    Args:
        images: decoded, by their side in pixels.
        rows: of the images.
    """
    if isinstance(model, Ensemble):
        return model.combined([outputs(member, images, rows) for member in model.members])
    return model.of_images(images[model.config.image_size], rows)


def recalibrated(found: Floats, targets: Ints) -> dict[str, Any]:
    """Return by what a model's temperature would be multiplied to fit these images, and the loss with it.

    Args:
        found: probabilities [images, classes].
        targets: class indices [images], or labels [images, classes] of 1, 0 and -1 (unknown).
    """
    several = targets.ndim == 2
    logits = logarithms(found, multi_label=several)
    factor = fit_temperature(logits, targets)
    loss = float(image_losses(tempered(logits, factor, multi_label=several), targets).mean())
    return {"temperature_factor": plain(factor), "loss": loss, "images": len(targets)}


def without_absent(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures without the balanced accuracy where a class has no images: it would be of the others alone."""
    if all(values["images"] for values in figures["classes"].values()):
        return figures
    return {**figures, "balanced_accuracy": None, "balanced_accuracy_95": None}


def differences(here: Mapping[str, Any], tested: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how much higher each figure is here than on the model's own test set, with 95% confidence intervals.

    The interval follows from those of the two figures (Newcombe 1998, method 10: square and add). None where either has
    none; means over the classes are compared only where both are of the same.
    """
    if tested is None:
        return {}
    own = tested.get("classes", {})
    judged = [
        {label for label, values in part.items() if values["auroc"] is not None} for part in (here["classes"], own)
    ]
    whole = here["balanced_accuracy"] is not None and judged[0] == judged[1]  # else the means are of other classes
    found: dict[str, Any] = {name: _difference(here, tested, name) if whole else None for name in COMPARED}
    found["classes"] = {
        label: {name: _difference(values, own.get(label, {}), name) for name in BY_CLASS}
        for label, values in here["classes"].items()
    }
    return found


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    a, b = one.get(name), other.get(name)
    bounds, others = one.get(f"{name}_95"), other.get(f"{name}_95")
    if a is None or b is None or bounds is None or others is None:
        return None
    low = a - b - float(np.hypot(a - bounds[0], others[1] - b))
    high = a - b + float(np.hypot(bounds[1] - a, b - others[0]))
    return {"difference": a - b, "difference_95": [low, high]}


def significant(change: Mapping[str, Any] | None) -> bool:
    """Return whether a difference's interval leaves out 0."""
    return change is not None and not change["difference_95"][0] <= 0 <= change["difference_95"][1]


def digest(folder: Path) -> str:
    """Return a sha256 of a model folder's `config.yaml` files, which hold the digests of the weights."""
    configs = sorted(folder.glob("**/config.yaml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in configs)).hexdigest()
