import os
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from tuning.cluster import Slots, cluster_map, gpu_share, ray_running, slots
from tuning.config import InputError, SearchPlan


def test_workers_have_loaded_what_trials_need_before_the_first():
    @ray.remote(num_cpus=1)
    class Worker:
        def loaded(self) -> bool:
            import sys

            return "tuning.trial" in sys.modules

    environment = dict(os.environ)
    with ray_running(SearchPlan(name="test")) as resources:
        cpus, _ = resources()
        assert cpus >= 1
        assert ray.get(Worker.remote().loaded.remote())
    assert not ray.is_initialized()
    assert dict(os.environ) == environment


def test_a_map_over_two_nodes_keeps_the_order_and_uses_both(monkeypatch):
    def node_and_double(number: int) -> tuple[str, int]:
        time.sleep(0.02)
        return ray.get_runtime_context().get_node_id(), 2 * number

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with ray_running(SearchPlan(name="test")) as resources:
            assert resources() == (2, 0.0)
            nodes, doubles = zip(*cluster_map(node_and_double, range(100)), strict=True)
    finally:
        cluster.shutdown()
    assert list(doubles) == list(range(0, 200, 2))
    assert len(set(nodes)) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus_per_trial": 1.0}, "there are 0 GPUs"),
        ({"gpus_per_trial": 1.5}, "only whole GPUs"),
        ({"cpus_per_trial": 9}, "there are 2 cores"),
    ],
)
def test_more_than_there_is_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        slots(SearchPlan(name="x", **settings), cpus=2, gpus=0.0)


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0.0, Slots(1, 0.0, 2)),
        ({"cpus_per_trial": 2}, 8, 0.0, Slots(2, 0.0, 4)),
        ({}, 16, 2.0, Slots(8, 1.0, 2)),
        ({"gpus_per_trial": 0.25}, 16, 1.0, Slots(4, 0.25, 4)),
        ({"gpus_per_trial": 0.0}, 16, 1.0, Slots(1, 0.0, 16)),
        ({"concurrent": 3}, 16, 4.0, Slots(4, 1.0, 3)),
        ({"gpus_per_trial": 0.4}, 16, 4.0, Slots(2, 0.4, 8)),
        ({"trials": 1}, 16, 4.0, Slots(4, 1.0, 1)),
        ({"gpus_per_trial": "auto"}, 16, 2.0, Slots(2, 1.0, 8, packed=2)),
        ({"gpus_per_trial": "auto"}, 2, 0.0, Slots(1, 0.0, 2)),
    ],
)
def test_slots(settings, cpus, gpus, expected):
    assert slots(SearchPlan(name="x", **settings), cpus=cpus, gpus=gpus) == expected


SMALL = {"backbone": "a", "image_size": 64, "unfreeze_depth": 2, "batch_size": 32}


@pytest.mark.parametrize(
    ("measured", "share"),
    [
        ([], 1.0),
        ([(SMALL, 1000.0, 80_000.0)], 0.25),
        ([(SMALL, 20_000.0, 80_000.0)], 0.5),
        ([(SMALL, 40_000.0, 80_000.0)], 1.0),
        ([(SMALL, 90_000.0, 80_000.0)], 1.0),
        ([(SMALL | {"unfreeze_depth": 5}, 20_000.0, 80_000.0), (SMALL, 1000.0, 80_000.0)], 0.25),
        ([(SMALL | {"unfreeze_depth": 1}, 1000.0, 80_000.0)], 1.0),
        ([(SMALL | {"batch_size": 16}, 1000.0, 80_000.0)], 1.0),
        ([(SMALL | {"image_size": 32}, 1000.0, 80_000.0)], 1.0),
        ([(SMALL | {"backbone": "b"}, 1000.0, 80_000.0)], 1.0),
    ],
)
def test_the_share_of_a_gpu_is_what_a_heavier_trial_was_seen_to_need(measured, share):
    assert gpu_share(SMALL, measured) == share
