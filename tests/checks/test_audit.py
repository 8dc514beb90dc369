import csv
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from shared import draw_folder, examples

from tuning.audit import Flags, main, run
from tuning.checks.audit import load_checked
from tuning.data.images import open_images
from tuning.record.tables import AUDIT, read_table
from tuning.settings.config import InputError, SearchPlan


def test_images_are_decoded_once(folder):
    plan = SearchPlan(name="x", data=str(folder))
    table, folders, fingerprint, *_ = load_checked(plan, [32, 48])
    assert open_images(folders[32]).shape == (60, 32, 32, 1)
    assert open_images(folders[48]).shape == (60, 48, 48, 1)
    before = folders[32].stat().st_ino
    again, same_folders, same_fingerprint, *_ = load_checked(plan, [32], table=table)
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
    whole, *_ = load_checked(SearchPlan(name="x", data=str(folder)), [32])
    lost = whole["path"][3]
    (folder / lost).write_bytes(b"no image")
    plan = SearchPlan(name="x", data=str(folder), skip_unreadable=True)
    table, folders, *_ = load_checked(plan, [32])
    assert list(table["path"]) == [path for path in whole["path"] if path != lost]
    assert len(open_images(folders[32])) == 39


def test_a_class_may_not_vanish_from_a_split(tmp_path):
    folder = draw_folder(tmp_path / "images", count=5)
    table, *_ = load_checked(SearchPlan(name="x", data=str(folder)), [32])
    for file in table.loc[(table["split"] == "val") & (table["label"] == "dark"), "file"]:
        open(file, "w").close()
    with pytest.raises(InputError, match="no readable image is left of dark in val"):
        load_checked(SearchPlan(name="x", data=str(folder), skip_unreadable=True), [32])


# --- What is found ---------------------------------------------------------------------------------------------------


def picture(seed):
    noise = np.random.default_rng(seed).normal(size=(64, 64))
    clouds = sum(sigma * ndimage.gaussian_filter(noise, sigma) for sigma in (1, 2, 4))
    return Image.fromarray((128 + 70 * clouds / clouds.std()).clip(1, 254).astype(np.uint8))


