"""Folders of class folders become one table; what is left out of them is said, and faults are reported all at once."""

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from test_samples import faults, touch

from tuning.data.samples import load_samples
from tuning.settings.config import InputError


def test_class_folders_are_listed_at_any_depth_without_hidden_and_other_files(tmp_path):
    touch(tmp_path, *(f"{name}/{number}.png" for name in ("ill", "well") for number in range(8)))
    touch(tmp_path, "ill/site/deep/x.JPG", "well/y.jpeg", "ill/notes.txt", "ill/.z.png", ".git/a.png", "README.md")
    samples = load_samples(str(tmp_path))
    assert list(samples.columns) == ["path", "file", "label", "split", "group"]
    assert len(samples) == 18 and list(samples.index) == list(range(18))
    assert list(samples["path"]) == sorted(samples["path"])
    assert {"ill/site/deep/x.JPG", "well/y.jpeg"} <= set(samples["path"])
    assert all(os.path.isabs(file) and Path(file).is_file() for file in samples["file"])
    assert all(group is None for group in samples["group"])
    assert sorted(samples["label"].unique()) == ["ill", "well"]
    assert set(samples["split"]) == {"train", "val", "test"}


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "testing"), ("TRAIN", "Validation")])
def test_split_folders_are_kept_under_any_of_their_names(tmp_path, names):
    touch(tmp_path, *(f"{name}/{label}/{number}.png" for name in names for label in "ab" for number in range(3)))
    touch(tmp_path, "sketches/a/1.png")
    samples = load_samples(str(tmp_path))
    words = dict(zip(names, ("train", "val", "test"), strict=False))
    assert len(samples) == 6 * len(names)
    assert all(row.split == words[row.path.split("/")[0]] for row in samples.itertuples())


def test_train_is_split_at_random_if_only_train_and_test_exist(tmp_path):
    touch(tmp_path, *(f"train/{label}/{number}.png" for label in "ab" for number in range(10)))
    touch(tmp_path, *(f"test/{label}/{number}.png" for label in "ab" for number in range(4)))
    samples = load_samples(str(tmp_path))
    counts = Counter(zip(samples["split"], samples["label"], strict=True))
    assert counts == {(split, label): n for split, n in (("train", 8), ("val", 2), ("test", 4)) for label in "ab"}
    assert all(row.path.startswith("test/") == (row.split == "test") for row in samples.itertuples())
    assert list(samples["path"]) == sorted(samples["path"])


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, *(f"{label}/{number}.png" for label in "ab" for number in range(3)))
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert Counter(load_samples(str(tmp_path))["label"]) == {"a": 3, "b": 3, "c": 3}


def test_images_have_any_suffix_and_what_is_left_out_is_said(tmp_path):
    touch(tmp_path, *(f"{name}/images/{number}.jfif" for name in ("ill", "well") for number in range(8)))
    touch(tmp_path, *(f"ill/images/{number}.IMA" for number in range(3)), "well/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg")
    touch(tmp_path, *(f"{name}/masks/{number}.png" for name in ("ill", "well") for number in range(8)))
    touch(tmp_path, "ill/x_mask.png", "ill/notes.txt", "well/y")
    Image.new("L", (4, 4)).save(tmp_path / "well" / "IM0001", "PNG")
    samples = load_samples(str(tmp_path))
    assert Counter(samples["label"]) == {"ill": 11, "well": 9}
    assert samples.attrs["remarks"] == [
        "left out: 17 files (masks), such as 0.png",
        "left out: 2 files (no images), such as notes.txt",
        "left out: 1 file (thumbnails), such as SYNOPHOTO_THUMB_M.jpg",
    ]


def test_dev_beside_train_is_validation_and_other_folders_are_said(tmp_path):
    parts = ("train", "dev", "test", "extra")
    touch(tmp_path, *(f"{part}/{name}/{number}.png" for part in parts for name in "ab" for number in range(3)))
    samples = load_samples(str(tmp_path))
    assert Counter(samples["split"]) == {"train": 6, "val": 6, "test": 6} and not samples.attrs["random_splits"]
    assert samples.attrs["remarks"] == ["left out: 1 folder beside dev, test, train: extra"]
    Image.new("L", (4, 4)).save(tmp_path / "IM0001", "PNG")
    touch(tmp_path, "DICOMDIR", "list.csv")
    beside = "left out: 1 file (images beside the folders), such as IM0001"
    assert load_samples(str(tmp_path)).attrs["remarks"][1:] == [beside]
    touch(tmp_path / "classes", *(f"{name}/{number}.png" for name in ("dev", "ops") for number in range(8)))
    assert set(load_samples(str(tmp_path / "classes"))["label"]) == {"dev", "ops"}


