"""ASHA: asynchronous successive halving in its stopping variant (Li et al. 2020, https://arxiv.org/abs/1810.05934)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """What was decided at a rung; `value` and `cutoff` are in the metric's own units, less being better."""

    rung: int
    stratum: str
    value: float | None
    cutoff: float | None
    verdict: str  # continue | stop


class Rungs:
    """The values that trials showed at each rung, from which the next trial there is judged.

    A trial goes on while it is among the best 1/reduction_factor (rounded up) of those that have reached the rung,
    itself included. A missing value (a metric that can't be computed) is worse than any.
    """

    def __init__(self, *, grace_epochs: int, reduction_factor: int, epochs: int):
        self.reduction_factor = reduction_factor
        self.rungs: list[int] = []  # in epochs; none at the last epoch, where nothing is left to save
        rung = grace_epochs
        while rung < epochs:
            self.rungs.append(rung)
            rung *= reduction_factor
        self._values: dict[tuple[int, str], dict[str, float]] = {}

    def enter(self, trial_id: str, rung: int, stratum: str, value: float | None) -> None:
        """Note a trial's value at a rung; a later one for the same trial and rung takes its place."""
        self._values.setdefault((rung, stratum), {})[trial_id] = math.inf if value is None else value

    def decide(self, trial_id: str, epoch: int, value: float | None, stratum: str = "all") -> Decision | None:
        """Enter a trial and judge it; null where no rung is due at this epoch."""
        if epoch not in self.rungs:
            return None
        self.enter(trial_id, epoch, stratum, value)
        values = self._values[epoch, stratum]
        cutoff = sorted(values.values())[math.ceil(len(values) / self.reduction_factor) - 1]
        verdict = "continue" if values[trial_id] <= cutoff else "stop"
        return Decision(epoch, stratum, value, cutoff if math.isfinite(cutoff) else None, verdict)
