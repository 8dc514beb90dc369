"""Models that an actor keeps from trial to trial: built once, reset for each trial, cut once at each depth."""

import math
import time
from dataclasses import dataclass, field

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from tuning.settings.values import Weights
from tuning.training import backbones
from tuning.training.depthwise import speed_up
from tuning.training.device import in_float32, mixed_precision
from tuning.training.folding import fold
from tuning.training.prefix import Cut, split

KEPT_MODELS = 3  # of one actor; the least recently used is dropped first
PASSES, PASSES_SECONDS = 3, 0.03  # a latency is timed over at least 3 passes in all, and 0.03 s in each call


@dataclass
class Network:
    """A model on its device, its stages and its cuts."""

    model: nn.Module
    stages: list[list[str]]
    backbone: str
    image_size: int
    weights: str  # file, mean and standard deviation, or the seed of random ones
    device: torch.device
    half: torch.dtype | None  # of mixed precision in training; what is evaluated is in float32, as it is deployed
    _initial: dict[str, Tensor] = field(default_factory=dict)  # tensors that the last trial may have changed
    _cuts: dict[int, Cut | None] = field(default_factory=dict)
    _latency_ms: float = math.inf
    _passes: int = 0  # timed so far

    def begin(self, depth: int, *, batch_norm: str, head_dropout: float) -> list[str]:
        """Reset the model for a trial, as if it were newly built.

        Arguments as in `backbones.unfreeze` and `backbones.build`.

        Returns:
            Names of the tensors that the trial changes: trained parameters and buffers.
        """
        tensors = self.model.state_dict()
        for name, tensor in self._initial.items():
            tensors[name].copy_(tensor)
        self.model.zero_grad(set_to_none=True)
        self.model.get_submodule(backbones.classifier_name(self.model))[0].p = head_dropout  # type: ignore[index]
        backbones.unfreeze(self.model, self.stages, depth, batch_norm=batch_norm)
        changed = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        changed += [name for name, _ in self.model.named_buffers() if name in tensors]
        self._initial = {name: tensors[name].clone() for name in changed}
        return changed

    def training_precision(self) -> torch.autocast:
        """Return the context of training's passes."""
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)

    def cut(self, depth: int) -> Cut | None:
        """Return the cut below the last `depth` stages; None if nothing is frozen or the model can't be cut."""
        if depth not in self._cuts:
            self._cuts[depth] = split(self.model, self.stages, depth, self.image_size)
        return self._cuts[depth]

    def latency_ms(self) -> float:
        """Return the milliseconds that the whole model takes for one image: the least of all passes timed so far.

        Each call times a few more. On one CPU thread the thread's own time counts: by the wall clock, beside other
        jobs, EfficientNet-lite1 seemed to take six times as long as lite0.
        """
        image, begun = backbones.zero_images(self.model, 1, self.image_size), time.perf_counter()
        clock = time.thread_time if self.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        with backbones.evaluating(self.model), in_float32():
            while self._passes < PASSES or time.perf_counter() - begun < PASSES_SECONDS:
                started = clock()
                self.model(image).cpu()  # waits for the GPU
                self._latency_ms = min(self._latency_ms, 1000 * (clock() - started))
                self._passes += 1
        return self._latency_ms


class Models:
    """The networks that an actor has built.

    Args:
        synchronized: whether batch norms compute their statistics over the batch of all ranks, which CUDA can.
    """

    def __init__(self, *, synchronized: bool = False) -> None:
        self._synchronized = synchronized
        self._networks: dict[tuple[object, ...], Network] = {}

    def get(
        self, backbone: str, *, classes: int, image_size: int, seed: int, weights: Weights | None, device: torch.device
    ) -> Network:
        """Return a network in the state that its last trial left (see `Network.begin`); build it the first time.

        Raises:
            InputError: as `backbones.build` and `backbones.stages` do.
        """
        key = (backbone, classes, image_size, seed, weights, device)
        network = self._networks.pop(key, None)
        if network is None:
            while len(self._networks) >= KEPT_MODELS:
                del self._networks[next(iter(self._networks))]
            model = backbones.build(
                backbone, classes=classes, image_size=image_size, head_dropout=0.0, seed=seed, weights=weights
            ).to(device)
            if device.type == "cpu":
                speed_up(model)
            if self._synchronized:
                model = convert_sync_batchnorm(model)
            stages = backbones.stages(model, image_size)
            if device.type == "cpu":
                fold(model, stages, image_size)
            name = f"random {seed}" if weights is None else weights.model_dump_json()
            network = Network(model, stages, backbone, image_size, name, device, mixed_precision(device))
        self._networks[key] = network
        return network

    def keep_only(self, network: Network) -> None:
        """Drop all others to free memory."""
        self._networks = {key: other for key, other in self._networks.items() if other is network}

    def clear(self) -> None:
        """Drop all networks; a trial that holds one can still use it."""
        self._networks.clear()
