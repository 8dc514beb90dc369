"""From files to pixels: samples and splits, decoding, DICOM, the decoded images."""
