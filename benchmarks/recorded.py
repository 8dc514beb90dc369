"""The curves that `record.py` has recorded, for `replay.py` and `portfolio.py`."""

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.record import CURVES, Grid

BEST = (0.05, 0.01)  # shares of the grid's configurations that a method is timed to
Key = tuple[Any, ...]
Row = dict[str, Any]


class Curves:
    """Recorded epochs by configuration."""

    def __init__(self, name: str):
        table = pq.read_table(CURVES / f"{name}.parquet")
        self.name, recorded = name, json.loads(table.schema.metadata[b"recorded"])
        self.class_entropy: float = recorded["class_entropy"]
        self.grid: Grid = {name: tuple(values) for name, values in recorded["grid"].items()}
        frame = table.to_pandas()
        # Recorded when it was measured of averaged weights there too.
        frame["early_loss"] = frame["early_loss"].where(frame["unfreeze_depth"] > 0, frame["val_loss"])
        self.rows: dict[Key, list[Row]] = {}
        self.seconds: dict[Key, float] = {}
        for row in frame.sort_values("epoch").astype(object).where(frame.notna(), None).to_dict("records"):
            key = tuple(row[name] for name in self.grid)
            self.rows.setdefault(key, []).append(row)
            self.seconds.setdefault(key, float(row["seconds"]))
        best = np.sort([self.best(key) for key in self.rows])
        self.least = float(best[0])
        self.goals = {share: float(best[math.ceil(share * len(best)) - 1]) for share in BEST}

    def best(self, key: Key) -> float:
        return min((row["val_loss"] for row in self.rows[key] if row["val_loss"] is not None), default=math.inf)

    def probed(self, backbone: str) -> float:
        """What a linear probe is taken to give: the best of the classifiers trained alone without augmentation."""
        alone = {"backbone": backbone, "augmentation": "none", "unfreeze_depth": 0}
        return min(self.best(self.key(alone | {"learning_rate": rate})) for rate in self.grid["learning_rate"])

    def key(self, params: Row) -> Key:
        """The grid's nearest configuration."""
        rate = min(self.grid["learning_rate"], key=lambda other: abs(math.log(other / params["learning_rate"])))
        named = params | {"learning_rate": rate}
        if not named["unfreeze_depth"]:  # no batch norm to choose, though peers give one
            named["batch_norm"] = "train"
        return tuple(named[name] for name in self.grid)

    def row(self, key: Key, epoch: int) -> Row:
        """An epoch; one after the last recorded, which was not finite, is like that."""
        rows = self.rows[key]
        return rows[min(epoch, len(rows)) - 1]


@cache
def curves_of(name: str) -> Curves:
    return Curves(name)
