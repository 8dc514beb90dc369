import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from searches import make_run, workers
from threadpoolctl import threadpool_info

from tuning.data.images import content_hashes, decode_all, open_images
from tuning.search.cluster import (
    MOST_PRELOADING,
    Slots,
    cluster_map,
    images_here,
    on_each_node,
    ray_running,
    serve_images,
    slots,
    small_shared_memories,
    small_shared_memory,
    start_ray,
)
from tuning.settings.config import InputError, SearchPlan


@pytest.mark.slow
def test_workers_have_loaded_what_trials_need_before_the_first(no_ray):
    @ray.remote(num_cpus=1)
    class Worker:
        def loaded(self) -> bool:
            import sys

            return "tuning.search.worker" in sys.modules

    environment = dict(os.environ)
    with ray_running(SearchPlan(name="test")) as resources:
        # While Ray's processes are forked no other thread computes with those of OpenBLAS, which forks end.
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}
        ((cpus, _),) = resources()
        assert cpus >= 1
        assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
        assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
        assert ray.get(Worker.remote().loaded.remote())
        session = ray._private.worker.global_worker.node.get_session_dir_path()
        lines = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        of_ray = [line for line in lines if session in line]
        assert of_ray and not [line for line in of_ray if "monitor.py" in line or "dashboard.py" in line]
    assert not ray.is_initialized()
    assert dict(os.environ) == environment


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) > MOST_PRELOADING, reason="no worker loads torch ahead")
def test_trials_run_in_the_workers_that_have_loaded_torch(tmp_path, folder, no_ray):
    """New ones would load it while the trial waits. Ray ends those that wait once a trial has reserved their cores."""
    search = make_run(tmp_path / "run", folder, trials=1, epochs=1, early_stopping=False)()
    ran = []
    search.show = lambda search, trial: ran.extend(workers())
    with ray_running(SearchPlan(name="test")) as nodes:
        ((cores, _),) = nodes()
        deadline = time.monotonic() + 60.0
        while len(waiting := workers((b"ray::IDLE",))) < cores and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(waiting) == cores
        reserved = placement_group([{"CPU": cores}])
        assert reserved.wait(60)
        time.sleep(2.0)
        assert sorted(workers((b"ray::IDLE",))) == sorted(waiting)
        remove_placement_group(reserved)
        assert search.run()
    assert len(set(ran)) == 1 and set(ran) <= set(waiting)


def test_an_address_at_which_nothing_answers_is_named_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"RAY_ADDRESS={address}: no Ray answers .* unset RAY_ADDRESS"):
        start_ray(SearchPlan(name="test"))


def end_raylet_of(process: subprocess.Popen[str], ended: set[int]) -> None:
    """End a raylet that a process starts, before it can be part of a cluster."""
    before = len(ended)
    while len(ended) == before and process.poll() is None:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                name, rest = (folder / "stat").read_text().split("(")[1].rsplit(")", 1)
                if name == "raylet" and int(rest.split()[1]) == process.pid and int(folder.name) not in ended:
                    os.kill(int(folder.name), signal.SIGKILL)
                    ended.add(int(folder.name))
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("most", "said"), [(1, "nodes: 1"), (2, "Ray did not start on this machine")])
def test_a_ray_that_does_not_start_is_started_once_more(most, said):
    code = """if True:
        from tuning.search.cluster import ray_running
        from tuning.settings.config import InputError, SearchPlan
        with ray_running(SearchPlan(name="test")) as nodes:
            try:
                print("nodes:", len(nodes()))
            except InputError as error:
                print(error)
    """
    ended: set[int] = set()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(most):
            end_raylet_of(process, ended)
        assert said in process.communicate()[0]
    assert process.returncode == 0 and len(ended) == most


@pytest.mark.slow
def test_an_empty_address_is_none():
    code = "import tuning.search.cluster, os; print('RAY_ADDRESS' in os.environ)"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"RAY_ADDRESS": ""}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_without_an_address_no_other_cluster_on_this_machine_is_joined(no_ray):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 7, "include_dashboard": False})
    try:
        with ray_running(SearchPlan(name="test")) as resources:
            assert resources() == [(os.cpu_count(), 0.0)]
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_map_over_two_nodes_keeps_the_order_and_uses_both(monkeypatch, tmp_path, no_ray):
    def node_and_double(number: int) -> tuple[str, int]:
        node = ray.get_runtime_context().get_node_id()
        (tmp_path / node).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        return node, 2 * number

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with ray_running(SearchPlan(name="test")) as resources:
            assert resources() == [(1, 0.0), (1, 0.0)]
            nodes, doubles = zip(*cluster_map(node_and_double, range(100)), strict=True)
            told = small_shared_memories(least_mb=2.0**50)
            assert len(told) == 2 and all("--shm-size" in words for words in told)
            here = ray.get_runtime_context().get_node_id()

            def end_other_nodes(node):
                if node != here:
                    os.kill(os.getppid(), signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)
                return "lives"

            assert on_each_node(end_other_nodes) == {here: "lives"}
    finally:
        cluster.shutdown()
    assert list(doubles) == list(range(0, 200, 2))
    assert len(set(nodes)) == 2


