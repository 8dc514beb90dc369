"""DICOM images as a viewer shows them, read by pydicom, an optional package."""

from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from tuning.settings.config import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

FRAMES = "has several frames, only the first is used"  # a note of other formats too
NEEDED = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored")
# Of a pixel's height and width.
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
JPEG_12_BITS = "1.2.840.10008.1.2.4.51"  # which Pillow and gdcm read up to 8 bits


def read(stream: BinaryIO) -> "Dataset":
    """Return the data set of a DICOM file that holds an image.

    Raises:
        InputError: pydicom is not installed, or the file has no image that it can decode.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import get_decoder
    except ImportError:
        cure = "pip install pydicom python-gdcm, or this package with the extra `dicom`"
        raise InputError(f"is a DICOM file, which needs pydicom; {cure}") from None

    dataset = dcmread(stream, force=True)  # also without the preamble and header, as PACS and old tools write
    if {"FloatPixelData", "DoubleFloatPixelData"} & set(dataset.dir("FloatPixelData")):
        raise InputError("is a DICOM file of floating-point pixels, which isn't supported; convert it to 16 bits")
    if "PixelData" not in dataset:
        kind = dataset["SOPClassUID"].value.name if "SOPClassUID" in dataset else "of unknown class"
        raise InputError(f"is a DICOM file without an image ({kind}); leave it out")
    if missing := [name for name in NEEDED if dataset.get(name) is None]:
        raise InputError(f"is a DICOM file without {', '.join(missing)}, so its pixels can't be read; export it again")
    if not dataset.PixelData:
        raise InputError("is a DICOM file whose pixels are empty; export it again, or leave it out")
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = _uncompressed_syntax(dataset)
    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    if syntax == JPEG_12_BITS and dataset.BitsStored > 8 and "pylibjpeg" not in decoder.available_plugins:
        cure = "pip install pylibjpeg pylibjpeg-libjpeg, or store it uncompressed"
        raise InputError(f"is a DICOM file whose pixels are compressed as {syntax.name}; {cure}")
    if not decoder.is_available:
        lacking = " ".join(decoder.missing_dependencies)
        packages = "python-gdcm" if "gdcm" in lacking else "pylibjpeg pylibjpeg-openjpeg pylibjpeg-libjpeg"
        cure = f"pip install {packages}, or store it uncompressed"
        raise InputError(f"is a DICOM file whose pixels are compressed as {syntax.name}; {cure}")
    return dataset


def _uncompressed_syntax(dataset: "Dataset") -> str:
    """Return the transfer syntax of a file that doesn't name one, as pydicom has found it."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    if implicit:
        return str(ImplicitVRLittleEndian)
    return str(ExplicitVRLittleEndian if little else ExplicitVRBigEndian)


def mode(dataset: "Dataset") -> str:
    """Return Pillow's mode of the stored pixels."""
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return "P"
    if dataset.SamplesPerPixel > 1:
        return "RGB"
    return "L" if dataset.BitsAllocated <= 8 else "I;16"


def aspect(dataset: "Dataset") -> float:
    """Return a pixel's height for a width of 1, after `show`.

    Source: DICOM PS3.3, 10.7.1.3 and C.7.6.3.1.7.
    """
    for name in SPACINGS:
        values = [float(value) for value in dataset.get(name) or []]
        if len(values) == 2 and min(values) > 0:
            return values[0] / values[1]
    return 1.0


