"""best.yaml: the configuration that the verdict chose, itself valid for `TrialConfig`, with its provenance."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tuning.insight.verdict import Verdict, counted
from tuning.record.journal import Trial, best_epoch
from tuning.search.plans import write_yaml
from tuning.settings.config import SearchPlan, TrialConfig


def write_best(
    folder: Path, plan: SearchPlan, trial: Trial, trials: pd.DataFrame, verdict: Verdict, run: Mapping[str, Any]
) -> None:
    """Write best.yaml into a run's folder: the chosen trial's configuration, and how it came to be chosen.

    Args:
        run: the provenance in plan.yaml.
    """
    runs = counted(trials[trials["finalist_of"] == trial.trial_id])
    provenance = {
        "run": plan.name,
        "trial_id": trial.trial_id,
        "verdict": verdict.verdict,
        "why": verdict.sentence,
        "metric": plan.metric,
        "best_epoch": dict(best_epoch(trial.rows, plan.metric) or {}),
        "best_epochs": [int(epoch) for epoch in runs["best_epoch"].dropna()],
        **{key: run[key] for key in ("fingerprint", "listing", "packages", "weights") if key in run},
        "config_sha256": config_digest(trial.config),
        "settings": plan.model_dump(),
    }
    write_yaml(folder / "best.yaml", trial.config | {"provenance": provenance})


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a digest of a configuration's values, however they are written, without the seed."""
    values = TrialConfig(**config).model_dump(mode="json", include=config.keys() - {"seed"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
