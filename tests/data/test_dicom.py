"""DICOM images are seen as in a viewer: windows, lookup tables, inverted greys, colours; or refused with a reason."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    BasicTextSRStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from tuning.data.decoding import decode
from tuning.settings.config import InputError

RAMP = np.add.outer(np.arange(32) * 64, np.arange(32) * 64).astype(np.uint16)  # 0 to 3,968, of 12 bits
NO_WINDOW = "has no window, so it is shown from its smallest to its largest value"


def write(
    file: Path,
    pixels: np.ndarray,
    *,
    photometric: str = "MONOCHROME2",
    bits: int = 12,
    syntax: str = ExplicitVRLittleEndian,
    compressed: bytes | None = None,
    **elements,
) -> str:
    """A DICOM file by pydicom's own writer."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    frames = elements.get("NumberOfFrames", 1)
    shape = pixels.shape if frames == 1 else pixels.shape[1:]
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = 1 if len(shape) == 2 else 3
    if len(shape) == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * pixels.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = (pixels.byteswap() if syntax == ExplicitVRBigEndian else pixels).tobytes()
    if compressed is not None:
        dataset.PixelData = encapsulate([compressed])
    dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 and compressed is None else "OB"
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    dataset.save_as(file, enforce_file_format=True)
    return str(file)


def shown(file: str, side: int = 32) -> np.ndarray:
    return decode(file, side)[0].astype(int)


def lookup_table(levels: np.ndarray, bits: int) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(levels), 0, bits]
    item.LUTData = levels.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return [item]


