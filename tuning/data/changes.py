"""Whether data still is what a run began with: the same images, labels, splits and groups."""

import os
from collections.abc import Mapping

import pandas as pd

from tuning.data.samples import AbsentFiles, load_samples
from tuning.record import storage
from tuning.settings.config import SAMPLE_SETTINGS, InputError, SearchPlan
from tuning.settings.words import count, examples

ABSENT, UNLISTED, OTHER = "missing image", "image no longer listed", "images, splits or groups were added or changed"


class OtherSamples(InputError):
    """The data has other samples than a run."""


def elsewhere(samples: pd.DataFrame, plan: SearchPlan, listing: str | None) -> pd.DataFrame:
    """Return the samples of a run with their files where `plan.data` has them.

    Args:
        samples: of the run, after images were moved between splits, or left out.
        listing: digest of what the run's data listed; None of an older run.

    Raises:
        OtherSamples: the data lacks images of the run, has more, or says otherwise of their labels, splits or groups.
        InputError: as `load_samples`.
    """
    there = _load(plan)
    faults = _differences(samples, there, plan, listing)
    if faults:
        raise OtherSamples(f"{plan.data}: has other samples than the run: {_in_words(faults)}")
    return samples.assign(file=samples["path"].map(there.set_index("path")["file"]))


def changes(samples: pd.DataFrame, plan: SearchPlan, listing: str | None) -> str | None:
    """Say how the data differs by now from the samples of a run; None if it doesn't, or is no longer there.

    Files that are missing are left to whoever opens them. Arguments as `elsewhere`.
    """
    places = [plan.data, plan.images, plan.join, *(plan.split_files or {}).values()]
    if plan.data is None or not all(map(_is_there, filter(None, places))):
        return None
    try:
        there = _load(plan)
    except AbsentFiles:
        return None
    except InputError as error:
        return None if storage.is_uri(plan.data) else f"it can't be read as before: {'; '.join(error.faults)}"
    found = _differences(samples, there, plan, listing)
    absent = found.pop(ABSENT, pd.Series(dtype=object))
    files = samples.set_index("path")["file"][absent]
    left = [path for path, file in files.items() if not storage.is_uri(file) and os.path.exists(file)]
    if left:
        found[UNLISTED] = pd.Series(left)
    if found.keys() == {OTHER} and len(absent):
        return None
    return _in_words(found) or None


def _is_there(place: str) -> bool:
    return storage.is_uri(place) or os.path.exists(os.path.expanduser(place))


def _load(plan: SearchPlan) -> pd.DataFrame:
    return load_samples(str(plan.data), **{key: getattr(plan, key) for key in SAMPLE_SETTINGS})


def _differences(
    samples: pd.DataFrame, there: pd.DataFrame, plan: SearchPlan, listing: str | None
) -> dict[str, "pd.Series[str]"]:
    """Return the paths at which a table of samples differs from a run's, by how.

    Where it says nothing of splits or groups, it doesn't differ in them.
    """
    if listing is not None and there.attrs["listing"] == listing:
        return {}
    both = samples.merge(there[["path", "label", "split", "group"]], "left", "path", suffixes=("", "_there"))
    known = both["label_there"].notna()
    differ = {name: both[name].fillna("") != both[f"{name}_there"].fillna("") for name in ("label", "split", "group")}
    drawn = there.attrs["random_splits"]
    # A run that moves images, or leaves some out, has other splits, or fewer images, than its data.
    altered = plan.on_leak == "move" or plan.skip_unreadable
    given = ~(both["split"].isin(drawn) & both["split_there"].isin(drawn)) & (plan.on_leak != "move")
    more = ~there["path"].isin(samples["path"]) & (not plan.skip_unreadable)
    found = {
        ABSENT: both.loc[~known, "path"],
        "further image": there.loc[more, "path"],
        "other label": both.loc[known & differ["label"], "path"],
        "other split": both.loc[known & differ["split"] & given, "path"],
        "other group": both.loc[known & differ["group"] & there["group"].notna().any(), "path"],
    }
    found = {what: paths for what, paths in found.items() if len(paths)}
    if altered and listing is not None and not found.keys() - {ABSENT}:
        found[OTHER] = pd.Series(dtype=object)
    return found


def _in_words(found: Mapping[str, "pd.Series[str]"]) -> str:
    return "; ".join(
        f"{count(len(paths), what)} ({examples(paths)})" if len(paths) else what for what, paths in found.items()
    )
