"""Images with several labels: as manifests give them, in splits, and what can't be learnt."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import examples
from test_samples import faults, touch

from tuning.data.labels import multi_labels
from tuning.data.samples import load_samples
from tuning.data.splits import random_splits, resplit
from tuning.record.targets import class_names, each_label, encoded

NUMBERS = range(60)
NAMES = [f"{number:03d}.png" for number in NUMBERS]
LISTS = ["No Finding", "Mass|Edema", "Edema", "Mass"]


@pytest.fixture
def place(tmp_path):
    return touch(tmp_path, *NAMES)


def write(file, header, rows):
    file.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(file)


def listed(place, labels=LISTS):
    rows = [(name, labels[number % len(labels)]) for number, name in enumerate(NAMES)]
    return write(place / "films.csv", ("path", "label"), rows)


def test_lists_of_labels(place):
    samples = load_samples(listed(place), multi_label=True)
    assert class_names(samples["label"]) == ("Edema", "Mass")
    assert Counter(samples["label"]) == {"|": 15, "|Edema|Mass": 15, "|Edema": 15, "|Mass": 15}
    assert "'No Finding' means that no label applies" in samples.attrs["remarks"]
    assert set(samples["split"]) == {"train", "val", "test"}


def test_without_the_setting_several_labels_are_asked_about(place):
    [found] = faults(listed(place))
    assert "15 images with several labels" in found and "--set multi_label=true" in found and "finding=" in found


@pytest.mark.parametrize("sign", [";", "|"])
def test_what_separates_labels_is_found(place, sign):
    samples = load_samples(listed(place, ["none", f"a b{sign}c", f"c {sign} d", "d"]), multi_label=True)
    assert class_names(samples["label"]) == ("a b", "c", "d")


def columns(place, cell=""):
    """Label columns in which one image in twelve is uncertain, and one in twelve has an empty cell, or another."""
    rows = []
    for number, name in enumerate(NAMES):
        edema = {4: "-1", 8: cell}.get(number % 12, str(number % 2))
        rows.append((name, edema, int(number % 3 == 0), int(number % 12 == 8), 40 + number))
    return write(place / "films.csv", ("path", "Edema", "Mass", "No Finding", "Age"), rows)


def test_columns_of_ones_and_zeros_are_found(place):
    samples = load_samples(columns(place), multi_label=True)
    assert class_names(samples["label"]) == ("Edema", "Mass")
    said = " ".join(samples.attrs["remarks"])
    assert "columns 'Edema', 'Mass', 'No Finding' of ones and zeros are the labels" in said
    assert "5 uncertain labels: unknown" in said and "uncertain=ignore" in said


@pytest.mark.parametrize(
    ("settings", "unknown"),
    [
        ({}, 5),
        ({"uncertain": "positive"}, 0),
        ({"uncertain": "negative"}, 0),
        ({"blank": "ignore"}, 5),  # the image with an empty cell has no finding, so its labels are known
        ({"blank": "ignore", "label_columns": ["Edema", "Mass"]}, 10),
    ],
)
def test_uncertain_and_empty_labels(place, settings, unknown):
    samples = load_samples(columns(place), multi_label=True, **settings)
    targets = encoded(samples["label"], ("Edema", "Mass"))
    assert (targets == -1).sum() == unknown
    positive = (targets[:, 0] == 1).sum()
    assert positive == 30 + 5 * (settings.get("uncertain") == "positive")
    told = any("empty label" in line for line in samples.attrs["remarks"])
    assert told == ("label_columns" in settings)


def test_a_label_that_can_not_be_learnt_is_left_out_and_told(place):
    rows = [(name, ["No Finding", "Mass"][number % 2] + "|Rare" * (number == 1)) for number, name in enumerate(NAMES)]
    file = write(place / "films.csv", ("path", "label"), rows)
    samples = load_samples(file, multi_label=True)
    assert class_names(samples["label"]) == ("Mass",)
    assert any("left out: 1 label" in line and line.endswith("Rare") for line in samples.attrs["remarks"])
    file = write(place / "films.csv", ("path", "label"), [(name, "Mass|Edema") for name in NAMES])
    assert "no label has images with it and without it" in faults(file, multi_label=True)[0]


def test_given_splits_and_names_that_are_no_labels(place):
    rows = [(name, LISTS[number % 4], ["train", "val"][number % 12 > 7]) for number, name in enumerate(NAMES)]
    samples = load_samples(write(place / "films.csv", ("path", "label", "split"), rows), multi_label=True)
    assert Counter(samples["split"]) == {"train": 40, "val": 20} and class_names(samples["label"]) == ("Edema", "Mass")
    file = write(place / "films.csv", ("path", "a?", "b"), [(name, 1, 0) for name in NAMES])
    assert "'a?'" in faults(file, multi_label=True, label_columns=["a?", "b"])[0]
    file = write(place / "films.csv", ("path", "label"), [(name, "|a") for name in NAMES])
    assert "there is only one class" in faults(file)[0]
    file = write(place / "films.csv", ("path", "label"), [(name, "|a" if name > NAMES[30] else "b") for name in NAMES])
    assert "begins with '|'" in faults(file)[0]


def test_rows_of_one_image_are_put_together(place):
    rows = [(name, label) for number, name in enumerate(NAMES) for label in LISTS[number % 4].split("|")]
    samples = load_samples(write(place / "films.csv", ("path", "label"), rows), multi_label=True)
    assert len(samples) == 60 and Counter(samples["label"])["|Edema|Mass"] == 15
    assert any("their labels are put together" in line for line in samples.attrs["remarks"])
    readers = [
        (name, int(reader < 1 + number % 2), int(number % 3 == 0))
        for number, name in enumerate(NAMES)
        for reader in range(3)
    ]
    file = write(place / "films.csv", ("path", "Edema", "Mass"), readers)
    samples = load_samples(file, multi_label=True, label_columns=["Edema", "Mass"])
    found = encoded(samples["label"], ("Edema", "Mass"))
    assert found.tolist() == [[number % 2, int(number % 3 == 0)] for number in NUMBERS]


marks = st.sampled_from([True, False, None])


@given(st.lists(st.dictionaries(st.sampled_from("abc"), marks), min_size=1).filter(any))
def test_what_is_said_of_labels_is_kept(rows):
    texts, *_ = multi_labels(rows, "ignore", "ignore")
    names = sorted({name for row in rows for name in row})
    wanted = [[{True: 1, False: 0, None: -1}[row.get(name)] for name in names] for row in rows]
    assert encoded(texts, names).tolist() == wanted


def table(rng, images, shares, patients):
    truth = rng.random((images, len(shares))) < shares
    groups = rng.integers(0, patients, images)
    labels = ["|" + "|".join(name for name, there in zip("abcdefgh", row, strict=False) if there) for row in truth]
    rows = {"path": [f"{number:05d}" for number in range(images)], "label": labels, "group": [f"p{g}" for g in groups]}
    frame = pd.DataFrame(rows | {"split": None}, dtype=object)
    frame.attrs["random_splits"] = ["train", "val", "test"]
    return frame.assign(unit=groups), truth


@examples(20)
@given(st.integers(0, 10_000))
def test_splits_have_their_share_of_each_label_and_keep_patients_whole(seed):
    rng = np.random.default_rng(seed)
    frame, truth = table(rng, 1000, [0.3, 0.1, 0.03, 0.01], 400)
    split = random_splits(frame, frame["group"].tolist(), val_fraction=0.2, test_fraction=0.2)
    assert (split.groupby("group")["split"].nunique() == 1).all()
    for place in range(4):
        for name, share in (("val", 0.2), ("test", 0.2), ("train", 0.6)):
            there = truth[(split["split"] == name).to_numpy(), place].sum()
            assert abs(there - share * truth[:, place].sum()) <= max(4, 0.04 * truth[:, place].sum())
    sizes = split["split"].value_counts() / 1000
    assert abs(sizes["val"] - 0.2) < 0.03 and abs(sizes["test"] - 0.2) < 0.03
    again = resplit(split, seed)
    of_split = [each_label(again.loc[again["split"] == name, "label"]) for name in ("train", "val")]
    both = [{name for of_image in labels for name in of_image} for labels in of_split]
    assert both[0] == both[1] == {name for name, there in zip("abcd", truth.T, strict=True) if there.any()}
    assert (again["split"] == "test").equals(split["split"] == "test")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finding": "Mass"}, "multi_label=true predicts each label by itself; give one of the two"),
        ({"blank": "ignore"}, "blank=ignore: needs label columns"),
        ({"multi_label": False, "blank": "ignore"}, "blank: has an effect only with multi_label=true"),
    ],
)
def test_settings_that_contradict_each_other(place, settings, said):
    assert said in faults(listed(place), **{"multi_label": True, **settings})[0]


def test_a_folder_has_neither_several_labels_nor_subgroups(tmp_path):
    touch(tmp_path, *(f"{label}/{number}.png" for label in "ab" for number in range(9)))
    assert "multi_label needs a manifest" in faults(str(tmp_path), multi_label=True)[0]
    assert "subgroups are columns of a manifest" in faults(str(tmp_path), subgroups=["sex"])[0]


def test_subgroups_are_kept_and_are_no_labels(place):
    rows = [(name, number % 2, number % 3 == 0, number % 2, f"s{number}", "NA") for number, name in enumerate(NAMES)]
    rows = [(path, mass, int(edema), sex, site, age) for path, mass, edema, sex, site, age in rows]
    file = write(place / "films.csv", ("path", "Mass", "Edema", "female", "site", "age"), rows)
    samples = load_samples(file, multi_label=True, subgroups=["female", "site", "age"])
    assert class_names(samples["label"]) == ("Edema", "Mass") and samples.attrs["labels"] == ["Edema", "Mass"]
    assert set(samples["subgroup_female"]) == {"0", "1"} and samples["subgroup_age"].isna().all()
    assert "subgroup_site" not in samples
    said = [line for line in samples.attrs["remarks"] if line.startswith("subgroups: ")]
    assert said == ["subgroups: 'site' is left out: it has 60 different values; give at most 20 words, or numbers"]
    assert "subgroups: has no column 'hospital'" in faults(file, multi_label=True, subgroups=["hospital"])[0]


@pytest.mark.parametrize("label", ["Mass/Edema", "['Mass', 'Edema']"])
def test_a_separator_that_is_not_known_is_asked_about(place, label):
    samples = load_samples(listed(place, ["Mass", "No Finding", label.replace(",", " "), "Edema"]), multi_label=True)
    said = samples.attrs["remarks"]
    assert any("3 labels: " in line for line in said) and any(line.startswith("is ") for line in said)


def test_readers_are_counted_also_where_columns_are_found_by_themselves(place):
    readers = [(name, int(reader == 0), int(number % 2)) for number, name in enumerate(NAMES) for reader in range(3)]
    file = write(place / "films.csv", ("path", "Edema", "Mass"), [*readers, *((name, 1, 0) for name in NAMES[:1] * 4)])
    found = load_samples(file, multi_label=True)
    assert "Edema" not in class_names(found["label"]) and any("Edema" in line for line in found.attrs["remarks"])


def test_an_empty_cell_of_a_list_is_no_label(place):
    samples = load_samples(listed(place, ["Mass|Edema", "", "Edema", "Mass"]), multi_label=True)
    assert Counter(samples["label"])["|"] == 15
    assert "15 rows with an empty cell: no label applies" in samples.attrs["remarks"]


def test_one_image_without_a_label_does_not_keep_splits_from_being_drawn_again():
    frame, _ = table(np.random.default_rng(0), 300, [0.5, 0.4], 300)
    frame.loc[:, "label"] = [
        "|" if row == 7 else label if label != "|" else "|a" for row, label in enumerate(frame["label"])
    ]
    split = random_splits(frame, frame["path"].tolist(), val_fraction=0.2, test_fraction=0.2)
    assert (resplit(split, 1)["split"] != split["split"]).sum() > 20
