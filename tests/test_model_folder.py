import numpy as np
import pytest
import torch
from conftest import draw_folder
from PIL import Image

from tuning import backbones
from tuning.config import InputError, TrialConfig
from tuning.model_folder import load_model, save_ensemble, save_model

CONFIG = TrialConfig(backbone="test_resnet", image_size=32, seed=5)


@pytest.fixture
def network():
    built = backbones.build("test_resnet", classes=2, image_size=32, head_dropout=0.3, seed=5, weights=None)
    with torch.no_grad():
        built.get_classifier()[1].weight.mul_(50)
    return built.eval()


def test_a_saved_model_predicts_the_same_from_anywhere(tmp_path, network):
    save_model(tmp_path / "model", network, CONFIG, ["dark", "light"], provenance={"trial_id": "t00001"})
    (tmp_path / "model").rename(tmp_path / "moved")
    files = sorted(draw_folder(tmp_path / "images", count=3).rglob("*.png"))
    model = load_model(tmp_path / "moved")
    assert model.classes == ("dark", "light") and model.config == CONFIG
    together = model.predict(files)
    assert together.shape == (6, 2)
    assert together.sum(axis=1) == pytest.approx(1.0)
    alone = np.concatenate([model.predict([file]) for file in files])
    assert np.allclose(together, alone, atol=1e-6)
    again = load_model(tmp_path / "moved")
    assert np.array_equal(again.predict(files), together)


def test_a_model_predicts_with_the_fit_that_it_was_trained_with(tmp_path, network):
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    boxed = np.zeros((32, 32), np.uint8)
    boxed[8:24] = np.asarray(Image.fromarray(wide).convert("L"))
    Image.fromarray(boxed).save(tmp_path / "boxed.png")
    save_model(tmp_path / "plain", network, CONFIG, ["dark", "light"])
    save_model(tmp_path / "boxing", network, CONFIG, ["dark", "light"], fit="letterbox", drop_colour=True)
    plain, boxing = load_model(tmp_path / "plain"), load_model(tmp_path / "boxing")
    by_hand, itself = plain.predict([tmp_path / "boxed.png"]), boxing.predict([tmp_path / "wide.png"])
    assert np.allclose(by_hand, itself) and not np.allclose(plain.predict([tmp_path / "wide.png"]), itself)

    config = tmp_path / "boxing" / "config.yaml"
    config.write_text(config.read_text().replace("fit: letterbox", "fit: fold"))
    with pytest.raises(InputError, match="'squash', 'crop' or 'letterbox'"):
        load_model(tmp_path / "boxing")


def test_unreadable_images_are_named_together(tmp_path, network):
    save_model(tmp_path / "model", network, CONFIG, ["dark", "light"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "model").predict([tmp_path / "text.png", tmp_path / "nowhere.png"])
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("name", ["..", ".", "../other", "/etc", "a/b", "a\\b", "", "C:", 3])
def test_an_ensemble_of_folders_elsewhere_is_refused(tmp_path, name):
    save_ensemble(tmp_path, {name: 1.0}, ["a", "b"], 1.0)
    with pytest.raises(InputError, match="must name folders in it, not"):
        load_model(tmp_path)


def test_what_is_no_model_folder_is_refused(tmp_path):
    for document in (
        None,
        "[1, 2]",
        "config: {backbone: test_resnet, speed: 3}\nclasses: [a, b]",
        "a: [",
        "classes: 3",
    ):
        if document is not None:
            (tmp_path / "config.yaml").write_text(document)
        with pytest.raises(InputError):
            load_model(tmp_path)
