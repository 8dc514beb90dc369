"""GPUs: all tried before a run begins, so that an old driver or missing kernels end no trial; how trials share them."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from statistics import median
from typing import Any

import ray

from tuning.search.cluster import LEAST_SHARE, Node, node_names, on_each_node
from tuning.settings.config import InputError, SearchPlan
from tuning.training.checking import package_environment

CHECK_SECONDS = 180.0  # for a process that loads torch and tries each GPU of its node
MEASURED_FIRST = 8  # trials on whole GPUs, before others share one
MEMORY_MARGIN = 1.1  # over the most memory that PyTorch reserved
CONTEXT_MB = 600.0  # roughly what a process takes on a GPU before its first tensor
Tried = list[tuple[str, str | None]]  # each GPU in words, and what is wrong with it


@contextmanager
def gpus_checked(plan: SearchPlan, nodes: Callable[[], list[Node]]) -> Iterator[Callable[[], list[str]]]:
    """Try all GPUs in the background, once Ray has started, unless the plan wants none.

    Yields:
        A function that waits, and returns lines to show: each node's GPUs, and which don't work.

        Raises:
            InputError: none works.
    """
    if not plan.on_gpus:
        yield list
        return
    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(lambda: _lines(_with_gpus(nodes))).result
    finally:
        pool.shutdown(cancel_futures=True)  # waits: Ray can't be shut down meanwhile


def _with_gpus(nodes: Callable[[], list[Node]]) -> set[str]:
    nodes()  # waits for Ray
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")}


def _lines(with_gpus: set[str]) -> list[str]:
    if not with_gpus:
        return []
    names, lines, works = node_names(), [], False
    tried = on_each_node(lambda node: json.dumps(gpus_here()) if node in with_gpus else None)
    for node, found in tried.items():
        name = names.get(node, node)
        for (words, wrong), same in groupby(json.loads(found)):
            number = len(list(same))
            works = works or wrong is None
            lines.append(f"{name}: {number} x {words}" + ("" if wrong is None else f", which can't be used: {wrong}"))
    if tried and not works:
        cure = "install a build of torch for this driver and these GPUs, or train on CPUs by --gpus-per-trial 0"
        raise InputError([*lines, f"no GPU works; {cure}"])
    return lines


def gpus_here() -> Tried:
    """Return what `device.gpus` does, from a process of its own, whose memory on the GPUs goes with it."""
    code = "import json; from tuning.training.device import gpus; print(json.dumps(gpus()))"
    # Before Ray 2.60 a task that asks for no GPU sees none.
    hidden = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    environment = {name: value for name, value in package_environment().items() if value or name not in hidden}
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=CHECK_SECONDS, **options)
    except subprocess.TimeoutExpired:
        return [("GPU", f"no answer within {CHECK_SECONDS:g} s")]
    if done.returncode:
        return [("GPU", done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")]
    return [(words, wrong) for words, wrong in json.loads(done.stdout.strip().rpartition("\n")[2])]


class Packing:
    """The share of a GPU that each trial gets: a whole one or, once some are measured, always the same smaller one.

    One smaller share in a run, since a worker serves trials of one share, and others have to be started for another.
    """

    def __init__(self) -> None:
        self._share: float | None = None  # the smaller one, once it is chosen; 1 if trials are too large to share
        self._outgrown: list[Mapping[str, Any]] = []  # configurations that were out of memory on it

    def outgrown(self, config: Mapping[str, Any]) -> None:
        """Note that a trial was out of memory on the smaller share; those at least as heavy get whole GPUs."""
        self._outgrown.append(config)

    def share(self, config: Mapping[str, Any], measured: Sequence[tuple[Mapping[str, Any], float, float]]) -> float:
        """Return the share for a trial: the smaller one if a trial at least as heavy has been measured to fit.

        Args:
            measured: of trials that trained whole batches and computed their frozen outputs: configuration, reserved
                memory and their GPU's memory, in MiB. The smallest GPU counts: no trial runs on a smaller one.
        """
        smallest = min((total for _, _, total in measured), default=math.inf)
        needs = [(other, (peak * MEMORY_MARGIN + CONTEXT_MB) / smallest) for other, peak, _ in measured]
        if self._share is None and len(needs) >= MEASURED_FIRST:
            typical = median(need for _, need in needs)
            self._share = next((share for share in (LEAST_SHARE, 2 * LEAST_SHARE) if typical <= share), 1.0)
        least = min((need for other, need in needs if _as_heavy(other, config)), default=math.inf)
        if self._share is None or least > self._share or any(_as_heavy(config, other) for other in self._outgrown):
            return 1.0
        return self._share


def _as_heavy(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a trial takes as much memory as another of its backbone and image size."""
    return (
        all(one[name] == other[name] for name in ("backbone", "image_size"))
        and all(one[name] >= other[name] for name in ("unfreeze_depth", "batch_size"))
        and one["optimizer"] in ("adamw", other["optimizer"])
        and one["batch_norm"] in ("train", other["batch_norm"])
    )
