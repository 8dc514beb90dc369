"""DICOM images as a viewer shows them, read by pydicom, which is an optional package."""

from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from tuning.settings.config import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

PYDICOM_CURE = "pip install pydicom python-gdcm, as this package's extra `dicom` does"


def read(stream: BinaryIO) -> "Dataset":
    """The data set of a DICOM file that holds an image.

    Raises:
        InputError: pydicom isn't there, or there is nothing that it could show.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import get_decoder
    except ImportError:
        raise InputError(f"is a DICOM file, which needs pydicom; {PYDICOM_CURE}") from None

    dataset = dcmread(stream)
    if "PixelData" not in dataset:
        kind = dataset["SOPClassUID"].value.name if "SOPClassUID" in dataset else "of no kind"
        raise InputError(f"is a DICOM file without an image ({kind}); leave it out")
    syntax = dataset.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        cure = "pip install python-gdcm, or store it uncompressed"
        raise InputError(f"is a DICOM file whose pixels are compressed as {syntax.name}; {cure}")
    return dataset


def mode(dataset: "Dataset") -> str:
    """What Pillow would call the stored pixels."""
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return "P"
    if dataset.SamplesPerPixel > 1:
        return "RGB"
    return "L" if dataset.BitsAllocated <= 8 else "I;16"


def show(dataset: "Dataset") -> tuple[Image.Image, list[str]]:
    """The first frame, in mode L or RGB, and what is to be told of it.

    Grey values go through the modality transformation and the first VOI LUT or window; MONOCHROME1 is inverted.

    Source: DICOM PS3.3, C.7.6.3 and C.11.
    """
    from pydicom.pixels import apply_color_lut, pixel_array

    notes = ["has several frames, of which the first is used"] if int(dataset.get("NumberOfFrames") or 1) > 1 else []
    pixels = pixel_array(dataset, index=0)
    if mode(dataset) == "P":
        pixels = apply_color_lut(pixels, dataset)[..., :3]
    if pixels.ndim == 3:
        bits = dataset.RedPaletteColorLookupTableDescriptor[2] if mode(dataset) == "P" else dataset.BitsStored
        return Image.fromarray((pixels >> max(bits - 8, 0)).astype(np.uint8)), notes

    if pixels.itemsize > 2:
        raise InputError("is a DICOM file of more than 16 bits a pixel, which isn't supported; convert it to 16 or 8")
    # What each value is shown as: at most 65,536, however large the image is.
    least = int(pixels.min())
    brightness, told = _brightness(dataset, np.arange(least, int(pixels.max()) + 1, dtype=pixels.dtype), pixels)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        brightness = 1 - brightness
    table = np.rint(255 * brightness.clip(0, 1)).astype(np.uint8)
    return Image.fromarray(table[pixels.astype(np.int32) - least]), notes + told


def _brightness(dataset: "Dataset", stored: Any, pixels: Any) -> tuple[Any, list[str]]:
    """How bright each stored value is, from 0 to 1 and beyond, and what is to be told; the values are of `pixels`."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi(np.rint(values).astype(np.int64), dataset) / (2**bits - 1), []
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        centre, width = (float(np.ravel(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        return _window(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR")), []
    if dataset.BitsStored <= 8 and not dataset.PixelRepresentation:
        ends, told = [0, 2**dataset.BitsStored - 1], []
    else:
        # Viewers differ here; most stretch what there is. Padding around the image is no part of it.
        held = pixels[pixels != dataset["PixelPaddingValue"].value] if "PixelPaddingValue" in dataset else pixels
        ends = [held.min(initial=pixels.max()), held.max(initial=pixels.min())]
        told = ["has no window, so it is shown from its least to its greatest value"]
    low, high = sorted(apply_modality_lut(np.array(ends, pixels.dtype), dataset).astype(float))
    return (values - low) / max(high - low, 1e-9), told


def _window(values: Any, centre: float, width: float, function: str) -> Any:
    """Brightness from 0 to 1 and beyond. Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    from scipy.special import expit

    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    steps = (values - centre) / max(width, 1e-9)
    return expit(4 * steps) if function == "SIGMOID" else steps + 0.5
