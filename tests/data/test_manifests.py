"""Manifests as people have them: any delimiter, without a header, JSON, Excel, lists of splits, several tables."""

import csv
import gzip
import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import examples
from test_samples import faults, touch

from tuning.data.samples import load_samples
from tuning.settings.config import SearchPlan, check_value

ROWS = [(f"{number:08d}.png", "ab"[number % 2], f"{number // 2:03d}") for number in range(20)]


@pytest.fixture
def place(tmp_path):
    return touch(tmp_path, *(f"images/part {1 + number // 10}/{name}" for number, (name, *_) in enumerate(ROWS)))


def write(file, rows, delimiter=",", header=("path", "label", "group"), end="\n"):
    lines = [header, *rows] if header else rows
    file.write_text("".join(delimiter.join(map(str, row)) + end for row in lines))
    return str(file)


def same(samples):
    """Whether these are the rows."""
    found = {(row.path, row.label, row.group) for row in samples.itertuples()}
    return found == set(ROWS) and all("images" in row.file for row in samples.itertuples())


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " ", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".txt", ".tsv"])
def test_the_delimiter_is_found_and_said(place, delimiter, suffix):
    samples = load_samples(write(place / f"films{suffix}", ROWS, delimiter))
    assert same(samples)
    said = [line for line in samples.attrs["remarks"] if "are separated by" in line]
    assert len(said) == (delimiter != ",")
    assert f"20 images found by name below {place}" in samples.attrs["remarks"]


@examples(30)
@given(
    delimiter=st.sampled_from(",;\t|"),
    cells=st.lists(st.text(st.characters(codec="ascii", exclude_characters="\r\n\x00")), min_size=20, max_size=20),
)
def test_whatever_a_cell_holds_is_read_back(tmp_path_factory, delimiter, cells):
    place = touch(tmp_path_factory.mktemp("cells"), *(name for name, *_ in ROWS))
    with open(place / "films.csv", "w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows(
            [("path", "label", "note"), *((*row[:2], cell) for row, cell in zip(ROWS, cells, strict=True))]
        )
    assert [*load_samples(str(place / "films.csv"))["label"]] == [row[1] for row in ROWS]


def test_rows_without_a_header_are_read_as_lists_of_images_have_them(place):
    """The patient, the file, the class, and where it is from; or by names that are given."""
    rows = [(group, name, label, "site") for name, label, group in ROWS]
    samples = load_samples(write(place / "train.txt", rows, " ", header=None))
    assert same(samples)
    said = "train.txt has no header: path = column 2, label = column 3, group = column 1 (others unused)"
    assert said in samples.attrs["remarks"]
    columns = ["group", "path", "label", "source"]
    assert same(load_samples(write(place / "train.txt", rows, " ", header=None), columns=columns))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv.gz", ".xlsx", ".parquet"])
def test_other_formats(place, suffix):
    table = pd.DataFrame(ROWS, columns=["path", "label", "group"])
    file = place / f"films{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(table.to_dict("list")))
        assert same(load_samples(str(file)))
        file.write_text(json.dumps(table.to_dict("records")))
    elif suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, table.to_dict("records"))) + "\n")
    elif suffix == ".xlsx":
        pytest.importorskip("openpyxl")
        table.to_excel(file, index=False)
    elif suffix == ".parquet":
        table.to_parquet(file)
    else:
        file.write_bytes(gzip.compress(table.to_csv(index=False).encode()))
    assert same(load_samples(str(file)))