def show(dataset: "Dataset") -> tuple[Image.Image, list[str]]:
    """Return the first frame, in mode L or RGB, and notes for the user.

    Grey values go through the modality transformation and the first VOI LUT or window; MONOCHROME1 is inverted.

    Source: DICOM PS3.3, C.7.6.3 and C.11; of windows, C.11.2.1.2 and C.11.2.1.3.
    """
    from pydicom.pixels import apply_color_lut

    notes = [FRAMES] if int(dataset.get("NumberOfFrames") or 1) > 1 else []
    if dataset.PhotometricInterpretation == "MONOCHROME2" and dataset.get("PresentationLUTShape") == "INVERSE":
        notes.append("has an inverse presentation LUT beside MONOCHROME2: viewers differ, it is shown as it is stored")
    _take_from_functional_groups(dataset)
    _drop_what_is_empty(dataset)
    _make_palette_little_endian(dataset)
    pixels = _stored_bits(dataset)
    if mode(dataset) == "P":
        pixels = apply_color_lut(pixels, dataset)[..., :3]
    if pixels.ndim == 3:
        bits = dataset.RedPaletteColorLookupTableDescriptor[2] if mode(dataset) == "P" else dataset.BitsStored
        return Image.fromarray((pixels >> max(bits - 8, 0)).astype(np.uint8)), notes

    if pixels.itemsize > 2:
        raise InputError("is a DICOM file of more than 16 bits per pixel, which isn't supported; convert it to 16 or 8")
    # A table of what each value is shown as: at most 65,536 entries, however large the image is.
    least = int(pixels.min())
    brightness, more = _brightness(dataset, np.arange(least, int(pixels.max()) + 1, dtype=pixels.dtype), pixels)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        brightness = 1 - brightness
    table = np.rint(255 * brightness.clip(0, 1)).astype(np.uint8)
    return Image.fromarray(table[pixels.astype(np.int32) - least]), notes + more


