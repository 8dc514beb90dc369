"""A final model on labelled images from elsewhere: figures, what differs, copies, and classes by other names."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import examples
from test_train_final import make_best
from test_train_final import run as train_final

from tuning import train_final as final
from tuning.evaluate import Flags, run
from tuning.insight.shift import NUMBERS, described, shifts
from tuning.model.evaluation import differences, near_copies, outlines
from tuning.record.tables import read_table
from tuning.settings.config import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory, folder):
    """A tested model's folder."""
    return train_final(final.Flags(str(make_best(tmp_path_factory.mktemp("runs") / "run", folder))))


@pytest.fixture
def hospital(tmp_path):
    """Makes another hospital's images: of another seed, exposure and size."""

    def make(name="other", *, brighter=0, side=40, classes=("dark", "light"), count=20):
        rng = np.random.default_rng(5)
        for index, label in enumerate(classes):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(60 + 120 * (index % 2) + brighter, 40, (side, side)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"p{number // 2}_{number}.png")
        return str(tmp_path / name)

    return make


def evaluated(model, data, *arguments, **flags):
    """The metrics that are written, and the folder."""
    shutil.rmtree(model.parent / f"evaluation-{flags.get('name', 'other')}", ignore_errors=True)
    place = run(Flags(str(model), data, *arguments, **flags))
    return json.loads((place / "metrics.json").read_text()), place


def test_a_set_like_the_training_images(model, hospital, capsys):
    before = (model.parent / "test_readings.jsonl").read_bytes()
    metrics, place = evaluated(model, hospital(), set=((r"group_pattern=(p\d+)_",),))
    here = metrics["evaluation"]
    assert here["images"] == 40 and here["groups"] == 10 and here["accuracy"] > 0.9
    assert metrics["copies"] == 0 and metrics["test"]["images"] == 12
    assert not any(shift["notable"] for shift in metrics["shift"] if shift["fact"] in NUMBERS)
    assert "no clear difference from the training images" in capsys.readouterr().out
    assert {"evaluation.html", "mistakes.html", "roc.png"} <= {path.name for path in place.iterdir()}
    table = read_table(place / "predictions.parquet")
    assert ((table["probability_dark"] > 0.5) == (table["label"] == "dark")).mean() == here["accuracy"]
    assert (model.parent / "test_readings.jsonl").read_bytes() == before


def test_another_exposure_and_size_are_seen_with_the_drop(model, hospital, capsys):
    metrics, place = evaluated(model, hospital(brighter=130, side=64))
    first = {shift["fact"]: shift["separation"] for shift in metrics["shift"]}
    assert first["width"] == first["height"] == first["brightness"] == 1.0
    change = metrics["differences"]["accuracy"]
    assert change["difference"] < -0.2 and change["difference_95"][1] < 0
    specificity = metrics["differences"]["classes"]["light"]["specificity"]
    assert specificity["difference_95"][1] < 0
    said = capsys.readouterr().out
    assert "lower by" in said and re.search(r"width: 64 here, 40 in training \(tells 100% of the images apart\)", said)
    page = (place / "evaluation.html").read_text()
    assert "Different here:" in page and "accuracy" in page and page.count("<img") == 3


def test_copies_of_images_that_the_model_knows_are_left_out(model, hospital, folder):
    place, samples = hospital(), read_table(model.parent / "samples.parquet")
    for number, file in enumerate(sorted((folder / "dark").iterdir())):
        if number % 2:
            shutil.copy(file, f"{place}/dark/copied{number}.png")
        else:
            Image.open(file).save(f"{place}/dark/again{number}.png", compress_level=1)  # other bytes, the same pixels
    shutil.copy(f"{place}/light/p0_0.png", f"{place}/light/twice.png")
    metrics, _ = evaluated(model, place)
    tested = ((samples["split"] == "test") & (samples["label"] == "dark")).sum()
    assert metrics["copies"] == 30 and metrics["evaluation"]["images"] == 40
    said = "\n".join(metrics["remarks"])
    assert f"left out: {30 - tested} copies of images that the model was trained on" in said
    assert f"left out: {tested} copies of images of its own test set" in said
    assert "left out: 1 image identical to another one here" in said
    with pytest.raises(InputError, match="was trained, validated or tested on all of these images"):
        run(Flags(str(model), str(folder)))