def test_a_dicomdir_is_no_image_wherever_it_lies(tmp_path):
    touch(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(8)))
    for place in ("a", "b/study"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    samples = load_samples(str(tmp_path))
    assert len(samples) == 16 and samples.attrs["remarks"] == ["left out: 2 files (no images), such as DICOMDIR"]


@pytest.mark.parametrize(
    "mask",
    ["lung masks/0.png", "infection_masks/0.png", "Segmentations/0.png", "0 (1)_mask_1.png", "0_segmentation.png"],
)
def test_masks_by_other_names(tmp_path, mask):
    touch(tmp_path, *(f"{name}/{number}.png" for name in ("masked", "bare") for number in range(8)), f"bare/{mask}")
    touch(tmp_path, "masked/unmasked.png", "masked/damask/0.png")
    samples = load_samples(str(tmp_path))
    assert len(samples) == 18 and "left out: 1 file (masks)" in samples.attrs["remarks"][0]


def test_a_class_of_masks_is_one(tmp_path):
    touch(tmp_path, *(f"{name}/{number}_mask.png" for name in "ab" for number in range(8)))
    assert len(load_samples(str(tmp_path))) == 16


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([], ["no class folders"]),
        (["1.png", "2.JPG"], ["2 images are outside the class folders (1.png, 2.JPG)", "folder of its class"]),
        (["a/1.png", "b/1.png", "1.png"], ["1 image is outside the class folders"]),
        (["a/1.png", "b/1.nii", "b/2.txt", "c/1.png"], ["/b: no images", "2 files with other suffixes: .nii, .txt"]),
        (["a/1.png", "b/.1.png", "c/1.png"], ["/b: no images in this class folder (no files)"]),
        (["a/1.png", "a/2.png"], ["only one class, 'a'"]),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"], ["'c' not in train, 'b' not in val"]),
        (["val/a/1.png", "val/b/1.png"], ["has val but no train folder"]),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], ["val: 1 image is outside"]),
        (["train/a/1.png", "train/b/1.png", "Training/a/1.png", "Training/b/1.png"], ["mean the same split"]),
        (["a/1.png", "b/1.png", "b/2.png", "b/3.png"], ["'a' (1 image in 1 group) has none for val"]),
    ],
)
def test_faulty_folders(tmp_path, paths, words):
    found = faults(str(touch(tmp_path, *paths)))
    assert len(found) == 1
    assert str(tmp_path) in found[0] and all(word in found[0] for word in words)


def test_dangling_links_and_unlistable_names_are_reported(tmp_path):
    touch(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "gone.png")
    try:
        (tmp_path / "b" / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    found = faults(str(tmp_path))
    assert len(found) == 2
    assert "1 file name is not in UTF-8" in found[0]
    assert "1 image file is missing (a/3.png)" in found[1]


def test_all_faults_come_at_once(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/1.txt", "val/a/1.png", "val/loose.png")
    found = faults(str(tmp_path), val_fraction=0.6, test_fraction=0.5)
    assert len(found) == 4
    for fault, word in zip(
        found, ["must be below 1", "train/b: no images", "val: 1 image ", "'b' not in val"], strict=True
    ):
        assert word in fault


def test_an_image_without_a_suffix_beside_class_folders_is_a_fault(tmp_path):
    touch(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(8)), "notes.txt", "DICOMDIR")
    load_samples(str(tmp_path))
    Image.new("L", (4, 4)).save(tmp_path / "IM0001", "PNG")
    with pytest.raises(InputError, match=r"1 image is outside the class folders \(IM0001\)"):
        load_samples(str(tmp_path))


def test_sites_above_classes_are_pointed_out(tmp_path):
    sites, classes = ("internal", "external"), ("ill", "well")
    touch(tmp_path, *(f"{site}/{name}/{number}.png" for site in sites for name in classes for number in range(8)))
    (said,) = load_samples(str(tmp_path)).attrs["remarks"]
    assert (
        said
        == "the folders external, internal are taken for the classes, not ill, well, found in more than one of them"
    )
    touch(tmp_path / "uneven", *(f"{place}/{n}.png" for place in ("a/ill", "a/well", "b/ill") for n in range(8)))
    (said,) = load_samples(str(tmp_path / "uneven")).attrs["remarks"]
    assert said == "the folders a, b are taken for the classes, not ill, found in more than one of them"


def test_columns_mean_nothing_in_a_folder(tmp_path):
    touch(tmp_path, *(f"{name}/{number}.png" for name in ("ill", "well") for number in range(8)))
    (said,) = load_samples(str(tmp_path), label_column="finding").attrs["remarks"]
    assert said == "label_column ('finding') is of a manifest: names of folders are classes and splits"
