"""A training step's passes as one CUDA graph: a small network's hundreds of launches take longer than their work.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Targets = tuple[Tensor, Tensor | None]  # labels of a batch, and the images' shares of them: of mixed images a part
Passes = Callable[[Tensor, Sequence[Targets], int], Tensor]  # from a batch, its targets and a micro-batch to the loss
WARM_UP = 3  # steps, in which cuDNN chooses its algorithms
TIMED = 8  # steps as they are, and as many replayed ones
LEAST_GAIN = 1.1  # factor of a step's speed


class Replayed:
    """Forward and backward pass of training's steps: recorded after some steps, and replayed if that is faster.

    If they can't be recorded, or a step is unlike the recorded one (a batch in halves), they run as they are.

    Args:
        passes: always launches the same operations, waits for none of them, and leaves gradients.
        parameters: that get gradients.
        device: of CUDA.
    """

    def __init__(self, passes: Passes, parameters: Iterable[nn.Parameter], device: torch.device):
        self._passes, self._device = passes, device
        self._parameters = [each for each in parameters if each.requires_grad]
        self._steps = 0
        self._seconds = {"as they are": 0.0, "replayed": 0.0}
        self._recorded: _Recorded | None = None
        self._settled = False  # whether it is known which is faster

    def __call__(self, batch: Tensor, targets: Sequence[Targets], micro_batch: int) -> Tensor:
        """Run a step's passes; the arguments and the loss are those of `passes`."""
        self._steps += 1
        first = WARM_UP + TIMED + 1
        if self._steps == first:
            self._record(batch, targets, micro_batch)
        if self._recorded is not None and not self._recorded.fits(batch, targets, micro_batch):
            self._drop()
        timed = not self._settled and self._steps > WARM_UP and self._steps != first
        began = self._now() if timed else 0.0
        if self._recorded is None:
            loss = self._passes(batch, targets, micro_batch)
        else:
            loss = self._recorded.run(batch, targets)
        if timed:
            self._seconds["as they are" if self._recorded is None else "replayed"] += self._now() - began
        if not self._settled and self._steps >= first + TIMED:
            self._settled = True
            if self._seconds["replayed"] * LEAST_GAIN > self._seconds["as they are"]:
                self._drop()
        return loss

    def _record(self, batch: Tensor, targets: Sequence[Targets], micro_batch: int) -> None:
        try:
            self._recorded = _Recorded(self._passes, self._parameters, batch, targets, micro_batch)
        except (RuntimeError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"training steps can't be recorded as a CUDA graph, and run without: {reason}", file=sys.stderr)
            self._drop()
            for parameter in self._parameters:  # of passes that were recorded in part, and never ran
                parameter.grad = None

    def _drop(self) -> None:
        self._recorded, self._settled = None, True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Recorded:
    """Passes that were recorded with a batch and its targets, in whose place others are put."""

    def __init__(
        self,
        passes: Passes,
        parameters: Sequence[nn.Parameter],
        batch: Tensor,
        targets: Sequence[Targets],
        micro_batch: int,
    ):
        self._parameters, self._micro_batch = parameters, micro_batch
        own = [(labels.clone(), None if shares is None else shares.clone()) for labels, shares in targets]
        self._batch, self._targets = batch.clone(), own
        for parameter in parameters:
            parameter.grad = None  # so that the recorded backward pass makes its own, and replaces what is in them
        self._replay = record(lambda: passes(self._batch, self._targets, micro_batch))
        self._gradients = [parameter.grad for parameter in parameters]

    def fits(self, batch: Tensor, targets: Sequence[Targets], micro_batch: int) -> bool:
        """Whether a step differs from the recorded one in nothing but values."""
        same = [tensor.shape for tensor in _tensors(batch, targets)] == [each.shape for each in self._inputs()]
        return same and micro_batch == self._micro_batch

    def run(self, batch: Tensor, targets: Sequence[Targets]) -> Tensor:
        """Replay the passes for another batch; the loss is valid until the next."""
        for own, given in zip(self._inputs(), _tensors(batch, targets), strict=True):
            own.copy_(given)
        loss = self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _inputs(self) -> list[Tensor]:
        return _tensors(self._batch, self._targets)


def _tensors(batch: Tensor, targets: Sequence[Targets]) -> list[Tensor]:
    return [batch, *(each for pair in targets for each in pair if each is not None)]


def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what a function launches on CUDA; what is returned launches it again, and returns the same tensor.

    Raises:
        RuntimeError: it can't be recorded: it waits for the GPU, there is no memory or no CUDA.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may pin memory meanwhile
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
