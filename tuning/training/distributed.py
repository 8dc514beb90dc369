"""Training on all GPUs of a machine where that is faster: a process for each computes its part of every batch."""

import dataclasses
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import distributed

from tuning.settings.config import TrialConfig
from tuning.training.checking import package_environment
from tuning.training.dataset import Data, placed
from tuning.training.device import ready
from tuning.training.features import Cache, HeldOutputs
from tuning.training.finetune import finetune
from tuning.training.models import Models
from tuning.training.ranks import Ranks
from tuning.training.state import Row, Snapshot, State

PART_IMAGES = 8  # of a batch, that each device has at least
MEASURED_EPOCHS = 2  # on one device and then on all; of each the last counts, since the first fill caches
LOOK_SECONDS = 0.05


class WorkerLost(Exception):
    """A process of the training has failed, or was killed."""


def finetune_on_all(
    devices: Sequence[torch.device],
    config: TrialConfig,
    data: Data,
    *,
    features: Cache,
    least_seconds: float = 120.0,
    least_gain: float = 1.1,
    **how: Any,
) -> Iterator[tuple[Row, Snapshot]]:
    """Fine-tune as `finetune` does: two epochs on the first device, and then on all of them if that is faster.

    The batches are the same on all devices, and the model too but for rounding: each computes its part, gradients are
    averaged, and batch norm's statistics are those of the whole batch. If a device fails, training goes on without it:
    from the third epoch on, on the first device. A state can be had until the next epoch is asked for.

    Args:
        devices: of this machine; with one this is `finetune` on it.
        config: as there, like `data`, `features` and `how` (`weights`, `metric`, `graphs`).
        least_seconds: that the rest would take on one device; to start the processes takes about 20.
        least_gain: factor of an epoch's speed.
    """
    devices = devices[: max(config.batch_size // PART_IMAGES, 1)]
    alone = finetune(config, _placed(data, devices[0]), device=devices[0], features=features, **how)
    for row, snapshot in alone:
        yield row, snapshot
        if row["epoch"] == MEASURED_EPOCHS:
            break
    seconds = row["seconds"]
    if row["ends"] is not None:
        return
    if len(devices) == 1 or seconds * (config.epochs - row["epoch"]) < least_seconds:
        yield from alone
        return
    state = snapshot()
    del alone, snapshot  # and with them the model
    features.clear()
    if devices[0].type == "cuda":
        torch.cuda.empty_cache()
    try:
        for row, snapshot in _by_processes(devices, config, data, state, how):
            yield row, snapshot
            if row["epoch"] != 2 * MEASURED_EPOCHS:
                continue
            print(f"an epoch takes {row['seconds']:.1f} s on {len(devices)} GPUs, {seconds:.1f} s on one", flush=True)
            if row["seconds"] * least_gain > seconds and row["ends"] is None:
                state = snapshot()
                break
        else:
            return
    except WorkerLost as error:
        print(f"training on {len(devices)} GPUs failed: {error}; it continues on one", file=sys.stderr)
    yield from finetune(config, _placed(data, devices[0]), device=devices[0], features=features, state=state, **how)


def _placed(data: Data, device: torch.device) -> Data:
    return replace(data, images=placed(data.images, device))


def _by_processes(
    devices: Sequence[torch.device], config: TrialConfig, data: Data, state: State, how: dict[str, Any]
) -> Iterator[tuple[Row, Snapshot]]:
    """Yield what `finetune` does from a state on, by a process for each device.

    Raises:
        WorkerLost: one of them failed.
    """
    ready_as = {
        "threads": max(torch.get_num_threads() // len(devices), 1),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    file = data.images.filename if isinstance(data.images, np.memmap) else None
    if file is not None:  # each process maps it
        data = replace(data, images=data.images[:0])
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-search-"))
        links: list[Connection] = []
        for rank, device in enumerate(devices):
            link, there = Pipe()
            command = [sys.executable, "-c", f"from {__name__} import work; work({there.fileno()})"]
            # In a session of its own, since Ctrl-C is for this process.
            process = subprocess.Popen(
                command, env=package_environment(), pass_fds=[there.fileno()], start_new_session=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            there.close()
            links.append(stack.enter_context(link))
            part = {"device": device, "ranks": Ranks(rank, len(devices)), "data": data, "config": config, **how}
            with _worker_lost():
                link.send((part, file, _packed(state), ready_as, f"file://{place}/ranks"))

        def snapshot(*, only_best: bool = False) -> State:
            with _worker_lost():
                links[0].send("state")
                return _unpacked(_reply(links[0]))

        while True:
            with _worker_lost():
                row = _next_row(links)
            if row["ends"] is not None:
                yield row, partial(_known, snapshot())
                return
            yield row, snapshot


def _next_row(links: Sequence[Connection]) -> Row:
    """Have every process train an epoch; return the row of the first."""
    for link in links:
        link.send("row")
    rows: dict[Connection, Row] = {}
    while len(rows) < len(links):
        for link in links:
            if link not in rows and link.poll(LOOK_SECONDS):
                rows[link] = _reply(link)
    return rows[links[0]]


def _reply(link: Connection) -> Any:
    reply = link.recv()
    if isinstance(reply, str):  # what has failed
        raise WorkerLost(reply)
    return reply


def work(descriptor: int) -> None:
    """Train as the process at the other end of a connection asks."""
    with suppress(EOFError, ConnectionError), Connection(descriptor) as link:  # that process may have been killed
        part, file, packed, ready_as, meeting = link.recv()
        device, ranks = part["device"], part["ranks"]
        try:
            ready(device.type, **ready_as)
            if file is not None:
                part["data"] = replace(part["data"], images=np.load(file, mmap_mode="r"))
            if device.type == "cuda":
                torch.cuda.set_device(device)
            part["data"] = _placed(part["data"], device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, init_method=meeting, rank=ranks.rank, world_size=ranks.size)
            models = Models(synchronized=device.type == "cuda")
            rows = finetune(**part, state=_unpacked(packed), features=HeldOutputs(device), models=models)
            while True:
                if link.recv() == "row":
                    row, snapshot = next(rows)
                    link.send(row)
                else:
                    link.send(_packed(snapshot()))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            link.send(f"{type(error).__name__}: {error}".partition("\n")[0])


@contextmanager
def _worker_lost() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise WorkerLost("a process ended") from error


def _packed(state: State) -> bytes:
    file = io.BytesIO()
    torch.save(dataclasses.asdict(state), file)
    return file.getvalue()


def _known(state: State, *, only_best: bool = False) -> State:
    return state


def _unpacked(packed: bytes) -> State:
    return State(**torch.load(io.BytesIO(packed), weights_only=True))
