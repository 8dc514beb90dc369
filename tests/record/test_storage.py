"""Data and runs in a storage: a real S3 server on this machine, and file:// for what needs none."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tuning.data.decoding import decode
from tuning.data.images import content_hashes
from tuning.data.samples import load_samples
from tuning.record import storage
from tuning.settings.config import InputError


def write_images(folder, count=8):
    rng = np.random.default_rng(0)
    for label in ("infected", "normal"):
        (folder / label).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).save(folder / label / f"film {index}%20#?.png")
    return folder


def test_a_file_is_written_read_listed_and_deleted(bucket):
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


def at(places):
    """Return a function that asks each node, as Ray does, and gives it its own location for the driver's."""

    def on_each(check):
        reasons = {}
        for node, (mine, theirs) in places.items():
            [meeting] = check.args
            reasons[node] = check.func(meeting.replace(mine, theirs), node)
        return {node: why for node, why in reasons.items() if why is not None}

    return on_each


def test_nodes_with_another_location_of_the_same_name_are_found(bucket, tmp_path):
    (tmp_path / "file").touch()
    away, wrong = f"file://{tmp_path}/local", f"file://{tmp_path}/file"
    places = {"a": (bucket, bucket), "b": (bucket, away), "c": (bucket, wrong), "d": (bucket, "nosuch://x")}
    found = storage.isolated_nodes(f"{bucket}/runs", places, at(places))
    assert sorted(found) == ["b", "c", "d"]
    assert "the same name, but isn't shared" in found["b"] and "unsupported storage" in found["d"]
    assert not storage.files_below(bucket)
    with pytest.raises(OSError, match="file"):
        storage.isolated_nodes(wrong, places, at(places))


def test_a_node_whose_files_are_not_seen_is_found(bucket):
    def on_each(check):  # what it writes is lost
        return {}

    assert storage.isolated_nodes(bucket, ["a"], on_each) == {"a": "the driver doesn't see what it writes there"}


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_many_images_take_few_requests_beside_their_reading(bucket, tmp_path, requests, monkeypatch):
    monkeypatch.setattr(storage, "LISTED", 5)
    folder = write_images(tmp_path / "films")
    for file in folder.rglob("*.png"):
        storage.write_bytes(f"{bucket}/films/{file.relative_to(folder)}", file.read_bytes())
    before = requests()
    files = list(load_samples(f"{bucket}/films")["file"])
    listed = requests()
    assert len(files) == 16 and len(listed) - len(before) < 8
    content_hashes(files, tmp_path / "known")
    read = requests()
    assert len(read) - len(listed) < 2 * 16 + 8  # each is asked for its size and read
    content_hashes(files, tmp_path / "known")
    assert len(requests()) - len(read) < 8


def test_files_are_found_alone_and_among_many(bucket):
    few, many = [f"{bucket}/few/{index}" for index in range(3)], [f"{bucket}/many/{index}" for index in range(25)]
    for uri in (*few, *many):
        storage.write_bytes(uri, b"x" * len(uri))
    asked = [few[0], many[3], f"{bucket}/many/none", f"{bucket}/few/none", *many, many[3]]
    known = [None if found is None else found.size for found in storage.stored(asked)]
    assert known == [None if uri.endswith("none") else len(uri) for uri in asked]


def test_a_location_that_can_not_be_reached_is_named(bucket, tmp_path):
    with pytest.raises(InputError, match="nothing is there"):
        load_samples(f"{bucket}/nowhere")
    with pytest.raises(InputError, match="nothing is there"):
        load_samples(bucket.replace("bucket-", "no-bucket-"))
    with pytest.raises(InputError, match=r"nosuch://x: unsupported storage .* s3://"):
        load_samples("nosuch://x/films")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hidden@bucket/films",
        "s3://hidden@bucket/films",
        "gs://anonymous:hidden@bucket/films",
        "fsspec+sftp://me:hidden@host/films",
        "s3://bucket/films?X-Amz-Signature=hidden",
        "fsspec+abfs://films?sig=hidden",
        "s3://bucket?secret_key=hidden",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_shown(uri):
    for read in (load_samples, storage.read_bytes, storage.files_below):
        with pytest.raises(InputError, match="password or key in a URI") as refused:
            read(uri)
        assert "hidden" not in str(refused.value)
