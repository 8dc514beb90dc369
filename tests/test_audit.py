import numpy as np
import pytest
from conftest import draw_folder
from PIL import Image

from tuning.audit import load_checked
from tuning.config import InputError, SearchPlan
from tuning.images import open_images


def test_images_are_decoded_once(folder):
    plan = SearchPlan(name="x", data=str(folder))
    table, folders, fingerprint = load_checked(plan, [32, 48])
    assert open_images(folders[32]).shape == (60, 32, 32, 1)
    assert open_images(folders[48]).shape == (60, 48, 48, 1)
    before = folders[32].stat().st_ino
    again, same_folders, same_fingerprint = load_checked(plan, [32], table=table)
    assert (same_folders[32].stat().st_ino, same_fingerprint) == (before, fingerprint)
    assert again.equals(table)


def test_fit_and_colour_reach_the_decoder(tmp_path):
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(rng.integers(50, 255, (20, 40, 3), np.uint8)).save(folder / label / f"{number}.png")
    plan = SearchPlan(name="x", data=str(folder))
    squashed, boxed, grey = (
        open_images(load_checked(plan.model_copy(update=changed), [32])[1][32])
        for changed in ({}, {"fit": "letterbox"}, {"drop_colour": True})
    )
    assert squashed.shape == boxed.shape == (10, 32, 32, 3) and grey.shape == (10, 32, 32, 1)
    assert (boxed[:, :8] == 0).all() and (boxed[:, 8:24].mean() > 100)
    assert (squashed[:, :8] > 0).all()


def test_leaving_out_unreadable_images_keeps_the_rest_in_place(tmp_path):
    folder = draw_folder(tmp_path / "images", count=20)
    whole, _, _ = load_checked(SearchPlan(name="x", data=str(folder)), [32])
    lost = whole["path"][3]
    (folder / lost).write_bytes(b"no image")
    plan = SearchPlan(name="x", data=str(folder), skip_unreadable=True)
    table, folders, _ = load_checked(plan, [32])
    assert list(table["path"]) == [path for path in whole["path"] if path != lost]
    assert len(open_images(folders[32])) == 39


def test_a_class_may_not_vanish_from_a_split(tmp_path):
    folder = draw_folder(tmp_path / "images", count=5)
    table, _, _ = load_checked(SearchPlan(name="x", data=str(folder)), [32])
    for file in table.loc[(table["split"] == "val") & (table["label"] == "dark"), "file"]:
        open(file, "w").close()
    with pytest.raises(InputError, match="no readable image is left of dark in val"):
        load_checked(SearchPlan(name="x", data=str(folder), skip_unreadable=True), [32])