def test_images_are_found_by_the_ends_of_their_paths(tmp_path):
    touch(tmp_path, *(f"deep/{site}/study/{number}.dcm" for site in ("a", "b") for number in range(12)))
    rows = [(f"CheXpert/deep/{site}/study/{number}", site) for site in "ab" for number in range(12)]
    samples = load_samples(write(tmp_path / "films.csv", rows, header=("path", "label")))
    assert all(
        row.file.endswith(f"/deep/{row.label}/study/{row.path.rpartition('/')[2]}.dcm") for row in samples.itertuples()
    )
    ambiguous = [(number, "ab"[number % 2]) for number in range(12)]
    found = faults(write(tmp_path / "films.csv", ambiguous, header=("path", "label")))[0]
    assert (
        "12 image names are in two places (0: " in found and "deep/a/study/0.dcm and " in found and "images=" in found
    )
    only = load_samples(str(tmp_path / "films.csv"), images=str(tmp_path / "deep" / "b"))
    assert {row.file.rpartition("/deep/")[2][0] for row in only.itertuples()} == {"b"}


def test_columns_of_ones_and_zeros_are_classes(place):
    rows = [(name, int(label == "a"), int(label == "b")) for name, label, _ in ROWS]
    file = write(place / "films.csv", rows, header=("path", "a", "b"))
    samples = load_samples(file)
    assert [*samples["label"]] == [row[1] for row in ROWS]
    assert "the columns 'a', 'b' of ones and zeros are the classes" in samples.attrs["remarks"]
    assert [*load_samples(file, label_columns=["a", "b"])["label"]] == [row[1] for row in ROWS]
    assert "has no column 'c'" in faults(file, label_columns=["a", "c"])[0]
    rows[3], rows[4] = (rows[3][0], 1, 1), (rows[4][0], 0, 0)
    [found] = faults(write(place / "films.csv", rows, header=("path", "a", "b")), label_columns=["a", "b"])
    assert "1 image with several labels, such as a and b, 1 image with none" in found and "`--set finding=" in found
    rows[3] = (rows[3][0], "maybe", 1)
    [found] = faults(write(place / "films.csv", rows, header=("path", "a", "b")), label_columns=["a", "b"])
    assert "'a' ('maybe'): must hold 1, 0, -1 (uncertain) or nothing" in found


def test_one_finding_of_several_against_all_others(place):
    several = ["Mass|Nodule", "Mass", "Nodule", "No Finding"]
    file = write(
        place / "films.csv", [(row[0], several[n % 4]) for n, row in enumerate(ROWS)], header=("path", "label")
    )
    [found] = faults(file)
    assert "5 images with several labels, such as Mass and Nodule" in found and "finding=" in found
    samples = load_samples(file, finding="Mass")
    assert Counter(samples["label"]) == {"Mass": 10, "no Mass": 10}
    assert (
        "finding: 'Hernia' is no label there; there are Mass, Mass|Nodule, No Finding, Nodule"
        in faults(file, finding="Hernia")[0]
    )


@pytest.mark.parametrize(
    ("uncertain", "counts"),
    [
        ("ignore", {"Edema": 5, "no Edema": 10}),
        ("positive", {"Edema": 10, "no Edema": 10}),
        ("negative", {"Edema": 5, "no Edema": 15}),
    ],
)
def test_uncertain_labels_are_left_out_or_taken(place, uncertain, counts):
    cells = ["1.0", "-1.0", "", "0.0"]
    rows = [(row[0], cells[n % 4], "1.0") for n, row in enumerate(ROWS)]
    file = write(place / "films.csv", rows, header=("path", "Edema", "Support Devices"))
    columns = ["Edema", "Support Devices"]
    samples = load_samples(file, label_columns=columns, finding="Edema", uncertain=uncertain)
    assert Counter(samples["label"]) == counts
    said = any("left out: 5 rows in which 'Edema' is uncertain" in line for line in samples.attrs["remarks"])
    assert said == (uncertain == "ignore")


