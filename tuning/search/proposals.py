"""New trials: probes, start points, suggested trials and finalists, each as the fields of its `asked` event."""

from collections.abc import Mapping
from typing import Any

from tuning.record.journal import Record, Trial
from tuning.search.optimizer import Optimizer
from tuning.settings.config import SearchPlan, TrialConfig
from tuning.settings.space import Key, Space, backbones, middle, trial_values

LEAST_TRAINED = 6  # trials with an epoch behind them, before which nothing is suggested that the portfolio has


def searched_trial(
    number: int,
    space: Space,
    plan: SearchPlan,
    optimizer: Optimizer,
    untried: Mapping[Key, dict[str, Any]],
    record: Record,
) -> dict[str, Any]:
    """Propose the point with this number, or a trial suggested by the optimizer; arguments as its `ask`.

    The portfolio's points take the place of suggestions for as long as there is little to learn those from.
    """
    listed = len(space.start) + len(space.enqueue)
    points = (*space.start, *space.enqueue, *space.portfolio)
    given = points[number] if number < listed or (number < len(points) and _trained(record) < LEAST_TRAINED) else None
    params = optimizer.ask(number, given, untried)
    config = TrialConfig(**trial_values(space, params), epochs=plan.epochs, seed=plan.seed).model_dump()
    origin = "start" if number < len(space.start) else "suggested" if given is None else "enqueued"
    return {"trial_id": f"t{number:05d}", "number": number, "origin": origin, "params": params, "config": config}


def _trained(record: Record) -> int:
    return sum(trial.number is not None and bool(trial.rows) for trial in record.trials.values())


def probe(space: Space, plan: SearchPlan, record: Record) -> dict[str, Any] | None:
    """Propose the linear probe of the next backbone that has none; None if each has one."""
    probed = {trial.config["backbone"] for trial in record.trials.values() if trial.origin == "probe"}
    backbone = next((name for name in backbones(space) if name not in probed), None)
    if backbone is None:
        return None
    given = {"backbone": backbone, "unfreeze_depth": 0, "augmentation": "none"}
    params = middle(space, given)
    config = TrialConfig(**trial_values(space, params) | given, epochs=1, seed=plan.seed)
    return _unnumbered("probe", params, config.model_dump(), record)


def finalist(trial: Trial, seed: int, record: Record) -> dict[str, Any]:
    """Propose to retrain a trial's configuration with another seed."""
    fields = _unnumbered("finalist", trial.params, trial.config | {"seed": seed}, record)
    return fields | {"finalist_of": trial.trial_id}


def _unnumbered(origin: str, params: dict[str, Any], config: dict[str, Any], record: Record) -> dict[str, Any]:
    """A trial that does not count among `plan.trials`."""
    trial_id = f"{origin[0]}{sum(trial.origin == origin for trial in record.trials.values()):05d}"
    return {"trial_id": trial_id, "number": None, "origin": origin, "params": params, "config": config}
