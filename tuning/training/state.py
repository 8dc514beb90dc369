"""What a trial carries from epoch to epoch: the state that it resumes from, and averaged weights."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Row = dict[str, Any]


class Snapshot(Protocol):
    """Takes a trial's state after an epoch; with `only_best` without what only an unfinished trial needs."""

    def __call__(self, *, only_best: bool = False) -> "State": ...


@dataclass(frozen=True)
class State:
    """All that a trial needs to resume after an epoch; every tensor is on the CPU, and no training changes it."""

    history: list[Row]
    tensors: dict[str, Tensor]  # model/<name>, best/<name>, averaged/<name>, optimizer/<parameter>/<key>, and
    # validation/logits: of the best epoch, float32 [validation images, classes]


class Averaged:
    """Exponential moving average of a model's tensors over about an epoch, which shows a trial's outcome sooner.

    While there are fewer optimizer steps, it is their mean.

    Args:
        model: whose tensors are averaged.
        names: tensors that change, including batch-norm statistics.
        epoch_steps: optimizer steps of an epoch.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], epoch_steps: int):
        tensors = model.state_dict()
        self._tensors = {name: tensors[name] for name in names if tensors[name].is_floating_point()}  # not batch counts
        self._share = 1 - math.exp(-1 / epoch_steps)
        self._steps = 0
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        self._pair = list(self.mean.values()), list(self._tensors.values())

    def restore(self, mean: Mapping[str, Tensor], steps: int) -> None:
        """Resume from the `mean` after `steps` optimizer steps."""
        self._steps = steps
        for name, tensor in self.mean.items():
            tensor.copy_(mean[name])

    @torch.no_grad()
    def update(self) -> None:
        """Add the tensors' current values, in one operation: on a GPU one for each tensor took a third of a step's."""
        self._steps += 1
        if self._pair[0]:
            torch._foreach_lerp_(*self._pair, max(self._share, 1 / self._steps))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in the model; afterwards it has its own tensors again, to the bit."""
        with torch.no_grad():
            own = {name: tensor.clone() for name, tensor in self._tensors.items()}
            for name, tensor in self._tensors.items():
                tensor.copy_(self.mean[name])
            try:
                yield
            finally:
                for name, tensor in self._tensors.items():
                    tensor.copy_(own[name])


def snapshot(
    model: nn.Module,
    changed: list[str],
    best: dict[str, Tensor],
    mean: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: list[Row],
    *,
    only_best: bool = False,
) -> State:
    """Copy the state of a trial: the model's `changed` tensors, and all others as they are in `State`.

    Args:
        best: the best epoch's part; copies, contiguous.
    """
    copied = {name: tensor.cpu() for name, tensor in best.items()}
    if only_best:
        return State(list(history), copied)
    tensors = model.state_dict()
    saved = {f"model/{name}": tensors[name] for name in changed}
    saved |= {f"averaged/{name}": tensor for name, tensor in mean.items()}
    for index, values in optimizer.state_dict()["state"].items():
        saved |= {f"optimizer/{index}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    if scaler.is_enabled():
        saved |= {f"scaler/{name}": torch.tensor(scaler.state_dict()[name]) for name in ("scale", "_growth_tracker")}
    for name, tensor in saved.items():
        copied[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return State(list(history), copied)


def restore(
    state: State, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put a snapshot back; return the best epoch's part of it and the averaged weights."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    model.load_state_dict(parts["model"], strict=False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in parts["optimizer"].items():
        index, _, key = name.partition("/")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:  # fused optimizers assume the parameter's memory layout
            tensor = torch.empty_like(parameter, device="cpu").copy_(tensor)
        slots[int(index)][key] = tensor
    optimizer.load_state_dict({"state": dict(slots), "param_groups": optimizer.state_dict()["param_groups"]})
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {name: value.item() for name, value in parts["scaler"].items()})
    best = {name: tensor for name, tensor in state.tensors.items() if name.startswith(("best/", "validation/"))}
    return best, parts["averaged"]
