"""Public sets open as they are downloaded, by the one command that docs/data.md gives for each; forms in small."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from test_samples import touch

from tuning.data.samples import load_samples
from tuning.record.targets import class_names, encoded
from tuning.settings.command_line import command_line
from tuning.settings.config import SAMPLE_SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
NUMBERS = range(40)


def table(file, header, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*([header] if header else []), *rows]) + "\n")


def nih(place):
    names = [f"{n // 2:08d}_{n % 2:03d}.png" for n in NUMBERS]
    touch(place, *(f"images_{1 + n // 20:03d}/images/{name}" for n, name in enumerate(names)))
    labels = ["No Finding", "Pneumonia|Infiltration", "Infiltration", "Pneumonia"]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,OriginalImage[Width,Height],"
    rows = [f"{name},{labels[n % 4]},0,{n // 2},60,2500,2048," for n, name in enumerate(names)]
    table(place / "Data_Entry_2017.csv", header, *rows)
    table(place / "train_val_list.txt", "", *names[:30])
    table(place / "test_list.txt", "", *names[30:])
    return {"Pneumonia": 20, "no Pneumonia": 20}, 20, {"test": 10}


def chexpert(place):
    def path(n, split):
        return f"{split}/patient{n // 2:05d}/study1/view{n % 2 + 1}_frontal.jpg"

    splits = {"train": NUMBERS[:30], "valid": NUMBERS[30:]}
    cells = ["1.0", "", "0.0", "-1.0", "1.0"]
    for split, numbers in splits.items():
        touch(place, *(path(n, split) for n in numbers))
        rows = [f"CheXpert-v1.0-small/{path(n, split)},Female,60,Frontal,AP,,{cells[n % 5]},1.0" for n in numbers]
        table(place / f"{split}.csv", "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Pneumonia,Support Devices", *rows)
    return {"Pneumonia": 16, "no Pneumonia": 16}, 20, {"val": 8}


def mimic(place):
    rows, studies = [], []
    for n in NUMBERS:
        subject, study, image = 10000000 + n // 4, 50000000 + n // 2, f"{n:08x}-aaaa"
        touch(place, f"files/p10/p{subject}/s{study}/{image}.jpg")
        rows.append(f"{image},{study},{subject},{['train', 'validate', 'test'][min(n // 4 % 5, 2)]}")
        if n % 2 == 0 and n != 38:
            studies.append(f"{subject},{study},{['1.0', '0.0', '', '-1.0'][n // 2 % 4]},1.0")
    table(place / "mimic-cxr-2.0.0-split.csv", "dicom_id,study_id,subject_id,split", *rows)
    table(place / "mimic-cxr-2.0.0-chexpert.csv", "subject_id,study_id,Pneumonia,Support Devices", *studies)
    return {"Pneumonia": 10, "no Pneumonia": 20}, 10, {}


def covidx(place):
    classes = ["normal", "pneumonia", "COVID-19"]
    for split, numbers in (("train", NUMBERS[:30]), ("test", NUMBERS[30:])):
        touch(place, *(f"{split}/film-{n}.png" for n in numbers))
        table(place / f"{split}.txt", "", *(f"{n // 2} film-{n}.png {classes[n % 3]} rsna" for n in numbers))
    return dict(zip(classes, (14, 13, 13), strict=True)), 20, {"test": 10}


def radiography(place):
    for name in ("COVID", "Normal", "Viral Pneumonia"):
        touch(place, *(f"{name}/{part}/{name}-{n}.png" for part in ("images", "masks") for n in range(12)))
        touch(place, f"{name}.metadata.xlsx")
    touch(place, "README.md.txt")
    return {"COVID": 12, "Normal": 12, "Viral Pneumonia": 12}, 0, {}


def kermany(place):
    for split in ("train", "test", "val"):
        for n in range(12):
            touch(place / "chest_xray", f"{split}/PNEUMONIA/person{n // 2}{split}_virus_{n}.jpeg")
            touch(place / "chest_xray", f"{split}/NORMAL/IM-{n:04d}{split}-0001.jpeg")
    touch(place, "__MACOSX/chest_xray/train/NORMAL/._IM-0001.jpeg", "chest_xray/train/.DS_Store")
    return {"PNEUMONIA": 36, "NORMAL": 36}, 0, {"test": 24, "val": 24}


def rsna(place):
    touch(place, *(f"stage_2_train_images/{n:08x}-bbbb.dcm" for n in NUMBERS))
    boxes = [f"{n:08x}-bbbb,{x},9,9,9,1" for n in NUMBERS if n % 2 for x in (100, 500)]
    none = [f"{n:08x}-bbbb,,,,,0" for n in NUMBERS if n % 2 == 0]
    table(place / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *boxes, *none)
    return {"0": 20, "1": 20}, 40, {}


def vindr(place):
    touch(place, *(f"{'train' if n < 30 else 'test'}/{n:032x}.dicom" for n in NUMBERS))
    readers = [f"{n:032x},R{r},{int(n % 2 == 0 or r == 0)},0" for n in NUMBERS[:30] for r in range(3)]
    table(place / "annotations" / "image_labels_train.csv", "image_id,rad_id,Pneumonia,No finding", *readers)
    test = [f"{n:032x},{(n + 1) % 2},0" for n in NUMBERS[30:]]
    table(place / "annotations" / "image_labels_test.csv", "image_id,Pneumonia,No finding", *test)
    return {"Pneumonia": 20, "no Pneumonia": 20}, 0, {"test": 10}


def mura(place):
    for split, numbers in (("train", NUMBERS[:30]), ("valid", NUMBERS[30:])):
        paths = [
            f"{split}/XR_WRIST/patient{n // 2:05d}/study1_{'negative' if n % 2 else 'positive'}/image{n}.png"
            for n in numbers
        ]
        touch(place, *paths)
        table(place / f"{split}_image_paths.csv", "", *(f"MURA-v1.1/{path}" for path in paths))
    return {"positive": 20, "negative": 20}, 20, {"val": 10}


def ham(place):
    touch(place, *(f"HAM10000_images_part_{1 + n // 20}/ISIC_{n:07d}.jpg" for n in NUMBERS))
    rows = [f"HAM_{n // 2:07d},ISIC_{n:07d},{['nv', 'mel'][n % 2]},histo,60.0,male,back" for n in NUMBERS]
    table(place / "HAM10000_metadata.csv", "lesion_id,image_id,dx,dx_type,age,sex,localization", *rows)
    return {"nv": 20, "mel": 20}, 20, {}


SETS = {
    "NIH ChestX-ray14": nih,
    "CheXpert": chexpert,
    "MIMIC-CXR-JPG": mimic,
    "COVIDx": covidx,
    "COVID-19 Radiography Database": radiography,
    "Kermany": kermany,
    "RSNA pneumonia": rsna,
    "VinDr-CXR": vindr,
    "MURA": mura,
    "HAM10000": ham,
}


def documented():
    """Each set's arguments, by its name, as the page gives them."""
    return {
        name: shlex.split(line) for name, line in re.findall(r"^# (.*)\n.*run_search\.py (.*)$", PAGE.read_text(), re.M)
    }


