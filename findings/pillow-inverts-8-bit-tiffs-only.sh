#!/usr/bin/env bash
# Library:  Pillow 13.0.0, TIFF files with PhotometricInterpretation WhiteIsZero, made by tifffile 2026.3.3.
# Expected: the same film looks the same, whether it is stored with 8 or with 16 bits.
# Happens:  Pillow inverts WhiteIsZero at 8 bits, so that 0 is black as everywhere else, but not at 16 bits: there the
#           film comes out as its negative. convert("L") then clips 16 bits to 255 instead of scaling them.
# Seen:
#   8 bits  WhiteIsZero, stored [0, 64, 128, 192, 255]
#           Pillow, mode L: [255, 191, 127, 63, 0]
#           Pillow, convert('L'): [255, 191, 127, 63, 0]
#   16 bits WhiteIsZero, stored [0, 16448, 32896, 49344, 65535]
#           Pillow, mode I;16: [0, 16448, 32896, 49344, 65535]
#           Pillow, convert('L'): [0, 255, 255, 255, 255]
# Matters:  films may be stored with 0 as white, as DICOM's MONOCHROME1 is. If one source exports 8 bits and another 16,
#           the negative gives away the source of an image, and a model may learn that instead of the disease.
# Guard:    16-bit images are inverted by the tag, and scaled to 8 bits:
#           `tests/data/test_decoding.py::test_16_bit_colours_and_inverted_and_12_bit_greys`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  pillow==13.0.0 numpy==2.4.6 tifffile==2026.3.3

cd "$folder"
"$folder/venv/bin/python" - <<'EOF'
import numpy as np
import tifffile
from PIL import Image

ramp = np.array([[0, 64, 128, 192, 255]], np.uint8)  # the first pixel is stored as 0, which is white here
shown = {}
for name, pixels in (("8 bits", ramp), ("16 bits", ramp.astype(np.uint16) * 257)):
    tifffile.imwrite("film.tif", pixels, photometric="miniswhite")
    image = Image.open("film.tif")
    shown[name] = np.asarray(image)[0].tolist()
    print(f"{name:7} WhiteIsZero, stored {pixels[0].tolist()}")
    print(f"        Pillow, mode {image.mode}: {shown[name]}")
    print(f"        Pillow, convert('L'): {np.asarray(image.convert('L'))[0].tolist()}")

assert shown["8 bits"] == [255, 191, 127, 63, 0], "8 bits are no longer inverted"
assert shown["16 bits"] == [0, 16448, 32896, 49344, 65535], "16 bits are no longer left as they are"
EOF
