"""Data and runs in a storage: a real S3 server on this machine, and file:// for what needs none."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tuning import storage
from tuning.config import InputError
from tuning.decoding import decode
from tuning.images import content_hashes
from tuning.samples import load_samples


def write_images(folder, count=8):
    rng = np.random.default_rng(0)
    for label in ("infected", "normal"):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).save(folder / label / f"film {index}%20#?.png")
    return folder


def test_what_is_written_is_read_listed_and_deleted(bucket):
    uri = f"{bucket}/some/folder/a %20 b#?.bin"
    assert storage.stored([uri]) == [None]
    storage.write_bytes(uri, b"content")
    assert storage.read_bytes(uri) == storage.readable(uri).read() == b"content"
    [known] = storage.stored([uri])
    assert known.size == 7
    assert storage.files_below(f"{bucket}/some") == {"folder/a %20 b#?.bin": known}
    assert storage.files_below(f"{bucket}/other") == {}
    storage.delete(uri)
    storage.delete(uri)
    assert storage.stored([uri]) == [None]
    with pytest.raises(OSError, match="a %20 b"):
        storage.read_bytes(uri)


def test_a_folder_of_images_is_the_same_in_a_storage(bucket, tmp_path):
    folder = write_images(tmp_path / "films")
    for file in folder.rglob("*.png"):
        storage.write_bytes(f"{bucket}/films/{file.relative_to(folder)}", file.read_bytes())
    here, there = load_samples(str(folder)), load_samples(f"{bucket}/films/")
    pd.testing.assert_frame_equal(here.drop(columns="file"), there.drop(columns="file"))
    assert set(there["file"]) == {f"{bucket}/films/{path}" for path in here["path"]}
    known = tmp_path / "known"
    assert content_hashes(list(here["file"]), known) == content_hashes(list(there["file"]), known)
    for mine, other in zip(here["file"], there["file"], strict=True):
        pixels, facts = decode(other, 16)
        np.testing.assert_array_equal(pixels, decode(mine, 16)[0])
        assert facts == decode(mine, 16)[1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_in_a_storage_names_files_beside_it(suffix, bucket, tmp_path):
    folder = write_images(tmp_path / "films")
    paths = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    table = pd.DataFrame({"path": [f"./{path}" for path in paths], "label": [path.split("/")[0] for path in paths]})
    manifest = tmp_path / f"manifest{suffix}"
    table.to_csv(manifest, index=False) if suffix == ".csv" else table.to_parquet(manifest)
    storage.write_bytes(f"{bucket}/films/manifest{suffix}", manifest.read_bytes())
    with pytest.raises(InputError, match="16 image files are missing"):
        load_samples(f"{bucket}/films/manifest{suffix}")
    for path in paths:
        storage.write_bytes(f"{bucket}/films/{path}", (folder / path).read_bytes())
    assert list(load_samples(f"{bucket}/films/manifest{suffix}")["path"]) == paths


def test_a_manifest_here_may_name_files_in_a_storage(bucket, tmp_path):
    folder = write_images(tmp_path / "films", count=4)
    rows = []
    for file in sorted(folder.rglob("*.png")):
        uri = f"{bucket}/{file.parent.name}/{file.name}"
        storage.write_bytes(uri, file.read_bytes())
        rows.append({"path": uri, "label": file.parent.name})
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    assert list(load_samples(str(tmp_path / "manifest.csv"))["file"]) == [row["path"] for row in rows]


def test_what_can_not_be_reached_is_told(bucket, tmp_path):
    with pytest.raises(InputError, match="nothing is there"):
        load_samples(f"{bucket}/nowhere")
    with pytest.raises(InputError, match="nothing is there"):
        load_samples(bucket.replace("bucket-", "no-bucket-"))
    with pytest.raises(InputError, match=r"nosuch://x: no storage of this kind .* s3://"):
        load_samples("nosuch://x/films")
    with pytest.raises(InputError, match="password in a URI") as told:
        load_samples("s3://key:hidden@bucket/films")
    assert "hidden" not in str(told.value)
