#!/usr/bin/env bash
# Library:  pydicom 3.0.2, DICOM images with a VOI LUT whose entries have 8 bits.
# Expected: a table of 4,096 entries of 8 bits, as for 12-bit films, is looked up by the stored value.
# Happens:  apply_voi makes the numbers of entries uint8 before it looks them up, so that they wrap at 256: value 256
#           is shown as value 0, and a smooth film comes out as noise. There is no error and no warning. The same table
#           said to have 16 bits is right.
# Seen:
#    8 bits: stored [0, 255, 256, 2048, 4095], brightness [0.0, 0.06, 0.0, 0.0, 0.06]
#   16 bits: stored [0, 255, 256, 2048, 4095], brightness [0.0, 0.06, 0.06, 0.5, 1.0]
# Matters:  a network is trained on noise, or learns which films came from the device that writes such tables.
# Guard:    tables are looked up by our own code:
#           `tests/data/test_dicom.py::test_a_table_of_8_bits_may_have_thousands_of_entries`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check pydicom==3.0.2 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_voi
from pydicom.uid import ExplicitVRLittleEndian

stored = np.array([0, 255, 256, 2048, 4095], np.uint16)
shown = {}
for bits in (8, 16):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, bits]
    table.LUTData = [round(entry / 4095 * (2**bits - 1)) for entry in range(4096)]
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film.BitsStored, film.BitsAllocated, film.PixelRepresentation = 12, 16, 0
    film.VOILUTSequence = [table]
    shown[bits] = [round(float(level) / (2**bits - 1), 2) for level in apply_voi(stored, film)]
    print(f"{bits:2} bits: stored {stored.tolist()}, brightness {shown[bits]}")

assert shown[16] == [0.0, 0.06, 0.06, 0.5, 1.0], "16 bits are no longer right"
assert shown[8] != shown[16] and shown[8][2] == shown[8][0], "8 bits no longer wrap"
END