def test_all_sets_are_on_the_page():
    assert documented().keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_opens_by_its_command(tmp_path, monkeypatch, name):
    words = documented()[name]
    data = words[words.index("--data") + 1]
    place = tmp_path / data.partition("/")[0]
    place.mkdir()
    classes, groups, splits = SETS[name](place)
    monkeypatch.chdir(tmp_path)
    pairs = words[words.index("--set") + 1 :] if "--set" in words else []
    given, _ = command_line({"data": data}, [pairs])
    samples = load_samples(data, **{key: given[key] for key in SAMPLE_SETTINGS if key in given})
    assert Counter(samples["label"]) == classes
    assert samples["group"].nunique() == groups
    counts = Counter(samples["split"])
    assert all(counts[split] == number for split, number in splits.items()) and len(counts) >= 2
    assert all(Path(file).is_file() for file in samples["file"]) and samples["file"].is_unique


@pytest.mark.parametrize(("name", "labels"), [("nih", {"Infiltration", "Pneumonia"}), ("CheXpert", {"Pneumonia"})])
def test_all_labels_of_a_public_set_open_by_its_command(tmp_path, monkeypatch, name, labels):
    [line] = [
        line for line in PAGE.read_text().splitlines() if "multi_label=true '" in line and f"--data {name}" in line
    ]
    words = shlex.split(line)
    data = words[words.index("--data") + 1]
    place = tmp_path / data.partition("/")[0]
    place.mkdir()
    {"nih": nih, "CheXpert": chexpert}[name](place)
    monkeypatch.chdir(tmp_path)
    given, _ = command_line({"data": data}, [words[words.index("--set") + 1 :]])
    samples = load_samples(data, **{key: given[key] for key in SAMPLE_SETTINGS if key in given})
    assert set(class_names(samples["label"])) == labels and samples["group"].nunique() == 20
    unknown = (encoded(samples["label"], class_names(samples["label"])) == -1).sum()
    assert unknown == (8 if name == "CheXpert" else 0)
