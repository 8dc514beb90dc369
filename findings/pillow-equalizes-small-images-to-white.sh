#!/usr/bin/env bash
# Library:  Pillow 13.0.0, ImageOps.equalize.
# Expected: histogram equalisation spreads the grey levels evenly over 0 to 255, whatever the size of the image: about
#           1% of the pixels come out white if 100 levels are equally frequent.
# Happens:  the number of pixels per level of the result is a whole number, rounded down: a 32 x 32 image has 3 instead of
#           4, so that the brightest quarter is cut off at 255. The rest is the smaller, the larger the image: 7% at 64 x 64.
# Seen:
#   white of  32 x  32 pixels: 25.4%
#   white of  48 x  48 pixels: 11.1%
#   white of  64 x  64 pixels:  6.7%
#   white of 256 x 256 pixels:  1.0%
# Matters:  AutoAugment, RandAugment and TrivialAugment equalise with it, or with code that gives the same, and are used on
#           small images: what is bright in them, such as bone in a radiograph, becomes one white area.
# Guard:    `trivial` equalises by ranks: `tests/training/test_augment.py::test_small_images_are_equalized_evenly`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check pillow==13.0.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'EOF'
import numpy as np
from PIL import Image, ImageOps

white = {}
for side in (32, 48, 64, 256):
    levels = np.random.default_rng(0).integers(50, 150, (side, side)).astype(np.uint8)
    white[side] = (np.asarray(ImageOps.equalize(Image.fromarray(levels))) == 255).mean()
    print(f"white of {side:3} x {side:3} pixels: {white[side]:5.1%}")
assert white[256] < 0.02
assert white[32] > 0.2, "small images are equalised evenly now"
EOF
