"""ASHA: asynchronous successive halving in its stopping variant (Li et al. 2020, https://arxiv.org/abs/1810.05934).

It has no random part, so a journal that is read again gives the same rungs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tuning.settings.config import unfrozen


@dataclass(frozen=True)
class Decision:
    """What was decided at a rung; `value` and `cutoff` are in the metric's own units, less being better."""

    rung: int
    stratum: str
    value: float | None
    cutoff: float | None
    verdict: str  # continue | stop | kept: its stratum would stop it, but it leads overall


class Rungs:
    """The values that trials showed at each rung, from which the next trial there is judged.

    A trial goes on while it is among the best 1/reduction_factor (rounded down, but at least the best) of those of its
    stratum that have reached the rung, itself included, or of all that have. A missing value (a metric that can't be
    computed) is worse than any.
    """

    def __init__(self, *, grace_epochs: int, reduction_factor: int, epochs: int):
        self.reduction_factor = reduction_factor
        self.rungs: list[int] = []  # in epochs; none at the last epoch, where nothing is left to save
        rung = grace_epochs
        while rung < epochs:
            self.rungs.append(rung)
            rung *= reduction_factor
        self._values: dict[int, dict[str, tuple[str, float]]] = {rung: {} for rung in self.rungs}

    def enter(self, trial_id: str, rung: int, stratum: str, value: float | None) -> None:
        """Note a trial's value at a rung; a later one for the same trial and rung takes its place."""
        self._values[rung][trial_id] = stratum, math.inf if value is None or math.isnan(value) else value

    def decide(self, trial_id: str, epoch: int, value: float | None, stratum: str = "all") -> Decision | None:
        """Enter a trial and judge it; null where no rung is due at this epoch."""
        if epoch not in self._values:
            return None
        self.enter(trial_id, epoch, stratum, value)
        there = self._values[epoch]
        mine = there[trial_id][1]
        cutoff = self._cutoff(value for other, value in there.values() if other == stratum)
        if mine <= cutoff:
            verdict = "continue"
        else:
            verdict = "kept" if mine <= self._cutoff(value for _, value in there.values()) else "stop"
        return Decision(epoch, stratum, value, cutoff if math.isfinite(cutoff) else None, verdict)

    def _cutoff(self, values: Iterable[float]) -> float:
        ordered = sorted(values)
        return ordered[max(1, len(ordered) // self.reduction_factor) - 1]


def stratum(strata: str, config: Mapping[str, Any]) -> str:
    """What a trial is compared with: `all`, or its kind by `strata` (none, unfrozen, backbone, both)."""
    kinds = {"backbone": str(config["backbone"]), "unfrozen": unfrozen(config["unfreeze_depth"])}
    names = {"none": [], "both": list(kinds)}.get(strata, [strata])
    return " ".join(kinds[name] for name in names) or "all"


def compared_value(losses: list[float | None], compared: str) -> float | None:
    """What a rung compares of a trial's losses so far: `last`, `best`, or `mean` of the last two.

    Null where there is none: the last is missing, or none is there. Less is better.
    """
    there = [loss for loss in losses if loss is not None]
    if not there or (compared != "best" and losses[-1] is None):
        return None
    if compared == "best":
        return min(there)
    return there[-1] if compared == "last" else math.fsum(there[-2:]) / len(there[-2:])