def test_lists_of_splits(place):
    file = write(place / "films.csv", ROWS)
    (place / "train_val_list.txt").write_text("".join(f"{name}\n" for name, *_ in ROWS[:12]))
    (place / "test_list.txt").write_text("".join(f"{name[:-4]}\n" for name, *_ in ROWS[12:18]))
    files = {"train": str(place / "train_val_list.txt"), "test": str(place / "test_list.txt")}
    samples = load_samples(file, split_files=files)
    assert Counter(samples["split"] == "test") == {False: 12, True: 6}
    assert "left out: 2 images in none of the lists of splits" in samples.attrs["remarks"]
    del files["train"]
    assert Counter(load_samples(file, split_files=files)["split"] == "test") == {False: 14, True: 6}
    (place / "test_list.txt").write_text("absent\nother.png\n")
    assert "test_list.txt names 2 images that films.csv lacks: absent, other.png" in faults(file, split_files=files)[0]
    (place / "test_list.txt").write_text("".join(f"{name}\n" for name, *_ in ROWS[12:18]))
    files["train"] = str(place / "train_val_list.txt")
    assert len(load_samples(file, split_files=files, evaluated=True)) == 20  # for a test alone splits mean nothing
    files["train"] = files["test"] = str(place / "train_val_list.txt")
    assert "is listed for test and for train" in faults(file, split_files=files)[0]


def test_a_split_with_a_manifest_of_its_own(place):
    file = write(place / "train.csv", ROWS[:14])
    samples = load_samples(file, split_files={"test": write(place / "test.csv", ROWS[14:])})
    assert same(samples)
    assert set(samples.loc[samples["path"] >= ROWS[14][0], "split"]) == {"test"}


def test_another_table_is_joined_by_common_columns(place):
    file = write(place / "films.csv", [(name, group) for name, _, group in ROWS], header=("path", "group"))
    studies = {group: "ab"[int(group) % 2] for *_, group in ROWS}
    other = write(place / "studies.csv", studies.items(), header=("group", "label"))
    samples = load_samples(file, join=other)
    assert all(studies[row.group] == row.label for row in samples.itertuples())
    write(place / "studies.csv", [*studies.items(), ("000", "c")], header=("group", "label"))
    assert "has several rows of 000 that differ" in faults(file, join=other)[0]
    write(place / "studies.csv", [("x", "c")], header=("group", "label"))
    assert "no row of" in faults(file, join=other)[0]
    write(place / "studies.csv", [("x", "c")], header=("study", "label"))
    assert "has no column of" in faults(file, join=other)[0]


def test_classes_and_groups_in_the_paths(tmp_path):
    paths = [f"patient{n // 2:05d}/study1_{'negative' if n % 2 else 'positive'}/{n}.png" for n in range(24)]
    touch(tmp_path / "MURA", *paths)
    (tmp_path / "MURA" / "paths.csv").write_text("".join(f"MURA/{path}\n" for path in paths))
    given = {"columns": ["path"], "label_pattern": r"study\d+_(positive|negative)", "group_pattern": r"(patient\d+)"}
    samples = load_samples(str(tmp_path / "MURA" / "paths.csv"), **given)
    assert Counter(samples["label"]) == {"positive": 12, "negative": 12} and samples["group"].nunique() == 12
    [found] = faults(str(tmp_path / "MURA" / "paths.csv"), **given | {"label_pattern": "study2_(.*)"})
    assert "label_pattern: 'study2_(.*)' doesn't match 24 of 24 paths" in found


def test_groups_in_the_names_of_a_folder(tmp_path):
    touch(tmp_path, *(f"{label}/person{n // 2}_virus_{n}.jpeg" for label in "ab" for n in range(12)))
    samples = load_samples(str(tmp_path), group_pattern=r"(person\d+)_")
    assert samples["group"].nunique() == 6 and (samples.groupby("group")["split"].nunique() == 1).all()


def test_rows_that_only_repeat_another_are_left_out(place):
    """As lists of boxes have them, a row each."""
    samples = load_samples(write(place / "boxes.csv", [*ROWS, *ROWS[:3]]))
    assert same(samples) and "left out: 3 rows that only repeat another" in samples.attrs["remarks"]