def test_classes_by_other_names_more_and_fewer(model, hospital):
    named = hospital("named", classes=("Dark", "light"))
    with pytest.raises(InputError, match=r"has the classes Dark, light, the model dark, light; did you mean Dark\?"):
        run(Flags(str(model), named))
    renamed, _ = evaluated(model, hospital(classes=("dim", "bright", "other")), rename=("dim=dark", "bright=light"))
    assert renamed["evaluation"]["images"] == 40
    said = "left out: 20 images of classes that the model lacks: other (--rename THEIRS=OURS)"
    assert said in renamed["remarks"]
    metrics, place = evaluated(model, hospital("one", classes=("dark",)), name="one")
    assert "no images of light: what needs them is not measured" in metrics["remarks"]
    here, differences = metrics["evaluation"], metrics["differences"]
    assert here["auroc"] is here["balanced_accuracy"] is metrics["recalibrated"] is None
    assert differences["auroc"] is differences["accuracy"] is differences["classes"]["light"]["sensitivity"] is None
    assert differences["classes"]["dark"]["sensitivity"] is not None
    assert (place / "evaluation.html").exists()
    wrong = {"dim=dark": "the data has no such class", "Dark=grey": "give THEIRS=OURS", "Dark": "give THEIRS=OURS"}
    for rename, said in wrong.items():
        with pytest.raises(InputError, match=said):
            run(Flags(str(model), named, rename=(rename,)))


def test_splits_mean_nothing(model, hospital, tmp_path):
    place = hospital("parts")
    rows = [f"{file},{file.parent.name},fold {n % 5}" for n, file in enumerate(sorted(Path(place).rglob("*.png")))]
    (tmp_path / "parts.csv").write_text("path,label,split\n" + "\n".join(rows))
    metrics, _ = evaluated(model, str(tmp_path / "parts.csv"), name="parts")
    assert metrics["evaluation"]["images"] == 40


def test_where_results_go(model, hospital, tmp_path):
    data = hospital("Other Hospital")
    assert run(Flags(str(model), data)).name == "evaluation-Other_Hospital"
    (tmp_path / "out").mkdir()
    assert run(Flags(str(model), data, out=str(tmp_path / "out"))).parent == tmp_path / "out"
    with pytest.raises(InputError, match="no folder to write in; give another by --out"):
        run(Flags(str(model), data, out=str(tmp_path / "absent")))


def test_what_is_there_is_not_overwritten_and_settings_without_effect_are_refused(model, hospital):
    data = hospital("twice")
    run(Flags(str(model), data))
    with pytest.raises(InputError, match="evaluation-twice exists"):
        run(Flags(str(model), data))
    with pytest.raises(InputError, match="epochs: has no effect here"):
        run(Flags(str(model), data, name="again", set=(("epochs=3",),)))
    with pytest.raises(InputError, match=r"must be letters.*give one by --name"):
        run(Flags(str(model), data, name="a/b"))


