"""Which images are likely to have a wrong label, by predictions of models that didn't train on them.

Images are ranked by the probability of their own label (self-confidence, Northcutt et al. 2021,
https://arxiv.org/abs/1911.00068), and one is an issue if another label is at least `ODDS` times as probable.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tuning.record.temperature import Floats, Ints

ODDS = 3.0
COLUMNS = ("row", "label", "suggested", "own", "probability", "issue")


def ranked(probabilities: Floats, targets: Ints, classes: Sequence[str]) -> pd.DataFrame:
    """Return a row for each image, and of several labels for each known one, the likeliest wrong label first.

    Args:
        probabilities: [n, classes], of models that weren't trained on these images.
        targets: class indices [n], or labels [n, classes] of 1, 0 and -1 (unknown).
        classes: names.

    Returns:
        Columns row (of the image), label, suggested (its label by the models), own (probability of its label),
        probability (of the suggested one), issue (whether it is likely to be wrong).
    """
    if targets.ndim == 1:
        found = _of_classes(probabilities, targets, classes)
    else:
        parts = []
        for place, name in enumerate(classes):
            rows = np.flatnonzero(targets[:, place] >= 0)
            of_two = np.stack([1 - probabilities[rows, place], probabilities[rows, place]], axis=1)
            part = _of_classes(of_two, targets[rows, place], (f"no {name}", name))
            parts.append(part.assign(row=rows[part["row"]]))
        found = pd.concat(parts, ignore_index=True)
    return found.sort_values("own", kind="stable", ignore_index=True)


def _of_classes(probabilities: Floats, targets: Ints, classes: Sequence[str]) -> pd.DataFrame:
    rows = np.arange(len(targets))
    own, suggested = probabilities[rows, targets], probabilities.argmax(axis=1)
    issue = probabilities[rows, suggested] >= ODDS * own
    names = np.array(classes, dtype=object)
    values = {
        "row": rows,
        "label": names[targets],
        "suggested": names[suggested],
        "own": own,
        "probability": probabilities[rows, suggested],
        "issue": issue,
    }
    return pd.DataFrame(values, columns=list(COLUMNS))
