"""The benchmark's plan and arithmetic on made-up parts, and the whole of it once, very small."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from shared import ONE_CORE, draw_folder

from tuning.settings.config import InputError
from tuning.settings.space_file import load
from tuning.settings.values import DEPTH_ALL

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
speed = importlib.util.module_from_spec(spec)
sys.modules["speed"] = speed  # dataclasses look their module up
spec.loader.exec_module(speed)

CONFIG = {"backbone": "tf_efficientnet_lite0", "unfreeze_depth": 0, "learning_rate": 1e-3, "augmentation": "none"}


def made_up(seconds, losses=None, start=0.0, **config):
    """A trial that begins at `start` and trains without a pause."""
    losses = losses or [0.5] * len(seconds)
    ends = [start + sum(seconds[: count + 1]) for count in range(len(seconds))]
    epochs = [
        {"epoch": count + 1, "seconds": seconds[count], "val_loss": losses[count], "clock": ends[count]}
        for count in range(len(seconds))
    ]
    times = {"started_at": start, "ended_at": ends[-1]} if seconds else {}
    return {"config": CONFIG | config, "epochs": epochs, **times}


# ---- the plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 33))
def test_depths_are_spread_evenly(count):
    counts = Counter(config["unfreeze_depth"] for config in speed.configs(count))
    per_depth = [counts[depth] for depth in range(DEPTH_ALL + 1)]
    assert max(per_depth) - min(per_depth) <= 1


def test_every_policy_and_both_backbones_are_there_and_depths_have_both():
    chosen = speed.configs(16)
    assert {config["augmentation"] for config in chosen} == set(speed.POLICIES)
    for depth in range(DEPTH_ALL + 1):
        assert {config["backbone"] for config in chosen if config["unfreeze_depth"] == depth} == set(speed.BACKBONES)


def test_a_half_has_two_head_only_configurations_of_the_same_views_and_one_without_augmentation():
    head_only = [[config for config in speed.configs(16)[half::2] if not config["unfreeze_depth"]] for half in (0, 1)]
    views = Counter((config["backbone"], config["augmentation"]) for config in head_only[0])
    assert views.most_common(1)[0][1] == 2
    assert [config["augmentation"] for config in head_only[1]] == ["none"]


def test_the_space_is_one_that_the_product_takes(tmp_path):
    half = speed.configs(100)[0::2]
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(speed.space(half, 64)))
    assert len(load(str(path)).start) == len(half)


# ---- the arithmetic ---------------------------------------------------------------------------------------------


def test_floor_of_one_configuration():
    costs = {"tf_efficientnet_lite0 0": {"prefix": 10.0, "step": 1.0, "evaluate": 0.5}}
    # 64 training images are 2 steps; 32 for validation and 32 of training are 2 batches.
    assert speed.floor_seconds([CONFIG], costs, epochs=3, train=64, val=32) == 3 * (2 * 1 + 2 * 0.5) + 2 * 10 + 2 * 10
    light = CONFIG | {"augmentation": "light"}
    assert (
        speed.floor_seconds([light], costs, epochs=3, train=64, val=32) == 3 * (2 * 1 + 2 * 0.5) + 2 * 10 + 3 * 2 * 10
    )


def test_floor_counts_views_once_by_the_largest_frozen_part():
    costs = {f"tf_efficientnet_lite0 {depth}": {"prefix": 10.0 - depth, "step": 0, "evaluate": 0} for depth in (0, 2)}
    alone, twice, deeper = CONFIG, CONFIG | {"learning_rate": 1e-4}, CONFIG | {"unfreeze_depth": 2}

    def floor(*chosen):
        return speed.floor_seconds(chosen, costs, epochs=1, train=32, val=32)

    assert floor(alone) == floor(alone, twice) == 10 + 2 * 10
    assert floor(alone, deeper) == 10 + 2 * 10 + 2 * 8


def test_floor_of_fewer_images_than_a_batch_takes_them_as_the_batch():
    costs = {"tf_efficientnet_lite0 0": {"prefix": 0.0, "step": 1.0, "evaluate": 0.0}}
    assert speed.floor_seconds([CONFIG], costs, epochs=1, train=14, val=6) == 1


def test_utilisation_counts_until_the_last_start():
    first, second, last = made_up([4.0, 4.0]), made_up([2.0], start=1.0), made_up([9.0], start=4.0)
    # Of the first four seconds of two slots, the first trial trains 4 and the second 2.
    assert speed.utilisation([{"trials": [first, second, last]}], slots=2) == pytest.approx(6 / 8)
    assert math.isnan(speed.utilisation([{"trials": [first, second]}], slots=2))


def test_start_up_is_what_comes_before_the_first_epoch():
    part = {"started": 90.0, "trials": [made_up([3.0, 3.0], start=105.0), made_up([4.0], start=102.0)]}
    assert speed.start_up(part) == 12
    assert math.isnan(speed.start_up({"started": 90.0, "trials": [made_up([])]}))


def test_ratios_and_notes_of_a_configuration():
    recipe, before, product = made_up([10.0] * 3), made_up([12.0] * 3), made_up([8.0, 1.0, 1.0])
    assert speed.ratio(speed.seconds_of(recipe), speed.seconds_of(product)) == 3
    assert speed.note({"recipe": recipe, "product": product}) == "10.0x from epoch 2 on"
    cached = made_up([1.0], augmentation="light")
    assert speed.note({"recipe": recipe, "product": cached}) == ""
    cached["epochs"][0]["cache_hits"] = 64
    assert speed.note({"recipe": recipe, "product": cached}) == "views from the cache"
    lost = dict.fromkeys(("recipe", "before", "product"), made_up([]))
    lines = speed.table_lines([{"recipe": recipe, "before": before, "product": product}, lost])
    assert lines[0].split()[3:-2] == "recipe s before s product s recipe/product before/product".split()
    assert lines[1].split()[4:] == "30.0 36.0 10.0 3.00x 3.60x 0.5000 0.5000 0.5000 10.0x from epoch 2 on".split()
    assert "nan" in lines[2]


def test_summary_of_made_up_halves():
    parts = {
        "recipe": [{"started": 0.0, "wall_s": 50.0, "trials": [made_up([20.0], start=5.0)]}] * 2,
        "product": [{"started": 0.0, "wall_s": 20.0, "trials": [made_up([10.0], start=6.0)]}] * 2,
    }
    text = "\n".join(speed.summary_lines(parts, 8.0, 2))
    assert "recipe 100.0 s, product 40.0 s: 2.50x" in text
    assert "recipe 40.0 s, product 20.0 s: 2.00x" in text
    assert "recipe 5.0, 5.0 s; product 6.0, 6.0 s" in text
    assert "8.0 s of wall, 20% of the product's" in text


# ---- what makes it invalid --------------------------------------------------------------------------------------


def test_losses_may_differ_by_seed_noise_alone():
    still, jumping = made_up([1.0, 1.0], [0.51, 0.50]), made_up([1.0, 1.0], [0.7, 0.6])
    assert speed.tolerance(still) == 0.15
    assert speed.tolerance(still, jumping) == pytest.approx(0.3)
    assert speed.faults({"recipe": still, "product": made_up([1.0, 1.0], [0.64, 0.64])}, 2) == []
    (fault,) = speed.faults({"recipe": still, "before": jumping, "product": made_up([1.0, 1.0], [0.66, 0.66])}, 2)
    assert "0.5000 of recipe and 0.6600 of product are over 0.1500 apart" in fault


@pytest.mark.parametrize("lost", [None, math.nan])
def test_a_lost_loss_is_a_fault(lost):
    assert speed.faults({"recipe": made_up([1.0], [0.5]), "product": made_up([1.0], [lost])}, 1)


def test_missing_epochs_are_a_fault():
    trials = {"recipe": made_up([1.0]), "product": made_up([])}
    assert speed.faults(trials, 1) == ["product trained 0 of 1 epochs"]


@pytest.mark.parametrize(
    "flags",
    [
        {"configs": 1},
        {"slots": 10_000},
        {"image_size": 8},
        {"epochs": 0},
        {"sides": ("product",)},
        {"sides": ("recipe", "before")},
    ],
)
def test_flags_that_make_no_sense(flags, tmp_path):
    with pytest.raises(InputError):
        speed.prepared(speed.Flags(out=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


# ---- the whole --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_configurations_end_to_end_and_parts_are_not_made_again(tmp_path):
    data = draw_folder(tmp_path / "images", count=12)
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--configs", "2", "--epochs", "2"]
    command += ["--image-size", "32", "--data", str(data), "--out", "out", "--slots", "1", "--json", "figures.json"]

    def run(*more):
        options = {"cwd": tmp_path, "env": os.environ | ONE_CORE, "capture_output": True, "text": True}
        return subprocess.run([*command, *more], check=False, **options)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [tmp_path / "out" / f"{name}-{half}.json" for name in ("recipe", "product") for half in (0, 1)]
    parts.append(tmp_path / "out" / "floor.json")
    made = [path.stat().st_mtime_ns for path in parts]
    for part in parts[:4]:
        (trial,) = json.loads(part.read_text())["trials"]
        assert [row["epoch"] for row in trial["epochs"]] == [1, 2]
    assert "their final losses agree" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [trial["unfreeze_depth"] for trial in figures["configurations"]] == [0, 3]
    assert figures["totals"].keys() == {"recipe", "product"}

    again = run()
    assert again.returncode == 0
    assert done.stdout.endswith(again.stdout.partition("hardware")[2])
    assert made == [path.stat().st_mtime_ns for path in parts]
    assert run("--epochs", "3").returncode == 2  # its parts were made with other flags
