"""Ray: started while the driver still loads and checks, with workers that have loaded what trials need."""

import fcntl
import logging
import math
import os
import shutil
import site
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

# Ray reads it when it is imported: Ray on this machine alone then listens on the loopback, not on every interface.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuning.data.decoding import Pixels
from tuning.data.images import DECODING, Item, Result, open_images, parallel_map
from tuning.settings.config import InputError, SearchPlan, cache_folder

SHARES = (1.0, 0.5, 0.25)  # of a GPU; few, since an actor serves trials of one share only
MEMORY_MARGIN = 1.25  # over the peak of what tensors took: the allocator's blocks are not all full
MOST_PRELOADING = 16  # cores; Ray starts a worker on each, and on a machine with GPUs most would load torch for nothing
PART = 16  # items of one of `cluster_map`'s tasks
SHARD_BYTES = 256 * 2**20  # of decoded images, sent between nodes at once
IMAGE_SERVER = "finetune-search-images"
LEAST_SHARED_MB = 1024.0  # of /dev/shm; a container has 64 by default
NOTICED_LOOKS = 60  # half a second apart, within which Ray knows that a node is gone
CONTEXT_MB = 600.0  # what a process takes on a GPU before its first tensor, roughly


@dataclass(frozen=True)
class Slots:
    """What each trial is given, and how many run at once."""

    cpus: int
    gpus: float
    count: int
    packed: int = 0  # GPUs on which each trial is given the share that `gpu_share` finds
    waiting: bool = False  # for nodes to join: so many don't fit yet


Node = tuple[int, float]  # its cores and GPUs


@contextmanager
def ray_running(plan: SearchPlan) -> Iterator[Callable[[], list[Node]]]:
    """Ray on this machine, or on the cluster that RAY_ADDRESS names, started in the background.

    Workers get this package's code, wherever the command was typed.

    Yields:
        A function that waits for Ray and gives its nodes.
    """
    environment = dict(os.environ)
    with ThreadPoolExecutor(1) as pool:  # its thread must live on: Ray's processes end with the one that started them
        starting = pool.submit(_start, plan)
        try:
            yield starting.result
        finally:
            starting.exception()  # wait: what is half started can't be shut down
            ray.shutdown()
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


def _start(plan: SearchPlan) -> list[Node]:
    options: dict[str, Any] = {}
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # the old output heeds verbose=0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Ray's own experiment state is never read
    }
    package = Path(__file__).parents[1]
    if "RAY_ADDRESS" in os.environ:
        options["runtime_env"] = {"py_modules": [str(package)]}
    else:
        options["address"] = "local"  # without it Ray joins whichever cluster was started on this machine last
        cores = os.cpu_count() or 1
        if cores <= MOST_PRELOADING and 2 * min(plan.concurrent or cores, plan.trials) >= cores:
            # Workers load torch at once, not when a trial starts: 7.9 s to the first epoch instead of 10.4.
            environment["RAY_preload_python_modules"] = "tuning.search.trainable"
            environment["RAY_prestart_worker_first_driver"] = "0"  # those would be others, and the first wait in vain
        if str(package.parent) not in site.getsitepackages():
            paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a lost worker's traceback stands in the table
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **options)
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(node.get("CPU", 0)), float(node.get("GPU", 0))) for node in resources]


def cluster_map(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Map over the cores of all nodes, in order; whatever `function` reads has to be readable on each of them."""
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        yield from parallel_map(function, items)
        return
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_call_each)
    ahead = 2 * int(ray.cluster_resources()["CPU"])
    pending: deque[Any] = deque()
    for first in range(0, len(items), PART):
        pending.append(task.remote(function, items[first : first + PART]))
        if len(pending) > ahead:
            yield from ray.get(pending.popleft())
    yield from chain.from_iterable(map(ray.get, pending))


def node_names() -> dict[str, str]:
    """What the nodes are called, by their ids: a machine may have several."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in alive}


def on_each_node(check: Callable[[str], str | None]) -> dict[str, str]:
    """What a check, called on each node with the node's id, has to say where it has a complaint, by their ids.

    Nodes that are lost meanwhile have no say.
    """
    task = ray.remote(num_cpus=0)(_call)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(check, node)
        for node in node_names()
    }
    found = {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer)
        except RayTaskError:
            raise
        except RayError:
            if not _lost(node):
                raise
    return {node: said for node, said in found.items() if said is not None}


def _lost(node: str) -> bool:
    """Whether a node on which something failed is gone; Ray may take a while to notice."""
    for _ in range(NOTICED_LOOKS):  # not seconds: a machine that stands still keeps Ray from noticing, too
        if node not in node_names():
            return True
        time.sleep(0.5)
    return False


def _call(check: Callable[[str], str | None], node: str) -> str | None:
    return check(node)


def _call_each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