def test_a_rare_finding_is_found_wherever_it_stands(place):
    """Also in a cell with others, however few such cells there are, and however few rows of an image name it."""
    labels = ["Mass|Nodule" if n == 0 else "Mass" if n % 2 else "No Finding" for n in range(20)]
    rows = [(row[0], label) for row, label in zip(ROWS, labels, strict=True)]
    samples = load_samples(write(place / "films.csv", rows, header=("path", "label")), finding="Mass")
    assert Counter(samples["label"]) == {"Mass": 11, "no Mass": 9}
    boxes = [*rows[1:], (ROWS[2][0], "Mass"), (ROWS[2][0], "Nodule"), (ROWS[2][0], "Effusion")]
    samples = load_samples(write(place / "boxes.csv", boxes, header=("path", "label")), finding="Mass").set_index(
        "path"
    )
    assert samples.loc[ROWS[2][0], "label"] == "Mass" and len(samples) == 19


def test_a_comma_in_the_name_of_a_class_separates_nothing(place):
    names = ["Pneumonia", "Pneumonia, viral"]
    rows = [(row[0], f'"{names[n % 2]}"') for n, row in enumerate(ROWS)]
    assert Counter(load_samples(write(place / "films.csv", rows, header=("path", "label")))["label"]) == dict.fromkeys(
        names, 10
    )


def test_columns_that_are_no_classes_are_not_taken_for_them(place):
    rows = [(name, label, n % 2, 1 - n % 2) for n, (name, label, _) in enumerate(ROWS)]
    [found] = faults(write(place / "films.csv", rows, header=("path", "diagnosis", "AP", "PA")))
    assert "has no column 'label'" in found
    rows = [(name, -1 if n == 3 else 1, 0) for n, (name, *_) in enumerate(ROWS)]
    found = faults(write(place / "films.csv", rows, header=("path", "a", "b")), label_columns=["a", "b"])[0]
    assert "1 image with uncertain ones" in found


