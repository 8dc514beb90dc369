"""Ray: started while the driver still reads and audits, with workers that have loaded what trials need; its nodes."""

import fcntl
import logging
import math
import os
import secrets
import shutil
import site
import socket
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

# Read by Ray at import: on this machine alone Ray then listens on the loopback, not on every interface.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.pop("RAY_ADDRESS", None)  # Ray takes an empty one for the cluster last started on this machine
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
import ray
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from threadpoolctl import threadpool_limits

from tuning.data.decoding import Pixels
from tuning.data.images import DECODING, Item, Result, open_images, parallel_map
from tuning.settings.config import InputError, SearchPlan, cache_folder
from tuning.settings.words import count

LEAST_SHARE = 0.25  # of a GPU, that a packed trial gets
MOST_PRELOADING = 16  # cores; Ray starts a worker on each
PART = 16  # items in one task of `cluster_map`
SHARD_BYTES = 256 * 2**20  # of decoded images, sent between nodes at once
IMAGE_SERVER = "finetune-search-images"
LEAST_SHARED_MB = 1024.0  # of /dev/shm; a container has 64 by default
NOTICED_LOOKS = 60  # half a second apart, within which Ray notices that a node died
ANSWER_SECONDS = 10.0
LONGEST_TEMPDIR = 40  # characters: Ray's sockets lie in a folder there, and their paths may have 107
TOKEN = secrets.token_hex(32)  # for the Ray on this machine, which would write one of its own below HOME
Node = tuple[int, float]  # its cores and GPUs


@dataclass(frozen=True)
class Slots:
    """The resources of each trial, and the number of slots: trials that run at once."""

    cpus: int
    gpus: float
    count: int
    packed: int = 0  # GPUs that trials share by `gpus.Packing`; 0: each trial gets `gpus`
    fitting: int = 0  # slots that there is room for now; 0: `count`
    waiting: bool = False  # more slots than fit now: nodes are to join

    @property
    def room(self) -> int:
        """Slots that there is room for now, whether they are used or not."""
        return self.fitting or self.count


@contextmanager
def ray_running(plan: SearchPlan) -> Iterator[Callable[[], list[Node]]]:
    """Start Ray in the background, on this machine or in the cluster at RAY_ADDRESS; workers can import this package.

    Yields:
        A function that waits for Ray and returns its nodes.
    """
    # The thread must outlive the search: Ray's processes end with it. OpenBLAS ends its own threads whenever this
    # process forks, as to start Ray: a product of matrices that they compute meanwhile would never end.
    with restored_environment(), threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start_ray, plan)
        try:
            yield starting.result
        finally:
            starting.exception()  # wait: Ray can't be shut down while it starts
            ray.shutdown()


