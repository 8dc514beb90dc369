"""ASHA: asynchronous successive halving (Li et al. 2020, https://arxiv.org/abs/1810.05934).

Trials are stopped at the rungs, as in its stopping variant, and promoted later if they are among the best after all. It
has no random part, so replaying a journal gives the same rungs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tuning.record.journal import loss_like
from tuning.settings.config import UNFROZEN, SearchPlan, unfrozen

ANY = "any"  # a stratum that is compared with all strata


class Decision(NamedTuple):
    """A trial judged at a rung; lower is better."""

    rung: int
    stratum: str
    value: float | None
    cutoff: float | None
    # continue | stop | kept: worse than the cut-off, but among the best of all trials, or a start point |
    # promoted: it had been stopped, and continues
    verdict: str


class Rungs:
    """The values of all trials at each rung.

    A trial continues while it is among the best 1/reduction_factor (rounded down, at least one) of the trials of its
    stratum that have reached the rung, itself included, or of all trials that have; one of stratum `any` is compared
    with those of all strata. A missing value (a metric that can't be computed) ranks last.
    """

    def __init__(self, *, grace_epochs: int, reduction_factor: int, epochs: int):
        self.reduction_factor = reduction_factor
        self.rungs: list[int] = []  # in epochs; none at the last epoch, where stopping would save nothing
        rung = grace_epochs
        while rung < epochs:
            self.rungs.append(rung)
            rung *= reduction_factor
        self._values: dict[int, dict[str, tuple[str, float]]] = {rung: {} for rung in self.rungs}

    def enter(self, trial_id: str, rung: int, stratum: str, value: float | None) -> None:
        """Set a trial's value at a rung, replacing an earlier one."""
        self._values[rung][trial_id] = stratum, math.inf if value is None or math.isnan(value) else value

    def decide(self, trial_id: str, epoch: int, value: float | None, stratum: str = "all") -> Decision | None:
        """Enter a trial's value and judge the trial; None if this epoch is no rung."""
        if epoch not in self._values:
            return None
        self.enter(trial_id, epoch, stratum, value)
        entered = self._values[epoch]
        own = entered[trial_id][1]
        overall = self._cutoff(value for _, value in entered.values())
        cutoff = overall
        if stratum != ANY:
            cutoff = self._cutoff(value for other, value in entered.values() if other == stratum)
        verdict = "continue" if own <= cutoff else "kept" if own <= overall else "stop"
        return Decision(epoch, stratum, value, cutoff if math.isfinite(cutoff) else None, verdict)

    def passing(self, rung: int) -> list[str]:
        """Return the trials that would continue at a rung if they were judged now, the best first."""
        entered = self._values[rung]
        if not entered:
            return []
        kinds = {kind for kind, _ in entered.values()}
        overall = self._cutoff(value for _, value in entered.values())
        cutoffs = {kind: self._cutoff(value for other, value in entered.values() if other == kind) for kind in kinds}
        return [
            trial_id
            for trial_id, (kind, value) in sorted(entered.items(), key=lambda item: item[1][1])
            if value <= overall or (kind != ANY and value <= cutoffs[kind])
        ]

    def _cutoff(self, values: Iterable[float]) -> float:
        ordered = sorted(values)
        return ordered[max(1, len(ordered) // self.reduction_factor) - 1]


def stratum(strata: str, config: Mapping[str, Any]) -> str:
    """Return the stratum that a trial is compared within: `all`, or by `strata` (see `SearchPlan.strata`)."""
    part = unfrozen(config["unfreeze_depth"])
    if strata == "head":
        return ANY if part == UNFROZEN[0] else "unfrozen"
    kinds = {"backbone": str(config["backbone"]), "unfrozen": part}
    names = {"none": [], "both": list(kinds)}.get(strata, [strata])
    return " ".join(kinds[name] for name in names) or "all"


def compared_value(losses: list[float | None], compared: str) -> float | None:
    """Reduce a trial's losses so far to the value compared at a rung: `last`, `best`, or `mean` of the last two.

    None if no loss is known or, unless `best` is compared, the last one isn't.
    """
    known = [loss for loss in losses if loss is not None]
    if not known or (compared != "best" and losses[-1] is None):
        return None
    if compared == "best":
        return min(known)
    return known[-1] if compared == "last" else math.fsum(known[-2:]) / len(known[-2:])


def value_at_rung(plan: SearchPlan, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return what is compared of a trial after these epochs; lower is better."""
    if plan.compared == "early_loss":
        return rows[-1]["early_loss"]  # type: ignore[no-any-return]
    values = [None if row["val_loss"] is None else row[plan.metric] for row in rows]
    return compared_value([as_loss(plan, value) for value in values], plan.compared)


def as_loss(plan: SearchPlan, value: float | None) -> float | None:
    """Convert a compared value from its own units to lower-is-better, or back."""
    return value if value is None or plan.compared == "early_loss" else loss_like(plan.metric, value)


def stop_reason(plan: SearchPlan, decision: Mapping[str, Any]) -> str:
    """Say with the numbers why ASHA stopped a trial."""
    templates = {"best": "best {}", "last": "{}", "mean": "mean of the last two {}", "early_loss": "early_loss"}
    value = templates[plan.compared].format(plan.metric)
    if decision["value"] is None:
        return f"{value} could not be computed at epoch {decision['rung']}"
    compared = decision["value"], decision["cutoff"]
    among = "" if decision["stratum"] in ("all", ANY) else f" of stratum {decision['stratum']}"
    digits = next((digits for digits in range(4, 17) if len({f"{each:.{digits}g}" for each in compared}) > 1), 17)
    own, cutoff = (f"{each:.{digits}g}" for each in compared)
    return f"{value} {own} after epoch {decision['rung']} is worse than the cut-off {cutoff}{among}"
