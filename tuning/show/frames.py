"""Numbers, tables and sentences that the terminal and the report page share; a frame's columns are its headings."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from tuning.insight import analysis
from tuning.settings.config import visible
from tuning.settings.words import count


def number(value: Any, digits: int = 4) -> str:
    """Format a float with `digits` decimals (very small or large ones in short), an int with commas, None as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return f"{int(value):,}"


def duration(seconds: float) -> str:
    """Format seconds as 42 s, 3.5 min or 1.2 h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def cells(frame: pd.DataFrame) -> Iterator[tuple[str, list[str], bool]]:
    """Yield each column's heading, its values as text on one line, and whether they are numbers."""
    for heading in frame:
        values = frame[heading].tolist()
        numbers = [value is None or isinstance(value, int | float) for value in values]
        texts = [
            number(value) if is_number else visible(value) for value, is_number in zip(values, numbers, strict=True)
        ]
        yield str(heading), texts, bool(values) and all(numbers)


def overfitting(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the overfitting gap of the best trial of each backbone and unfrozen part."""
    heads = {"trial_id": "best trial", "train_eval_loss": "train loss", "val_loss": "val loss"}
    return analysis.overfitting(trials, metric).rename(columns=heads)


def gaps(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the median gap, with the number of trials, by unfrozen part (rows) and augmentation (columns)."""
    found = analysis.gaps(trials)
    found["cell"] = [f"{gap:.4f} ({trials})" for gap, trials in zip(found["gap"], found["trials"], strict=True)]
    wide = found.pivot(index="unfrozen", columns="augmentation", values="cell")
    return pd.DataFrame({"unfrozen": wide.index, **{name: wide[name].to_numpy() for name in wide}})


def finalists(judged: pd.DataFrame) -> pd.DataFrame:
    """Return the table of finalists, with the bounds of the confidence interval in one column."""
    low, high = judged["low"].map(number), judged["high"].map(number)
    heads = {"trial_id": "trial", "role": "role", "runs": "runs", "mean": "mean", "sd": "sd", "searched": "search"}
    heads |= {"luck": "selection bias", "difference": "better by", "interval": "confidence interval", "p_value": "p"}
    return judged.assign(
        role=judged["role"].where(~judged["chosen"].astype(bool), judged["role"] + ", chosen"),
        interval=(low + " to " + high).where(judged["low"].notna(), "-"),
        seconds=judged["seconds"].round(),
    )[[*heads, "seconds"]].rename(columns=heads | {"seconds": "s per run"})


def early_stopping(trials: pd.DataFrame, epochs: int) -> str:
    """Say what early stopping saved of the planned `epochs` per trial, in GPU time if the trials ran on GPUs."""
    column, kind = ("gpu_seconds", "GPU time") if trials["gpu_seconds"].sum() > 0 else ("seconds", "training")
    rows = analysis.savings(trials.assign(seconds=trials[column]), epochs)
    if not rows["epochs_saved"].sum():
        return "Early stopping ended no trial before its last epoch."
    saved, spent = rows["seconds_saved"].sum(), trials[column].sum()
    share = saved / max(saved + spent, 1e-9)
    saved_epochs = count(int(rows["epochs_saved"].sum()), "epoch")
    time = f"{duration(saved)} of {kind} ({share:.0%} of the time that all epochs take)"
    return f"Early stopping saved {saved_epochs}, about {time}."