def test_images_that_cannot_be_read(model, hospital):
    data = hospital("damaged")
    with open(f"{data}/dark/broken.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(InputError, match="1 of 41 images can't be read"):
        run(Flags(str(model), data))
    metrics, _ = evaluated(model, data, name="damaged", set=(("skip_unreadable=true",),))
    assert metrics["evaluation"]["images"] == 40 and any("that can't be read" in line for line in metrics["remarks"])


def test_copies_that_were_resized_or_compressed_again_are_left_out(model, hospital, folder):
    place, samples = hospital(), read_table(model.parent / "samples.parquet")
    for number, file in enumerate(sorted((folder / "light").iterdir())):
        image = Image.open(file)
        if number % 2:
            image = image.resize((160, 160), Image.Resampling.BICUBIC).point(lambda value: value * 0.9)
        image.save(f"{place}/light/again{number}.jpg", quality=85)
    Image.new("L", (40, 40), 128).save(f"{place}/dark/nothing.png")  # has no outline, and so no copy
    metrics, _ = evaluated(model, place)
    assert metrics["copies"] == 30 and metrics["evaluation"]["images"] == 41
    tested = ((samples["split"] == "test") & (samples["label"] == "light")).sum()
    said = "\n".join(metrics["remarks"])
    assert f"left out: {30 - tested} near copies of images that the model was trained on" in said
    old = model.with_name("old-model")
    shutil.copytree(model, old)
    table = pq.read_table(old / "known_images.parquet")
    pq.write_table(table.drop_columns("outline"), old / "known_images.parquet")
    metrics, _ = evaluated(old, place)
    assert metrics["copies"] == 0 and any("near copies are unknown" in line for line in metrics["remarks"])
    shutil.rmtree(old)


@examples(40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([24, 64, 128]))
def test_an_outline_outlives_compression_and_differs_between_images(seed, side):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 16, 16), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in coarse]
    again = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=70)
        again.append(np.asarray(Image.open(file)))
    images = np.stack([*map(np.asarray, pictures), *again])[..., None]
    own, copied = outlines(images, np.arange(6)), outlines(images, np.arange(6, 12))
    known = pd.DataFrame({"outline": own})
    assert near_copies(known, copied).all() and not near_copies(known.iloc[1:], copied[:1]).any()


def test_a_model_of_an_older_version_is_evaluated_without_copies_and_shift(model, hospital, tmp_path):
    old = tmp_path / "old" / "model"
    shutil.copytree(model, old)
    (old / "known_images.parquet").unlink()
    metrics, place = evaluated(old, hospital())
    assert metrics["shift"] == [] and any("are unknown" in line for line in metrics["remarks"])
    assert "Unknown: the model&#x27;s folder" in (place / "evaluation.html").read_text()


def test_what_the_model_keeps_of_its_images_names_none(model):
    table = pd.read_parquet(model / "known_images.parquet")
    assert (
        len(table) == 60
        and list(table["sha256"]) == sorted(table["sha256"])
        and not {"path", "file", "label"} & set(table)
    )
    names = yaml.safe_load((model / "config.yaml").read_text())["classes"]
    assert not any(name in str(cell) for name in names for cell in table.to_numpy().ravel())


@examples(60)
@given(
    here=st.floats(0, 1),
    there=st.floats(0, 1),
    reach=st.tuples(*[st.floats(0.001, 0.3)] * 4),
)
def test_an_interval_of_a_difference_holds_it_and_is_wider_than_either(here, there, reach):
    def figures(value, below, above):
        names = ("accuracy", "balanced_accuracy", "auroc")
        bounds = {f"{name}_95": [value - below, value + above] for name in names}
        return dict.fromkeys(names, value) | bounds | {"classes": {}}

    found = differences(figures(here, *reach[:2]), figures(there, *reach[2:]))["auroc"]
    low, high = found["difference_95"]
    assert low <= found["difference"] <= high
    assert high - low >= max(reach[0] + reach[1], reach[2] + reach[3]) - 1e-9


def test_equal_sets_have_no_shift():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (200, 8, 8, 1), dtype=np.uint8)
    facts = pd.DataFrame({"width": 8, "height": rng.integers(8, 20, 200), "mode": "L", "format": "PNG", "bytes": 100})
    table = described(images, np.arange(200), facts)
    assert not any(shift.notable for shift in shifts(table.iloc[:100], table.iloc[100:]))
    brighter = table.assign(brightness=table["brightness"] + 200)
    assert shifts(table, brighter)[0][0] == "brightness" and shifts(table, brighter)[0][3:] == (1.0, True)
    other = table.assign(**{"colour mode": "RGB"})
    assert shifts(table, other)[0][0] == "colour mode" and shifts(table, other)[0][3:] == (1.0, True)
    spread = table.assign(width=np.where(np.arange(200) % 2, 4, 16))
    assert shifts(table, spread)[0].separation == pytest.approx(0.75)