def test_names_in_a_list_are_matched_by_the_ends_of_their_paths(tmp_path):
    paths = [f"patient{number}/{view}.png" for number in range(12) for view in ("one", "two")]
    touch(tmp_path, *paths)
    file = write(
        tmp_path / "films.csv", [(path, "ab"[n // 2 % 2]) for n, path in enumerate(paths)], header=("path", "label")
    )
    (tmp_path / "test.txt").write_text(
        "\n".join([f"./{paths[0]}", f"Set\\{paths[3]}".replace("/", "\\"), f"/data/{paths[5]}"])
    )
    samples = load_samples(file, split_files={"test": str(tmp_path / "test.txt")})
    assert set(samples.loc[samples["split"] == "test", "path"]) == {paths[0], paths[3], paths[5]}
    (tmp_path / "test.txt").write_text("one.png\n" + paths[3])
    assert "1 name is of several images (one.png (patient0/one.png and patient1/one.png))" in "\n".join(
        faults(file, split_files={"test": str(tmp_path / "test.txt")})
    )
    touch(tmp_path, *(f"COVID-19 ({n}).png" for n in range(20)))
    names = [f"COVID-19 ({n}).png" for n in range(20)]
    file = write(
        tmp_path / "named.csv", [(name, "ab"[n % 2]) for n, name in enumerate(names)], header=("path", "label")
    )
    (tmp_path / "test.txt").write_text("\n".join(names[:6]))
    samples = load_samples(file, split_files={"test": str(tmp_path / "test.txt")})
    assert set(samples.loc[samples["split"] == "test", "path"]) == set(names[:6])


def test_each_manifest_has_its_paths_beside_it(tmp_path):
    parts = {"train": range(16), "test": range(16)}  # of the same names
    for part, numbers in parts.items():
        touch(tmp_path, *(f"{part}/{number}.png" for number in numbers))
        rows = [(f"{number}.png", "ab"[number % 2]) for number in numbers]
        write(tmp_path / part / "labels.csv", rows, header=("path", "label"))
    files = {"test": str(tmp_path / "test" / "labels.csv")}
    samples = load_samples(str(tmp_path / "train" / "labels.csv"), split_files=files)
    assert len(samples) == 32 and samples["path"].is_unique
    assert ((samples["split"] == "test") == samples["file"].str.contains("/test/")).all()


def test_tables_are_not_joined_by_row_numbers_or_empty_cells(place):
    films = pd.DataFrame(ROWS, columns=["path", "label", "PatientID"]).drop(columns="label")
    films.loc[0, "PatientID"] = None
    patients = pd.DataFrame({"PatientID": [f"{number:03d}" for number in range(10)] + [None]})
    patients["label"] = ["ab"[number % 2] for number in range(11)]
    films.to_csv(place / "films.csv")
    patients.sample(frac=1, random_state=0).to_csv(place / "patients.csv")
    samples = load_samples(str(place / "films.csv"), join=str(place / "patients.csv"))
    assert len(samples) == 19 and "patients.csv is joined by 'PatientID'" in samples.attrs["remarks"]
    wanted = {row[0]: "ab"[int(row[2]) % 2] for row in ROWS}
    assert all(wanted[row.path] == row.label for row in samples.itertuples())


@pytest.mark.parametrize(("uncertain", "images"), [("ignore", 19), ("positive", 20), ("negative", 20)])
def test_where_readers_disagree_the_majority_decides(place, uncertain, images):
    rows = [(name, int(label == "a")) for name, label, _ in ROWS]
    more = [(ROWS[0][0], 0), (ROWS[1][0], 1), (ROWS[1][0], 1)]  # a draw, and two against one
    file = write(place / "films.csv", [*rows, *more], header=("path", "Mass"))
    samples = load_samples(file, label_columns=["Mass"], finding="Mass", uncertain=uncertain).set_index("path")
    assert len(samples) == images and samples.loc[ROWS[1][0], "label"] == "Mass"
    assert uncertain == "ignore" or samples.loc[ROWS[0][0], "label"] == (
        "Mass" if uncertain == "positive" else "no Mass"
    )
    said = "2 images whose rows disagree on 'Mass': the majority decides"
    assert said + ("; left out: 1 with a draw" if uncertain == "ignore" else "") in samples.attrs["remarks"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("set.xlsx", b"PK", "can't be read as Excel"),
        ("set.docx", b"PK", "a manifest must end in .csv, .tsv, .txt, .json"),
        ("set.json", b"[1, 2]", "must hold a list of objects"),
        ("set.json", b"[", "can't be read as .json"),
        ("set.jsonl", b'{"path": ["a"], "label": 1}', "column 'path' contains ['a']"),
        ("set.csv.gz", b"path,label", "can't be read as .csv"),
        ("set.csv.gz", gzip.compress(b"path,label\n" * 99, mtime=0)[:-20] + bytes(20), "can't be read as .csv"),
        ("sep.csv", b"sep=;\npath,label\n00.png,a", "has no column 'path'"),
    ],
)
def test_what_is_no_manifest_is_told(tmp_path, name, content, words):
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    (tmp_path / name).write_bytes(content)
    found = faults(str(tmp_path / name))
    assert name in found[0] and words in found[0]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("label_columns", "[No Finding, Edema]", ["No Finding", "Edema"]),
        ("split_files", "{test: list.txt}", {"test": "list.txt"}),
        ("columns", "[group, path]", ["group", "path"]),
    ],
)
def test_lists_and_mappings_on_the_command_line(key, text, value):
    assert check_value(SearchPlan, key, text, text=True) == value
    with pytest.raises(ValueError, match="must"):
        check_value(SearchPlan, key, "[", text=True)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"must be a regular expression \(missing \)"):
        check_value(SearchPlan, "group_pattern", "(a", text=True)
