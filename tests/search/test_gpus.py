"""How trials share GPUs."""

import pytest

from tuning.search.gpus import MEASURED_FIRST, Packing

SMALL = {
    "backbone": "a",
    "image_size": 64,
    "unfreeze_depth": 2,
    "batch_size": 32,
    "optimizer": "adamw",
    "batch_norm": "frozen",
}


def measured(*peaks, card=80_000.0, **values):
    return [(SMALL | values, peak, card) for peak in peaks]


@pytest.mark.parametrize(
    ("known", "share"),
    [
        ([], 1.0),
        (measured(*[1000.0] * (MEASURED_FIRST - 1)), 1.0),
        (measured(*[1000.0] * MEASURED_FIRST), 0.25),
        (measured(*[30_000.0] * MEASURED_FIRST), 0.5),
        (measured(*[50_000.0] * MEASURED_FIRST), 1.0),
        (measured(*[90_000.0] * MEASURED_FIRST), 1.0),
        (measured(*[1000.0] * MEASURED_FIRST, unfreeze_depth=5), 0.25),
        (measured(*[1000.0] * MEASURED_FIRST, batch_norm="train"), 0.25),
        (measured(*[1000.0] * MEASURED_FIRST, unfreeze_depth=1), 1.0),
        (measured(*[1000.0] * MEASURED_FIRST, batch_size=16), 1.0),
        (measured(*[1000.0] * MEASURED_FIRST, image_size=32), 1.0),
        (measured(*[1000.0] * MEASURED_FIRST, backbone="b"), 1.0),
        (measured(*[1000.0] * MEASURED_FIRST, optimizer="sgd"), 1.0),
        (measured(*[4000.0] * MEASURED_FIRST) + measured(1000.0, card=16_000.0, backbone="b"), 0.5),
    ],
)
def test_the_share_of_a_gpu_is_what_trials_at_least_as_heavy_were_seen_to_need(known, share):
    assert Packing().share(SMALL, known) == share


def test_there_is_one_smaller_share_in_a_run():
    packing, known = Packing(), measured(*[1000.0] * MEASURED_FIRST)
    assert packing.share(SMALL, known) == 0.25
    heavier = SMALL | {"unfreeze_depth": 5}
    known += [(heavier, 30_000.0, 80_000.0)] * MEASURED_FIRST
    assert packing.share(heavier, known) == 1.0  # which fits a half: others' workers would have to be started for it
    assert packing.share(SMALL, known) == 0.25


def test_what_has_outgrown_its_share_gets_a_whole_gpu_and_so_does_what_is_heavier():
    packing, known = Packing(), measured(*[1000.0] * MEASURED_FIRST, unfreeze_depth=5)
    packing.outgrown(SMALL | {"unfreeze_depth": 1})
    assert packing.share(SMALL, known) == 1.0
    assert packing.share(SMALL | {"unfreeze_depth": 0}, known) == 0.25
