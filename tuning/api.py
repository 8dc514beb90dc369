"""The commands in Python: `from tuning import search, train_final, evaluate, load_model`."""

import dataclasses
import functools
import inspect
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tuning.record.storage import is_uri
from tuning.settings.config import InputError

if TYPE_CHECKING:  # loaded when they are used: `import tuning` takes a moment
    import numpy as np
    import pandas as pd

    from tuning.model.folder import Ensemble, Model

SHOWN = 5  # trials of a search


class CommandModule(ModuleType):
    """Makes a module callable, so that `tuning.search(...)` works though `tuning.search` is a package, too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return getattr(sys.modules[__name__], self.__name__.rpartition(".")[2])(*given, **named)


@dataclasses.dataclass(frozen=True)
class Run:
    """A search, finished or interrupted."""

    folder: Path

    def table(self, name: str) -> "pd.DataFrame":
        """Return a table of results/README.md, such as `trials` or `epochs`."""
        from tuning.record.tables import read_table

        return read_table(self.folder / f"{name}.parquet")

    @property
    def trials(self) -> "pd.DataFrame":
        """The table of trials, the best first."""
        from tuning.insight.analysis import best, searched

        trials = self.table("trials")
        ranked = best(trials, self._metric, len(trials))
        return trials.loc[[*ranked.index, *searched(trials).index.difference(ranked.index)]]

    @property
    def best(self) -> dict[str, Any]:
        """The best configuration, with its provenance; empty if no trial had a finite loss."""
        import yaml

        path = self.folder / "best.yaml"
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    @property
    def verdict(self) -> str:
        """What the search found, in a sentence."""
        provenance = self.best.get("provenance", {})
        return f"{provenance['verdict']}: {provenance['why']}" if provenance else "no verdict"

    @property
    def _metric(self) -> str:
        from tuning.settings.documents import read_plan

        return str(read_plan(self.folder)["settings"]["metric"])

    def _repr_html_(self) -> str:
        from tuning.show.page import text

        columns = ["trial_id", "config_backbone", "config_unfreeze_depth", "config_learning_rate", self._metric]
        best = self.trials[[*columns, "val_auroc", "epochs", "status"]].head(SHOWN)
        names = {name: name.removeprefix("config_") for name in best}
        table = best.rename(columns=names).to_html(index=False, border=0, float_format="{:.4g}".format)
        return (
            f"<p><b>{text(self.folder.name)}</b>: {text(self.verdict)}</p>{table}<p>{text(self.folder)}/report.html</p>"
        )


@dataclasses.dataclass(frozen=True)
class Tested:
    """A final model with its figures on the test set, or a model's on images from elsewhere."""

    folder: Path

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found

    @functools.cached_property
    def model(self) -> "Model | Ensemble":
        """The final model.

        Raises:
            InputError: this is the result of `evaluate`, whose folder holds no model.
        """
        from tuning.model.folder import load_model

        return load_model(self.folder)

    def predict(self, files: str | Path | Sequence[str | Path]) -> "np.ndarray[Any, Any]":
        """Return probabilities [files, classes] for one or more image files."""
        return self.model.predict(files)

    def _repr_html_(self) -> str:
        import pandas as pd

        from tuning.model.card import BY_CLASS, OVERALL
        from tuning.model.held_out import estimate
        from tuning.show.page import text

        figures = self.metrics.get("evaluation") or self.metrics.get("test")
        if figures is None:
            return f"<p><b>{text(self.folder)}</b>: no test images</p>"
        rows = [{"": "all", **{words: estimate(figures, name) for name, words in OVERALL.items()}}]
        rows += [
            {"": label, **{words: estimate(values, name) for name, words in BY_CLASS.items()}}
            for label, values in figures["classes"].items()
        ]
        table = pd.DataFrame(rows).fillna("").to_html(index=False, border=0)
        return f"<p><b>{text(self.folder)}</b>: {figures['images']:,} images, 95% confidence intervals</p>{table}"


def search(data: str | Path | None = None, **named: Any) -> Run:
    """Search for the best way to fine-tune an image classifier, as `run_search.py` does, and return the run.

    A search that was interrupted, or in which no trial had a finite loss, is returned, too.

    Args:
        data: folder of class folders, manifest or URI; None: generated chest radiographs.
        named: flags of the command (`trials=24`, `time_budget="2h"`, `resume=True`) and settings (`image_size=128`).

    Raises:
        InputError: wrong input; no trial has started.
    """
    from tuning import run_search

    if named.get("storage") is not None:
        named["storage"] = _local(named["storage"], "storage")
    flags = run_search.Flags(**_arguments(run_search.Flags, {"data": data, **named}))
    if flags.name is None:
        flags = dataclasses.replace(flags, name=run_search.planned(flags)[0].name)
    folder = run_search.planned(flags)[2]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        run_search.run(flags)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Run(folder)


def train_final(run: Run | str | Path, **named: Any) -> Tested:
    """Take or train the best model of a run, test it once and write its folder, as `train_final.py` does.

    Args:
        run: a `Run`, the folder of one, or a best.yaml.
        named: flags of the command, settings, and trials' parameters; `prevalence={"pneumonia": 0.02}`.

    Raises:
        InputError: wrong input.
    """
    command = import_module("tuning.train_final")
    named["best"] = _local(run.folder if isinstance(run, Run) else run, "run")
    return Tested(command.run(command.Flags(**_arguments(command.Flags, named))))


def evaluate(model: Tested | str | Path, data: str | Path, **named: Any) -> Tested:
    """Evaluate a model on labelled images from elsewhere, as `evaluate.py` does.

    Args:
        model: what `train_final` returned, or a model's folder.
        data: as for `search`.
        named: flags of the command, and settings of the data; `rename={"Normal": "normal"}`.

    Raises:
        InputError: wrong input.
    """
    command = import_module("tuning.evaluate")
    named |= {"model": _local(model.folder if isinstance(model, Tested) else model, "model"), "data": data}
    return Tested(command.run(command.Flags(**_arguments(command.Flags, named))))


def _local(place: Any, what: str) -> str:
    """Return a folder as text; a URI raises InputError."""
    if is_uri(str(place)):
        raise InputError(f"{what}: {place} is in a storage; use the commands, or copy it to this machine")
    return str(place)


def _arguments(flags: Callable[..., Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a command that arguments give, all others as its `--set`."""
    names = inspect.signature(flags).parameters.keys() - {"set"}
    given = {name: _flag(value) for name, value in named.items() if name in names and value is not None}
    pairs = [f"{name}={_text(value)}" for name, value in named.items() if name not in names]
    return {**given, "set": (tuple(pairs),)} if pairs else given


def _flag(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(f"{key}={each}" for key, each in value.items())
    return str(value) if isinstance(value, Path) else value


def _text(value: Any) -> str:
    """Return a setting's value as `--set` takes it."""
    if isinstance(value, bool | list | tuple | Mapping):
        return json.dumps(value, default=str)
    return str(value)
