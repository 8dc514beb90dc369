"""Which classes can't be ruled out for an image: prediction sets with a stated coverage.

Class-conditional split conformal prediction (Vovk 2012, https://arxiv.org/abs/1209.2673), fitted on validation with
each group, such as a patient, counted once (Dunn et al. 2022, https://arxiv.org/abs/1809.07441): of images that have a
class, or a label, at least the stated share have it in their sets, for each class alone.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tuning.record.tables import replacing, versioned
from tuning.record.targets import by_class
from tuning.record.temperature import Floats, Ints

FILE = "conformal.parquet"  # in a model folder
SCHEMA = versioned({"class": pa.string(), "probability": pa.float64(), "weight": pa.float64()})


def scores(each: Sequence[Floats], targets: Ints, groups: Ints, classes: Sequence[str]) -> pd.DataFrame:
    """Return, for each class, its probability for the validation images that have it, and their weights.

    Args:
        each: probabilities [n, classes] by one or several models.
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        groups: [n], 0, 1, ...
        classes: names.

    Returns:
        Columns class, probability and weight; the weights of a class add up to its number of groups.
    """
    parts = []
    cells = by_class(targets, len(classes))
    for place, name in enumerate(classes):
        rows = np.flatnonzero(cells[:, place] == 1)
        sizes = np.bincount(groups[rows], minlength=1)[groups[rows]]
        for probabilities in each:
            weights = 1 / (sizes * len(each))
            parts.append(pd.DataFrame({"class": name, "probability": probabilities[rows, place], "weight": weights}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=SCHEMA.names)


def write(folder: Path, found: pd.DataFrame) -> None:
    """Write what `scores` returned into a model folder."""
    with replacing(folder / FILE) as temporary:
        table = pa.Table.from_pandas(found, schema=SCHEMA, preserve_index=False)
        pq.write_table(table, temporary, write_page_checksum=True)


def thresholds(found: pd.DataFrame, classes: Sequence[str], coverage: float) -> Floats:
    """Return the probability of each class from which it is in a set [classes]; 0 where it can never be ruled out.

    Args:
        found: of `scores`.
        classes: names.
        coverage: share of the images of a class whose sets hold it, above 0 and below 1.
    """
    least = np.zeros(len(classes))
    for place, name in enumerate(classes):
        own = found[found["class"] == name].sort_values("probability", ascending=False)
        weights = np.cumsum(own["weight"].to_numpy(np.float64))
        # The new image's group counts as one more, which may have any probability.
        enough = np.flatnonzero(weights >= coverage * ((weights[-1] if len(weights) else 0) + 1) - 1e-9)
        if len(enough):
            least[place] = float(own["probability"].iloc[enough[0]])
    return least