@contextmanager
def restored_environment() -> Iterator[None]:
    """Restore the environment's variables at the end."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def start_ray(plan: SearchPlan) -> list[Node]:
    """Start Ray, or connect to the cluster at RAY_ADDRESS, by variables that stay in the environment; return nodes."""
    options: dict[str, Any] = {}
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    package = Path(__file__).parents[1]
    if "RAY_ADDRESS" in os.environ:
        _check_answers(os.environ["RAY_ADDRESS"])
        options["runtime_env"] = {"py_modules": [str(package)]}
    else:
        environment["RAY_AUTH_TOKEN"] = TOKEN
        options["address"] = "local"  # else Ray joins the cluster last started on this machine
        if len(tempfile.gettempdir()) > LONGEST_TEMPDIR:
            options["_temp_dir"] = f"/tmp/ray-{os.getuid()}"
        if plan.device == "mps" and not _gpus():  # before 2.60 Ray knows no GPU of Apple's
            options["num_gpus"] = 1
        if loading := loading_ahead(plan):
            # Workers load torch at once, while the driver reads and audits, not when a trial starts. As many as there
            # are slots may wait; else Ray ends those that wait as soon as a trial has reserved their cores.
            environment["RAY_preload_python_modules"] = "tuning.search.preloaded"
            environment["RAY_num_workers_soft_limit"] = str(loading)
        if str(package.parent) not in site.getsitepackages():
            paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.update(environment | os.environ)  # the user's values count
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a dead worker's traceback is in the table
    with _few_processes():
        try:
            _init(options)
        except InputError:  # on a busy machine; what it read from the disk is in memory now
            _init(options)
    return ray_nodes()


def _init(options: dict[str, Any]) -> None:
    """Start Ray or connect to it; raise InputError if it doesn't start in the time that Ray gives itself.

    A node gives up if one of its own processes takes more than 15 s to load (Ray 2.60, ray-project/ray#65983).
    """
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:
        ray.shutdown()
        if "timed out during startup" not in str(error):
            raise
        cure = "run the command again when it is less busy, or has more free memory"
        raise InputError(f"Ray did not start on this machine within its 30 s: {cure}") from error


def loading_ahead(plan: SearchPlan) -> int:
    """Return how many workers are to load what trials need while the driver still reads and audits."""
    cores = os.cpu_count() or 1
    wanted = min(plan.concurrent or cores // (plan.cpus_per_trial or 1), plan.trials)
    if "RAY_ADDRESS" in os.environ or cores > MOST_PRELOADING or 2 * wanted < cores:
        return 0
    return 0 if plan.on_gpus and _gpus() else wanted


def _gpus() -> int:
    """Return how many GPUs Ray finds on this machine."""
    return int(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())


def _check_answers(address: str) -> None:
    """Raise InputError if nothing answers at a cluster's address: Ray would wait for minutes, deaf to signals."""
    place = ray._private.utils.read_ray_address() if address == "auto" else address
    host, _, port = (place or "").rpartition(":")
    if "://" in address or not port.isdigit():  # Ray has words for these
        return
    try:
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        cure = "start the cluster, or unset RAY_ADDRESS to search on this machine alone"
        raise InputError(f"RAY_ADDRESS={address}: no Ray answers at {place} ({error}); {cure}") from None


@contextmanager
def _few_processes() -> Iterator[None]:
    """Have Ray start here without a dashboard's process and without monitors; in a cluster they run elsewhere.

    Even without a dashboard and with usage statistics off, the first asks three clouds' metadata services who they are,
    one of them by name. The monitors watch for nodes to add, and for logs to show in the driver: neither is done here,
    and they take 1.5 s of processor time and 2 s of each start.
    """
    services, node = ray._private.services, ray._private.node.Node
    were = services.start_api_server, node.start_monitor, node.start_log_monitor
    services.start_api_server = lambda *given, **named: (None, None)
    node.start_monitor = node.start_log_monitor = lambda self: None
    try:
        yield
    finally:
        services.start_api_server, node.start_monitor, node.start_log_monitor = were


def ray_nodes() -> list[Node]:
    """Return the nodes that are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(node.get("CPU", 0)), float(node.get("GPU", 0))) for node in resources]


def cluster_map(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Map over the cores of all nodes, in order; each node must be able to read what `function` reads."""
    if len(node_names()) == 1:
        yield from parallel_map(function, items)
        return
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda part: [function(item) for item in part])
    ahead = 2 * int(ray.cluster_resources()["CPU"])
    pending: deque[Any] = deque()
    for first in range(0, len(items), PART):
        pending.append(task.remote(items[first : first + PART]))
        if len(pending) > ahead:
            yield from ray.get(pending.popleft())
    yield from chain.from_iterable(map(ray.get, pending))


def node_names() -> dict[str, str]:
    """Return the names of living nodes by id; one machine may have several."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in alive}


def on_each_node(check: Callable[[str], str | None]) -> dict[str, str]:
    """Call a check on each node with the node's id; return its complaints by node, without nodes that die meanwhile."""
    task = ray.remote(num_cpus=0)(lambda node: check(node))
    pending = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(node)
        for node in node_names()
    }
    complaints = {}
    for node, answer in pending.items():
        try:
            complaints[node] = ray.get(answer)
        except RayError as error:
            if isinstance(error, RayTaskError) or not _died(node):
                raise
    return {node: complaint for node, complaint in complaints.items() if complaint is not None}


def _died(node: str) -> bool:
    """Return whether a node on which something failed has died, which Ray may notice late."""
    for _ in range(NOTICED_LOOKS):  # looks, not seconds: a machine that stands still keeps Ray from noticing, too
        if node not in node_names():
            return True
        time.sleep(0.5)
    return False