def window(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, word for word, to 0 .. 255."""
    linear = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    below, above = values <= centre - 0.5 - (width - 1) / 2, values > centre - 0.5 + (width - 1) / 2
    return np.where(below, 0, np.where(above, 255, linear))


def test_the_window_is_applied_and_monochrome1_is_the_inverse(tmp_path):
    options = {"WindowCenter": 2000, "WindowWidth": 1000}
    pixels, facts = decode(write(tmp_path / "2.dcm", RAMP, **options), 32)
    assert abs(pixels - window(RAMP.astype(float), 2000, 1000)).max() <= 0.5
    assert facts[:4] == (32, 32, "I;16", "DICOM") and facts.notes is None
    inverse = shown(write(tmp_path / "1.dcm", RAMP, photometric="MONOCHROME1", **options))
    assert abs(inverse - (255 - pixels.astype(int))).max() <= 1
    several = shown(write(tmp_path / "0.dcm", RAMP, WindowCenter=[2000, 100], WindowWidth=[1000, 50]))
    assert (several == pixels).all()


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_other_ways_to_store_the_pixels_are_seen_alike(tmp_path, syntax):
    options = {"WindowCenter": 2000, "WindowWidth": 4000}
    plain = shown(write(tmp_path / "plain.dcm", RAMP, **options))
    assert (shown(write(tmp_path / "other.dcm", RAMP, syntax=syntax, **options)) == plain).all()


def test_windows_are_in_rescaled_units_and_pixels_may_be_signed(tmp_path):
    signed = RAMP.astype(np.int16) - 2000
    pixels = shown(
        write(
            tmp_path / "ct.dcm",
            signed,
            bits=16,
            RescaleSlope=2,
            RescaleIntercept=-24,
            WindowCenter=-200,
            WindowWidth=1500,
        )
    )
    assert abs(pixels - window(signed * 2.0 - 24, -200, 1500)).max() <= 0.5


def test_other_functions_of_the_window(tmp_path):
    exact = write(tmp_path / "e.dcm", RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    assert abs(shown(exact) - ((RAMP.astype(float) - 2000) / 1000 + 0.5).clip(0, 1) * 255).max() <= 0.5
    sigmoid = write(tmp_path / "s.dcm", RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    assert abs(shown(sigmoid) - 255 / (1 + np.exp(-4 * (RAMP - 2000.0) / 1000))).max() <= 0.5
    step = shown(write(tmp_path / "w.dcm", RAMP, WindowCenter=2000, WindowWidth=1))
    assert set(np.unique(step)) == {0, 255} and ((step == 255) == (RAMP > 1999)).all()


def test_lookup_tables_come_before_windows(tmp_path):
    curve = np.round(4095 * np.linspace(0, 1, 4096) ** 0.5)
    options = {"WindowCenter": 5, "WindowWidth": 5, "VOILUTSequence": lookup_table(curve, 12)}
    assert abs(shown(write(tmp_path / "voi.dcm", RAMP, **options)) - curve[RAMP] / 4095 * 255).max() <= 0.5
    halved = np.arange(4096) // 2
    modality = lookup_table(halved, 16)
    modality[0].ModalityLUTType = "US"
    file = write(tmp_path / "m.dcm", RAMP, ModalityLUTSequence=modality, WindowCenter=1000, WindowWidth=2000)
    assert abs(shown(file) - window(halved[RAMP].astype(float), 1000, 2000)).max() <= 0.5


def test_without_a_window_the_whole_range_is_shown(tmp_path):
    pixels, facts = decode(write(tmp_path / "whole.dcm", RAMP // 2 + 500), 32)
    assert abs(pixels - RAMP / RAMP.max() * 255).max() <= 1 and facts.notes == NO_WINDOW
    padded = np.where(np.arange(32) < 5, 0, RAMP // 2 + 500).astype(np.uint16)
    pixels = shown(write(tmp_path / "padded.dcm", padded, PixelPaddingValue=0))
    assert (pixels[:, :5] == 0).all()
    rest = RAMP[:, 5:].astype(float) // 2
    assert abs(pixels[:, 5:] - (rest - rest.min()) / (rest.max() - rest.min()) * 255).max() <= 1
    even = decode(write(tmp_path / "even.dcm", np.full_like(RAMP, 7)), 32)
    assert (even[0] == 0).all()
    wide = np.linspace(0, 65535, 1024).round().reshape(32, 32)
    for number, all16 in enumerate((wide.astype(np.uint16), (wide - 32768).astype(np.int16))):
        assert abs(shown(write(tmp_path / f"{number}.dcm", all16, bits=16)) - wide / 257).max() <= 1
    byte = (RAMP >> 5).astype(np.uint8)
    pixels, facts = decode(write(tmp_path / "byte.dcm", byte, bits=8), 32)
    assert (pixels == byte).all() and facts.mode == "L" and facts.notes is None


def test_colours(tmp_path):
    byte = (RAMP >> 4).astype(np.uint8)
    colours = np.dstack([byte, byte[::-1], byte[:, ::-1]])
    pixels, facts = decode(write(tmp_path / "rgb.dcm", colours, photometric="RGB", bits=8), 32)
    assert (pixels == colours).all() and facts.mode == "RGB"
    levels = {"Red": np.arange(256), "Green": np.arange(256)[::-1], "Blue": np.full(256, 9)}
    tables = {
        f"{name}PaletteColorLookupTableData": (each.astype("<u2") * 257).tobytes() for name, each in levels.items()
    }
    tables |= {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in levels}
    pixels, facts = decode(write(tmp_path / "p.dcm", byte, photometric="PALETTE COLOR", bits=8, **tables), 32)
    assert (pixels == np.dstack([byte, 255 - byte, np.full_like(byte, 9)])).all() and facts.mode == "P"
    assert decode(str(tmp_path / "rgb.dcm"), 32, drop_colour=True)[0].ndim == 2


def test_jpegs_inside(tmp_path):
    byte = (RAMP >> 4).astype(np.uint8)
    for pixels, photometric in ((byte, "MONOCHROME2"), (np.dstack([byte, byte[::-1], byte[:, ::-1]]), "YBR_FULL_422")):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        options = {"photometric": photometric, "bits": 8, "syntax": JPEGBaseline8Bit, "compressed": stream.getvalue()}
        assert abs(shown(write(tmp_path / "jpeg.dcm", pixels, **options)) - pixels).mean() < 6


def test_of_several_frames_the_first_is_used_and_a_wrong_suffix_is_noted(tmp_path):
    frames = np.stack([RAMP, RAMP[::-1]])
    file = write(tmp_path / "cine.png", frames, NumberOfFrames=2, WindowCenter=2000, WindowWidth=4000)
    assert (shown(file) == shown(write(tmp_path / "one.dcm", RAMP, WindowCenter=2000, WindowWidth=4000))).all()
    notes = decode(file, 32)[1].notes
    assert notes == "is a DICOM file named .png; has several frames, only the first is used"


def test_what_cannot_be_shown_is_reported(tmp_path, monkeypatch):
    def reason(file: str) -> str:
        with pytest.raises(InputError) as caught:
            decode(file, 32)
        return str(caught.value)

    whole = write(tmp_path / "whole.dcm", RAMP)
    (tmp_path / "cut.dcm").write_bytes(Path(whole).read_bytes()[:-500])
    assert "number of bytes of pixel data is less than expected" in reason(str(tmp_path / "cut.dcm"))
    (tmp_path / "head.dcm").write_bytes(Path(whole).read_bytes()[:200])
    assert reason(str(tmp_path / "head.dcm"))
    assert "60000 x 60000 pixels, over the limit" in reason(write(tmp_path / "b.dcm", RAMP, Rows=60000, Columns=60000))
    assert "more than 16 bits" in reason(write(tmp_path / "deep.dcm", RAMP.astype(np.uint32), bits=32))

    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.SOPClassUID, report.SOPInstanceUID = BasicTextSRStorage, generate_uid()
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    assert "without an image (Basic Text SR Storage)" in reason(str(tmp_path / "report.dcm"))

    if not get_decoder(JPEGLosslessSV1).is_available:
        message = reason(write(tmp_path / "lossless.dcm", RAMP, syntax=JPEGLosslessSV1, compressed=b"\xff\xd8"))
        assert "compressed as JPEG Lossless" in message and "pip install python-gdcm" in message
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "is a DICOM file, which needs pydicom; pip install pydicom python-gdcm" in reason(whole)


def item(**elements) -> Dataset:
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


VOI = {"FrameVOILUTSequence": [item(WindowCenter=40, WindowWidth=400)]}
RESCALE = {"PixelValueTransformationSequence": [item(RescaleIntercept=-1024, RescaleSlope=1, RescaleType="HU")]}


@pytest.mark.parametrize(
    "groups",
    [
        {"SharedFunctionalGroupsSequence": [item(**VOI, **RESCALE)]},
        {"SharedFunctionalGroupsSequence": [item(**RESCALE)], "PerFrameFunctionalGroupsSequence": [item(**VOI)]},
        {
            "SharedFunctionalGroupsSequence": [
                item(FrameVOILUTSequence=[item(WindowCenter=0, WindowWidth=9)], **RESCALE)
            ],
            "PerFrameFunctionalGroupsSequence": [item(**VOI)],
        },
    ],
)
def test_an_enhanced_image_has_window_and_rescale_in_functional_groups(tmp_path, groups):
    file = write(tmp_path / "x.dcm", RAMP, NumberOfFrames=1, **groups)
    assert abs(shown(file) - window(RAMP.astype(float) - 1024, 40, 400)).max() <= 0.5


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_bits_above_the_stored_ones_are_no_brightness(tmp_path, syntax):
    """Such as an overlay that was left there."""
    dirty, stream = (RAMP | 0xA000).astype(np.uint16), io.BytesIO()
    Image.fromarray(dirty).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    compressed = stream.getvalue() if syntax == JPEG2000Lossless else None
    options = {"WindowCenter": 2000, "WindowWidth": 4000}
    file = write(tmp_path / "x.dcm", dirty, syntax=syntax, compressed=compressed, **options)
    assert abs(shown(file) - window(RAMP.astype(float), 2000, 4000)).max() <= 0.5


def test_signed_values_keep_their_sign_below_other_bits(tmp_path):
    signed = RAMP.astype(np.int16) - 2048
    dirty = (signed & 0x0FFF).astype(np.int16)  # 12 bits, with nothing of the sign above
    file = write(tmp_path / "x.dcm", dirty, WindowCenter=0, WindowWidth=4000)
    assert abs(shown(file) - window(signed.astype(float), 0, 4000)).max() <= 0.5


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_values_may_lie_in_the_upper_bits(tmp_path, dtype):
    values = RAMP.astype(dtype) - (2048 if dtype is np.int16 else 0)
    file = write(tmp_path / "x.dcm", (values << 4).astype(dtype), HighBit=15, WindowCenter=0, WindowWidth=4000)
    assert abs(shown(file) - window(values.astype(float), 0, 4000)).max() <= 0.5


@pytest.mark.parametrize(("function", "width"), [("LINEAR", 0), ("LINEAR", 0.5), ("LINEAR_EXACT", 0), ("LINEAR", -3)])
def test_a_window_without_width_is_none(tmp_path, function, width):
    file = write(tmp_path / "x.dcm", RAMP, WindowCenter=0, WindowWidth=width, VOILUTFunction=function)
    pixels, facts = decode(file, 32)
    assert (pixels == np.rint(RAMP / RAMP.max() * 255)).all()
    assert facts.notes == NO_WINDOW.replace("no window", f"a window of width {width:g}")


def test_a_lookup_table_that_says_too_many_bits_is_shown_in_those_it_uses(tmp_path):
    curve = np.round(4095 * np.linspace(0, 1, 4096) ** 0.5)
    pixels, facts = decode(write(tmp_path / "x.dcm", RAMP, VOILUTSequence=lookup_table(curve, 16)), 32)
    assert abs(pixels - curve[RAMP] / 4095 * 255).max() <= 0.5
    assert facts.notes == "has a lookup table that says 16 bits and holds 12, in which it is shown"


@pytest.mark.parametrize(("kind", "value"), [("SS", -2000), ("US", 63_536)])
def test_padding_is_not_stretched_whichever_sign_it_is_stored_with(tmp_path, kind, value):
    signed = RAMP.astype(np.int16) - 1024
    signed[:, :5] = -2000
    dataset = dcmread(write(tmp_path / "x.dcm", signed, bits=16))
    dataset.add_new("PixelPaddingValue", kind, value)
    dataset.save_as(tmp_path / "x.dcm")
    rest = signed[:, 5:].astype(float)
    wanted = (rest - rest.min()) / (rest.max() - rest.min()) * 255
    assert abs(shown(str(tmp_path / "x.dcm"))[:, 5:] - wanted).max() <= 0.5


def test_padding_may_be_a_range(tmp_path):
    values = (RAMP // 4 + 2000).astype(np.uint16)
    values[:, :3], values[:, 3:6] = 0, 20
    file = write(tmp_path / "x.dcm", values, PixelPaddingValue=0, PixelPaddingRangeLimit=20)
    rest = values[:, 6:].astype(float)
    assert abs(shown(file)[:, 6:] - (rest - rest.min()) / (rest.max() - rest.min()) * 255).max() <= 0.5


def test_a_polarity_that_contradicts_itself_is_noted(tmp_path):
    options = {"WindowCenter": 2000, "WindowWidth": 4000}
    plain = shown(write(tmp_path / "x.dcm", RAMP, PresentationLUTShape="IDENTITY", **options))
    pixels, facts = decode(write(tmp_path / "y.dcm", RAMP, PresentationLUTShape="INVERSE", **options), 32)
    assert (pixels == plain).all() and "has an inverse presentation LUT beside MONOCHROME2" in facts.notes


def test_tables_of_a_big_endian_file(tmp_path):
    byte, tables = (RAMP >> 4).astype(np.uint8), {}
    levels = {"Red": np.arange(256), "Green": np.arange(256)[::-1], "Blue": np.full(256, 9)}
    for name, values in levels.items():
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = (values * 256).astype(">u2").tobytes()
    options = {"photometric": "PALETTE COLOR", "bits": 8, "syntax": ExplicitVRBigEndian}
    assert (
        shown(write(tmp_path / "p.dcm", byte, **options, **tables)) == np.dstack([byte, 255 - byte, 9 + 0 * byte])
    ).all()
    curve = np.round(65_535 * np.linspace(0, 1, 4096) ** 0.5)
    voi = lookup_table(curve, 16)
    voi[0].LUTData = curve.astype(">u2").tobytes()
    file = write(tmp_path / "v.dcm", RAMP, syntax=ExplicitVRBigEndian, VOILUTSequence=voi)
    assert abs(shown(file) - curve[RAMP] / 65_535 * 255).max() <= 0.5


@pytest.mark.parametrize(
    ("elements", "wanted"),
    [
        ({"RescaleSlope": None, "RescaleIntercept": None}, RAMP),
        ({"VOILUTSequence": [item(LUTExplanation="Normal")]}, RAMP),
        ({"ModalityLUTSequence": lookup_table(np.arange(4096) // 2, 12)}, RAMP // 2),
    ],
)
def test_what_is_empty_is_passed_over(tmp_path, elements, wanted):
    file = write(tmp_path / "x.dcm", RAMP, WindowCenter=1000, WindowWidth=2000, **elements)
    assert abs(shown(file) - window(wanted.astype(float), 1000, 2000).clip(0, 255)).max() <= 0.5


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("without", ["transfer syntax", "header"])
def test_a_file_may_lack_its_transfer_syntax_or_its_header(tmp_path, syntax, without):
    file = Path(write(tmp_path / "x.dcm", RAMP, syntax=syntax, WindowCenter=2000, WindowWidth=4000))
    whole = file.read_bytes()
    place = whole.index(b"\x02\x00\x00\x00UL") + 8
    length = int.from_bytes(whole[place : place + 4], "little")
    at = whole.index(b"\x02\x00\x10\x00UI")
    size = 8 + int.from_bytes(whole[at + 6 : at + 8], "little")
    shorter = whole[:place] + (length - size).to_bytes(4, "little") + whole[place + 4 : at] + whole[at + size :]
    file.write_bytes(whole[place + 4 + length :] if without == "header" else shorter)
    assert abs(shown(str(file)) - window(RAMP.astype(float), 2000, 4000)).max() <= 0.5


def test_the_cure_of_a_compression_names_what_decodes_it(tmp_path):
    with pytest.raises(InputError, match="High-Throughput") as caught:
        decode(write(tmp_path / "x.dcm", RAMP, syntax=HTJ2KLossless, compressed=bytes(64)), 32)
    assert "pylibjpeg" in str(caught.value) and "python-gdcm" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_a_table_of_8_bits_may_have_thousands_of_entries(tmp_path, sequence, packed):
    """pydicom's own counts them in 8 bits: a film comes out as noise."""
    levels = (np.arange(4096) / 4095 * 255).round()
    (item,) = lookup_table(levels, 8)
    item.LUTData = levels.astype("u1" if packed else "<u2").tobytes()
    item.ModalityLUTType = "US"
    whole = {"WindowCenter": 128, "WindowWidth": 256} if sequence == "ModalityLUTSequence" else {}
    film = shown(write(tmp_path / "a.dcm", RAMP, **{sequence: [item]}, **whole))
    assert np.abs(film - levels[RAMP]).max() <= 1


def test_values_beyond_a_table_are_shown_as_its_last_entry(tmp_path):
    table = lookup_table(np.arange(4096) * 16, 16)
    film = shown(write(tmp_path / "a.dcm", RAMP, VOILUTSequence=table, RescaleSlope=30, RescaleIntercept=0))
    assert np.abs(film - (RAMP * 30.0).clip(0, 4095) / 4095 * 255).max() <= 1


@pytest.mark.parametrize("elements", [{"PixelSpacing": [0.4, 0.2]}, {"PixelAspectRatio": [2, 1]}])
def test_pixels_that_are_not_square_are_shown_in_proportion(tmp_path, elements):
    circle = (np.hypot(*np.meshgrid(np.arange(64) - 31.5, 2 * (np.arange(32) - 15.5))) < 24).astype(np.uint16) * 4000
    file = write(tmp_path / "a.dcm", circle, WindowCenter=2048, WindowWidth=4096, **elements)
    for fit in ("squash", "crop", "letterbox"):
        film = decode(file, 64, fit=fit)[0] > 127
        assert abs(film.any(axis=0).sum() - film.any(axis=1).sum()) <= 2, fit
    plain = write(tmp_path / "b.dcm", circle, WindowCenter=2048, WindowWidth=4096, PixelSpacing=[0.0, 0.2])
    film = decode(plain, 64, fit="letterbox")[0] > 127  # no sense in it
    assert film.any(axis=0).sum() > 1.5 * film.any(axis=1).sum()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda dataset: delattr(dataset, "Rows"), "is a DICOM file without Rows, so its pixels can't be read"),
        (lambda dataset: delattr(dataset, "BitsStored"), "is a DICOM file without BitsStored"),
        (lambda dataset: setattr(dataset, "PixelData", b""), "whose pixels are empty"),
    ],
)
def test_what_a_film_lacks_is_named(tmp_path, change, reason):
    file = write(tmp_path / "a.dcm", RAMP)
    dataset = dcmread(file)
    change(dataset)
    dataset.save_as(file)
    with pytest.raises(InputError, match=reason):
        decode(file, 32)