@pytest.mark.slow
def test_a_node_that_cannot_read_the_drivers_images_gets_them_once_in_shards(tmp_path):
    rng = np.random.default_rng(0)
    files = [str(tmp_path / f"{number}.png") for number in range(10)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(file)
    hashes = content_hashes(files, tmp_path / "driver")
    folder, _ = decode_all(files, hashes, 32, folder=tmp_path / "driver", disk_cache_bytes=10**9)
    expected = np.array(open_images(folder))
    # In a process of its own: in one that had joined another Ray before, actors were seen to be lost.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        fetched = pool.submit(fetched_on_another_node, folder, tmp_path / "node").result()
    assert [path for path, _, _ in fetched] == [tmp_path / "node" / "received" / folder.name] * 2
    assert fetched[0][1] == fetched[1][1]  # written once, although two wanted it at once
    assert all((array == expected).all() for _, _, array in fetched)
    assert not list((tmp_path / "node" / "received").glob(".*"))


def fetched_on_another_node(folder, cache):
    """What two workers read at once on a node with a cache of its own, from which the driver's is out of reach."""

    def fetch():
        here = images_here(folder)
        return here, (here / "images.npy").stat().st_mtime_ns, np.array(open_images(here))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2, env_vars={"FINETUNE_SEARCH_CACHE": str(cache)})
        os.environ["RAY_ADDRESS"] = cluster.address
        with ray_running(SearchPlan(name="test")) as resources:
            resources()
            server = serve_images([folder], shard_bytes=3 * 32 * 32)
            ray.get(server.shape.remote(folder))
            folder.rename(folder.with_name("out of reach"))
            there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            tasks = [ray.remote(fetch).options(scheduling_strategy=there).remote() for _ in range(2)]
            return ray.get(tasks)
    finally:
        cluster.shutdown()


def test_images_that_can_be_read_stay_where_they_are(tmp_path):
    (tmp_path / "images.npy").touch()
    assert images_here(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus_per_trial": 1.0}, "no GPU; use 0 to train on CPUs"),
        ({"device": "cuda"}, "--device cuda: no node has a GPU for trials"),
        ({"cpus_per_trial": 9}, "the only node has 2 cores"),
    ],
)
def test_more_than_there_is_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        slots(SearchPlan(name="x", **settings), [(2, 0.0)])


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "expected"),
    [
        ({}, 2, 0.0, Slots(1, 0.0, 2)),
        ({"cpus_per_trial": 2}, 8, 0.0, Slots(2, 0.0, 4)),
        ({}, 16, 2.0, Slots(8, 1.0, 2)),
        ({"gpus_per_trial": 0.25}, 16, 1.0, Slots(4, 0.25, 4)),
        ({"gpus_per_trial": 0.0}, 16, 1.0, Slots(1, 0.0, 16)),
        ({"device": "cpu"}, 16, 1.0, Slots(1, 0.0, 16)),
        ({"device": "mps"}, 8, 1.0, Slots(8, 1.0, 1)),
        ({"concurrent": 3}, 16, 4.0, Slots(4, 1.0, 3)),
        ({"gpus_per_trial": 0.4}, 16, 4.0, Slots(2, 0.4, 8)),
        ({"trials": 1}, 16, 4.0, Slots(4, 1.0, 1)),
        ({"gpus_per_trial": "auto"}, 16, 2.0, Slots(2, 1.0, 8, packed=2)),
        ({"gpus_per_trial": "auto"}, 2, 0.0, Slots(1, 0.0, 2)),
    ],
)
def test_slots(settings, cpus, gpus, expected):
    assert replace(slots(SearchPlan(name="x", **settings), [(cpus, gpus)]), fitting=0) == expected


@pytest.mark.parametrize(
    ("settings", "nodes", "expected"),
    [
        ({}, [(0, 0.0), (8, 1.0), (32, 4.0)], Slots(8, 1.0, 5)),
        ({}, [(64, 0.0), (8, 1.0), (8, 2.0)], Slots(4, 1.0, 3)),  # as many threads as fit beside each GPU
        ({"cpus_per_trial": 6}, [(8, 1.0), (8, 2.0)], Slots(6, 1.0, 2)),
        ({"cpus_per_trial": 4}, [(6, 0.0), (6, 0.0)], Slots(4, 0.0, 2)),  # a trial runs on one node
    ],
)
def test_slots_of_nodes_that_differ(settings, nodes, expected):
    assert replace(slots(SearchPlan(name="x", **settings), nodes), fitting=0) == expected


def test_what_no_node_has_is_refused():
    with pytest.raises(InputError, match="no node has more than"):
        slots(SearchPlan(name="x", cpus_per_trial=6, gpus_per_trial=1.0), [(4, 1.0), (4, 1.0), (16, 0.0)])


def test_a_cluster_that_grows_is_asked_for_more_trials_than_fit_now():
    plan = SearchPlan(name="x", concurrent=8)
    assert slots(plan, [(2, 0.0)]).count == 2 and slots(plan, [(2, 0.0)], grows=True).count == 8
    assert slots(plan, [(2, 0.0)], grows=True).waiting and not slots(plan, [(8, 0.0)], grows=True).waiting
    assert slots(SearchPlan(name="x"), [(2, 0.0)], grows=True) == Slots(1, 0.0, 2, fitting=2)
    assert slots(plan, [(0, 0.0)], grows=True).count == 8
    with pytest.raises(InputError, match="no node has a core"):
        slots(SearchPlan(name="x"), [(0, 0.0)], grows=True)


def test_a_containers_small_shared_memory_is_told(tmp_path):
    assert small_shared_memory(str(tmp_path / "none")) is None
    assert small_shared_memory(str(tmp_path), least_mb=0.0) is None
    assert "--shm-size" in small_shared_memory(str(tmp_path), least_mb=2.0**50)