class ImageServer:
    """Serves decoded images in shards to nodes that can't read the driver's folders."""

    def __init__(self, folders: Iterable[Path], shard_bytes: int = SHARD_BYTES):
        self._images = {folder: open_images(folder) for folder in folders}
        self._shard_bytes = shard_bytes

    def shape(self, folder: Path) -> tuple[tuple[int, ...], int]:
        """Return the shape of the whole array, and the number of images in a shard."""
        images = self._images[folder]
        return images.shape, max(1, self._shard_bytes // max(math.prod(images.shape[1:]), 1))

    def shard(self, folder: Path, first: int, last: int) -> Pixels:
        return np.array(self._images[folder][first:last])


def serve_images(folders: Iterable[Path], *, shard_bytes: int = SHARD_BYTES) -> Any:
    """Start an `ImageServer` on the driver's node; it ends when the returned handle is dropped."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    server = ray.remote(num_cpus=0)(ImageServer)
    return server.options(name=IMAGE_SERVER, scheduling_strategy=here).remote(list(folders), shard_bytes)


def images_here(folder: Path) -> Path:
    """Return where this node reads decoded images: the driver's folder, or a copy in the node's cache, made once.

    Raises:
        OSError: the copy can't be written.
    """
    if (folder / "images.npy").is_file():
        return folder
    target = cache_folder() / "received" / folder.name  # the images alone, without decoding's notes
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "received.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system if this process is killed
        if not (target / "images.npy").is_file():
            unfinished = target.with_name(f"{DECODING}{uuid.uuid4().hex}")
            unfinished.mkdir()
            try:
                _receive(folder, unfinished / "images.npy")
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)  # does nothing after the renaming
    return target


def _receive(folder: Path, path: Path) -> None:
    server = ray.get_actor(IMAGE_SERVER)
    shape, per_shard = ray.get(server.shape.remote(folder))
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for first in range(0, shape[0], per_shard):
            file.write(ray.get(server.shard.remote(folder, first, first + per_shard)).data)
        file.flush()
        os.fsync(file.fileno())


def small_shared_memories(least_mb: float = LEAST_SHARED_MB) -> list[str]:
    """Return a warning for each node whose shared memory is small."""
    warnings, names = on_each_node(lambda node: small_shared_memory(least_mb=least_mb)), node_names()
    return [f"{names.get(node, node)}: {warning}" for node, warning in warnings.items()]


def small_shared_memory(folder: str = "/dev/shm", least_mb: float = LEAST_SHARED_MB) -> str | None:
    """Return a warning if this node's shared memory is small, as it is by default in a container."""
    if not os.path.isdir(folder):  # macOS has none, and Ray needs none there
        return None
    size = shutil.disk_usage(folder).total / 2**20
    if size >= least_mb:
        return None
    return f"{folder} has only {size:.0f} MiB, so Ray uses slower disk space; start containers with --shm-size 8g"


def slots(plan: SearchPlan, nodes: Sequence[Node], *, grows: bool = False) -> Slots:
    """Choose the resources of a trial and the number of slots: by default one per GPU, else one per core.

    Args:
        nodes: the nodes so far; a trial runs on one of them.
        grows: whether nodes may join, so that `plan.concurrent` may be larger than what fits now.

    Raises:
        InputError: no node has what a trial is to be given.
    """
    asked, most_gpus = plan.gpus_per_trial if plan.on_gpus else 0.0, max(gpus for _, gpus in nodes)
    if plan.device in ("cuda", "mps") and not (most_gpus and plan.on_gpus):
        raise InputError(f"--device {plan.device}: no node has a GPU for trials; use auto or cpu")
    per_trial = min(most_gpus, 1.0) if asked is None or asked == "auto" else asked
    usable = [(cpus, gpus) for cpus, gpus in nodes if gpus >= per_trial]
    most_cpus = max((cpus for cpus, _ in usable), default=0)
    packed = int(sum(gpus for _, gpus in nodes)) if asked == "auto" else 0
    limit = "the only node has" if len(nodes) == 1 else "no node has more than"
    if per_trial > most_gpus:
        cure = f"{limit} {most_gpus:g} GPUs; use at most that, or" if most_gpus else "no GPU; use"
        raise InputError(f"--gpus-per-trial {per_trial:g}: {cure} 0 to train on CPUs")
    if plan.cpus_per_trial is not None and plan.cpus_per_trial > most_cpus:
        raise InputError(
            f"--cpus-per-trial {plan.cpus_per_trial}: {limit} {count(most_cpus, 'core')}; use at most that"
        )
    if per_trial:
        smallest = LEAST_SHARE if packed else per_trial
        fit = [int(gpus) * int(1 / smallest) for _, gpus in usable]
        cores_each = min(cpus // room for (cpus, _), room in zip(usable, fit, strict=True))
        threads = plan.cpus_per_trial or max(1, cores_each)
        fitting = sum(min(room, cpus // threads) for (cpus, _), room in zip(usable, fit, strict=True))
    else:
        threads = plan.cpus_per_trial or 1
        fitting = sum(cpus // threads for cpus, _ in usable)
    wanted = min(plan.concurrent or fitting, plan.trials)
    at_once = wanted if grows and plan.concurrent else min(fitting, wanted)
    if not at_once:
        raise InputError("no node has a core for a trial; wait for nodes, or give the number of trials by --concurrent")
    return Slots(threads, per_trial, at_once, packed, fitting, waiting=at_once > fitting)
