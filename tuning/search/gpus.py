"""The GPUs of all nodes, tried before a run begins: a driver that is too old or a GPU without kernels ends no trial."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import ray

from tuning.search.cluster import Node, node_names, on_each_node
from tuning.settings.config import InputError, SearchPlan
from tuning.training.checking import package_environment

CHECK_SECONDS = 180.0  # for a process that loads torch and tries each GPU of its node
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
        pool.shutdown(wait=False, cancel_futures=True)


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
    options: dict[str, Any] = {"env": package_environment(), "capture_output": True, "text": True}
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=CHECK_SECONDS, **options)
    except subprocess.TimeoutExpired:
        return [("GPU", f"no answer within {CHECK_SECONDS:g} s")]
    if done.returncode:
        return [("GPU", done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")]
    return [(words, wrong) for words, wrong in json.loads(done.stdout.strip().rpartition("\n")[2])]