class ImageServer:
    """Hands decoded images in shards to nodes that can't read the driver's folders."""

    def __init__(self, folders: Iterable[Path], shard_bytes: int = SHARD_BYTES):
        self._images = {folder: open_images(folder) for folder in folders}
        self._shard_bytes = shard_bytes

    def shape(self, folder: Path) -> tuple[tuple[int, ...], int]:
        """Shape of the whole array, and images in a shard."""
        images = self._images[folder]
        return images.shape, max(1, self._shard_bytes // max(math.prod(images.shape[1:]), 1))

    def shard(self, folder: Path, first: int, last: int) -> Pixels:
        return np.array(self._images[folder][first:last])


def serve_images(folders: Iterable[Path], *, shard_bytes: int = SHARD_BYTES) -> Any:
    """An `ImageServer` beside the driver, which lives as long as what is returned is kept."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    server = ray.remote(num_cpus=0)(ImageServer)
    return server.options(name=IMAGE_SERVER, scheduling_strategy=here).remote(list(folders), shard_bytes)


def images_here(folder: Path) -> Path:
    """The folder of decoded images as this node reads it: the driver's, else a copy in the node's own cache, made once.

    Raises:
        OSError: there is no room for it.
    """
    if (folder / "images.npy").is_file():
        return folder
    target = cache_folder() / "received" / folder.name  # without the facts that lie beside what is decoded here
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "received.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system if this process is killed
        if not (target / "images.npy").is_file():
            unfinished = target.with_name(f"{DECODING}{uuid.uuid4().hex}")
            unfinished.mkdir()
            try:
                _receive(folder, unfinished / "images.npy")
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was renamed
    return target


def _receive(folder: Path, path: Path) -> None:
    server = ray.get_actor(IMAGE_SERVER)
    shape, count = ray.get(server.shape.remote(folder))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for first in range(0, shape[0], count):
            file.write(ray.get(server.shard.remote(folder, first, first + count)).data)
        file.flush()
        os.fsync(file.fileno())


def small_shared_memories(least_mb: float = LEAST_SHARED_MB) -> list[str]:
    """What there is to say of the nodes' shared memory."""
    said, names = on_each_node(lambda node: small_shared_memory(least_mb=least_mb)), node_names()
    return [f"{names.get(node, node)}: {words}" for node, words in said.items()]


def small_shared_memory(folder: str = "/dev/shm", least_mb: float = LEAST_SHARED_MB) -> str | None:
    """What there is to say of shared memory as small as a container has it by default."""
    if not os.path.isdir(folder):  # macOS has none, and Ray needs none there
        return None
    status = os.statvfs(folder)
    size = status.f_blocks * status.f_frsize / 2**20
    if size >= least_mb:
        return None
    return f"{folder} has {size:.0f} MiB, so Ray keeps on disk what it sends; give a container more by --shm-size 8g"


def slots(plan: SearchPlan, nodes: Sequence[Node], *, grows: bool = False) -> Slots:
    """Resources of a trial and how many fit: by default one per GPU, else one per core with one thread each.

    Args:
        plan: the settings.
        nodes: those that are there; a trial runs on one of them.
        grows: whether nodes may join, so that `concurrent` may be more than there is room for now.

    Raises:
        InputError: more is asked for than a node has, or a fraction that makes no sense.
    """
    asked, most_gpus = plan.gpus_per_trial, max(gpus for _, gpus in nodes)
    per_trial = min(most_gpus, 1.0) if asked is None or asked == "auto" else asked
    usable = [(cpus, gpus) for cpus, gpus in nodes if gpus >= per_trial]
    most_cpus = max((cpus for cpus, _ in usable), default=0)
    packed = int(sum(gpus for _, gpus in nodes)) if asked == "auto" else 0
    where = "there are" if len(nodes) == 1 else "no node has more than"
    faults = []
    if per_trial > 1 and per_trial != int(per_trial):
        faults.append(f"--gpus-per-trial {per_trial:g}: above 1 only whole GPUs can be given; use {int(per_trial)}")
    if per_trial > most_gpus:
        faults.append(
            f"--gpus-per-trial {per_trial:g}: {where} {most_gpus:g} GPUs; use at most that, or 0 to train on CPUs"
        )
    elif plan.cpus_per_trial is not None and plan.cpus_per_trial > most_cpus:
        faults.append(f"--cpus-per-trial {plan.cpus_per_trial}: {where} {most_cpus} cores; use at most that")
    if faults:
        raise InputError(faults)
    if per_trial:
        smallest = min(SHARES) if packed else per_trial
        fit = [int(gpus) * int(1 / smallest) if smallest < 1 else int(gpus // smallest) for _, gpus in usable]
        beside = min(cpus // count for (cpus, _), count in zip(usable, fit, strict=True))
        threads = plan.cpus_per_trial or max(1, beside)
        count = sum(min(room, cpus // threads) for (cpus, _), room in zip(usable, fit, strict=True))
    else:
        threads = plan.cpus_per_trial or 1
        count = sum(cpus // threads for cpus, _ in usable)
    wanted = min(plan.concurrent or count, plan.trials)
    at_once = wanted if grows and plan.concurrent else min(count, wanted)
    if not at_once:
        raise InputError(
            "no node has a core for a trial; wait for nodes, or say by --concurrent how many trials at once"
        )
    return Slots(threads, per_trial, at_once, packed, waiting=at_once > count)


def gpu_share(config: Mapping[str, Any], measured: Iterable[tuple[Mapping[str, Any], float, float]]) -> float:
    """The share of a GPU that a trial needs: the least of `SHARES` that held a trial which is at least as heavy.

    Args:
        config: of the trial.
        measured: config of other trials that took whole batches, with the peak of their memory and what their GPU
            has, in MiB. The smallest of these GPUs counts: whichever the trial will be on, it has no less.

    Returns:
        1 where no trial of the same backbone and image size, with as many stages and images a step, has been measured.
    """
    heavier = ("unfreeze_depth", "batch_size")
    measured = list(measured)
    smallest = min((total for _, _, total in measured), default=math.inf)
    needed = [
        (peak * MEMORY_MARGIN + CONTEXT_MB) / smallest
        for other, peak, _ in measured
        if all(other[name] == config[name] for name in ("backbone", "image_size"))
        and all(other[name] >= config[name] for name in heavier)
    ]
    return min(share for share in SHARES if share >= min(min(needed, default=1.0), 1.0))
