import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import examples

from tuning.data.phantoms import CLASSES, draw_phantom, write_phantoms
from tuning.settings.config import InputError


def draw_numbered(kind: str, count: int, side: int = 64) -> npt.NDArray[np.uint8]:
    return np.stack(
        [draw_phantom(kind, np.random.default_rng([0, CLASSES.index(kind), i]), side) for i in range(count)]
    )


@examples(20)
@given(kind=st.sampled_from(CLASSES), seed=st.integers(0, 2**31), side=st.integers(32, 130))
def test_any_film_is_grey_square_varied_and_drawn_alike_twice(kind: str, seed: int, side: int) -> None:
    film = draw_phantom(kind, np.random.default_rng(seed), side)
    assert film.shape == (side, side) and film.dtype == np.uint8
    assert film.std() > 15
    assert (film == 255).mean() < 0.5
    np.testing.assert_array_equal(film, draw_phantom(kind, np.random.default_rng(seed), side))


@examples(20)
@given(seed=st.integers(0, 2**31))
def test_a_finding_changes_the_lungs_and_leaves_the_patient(seed: int) -> None:
    films = {kind: draw_phantom(kind, np.random.default_rng(seed), 64).astype(int) for kind in CLASSES}
    for kind in CLASSES[1:]:
        change = np.abs(films[kind] - films["normal"])
        assert change.max() >= 5
        assert (change <= 1).mean() > 0.25


def test_diffuse_opacities_are_on_both_sides_and_focal_ones_mostly_on_one() -> None:
    def lesser_side_share(kind: str, seed: int) -> float:
        films = [draw_phantom(k, np.random.default_rng(seed), 64).astype(float) for k in (kind, "normal")]
        brighter = np.clip(films[0] - films[1] - 6, 0, None)
        sides = brighter[:, :32].sum(), brighter[:, 32:].sum()
        return min(sides) / (sum(sides) + 1)

    shares = {kind: np.median([lesser_side_share(kind, seed) for seed in range(40)]) for kind in CLASSES[1:]}
    assert shares["focal_opacity"] < 0.05
    assert shares["diffuse_opacity"] > 0.15


def test_brightness_and_contrast_do_not_predict_the_class() -> None:
    films = {kind: draw_numbered(kind, 80) for kind in CLASSES}
    for statistic in (np.mean, np.std):
        values = {kind: statistic(films[kind], axis=(1, 2)) for kind in CLASSES}
        for kind in CLASSES[1:]:
            auroc = (values[kind][:, None] > values["normal"]).mean()
            assert 0.35 < auroc < 0.65, (statistic.__name__, kind, auroc)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="kind must be one of normal, focal_opacity, diffuse_opacity, got 'covid'"):
        draw_phantom("covid", np.random.default_rng(0), 64)


def test_writes_grey_png_files_by_class_each_from_its_own_seed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "phantoms"
    assert write_phantoms(folder, images_per_class=3, side=48, seed=5) == folder
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")) == sorted(
        f"{kind}/000{number}.png" for kind in CLASSES for number in range(3)
    )
    assert [path.name for path in folder.parent.iterdir()] == ["phantoms"]
    for number, kind in enumerate(CLASSES):
        with Image.open(folder / kind / "0002.png") as image:
            assert image.mode == "L"
            expected = draw_phantom(kind, np.random.default_rng([5, number, 2]), 48)
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_no_two_images_are_equal(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "phantoms", images_per_class=10, side=32)
    assert len({path.read_bytes() for path in folder.rglob("*.png")}) == 30


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "phantoms", images_per_class=2, side=32)
    (folder / ".DS_Store").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_phantoms(folder, images_per_class=2, side=32)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("other", [{"images_per_class": 3}, {"side": 40}, {"seed": 1}])
def test_a_folder_of_other_images_is_refused_and_kept(tmp_path: Path, other: dict[str, int]) -> None:
    folder = write_phantoms(tmp_path / "phantoms", **{"images_per_class": 2, "side": 32, "seed": 0} | other)
    names = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="delete it or name another folder"):
        write_phantoms(folder, images_per_class=2, side=32, seed=0)
    assert sorted(folder.rglob("*")) == names


def test_an_incomplete_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "phantoms", images_per_class=2, side=32)
    (folder / "normal" / "0001.png").unlink()
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for place in (folder, file):
        with pytest.raises(InputError, match=f"{place.name}: must be absent, empty or hold 2 generated images"):
            write_phantoms(place, images_per_class=2, side=32)
    assert file.read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_phantoms(tmp_path, images_per_class=1, side=32)
    assert len(list(tmp_path.rglob("*.png"))) == 3


def test_all_wrong_arguments_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        write_phantoms(tmp_path / "phantoms", images_per_class=0, side=8, seed=-1)
    assert [fault.split(" must")[0] for fault in error.value.faults] == [
        "phantoms: images_per_class",
        "phantoms: side",
        "phantoms: seed",
    ]
    assert not list(tmp_path.iterdir())


def test_several_writers_at_once_leave_one_complete_folder(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(write_phantoms, folder, images_per_class=4, side=32) for _ in range(4)]
        assert [job.result() for job in jobs] == [folder] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["phantoms"]
    assert len(list(folder.rglob("*.png"))) == 12


def test_a_killed_writer_leaves_no_folder_and_the_next_one_writes_it(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    script = (
        "import os, sys, tuning.data.phantoms as p\n"
        "draw, count = p.draw_phantom, iter(range(5))\n"
        "p.draw_phantom = lambda *a: draw(*a) if next(count, None) is not None else os._exit(9)\n"
        "p.write_phantoms(p.Path(sys.argv[1]), images_per_class=4, side=32)"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=root, env=os.environ | {"PYTHONPATH": "."})
    assert ended.returncode == 9
    assert not folder.exists()
    write_phantoms(folder, images_per_class=4, side=32)
    assert len(list(folder.rglob("*.png"))) == 12