@pytest.fixture
def films(tmp_path):
    """Pictures 00.png to 23.png, and a function that writes their manifest with some rows changed."""
    for number in range(24):
        picture(number).save(tmp_path / f"{number:02d}.png")

    def manifest(*changed, **columns):
        rows = [
            {"path": f"{number:02d}.png", "label": "ab"[number % 2], "split": ("train", "val", "test")[number // 2 % 3]}
            for number in range(24)
        ]
        rows += [{"path": path, "label": label, "split": split} for path, label, split in changed]
        for name, values in columns.items():
            for number, row in enumerate(rows):
                row[name] = values.get(number, f"own{number}")
        with open(tmp_path / "films.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return str(tmp_path / "films.csv")

    return tmp_path, manifest


def check(data, **settings):
    checked = load_checked(SearchPlan(name="x", data=data, **settings), [64])
    return checked, checked.audit.to_pandas()


def test_clean_data_passes(films):
    _, manifest = films
    checked, found = check(manifest(group={0: "p", 6: "p"}))
    assert found.empty and checked.messages == ["audit: no warnings"]


def test_identical_images_in_different_splits_stop_the_search(films):
    folder, manifest = films
    shutil.copy(folder / "00.png", folder / "bytes.png")
    Image.open(folder / "02.png").save(folder / "pixels.png", compress_level=1)
    data = manifest(("bytes.png", "a", "test"), ("pixels.png", "a", "train"))
    with pytest.raises(InputError) as caught:
        check(data)
    [fault] = caught.value.faults
    assert fault.startswith(
        "2 pairs of identical images, 2 of them in different splits, such as 00.png and bytes.png; "
    )
    assert "--set on_leak=move" in fault and "on_leak=warn" in fault
    _, found = check(data, on_leak="warn")
    assert found["finding"].tolist() == ["exact_duplicate"] * 2
    assert found["detail"].str.split("; ").str[0].tolist() == ["the same bytes", "the same pixels in other bytes"]


@pytest.fixture
def copied(films):
    """Rows of the films, of eight of them copies, and of one more the same pixels, and a function that writes rows."""
    folder, _ = films
    rows = [(f"{number:02d}.png", "ab"[number % 2], f"own{number}") for number in range(24)]
    for number in range(8):
        shutil.copy(folder / f"{number:02d}.png", folder / f"copy{number}.png")
        rows.append((f"copy{number}.png", "ab"[number % 2], f"copy{number}"))
    Image.open(folder / "00.png").save(folder / "pixels.png", compress_level=1)
    rows.append(("pixels.png", "a", "own10"))  # the patient of 10.png

    def write(rows, header="path,label,group"):
        (folder / "copied.csv").write_text("\n".join([header, *(",".join(row) for row in rows)]))
        return str(folder / "copied.csv")

    return rows, write


def test_random_splits_keep_identical_images_together(copied):
    rows, write = copied
    checked, found = check(write(rows))
    split = checked.samples.set_index("path")["split"]
    assert all(split[f"copy{number}.png"] == split[f"{number:02d}.png"] for number in range(8))
    assert split["pixels.png"] == split["00.png"] == split["10.png"]
    assert found["severity"].tolist() == ["warn"] * 9 and (found["finding"] == "exact_duplicate").all()
    assert checked.messages[-1] == "  train, val, test were split at random, with identical images in the same split"
    counts = checked.samples.groupby("label")["split"].value_counts()
    for label, total in checked.samples["label"].value_counts().items():
        shares = {"train": 0.6, "val": 0.2, "test": 0.2}
        assert all(abs(counts[label, name] - share * total) <= 4 for name, share in shares.items())
    again, _ = check(write(rows[::-1]), on_leak="warn")  # whatever `on_leak` is, and in any order
    assert again.samples.equals(checked.samples) and again.fingerprint == checked.fingerprint
    assert again.samples.attrs["random_splits"] == ["train", "val", "test"]


def test_identical_images_in_given_splits_stop_the_search_though_validation_is_random(copied):
    rows, write = copied
    given = [(*row, "test" if number in (20, 21) else "train") for number, row in enumerate(rows)]
    checked, _ = check(write(given, "path,label,group,split"))
    split = checked.samples.set_index("path")["split"]
    assert all(split[f"copy{number}.png"] == split[f"{number:02d}.png"] for number in range(8))
    assert set(split) == {"train", "val", "test"} and checked.messages[-1].startswith(
        "  train, val were split at random, with"
    )
    given[24] = (*rows[24], "test")  # copy0.png
    with pytest.raises(InputError, match="1 pair of identical images, 1 of them in different splits, such as 00"):
        check(write(given, "path,label,group,split"))


def test_a_class_of_identical_images_cannot_be_split(copied):
    rows, write = copied
    few = [row for row in rows if row[1] == "b"] + [rows[0], rows[24], rows[32]]
    with pytest.raises(
        InputError, match="with identical images in the same split: too few images for random splits: 'a'"
    ):
        check(write(few))


def test_a_skipped_search_for_shortcuts_is_reported(films):
    _, manifest = films
    everyone = {number: "one" for number in range(0, 24, 2)}  # all of class a are of one patient
    checked, _ = check(manifest(group=everyone), on_leak="warn")
    [message] = [line for line in checked.messages if "shortcuts" in line]
    assert message.startswith("  shortcuts were not searched for in 2 of 2 classes, such as a: two or more")


def test_near_duplicates_and_labels_in_conflict_warn(films):
    folder, manifest = films
    Image.open(folder / "00.png").resize((50, 50)).save(folder / "copy.jpg")
    checked, found = check(manifest(("copy.jpg", "b", "test")))
    assert found[["finding", "severity", "path_a", "path_b"]].to_numpy().tolist() == [
        ["label_conflict", "warn", "00.png", "copy.jpg"],
        ["near_duplicate", "warn", "00.png", "copy.jpg"],
    ]
    assert found["detail"].str.contains("in train and test").all() and len(checked.messages) == 3


def test_groups_in_different_splits_stop_the_search_or_move(films):
    folder, manifest = films
    Image.open(folder / "01.png").save(folder / "copy.jpg")
    # Patient p has images in train, val and twice in train again; a copy of another's test image hangs on it.
    data = manifest(("copy.jpg", "b", "test"), group={0: "p", 2: "p", 6: "p", 1: "p"})
    with pytest.raises(
        InputError, match="1 group \\(4 images\\) in more than one split, such as group p: 3 in train, 1 in v"
    ):
        check(data)
    warned, _ = check(data, on_leak="warn")
    moved, found = check(data, on_leak="move")
    before, after = (checked.samples.set_index("path")["split"] for checked in (warned, moved))
    assert dict(after[before != after]) == {"02.png": "train", "copy.jpg": "train"}
    assert before["copy.jpg"] == "test" and moved.fingerprint != warned.fingerprint
    assert found["finding"].tolist() == ["group_across_splits", "near_duplicate"]
    assert found["detail"].str.endswith("; moved: 02.png from val to train, copy.jpg from test to train").all()
    assert any("2 images moved" in line for line in moved.messages)


def test_a_move_may_not_empty_a_split(films):
    _, manifest = films
    everyone = {number: "ab"[number % 2] for number in range(24)}
    with pytest.raises(
        InputError, match="would leave no image of a in train, a in val, b in train, b in val; move groups"
    ):
        check(manifest(group=everyone), on_leak="move")


def test_unreadable_images_are_findings_if_they_are_left_out(films):
    folder, manifest = films
    (folder / "04.png").write_bytes(b"")
    checked, found = check(manifest(), skip_unreadable=True)
    assert found[["finding", "severity", "path_a"]].to_numpy().tolist() == [["unreadable", "warn", "04.png"]]
    assert len(checked.samples) == 23 and "is empty" in checked.messages[1]


def test_samples_of_an_earlier_run_are_not_audited_again(films):
    _, manifest = films
    data = manifest(group={0: "p", 2: "p"})
    warned, _ = check(data, on_leak="warn")
    again = load_checked(SearchPlan(name="x", data=data), [64], table=warned.samples)
    assert again.audit is None and again.messages == [] and again.fingerprint == warned.fingerprint


def test_pairs_are_cached_beside_the_decoded_images(films):
    folder, manifest = films
    Image.open(folder / "00.png").save(folder / "copy.jpg")
    checked, found = check(manifest(("copy.jpg", "a", "train")))
    [kept] = checked.folders[64].glob("near-*.parquet")
    table = pd.read_parquet(kept)
    assert table[["a", "b"]].to_numpy().tolist() == [[0, 24]]
    table.assign(copies=False).to_parquet(kept)
    _, again = check(manifest(("copy.jpg", "a", "train")))
    kept.unlink()
    assert (found["finding"].tolist(), again["finding"].tolist()) == (["near_duplicate"], ["look_alike"])


def test_slices_of_one_scan_are_a_sequence_that_moves_as_one(films):
    folder, manifest = films
    noise = np.random.default_rng(9).normal(size=(40, 64, 64))
    clouds = sum(sigma * ndimage.gaussian_filter(noise, (6 * sigma, sigma, sigma)) for sigma in (1, 2, 4))[16:24]
    for number, pixels in enumerate((128 + 60 * clouds / clouds.std()).clip(1, 254).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"slice{number}.png")
    rows = [(f"slice{number}.png", "a", "test" if number > 5 else "train") for number in range(8)]
    checked, found = check(manifest(*rows))
    assert found["finding"].tolist() == ["sequence"] and found["severity"].tolist() == ["warn"]
    assert found["detail"][0].startswith("8 images, each much like the next: 6 in train, 2 in test")
    assert len(set(checked.samples["unit"][24:])) == 1
    moved, found = check(manifest(*rows), on_leak="move")
    assert set(moved.samples["split"][24:]) == {"train"} and "moved: slice6.png from test" in found["detail"][0]


@pytest.mark.slow
@examples(10)
@given(st.lists(st.sampled_from("pqrst"), min_size=24, max_size=24))
def test_a_search_that_moves_has_no_group_in_two_splits(folder, groups):
    rows = [f"{kind}/{number:03d}.png,{kind}" for number in range(12) for kind in ("dark", "light")]
    splits = [split for split in ("train", "val", "test") for _ in range(8)]
    lines = [",".join(row) for row in zip(rows, splits, groups, strict=True)]
    (folder / "groups.csv").write_text("\n".join(["path,label,split,group", *lines]))
    try:
        checked, _ = check(str(folder / "groups.csv"), on_leak="move")
    except InputError as error:
        assert "would leave no image of" in error.faults[0]
        return
    assert checked.samples.groupby("group")["split"].nunique().max() == 1


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_and_exits(films, capsys):
    folder, manifest = films
    shutil.copy(folder / "00.png", folder / "again.png")
    (folder / "05.png").write_bytes(b"none")
    data = manifest(("again.png", "b", "test"))
    out = folder / "new"
    assert run(Flags(data, out=str(out))) == 2
    printed = capsys.readouterr().out
    assert "a: 4 test, 4 train, 4 val" in printed and "audit: 2 reasons to stop, 1 warning (3 findings in" in printed
    assert "00.png" in printed and printed.endswith(f"written: {out}/audit.parquet\n")
    found = read_table(out / "audit.parquet")
    assert found.columns.tolist() == AUDIT.names
    assert found["finding"].tolist() == ["unreadable", "exact_duplicate", "label_conflict"]
    allowed = (("on_leak=warn", "skip_unreadable=true", "image_size=48"),)
    assert run(Flags(data, out=str(out), set=allowed)) == 0
    assert set(read_table(out / "audit.parquet")["severity"]) == {"warn"}
    capsys.readouterr()
    assert run(Flags(data, out=str(out), set=(("on_leak=move", "skip_unreadable=true"),))) == 0
    assert "a: 5 test, 3 train, 4 val" in capsys.readouterr().out  # as a search would take them


def test_names_of_any_kind_are_text_on_the_screen(films, capsys, monkeypatch):
    folder, manifest = films
    odd = "[red]a[red]\n\x1b[31m 'b' \"c\" 🫁"
    shutil.copy(folder / "00.png", folder / odd)
    data = manifest((odd, odd, "train"), ("./23.png", odd, "val"), ("./22.png", odd, "test"))
    monkeypatch.setattr("sys.argv", ["audit.py", data, "--out", str(folder), "--set", "on_leak=warn"])
    assert main() == 2
    errors = capsys.readouterr().err
    shown = "[red]a[red]\\n\\x1b[31m 'b' \"c\" 🫁"
    assert errors.count("\n") == 1 and "paths are listed more than once (22.png, 23.png)" in errors
    for number in (24, 25):
        picture(number).save(folder / f"{number}.png")
    data = manifest((odd, odd, "train"), ("24.png", odd, "val"), ("25.png", odd, "test"))
    assert run(Flags(data, out=str(folder), set=(("on_leak=warn",),))) == 0
    printed = capsys.readouterr().out
    assert (
        f"{shown}: 1 test, 1 train, 1 val" in printed
        and f"such as 00.png and {shown}" in printed
        and "\x1b" not in printed
    )


def test_the_command_refuses_what_it_does_not_know(films, capsys, monkeypatch):
    folder, manifest = films
    data = manifest()
    for arguments, message in (
        ([str(folder / "nothing")], "no such folder or file"),
        ([data, "--set", "learning_rate=0.1"], "--set learning_rate: has no effect on an audit"),
        ([data, "--set", "on_leak=go"], "--set on_leak: must be 'stop', 'warn' or 'move'"),
        ([data, "--out", str(folder / "00.png" / "x")], "can't be created"),
    ):
        monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
        assert main() == 2
        assert message in capsys.readouterr().err


def test_many_images_are_not_compared_pair_by_pair(films, monkeypatch):
    folder, manifest = films
    Image.open(folder / "00.png").save(folder / "copy.jpg", quality=60)
    monkeypatch.setattr("tuning.checks.audit.MOST_IMAGES", 24)
    checked, found = check(manifest(("copy.jpg", "a", "train")))
    assert found.empty and checked.messages[-1] == "  near duplicates were not searched for among more than 24 images"


def test_shortcuts_are_searched_for_once_in_the_same_images_and_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    plan = SearchPlan(name="x", data=str(draw_folder(tmp_path / "films")), on_leak="warn")
    first = load_checked(plan, [32])
    monkeypatch.setattr("tuning.checks.shortcuts.shortcuts", lambda *given: pytest.fail("searched again"))
    again = load_checked(plan, [32])
    assert first.audit.equals(again.audit) and first.audit.num_rows and first.messages == again.messages
    renamed = pd.DataFrame({"path": first.samples["file"], "label": first.samples["label"].replace("dark", "dull")})
    renamed.to_csv(tmp_path / "films.csv", index=False)
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        load_checked(plan.model_copy(update={"data": str(tmp_path / "films.csv")}), [32])
