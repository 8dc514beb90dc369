"""Manifests become one table, faults are reported all at once, random splits are the same everywhere."""

import csv
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import examples

from tuning.data.samples import fingerprint, load_samples
from tuning.data.splits import resplit
from tuning.settings.config import InputError

N_FILES = 60


def touch(root: Path, *paths: str) -> Path:
    """Empty files: samples are listed, never opened."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write_csv(file: Path, rows: list[dict[str, str]]) -> str:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def faults(*arguments, **settings) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_samples(*arguments, **settings)
    return caught.value.faults


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return touch(tmp_path_factory.mktemp("files"), *(f"{number:02d}.png" for number in range(N_FILES)))


@pytest.fixture
def rows(files) -> list[dict[str, str]]:
    return [{"path": f"{number:02d}.png", "label": "ab"[number % 2]} for number in range(20)]


# --- Manifests -------------------------------------------------------------------------------------------------------


def test_manifest_columns_paths_and_splits(tmp_path):
    touch(tmp_path, *(f"in/{number}.png" for number in range(4)))
    outside = touch(tmp_path / "far", "x.png", "y.png")
    (tmp_path / "set").mkdir()
    paths = ["../in/0.png", "..\\in\\1.png", "../in/./2.png", "../in/3.png", str(outside / "x.png"), "../far/y.png"]
    splits = ["train", "Training", "VAL", "validation", "test", "testing"]
    rows = [
        {"image": path, "class": "NA" if index % 2 else "None", "part": split, "patient": f"{index:03d}"}
        for index, (path, split) in enumerate(zip(paths, splits, strict=True))
    ]
    file = write_csv(tmp_path / "set" / "all.CSV", rows)
    names = {"path_column": "image", "label_column": "class", "split_column": "part", "group_column": "patient"}
    samples = load_samples(file, **names).set_index("group")
    assert samples.loc["001", "path"] == "../in/1.png"
    assert samples.loc["002", "path"] == "../in/2.png"
    assert samples.loc["004", "path"] == str(outside / "x.png")
    assert samples.loc["000", "label"] == "None" and samples.loc["001", "label"] == "NA"
    assert Counter(samples["split"]) == {"train": 2, "val": 2, "test": 2}


def test_an_absolute_path_below_the_manifest_is_shown_relative(files, rows, tmp_path):
    relative = load_samples(write_csv(files / "relative.csv", rows))
    absolute = load_samples(write_csv(files / "absolute.csv", [r | {"path": str(files / r["path"])} for r in rows]))
    pd.testing.assert_frame_equal(relative, absolute)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_numeric_labels_and_groups_are_text_without_a_point(files, suffix):
    table = pd.DataFrame(
        {
            "path": [f"{number:02d}.png" for number in range(20)],
            "label": [number % 2 for number in range(20)],
            "group": [123 + number // 2 for number in range(20)],
        }
    )
    if suffix == "csv":
        table.to_csv(files / "numeric.csv", index=False)
    else:
        table.astype({"group": float, "label": "category"}).to_parquet(files / "numeric.parquet")
    samples = load_samples(str(files / f"numeric.{suffix}"))
    assert sorted(samples["label"].unique()) == ["0", "1"]
    assert set(samples["group"]) == {str(123 + number) for number in range(10)}
    assert samples.groupby("group")["split"].nunique().max() == 1


def test_csv_as_spreadsheets_write_it(files, rows):
    lines = [", ".join(rows[0]) + ","] + [", ".join(row.values()) + "," for row in rows] + ["", ""]
    (files / "sheet.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert len(load_samples(str(files / "sheet.csv"))) == 20


def test_faulty_rows_come_all_at_once(files, rows):
    rows = [row | {"split": "train" if index < 12 else "val", "group": str(index)} for index, row in enumerate(rows)]
    rows[0]["label"] = " "
    rows[1]["split"] = "holdout"
    rows[2]["group"] = "NA"  # R's empty cell: not one patient of all images that have it
    rows[3]["path"] = "gone.png"
    rows[5]["path"] = rows[4]["path"]
    found = "\n".join(faults(write_csv(files / "rows.csv", rows)))
    for words in (
        "column 'label' has 1 empty cell (rows below the header: 1)",
        "column 'split' contains 'holdout'; a split is train, val or test",
        "column 'group' has 1 empty cell or NA (rows below the header: 3)",
        "1 image file is missing (gone.png)",
        "1 path is listed more than once (04.png)",
    ):
        assert words in found
    assert len(found.splitlines()) == 5


def test_a_number_of_two_spellings_is_one_patient_and_one_class(files, rows):
    """As in tables that were put together from parts with and without gaps; a zero in front is no such spelling."""
    endings = ["", ".0"]
    rows = [
        {"path": row["path"], "label": f"{index % 2}{endings[index > 9]}", "group": f"{index % 10}{endings[index > 9]}"}
        for index, row in enumerate(rows)
    ]
    rows[0]["group"], rows[10]["group"] = "007", "07.0"
    samples = load_samples(write_csv(files / "rows.csv", rows))
    assert set(samples["label"]) == {"0", "1"}
    assert set(samples["group"]) == {*map(str, range(1, 10)), "007", "07.0"}
    assert (samples.groupby("group")["split"].nunique() == 1).all()


def test_text_that_is_stored_as_bytes_is_text(files):
    """As Spark and Impala write it."""
    rows = [{"path": f"{number:02d}.png".encode(), "label": "äb"[number % 2].encode()} for number in range(20)]
    pd.DataFrame(rows).to_parquet(files / "bytes.parquet")
    assert set(load_samples(str(files / "bytes.parquet"))["label"]) == {"ä", "b"}


def test_long_lists_are_cut_to_five(files):
    rows = [{"path": f"gone{number}.png", "label": "ab"[number % 2]} for number in range(9)]
    [found] = faults(write_csv(files / "gone.csv", rows))
    assert "9 image files are missing" in found and "gone4.png and 4 more" in found and "gone5" not in found


def test_missing_columns_name_those_there_and_the_setting(files, rows):
    file = write_csv(files / "columns.csv", [{"image": row["path"], "label": row["label"]} for row in rows])
    [found] = faults(file)
    assert "no column 'path' (its columns: 'image', 'label')" in found and "`--set path_column='image'`" in found
    assert len(load_samples(file, path_column="image")) == 20
    found = faults(file, path_column="image", split_column="fold", group_column="patient")
    assert ["--set split_column=..." in found[0], "--set group_column=..." in found[1]] == [True, True]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "no such folder or file"),
        ("set", b"", "not in no suffix"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"path,label\n", "has no rows"),
        ("latin.csv", "path,label\nä.png,a\n".encode("latin-1"), "can't be read as .csv"),
        ("wide.csv", b"path,label\na.png,a,b\n", "line 2 has more cells than the header"),
        ("twice.csv", b"path,label,label\n00.png,a,b\n01.png,b,a\n", "has 2 columns named 'label'"),
        ("broken.parquet", b"PAR1", "can't be read as .parquet"),
    ],
)
def test_faulty_manifests(files, name, content, words):
    if content is not None:
        (files / name).write_bytes(content)
    found = faults(str(files / name))
    assert len(found) == 1 and name in found[0] and words in found[0]


def test_lists_as_labels_are_refused(files):
    pd.DataFrame({"path": ["00.png"], "label": [["a", "b"]]}).to_parquet(files / "lists.parquet")
    [found] = faults(str(files / "lists.parquet"))
    assert "column 'label' contains list" in found


# --- Splits ----------------------------------------------------------------------------------------------------------


@st.composite
def labelled(draw, *, grouped: bool):
    labels = draw(st.lists(st.sampled_from("abc"), min_size=12, max_size=N_FILES).filter(lambda x: len(set(x)) > 1))
    groups = draw(st.lists(st.integers(0, 20), min_size=len(labels), max_size=len(labels)))
    rows = [
        {"path": f"{number:02d}.png", "label": label} | ({"group": f"p{group}"} if grouped else {})
        for number, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]
    return rows, draw(st.permutations(rows))


@examples(50)
@given(
    labelled_rows=labelled(grouped=False),
    val_fraction=st.floats(0.05, 0.4),
    test_fraction=st.just(0.0) | st.floats(0.05, 0.4),
)
def test_shares_of_every_class_are_within_one_image(files, labelled_rows, val_fraction, test_fraction):
    rows, shuffled = labelled_rows
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    counts = Counter(row["label"] for row in rows)
    if min(counts.values()) == 1:
        [found] = faults(write_csv(files / "random.csv", rows), **fractions)
        assert "too few images for random splits" in found
        return
    samples = load_samples(write_csv(files / "random.csv", rows), **fractions)
    pd.testing.assert_frame_equal(samples, load_samples(write_csv(files / "random.csv", shuffled), **fractions))
    shares = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    placed = Counter(zip(samples["split"], samples["label"], strict=True))
    for label, total in counts.items():
        assert placed["train", label] and placed["val", label]
        assert all(abs(placed[split, label] - share * total) <= 1 for split, share in shares.items())


@examples(50)
@given(labelled_rows=labelled(grouped=True))
def test_no_group_is_split_and_the_order_of_rows_does_not_matter(files, labelled_rows):
    rows, shuffled = labelled_rows
    try:
        samples = load_samples(write_csv(files / "random.csv", rows))
    except InputError as error:
        assert faults(write_csv(files / "random.csv", shuffled)) == error.faults
        assert "too few images for random splits" in error.faults[0]
        return
    pd.testing.assert_frame_equal(samples, load_samples(write_csv(files / "random.csv", shuffled)))
    assert samples.groupby("group")["split"].nunique().max() == 1
    assert {label for split, label in zip(samples["split"], samples["label"], strict=True) if split == "val"} == set(
        samples["label"]
    )


@examples(50)
@given(labelled_rows=labelled(grouped=True), seed=st.integers(0, 2**31 - 1))
def test_resplitting_keeps_the_test_set_the_groups_and_the_classes(files, labelled_rows, seed):
    try:
        samples = load_samples(write_csv(files / "resplit.csv", labelled_rows[0]))
    except InputError:
        return  # too few groups of a class
    samples["unit"] = pd.factorize(samples["group"])[0]
    again = resplit(samples, seed)
    assert again.drop(columns="split").equals(samples.drop(columns="split"))
    assert list(again["split"] == "test") == list(samples["split"] == "test")
    assert (again.groupby("group")["split"].nunique() == 1).all()
    for split in ("train", "val"):
        assert set(again.loc[again["split"] == split, "label"]) == set(samples["label"])
    assert again.equals(resplit(samples, seed))


def test_resplits_differ_by_seed_and_keep_their_sizes(files, rows):
    samples = load_samples(write_csv(files / "sizes.csv", rows))
    assert samples.attrs["random_splits"] == ["train", "val", "test"]
    samples["unit"] = range(len(samples))
    splits = {tuple(resplit(samples, seed)["split"]) for seed in range(10)}
    assert len(splits) > 5
    assert {split.count("val") for split in splits} == {list(samples["split"]).count("val")}


def test_copies_stay_together_in_a_resplit(files, rows):
    samples = load_samples(write_csv(files / "copies.csv", rows)).assign(split=["train"] * 16 + ["val"] * 4)
    samples["unit"] = [number // 2 for number in range(len(samples))]  # of no group
    for seed in range(20):
        assert (resplit(samples, seed).groupby("unit")["split"].nunique() == 1).all()


def test_a_given_validation_split_is_not_random(files, rows):
    given_splits = [row | {"split": ("train", "val")[index // 2 % 2]} for index, row in enumerate(rows)]
    assert load_samples(write_csv(files / "given.csv", given_splits)).attrs["random_splits"] == []


@examples(50)
@given(
    patients=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 4)), min_size=12, max_size=15),
    val_fraction=st.floats(0.1, 0.4),
)
def test_shares_of_every_class_are_kept_as_far_as_groups_allow(files, patients, val_fraction):
    labels = [(label, f"p{number}") for number, (label, images) in enumerate(patients) for _ in range(images)]
    rows = [
        {"path": f"{number:02d}.png", "label": label, "group": group} for number, (label, group) in enumerate(labels)
    ]
    if len({label for label, _ in patients}) == 1:
        return
    try:
        samples = load_samples(write_csv(files / "patients.csv", rows), val_fraction=val_fraction, test_fraction=0.2)
    except InputError as error:
        assert "too few images for random splits" in error.faults[0]
        return
    placed = Counter(zip(samples["split"], samples["label"], strict=True))
    largest = max(images for _, images in patients)
    for label, total in Counter(label for label, _ in labels).items():
        for split, share in {"train": 0.8 - val_fraction, "val": val_fraction, "test": 0.2}.items():
            assert abs(placed[split, label] - share * total) <= 2 * largest + 1


def test_groups_in_several_given_splits_are_left_to_the_audit(files, rows):
    rows = [row | {"group": "p1", "split": ("train", "val")[number // 10]} for number, row in enumerate(rows)]
    assert Counter(load_samples(write_csv(files / "leaky.csv", rows))["split"]) == {"train": 10, "val": 10}


def test_splits_are_the_same_on_every_machine(files, rows):
    samples = load_samples(write_csv(files / "same.csv", rows))
    assert " ".join(split[:2] for split in samples["split"]) == (
        "tr tr tr tr tr va tr tr va te tr tr te tr va va te te tr tr"
    )


# --- Fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_every_part(files, rows):
    samples = load_samples(write_csv(files / "print.csv", [row | {"group": row["path"]} for row in rows]))
    hashes = [str(number) for number in range(20)]
    whole = fingerprint(samples, hashes)
    assert len(whole) == 64 and whole == fingerprint(samples.copy(), list(hashes))
    for column in ("path", "label", "split", "group"):
        changed = samples.copy()
        changed.loc[7, column] = "other"
        assert fingerprint(changed, hashes) != whole
    assert fingerprint(samples, ["x", *hashes[1:]]) != whole
    assert fingerprint(samples.assign(file="elsewhere"), hashes) == whole


def test_fingerprint_takes_every_way_to_say_no_group_alike(files, rows, tmp_path):
    samples = load_samples(write_csv(files / "print.csv", rows))
    samples.to_parquet(tmp_path / "samples.parquet")
    back = pd.read_parquet(tmp_path / "samples.parquet")
    assert fingerprint(samples, ["0"] * 20) == fingerprint(back, ["0"] * 20)
    assert fingerprint(samples, ["0"] * 20) == fingerprint(samples.assign(group=float("nan")), ["0"] * 20)


def test_columns_that_may_be_split_or_group_by_other_names_are_pointed_out(files, rows):
    named = [row | {"Split": "train", "PatientID": "1", "Age": "40"} for row in rows]
    assert load_samples(write_csv(files / "named.csv", named)).attrs["remarks"] == [
        "column 'Split' isn't used; if it is meant, --set split_column='Split'",
        "column 'PatientID' isn't used; if it is meant, --set group_column='PatientID'",
    ]
    given = {"split_column": "Split", "group_column": "PatientID"}
    varied = [row | {"PatientID": str(number)} for number, row in enumerate(named)]
    assert load_samples(write_csv(files / "varied.csv", varied), **given).attrs["remarks"] == []


def test_what_spreadsheets_write_is_read(files):
    lines = ["path,label", *(f"{number:02d}.png,{'ab'[number % 2]}" for number in range(20)), ",", ","]
    (files / "rows.csv").write_text("\n".join(lines) + "\n")
    assert len(load_samples(str(files / "rows.csv"))) == 20
    for sign in ",;":
        (files / "sep.csv").write_text(f"sep={sign}\n" + "\n".join(lines).replace(",", sign))
        assert len(load_samples(str(files / "sep.csv"))) == 20