def test_a_file_may_lack_the_preamble_before_its_header(tmp_path):
    file = write(tmp_path / "a.dcm", RAMP, WindowCenter=2048, WindowWidth=4096)
    whole = shown(file)
    Path(file).write_bytes(Path(file).read_bytes()[132:])
    assert (shown(file) == whole).all()


@pytest.mark.parametrize("function", ["SIGMOID", "Sigmoid", "linear", "FOO"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")  # lower case is what is tried
def test_a_functions_case_does_not_matter_and_an_unknown_one_is_noted(tmp_path, function):
    window_of = {"WindowCenter": 2048, "WindowWidth": 1000}
    known = {"sigmoid": "SIGMOID"}.get(function.lower(), "LINEAR")
    wanted, _ = decode(write(tmp_path / "wanted.dcm", RAMP, **window_of, VOILUTFunction=known), 32)
    found, facts = decode(write(tmp_path / "found.dcm", RAMP, **window_of, VOILUTFunction=function), 32)
    assert np.array_equal(found, wanted)
    assert ("VOI LUT function 'FOO', shown as LINEAR" in str(facts.notes)) == (function == "FOO")


def test_a_table_may_begin_below_zero_in_implicit_vr(tmp_path):
    pictures = []
    for syntax, kind, first in ((ExplicitVRLittleEndian, "SS", -1024), (ImplicitVRLittleEndian, "US", 65536 - 1024)):
        table = Dataset()
        table.add_new("LUTDescriptor", kind, [2048, first, 12])
        table.add_new("LUTData", "US", [2 * number for number in range(2048)])
        rescaled = {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU", "VOILUTSequence": [table]}
        pictures.append(shown(write(tmp_path / f"{kind}.dcm", RAMP, syntax=syntax, **rescaled)))
    explicit, implicit = pictures
    assert np.array_equal(implicit, explicit) and explicit.max() > 250 and len(np.unique(explicit)) > 30
    tight = shown(write(tmp_path / "tight.dcm", RAMP[20:, 20:] + 1024, syntax=ImplicitVRLittleEndian, **rescaled))
    assert tight.max() > 200  # no value below zero, but the table is the same


def test_floating_point_pixels_are_named(tmp_path):
    file = write(tmp_path / "x.dcm", RAMP)
    dataset = dcmread(file)
    dataset.FloatPixelData = RAMP.astype(np.float32).tobytes()
    dataset.BitsAllocated = 32
    del dataset.PixelData
    dataset.save_as(file)
    with pytest.raises(InputError, match="floating-point pixels, which isn't supported"):
        decode(file, 32)


def test_jpeg_of_12_bits_names_what_decodes_it(tmp_path):
    file = write(tmp_path / "x.dcm", RAMP, syntax=JPEGExtended12Bit, compressed=bytes(64))
    with pytest.raises(InputError, match="JPEG Extended") as caught:
        decode(file, 32)
    assert "pip install pylibjpeg pylibjpeg-libjpeg" in str(caught.value) and "gdcm" not in str(caught.value)