def _take_from_functional_groups(dataset: "Dataset") -> None:
    """Copy window and rescale of an enhanced image's first frame into the root, where classic images have them.

    Source: DICOM PS3.3, C.7.6.16.2.9b and C.7.6.16.2.10b.
    """
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (dataset.get(groups) or [])[:1]:
            for macro in ("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in (group.get(macro) or [])[:1]:
                    dataset.update({element.tag: element for element in item})


def _drop_what_is_empty(dataset: "Dataset") -> None:
    """Drop empty elements and lookup tables, which viewers pass over."""
    for name in ("RescaleSlope", "RescaleIntercept"):
        if name in dataset and dataset[name].value in (None, ""):
            del dataset[name]
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        whole = [item for item in dataset.get(name) or [] if item.get("LUTDescriptor") and item.get("LUTData")]
        if name in dataset:
            del dataset[name]
        if whole:
            setattr(dataset, name, whole)


def _make_palette_little_endian(dataset: "Dataset") -> None:
    """Swap the bytes of a big-endian file's palette, which pydicom, unlike other tables, reads as little-endian."""
    if dataset.file_meta.TransferSyntaxUID.is_little_endian:
        return
    for name in (f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")):
        if isinstance(content := dataset.get(name), bytes):
            dataset[name].value = np.frombuffer(content, ">u2").astype("<u2").tobytes()


def _stored_bits(dataset: "Dataset") -> Any:
    """Return the first frame's stored values: High Bit says where they lie, and other bits are none of them."""
    from pydicom.pixels import pixel_array

    stored, allocated = dataset.BitsStored, dataset.BitsAllocated
    above = int(dataset.get("HighBit", stored - 1)) + 1 - stored  # unused bits below the values, in old modalities
    if above <= 0 or stored + above > allocated or dataset.file_meta.TransferSyntaxUID.is_compressed:
        above = 0
    dataset.BitsStored = stored + above  # else pydicom takes the lower end
    pixels = pixel_array(dataset, index=0)
    dataset.BitsStored = stored
    if stored == allocated or allocated not in (8, 16) or pixels.dtype.kind not in "iu":
        return pixels
    shift = 8 * pixels.itemsize - stored - above  # away with what is above, such as an overlay in a compressed image
    return ((pixels << shift) >> shift) >> above


def _padded(dataset: "Dataset", pixels: Any) -> Any:
    """Return where pixels are padding, which some writers store as unsigned beside signed pixels, or as a range."""
    bounds = [
        np.array(int(dataset[name].value) & (256**pixels.itemsize - 1)).astype(f"u{pixels.itemsize}").view(pixels.dtype)
        for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")
        if dataset.get(name) is not None
    ]
    return (pixels >= min(bounds)) & (pixels <= max(bounds)) if bounds else np.zeros(pixels.shape, bool)


def _modality(dataset: "Dataset", stored: Any) -> Any:
    """Return what stored values mean, by a lookup table or a slope and an intercept."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        return _looked_up(dataset, "ModalityLUTSequence", stored, below_zero=bool(dataset.PixelRepresentation))[0]
    return apply_modality_lut(stored, dataset)


def _looked_up(dataset: "Dataset", sequence: str, values: Any, *, below_zero: bool) -> tuple[Any, int]:
    """Return what a lookup table gives for values, those beyond an end as the end does, and how many bits it uses.

    pydicom's own counts the entries of a table of 8 bits in 8 bits, so that their numbers wrap at 256. Entries of 8
    bits may be packed, two to a word.

    Source: DICOM PS3.3, C.11.1.1.1, C.11.2.1.1 and C.7.6.3.1.5.
    """
    item = dataset[sequence].value[0]
    entries, first, bits = item.LUTDescriptor
    entries, content = entries % 65_536 or 65_536, item.LUTData
    if first > 32_767 and below_zero:  # a negative number, which implicit VR can't say of unsigned pixels
        first -= 65_536
    if isinstance(content, bytes):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        packed = bits <= 8 and len(content) < 2 * entries
        table = np.frombuffer(content, np.uint8 if packed else f"{order}u2")
    else:
        table = np.ravel(np.asarray(content, np.int64))
    table = table[:entries].astype(np.int64)
    place = np.rint(values).astype(np.int64) - first
    return table[place.clip(0, len(table) - 1)], int(table.max()).bit_length()


def _brightness(dataset: "Dataset", stored: Any, pixels: Any) -> tuple[Any, list[str]]:
    """Brightness of each stored value of `pixels`, from 0 to 1 and beyond, and notes for the user."""
    from scipy.special import expit

    values = _modality(dataset, stored)
    if dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
        below_zero = bool(_modality(dataset, np.array([lowest], stored.dtype))[0] < 0)
        levels, used = _looked_up(dataset, "VOILUTSequence", values, below_zero=below_zero)
        if used > bits - 2:
            return levels / (2**bits - 1), []
        note = f"has a lookup table that says {bits} bits and holds {used}, in which it is shown"
        return levels / (2 ** max(used, 1) - 1), [note]
    known = dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    notes = [] if function in FUNCTIONS else [f"has the VOI LUT function {function!r}, shown as LINEAR"]
    function = function if function in FUNCTIONS else "LINEAR"
    width = float(np.ravel(dataset["WindowWidth"].value)[0]) if known else 0.0
    if width >= 1 or (width > 0 and function != "LINEAR"):  # C.11.2.1.2; others are no window, as in dcmtk
        centre = float(np.ravel(dataset["WindowCenter"].value)[0])
        if function == "LINEAR":
            centre, width = centre - 0.5, width - 1
        steps = (values - centre) / max(width, 1e-9)
        return expit(4 * steps) if function == "SIGMOID" else steps + 0.5, notes
    if dataset.BitsStored <= 8 and not dataset.PixelRepresentation:
        ends, notes = [0, 2**dataset.BitsStored - 1], []
    else:
        # Viewers differ here; most stretch what there is. Padding around the image is not part of it.
        held = pixels[~_padded(dataset, pixels)]
        ends = [held.min(initial=pixels.max()), held.max(initial=pixels.min())]
        what = f"a window of width {width:g}" if known else "no window"
        notes = [f"has {what}, so it is shown from its smallest to its largest value"]
    low, high = sorted(_modality(dataset, np.array(ends, pixels.dtype)).astype(float))
    return (values - low) / max(high - low, 1e-9), notes
