"""Compare ways to search, by replaying recorded learning curves instead of training.

Every method chooses from the grid that `record.py` trained and is answered from its curves, in simulated time, with any
number of simulated slots. The product is the real one: `search.Search` with its journal, its rungs and its Optuna
bridge, told of epochs by this file instead of by Ray. Stock Ray Tune, Optuna alone and Syne Tune run their own code.

A loss that is not finite is told to Ray Tune as it is, to Syne Tune, which has no word for it, as 10.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import heapq
import itertools
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks.portfolio import as_point, ranks, without
from benchmarks.record import EPOCHS, Grid, space
from benchmarks.recorded import Curves, Key, Row, curves_of
from tuning.record.tables import make_tables
from tuning.search.cluster import Slots
from tuning.search.driver import Search
from tuning.search.optimizer import Prior, read_priors
from tuning.settings.config import SearchPlan
from tuning.settings.space import Space
from tuning.settings.space_file import parse
from tuning.training.finetune import ending

MAX_EPOCHS = 600
PORTFOLIO_SIZE = 16
# Surrogates are fitted anew for each suggestion: 600 epochs take over a minute.
FEWER_EPOCHS = dict.fromkeys(("syne-cqr", "smac", "optuna-gp-hyperband"), 200)
WARM_EPOCHS = 200
SIGNALS_AT = (1, 2, 3, 4)  # epochs whose signals are compared with how trials end
SHOWN_AFTER = (60, 200)  # epochs after which the best loss found is printed
Task = tuple[str, str, int, int]  # curves, method, slots, seed


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare ways to search on recorded curves."""

    curves: tuple[str, ...] = ("generated", "xrays")
    """Files in benchmarks/curves."""
    methods: tuple[str, ...] = ()
    """Names of methods. Default: all but those of `peers.py`."""
    slots: tuple[int, ...] = (1, 4, 16)
    """Simulated trials at once."""
    seeds: int = 30
    """Replays of each."""
    out: str = "results/replay"
    """Folder of the traces; those that are there are not run again, so take a new one when the product has changed."""


# ---- the methods ------------------------------------------------------------------------------------------------


class Method(Protocol):
    """A way to search; trials are named by tickets, which count from 0."""

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        """A configuration, and the epochs of it that were trained already, from whose end it goes on."""

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        """Take in an epoch; true if the trial goes on."""


class Product:
    """The search of this project; `changed` are its settings, `portfolio` makes the points that it tries first.

    With `warm_start` it knows of a search of WARM_EPOCHS epochs on the other data set.
    """

    def __init__(
        self,
        curves: Curves,
        seed: int,
        slots: int,
        clock: SimpleNamespace,
        portfolio: Callable[[Curves], list[Row]] = lambda curves: [],
        warm_start: bool = False,
        **changed: Any,
    ):
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        settings = {name: value for name, value in changed.items() if name in SearchPlan.model_fields}
        self._plan = SearchPlan(name="replay", trials=100_000, epochs=EPOCHS, seed=seed, metric="val_loss", **settings)
        tried = portfolio(curves)
        searched_space = parse(space(curves.grid) | {"start": tried[:1], "portfolio": tried[1:]}, "grid")
        self.search = Search(
            self._plan,
            searched_space,
            Path(self._folder.name),
            images={},
            weights={},
            resources=Slots(1, 0.0, slots),
            show=lambda search, trial: None,
            priors=priors("xrays" if curves.name == "generated" else "generated", seed, searched_space)
            if warm_start
            else (),
            clock=lambda: float(clock.now),
        )
        for name in changed.keys() - settings.keys():  # what the bridge can do and no setting says
            assert hasattr(self.search.optimizer, name)
            setattr(self.search.optimizer, name, changed[name])
        self._curves = curves
        self._histories: dict[str, list[Row]] = {}  # by trial
        self._trials: dict[int, str] = {}
        self._probes: dict[int, float] = {}

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        named = self.search.next_trial(str(ticket))
        if not isinstance(named, dict):
            return None
        self.search.started(str(ticket))
        self._trials[ticket] = named["trial_id"]
        history = self._histories.setdefault(named["trial_id"], [])
        config: Row = named["config"]
        if named["origin"] == "probe":
            self._probes[ticket] = self._curves.probed(config["backbone"])
        return config, len(history)

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        history = self._histories[self._trials[ticket]]
        compared = self._plan.compared == "early_loss" and epoch in self.search.rungs.rungs
        early_loss = row["early_loss"] if compared else None  # as the product measures it
        history.append(row | {"val_loss": self._probes.get(ticket, row["val_loss"]), "early_loss": early_loss})
        row = history[-1]
        stopping = self._plan.early_stopping
        ends, reason = ending(
            history,
            epochs=1 if ticket in self._probes else EPOCHS,
            metric=self._plan.metric,
            patience=self._plan.patience if stopping else None,
            class_entropy=self._curves.class_entropy,
            divergence_factor=self._plan.divergence_factor if stopping else math.inf,
        )
        named = {"epoch": epoch, "ends": ends, "reason": reason, "batch_size": 32, "micro_batch": 32, "images": 0}
        named |= dict.fromkeys(("data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds"), 0.0)
        named |= {"learning_rate": 0.0, "cache_hits": 0, "peak_memory_mb": None}
        return self.search.result(str(ticket), row | named)


class StockRay:
    """`OptunaSearch` and `ASHAScheduler` with their defaults, called as Ray's controller calls them."""

    def __init__(self, curves: Curves, seed: int, slots: int, clock: SimpleNamespace):
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        self._searcher = OptunaSearch(distributions(curves.grid), metric="val_loss", mode="min", seed=seed)
        self._scheduler = ASHAScheduler(metric="val_loss", mode="min", max_t=EPOCHS)

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=str(ticket)))
        return self._searcher.suggest(str(ticket)), 0

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        loss = math.nan if row["val_loss"] is None else row["val_loss"]
        result = {"training_iteration": epoch, "val_loss": loss}
        decision = self._scheduler.on_trial_result(None, SimpleNamespace(trial_id=str(ticket)), result)
        if decision == ASHAScheduler.CONTINUE:
            self._searcher.on_trial_result(str(ticket), result)
            return True
        try:
            self._searcher.on_trial_complete(str(ticket), result)
        except ValueError:  # of a loss that is not a number; Ray logs it and goes on
            pass
        return False


class OptunaAlone:
    """One of Optuna's samplers with one of its pruners, each with its defaults; a trial's value is its best epoch."""

    def __init__(
        self,
        curves: Curves,
        seed: int,
        slots: int,
        clock: SimpleNamespace,
        pruner: str,
        sampler: type[optuna.samplers.BaseSampler] = optuna.samplers.TPESampler,
    ):
        pruners = {
            "hyperband": partial(optuna.pruners.HyperbandPruner, max_resource=EPOCHS),
            "halving": optuna.pruners.SuccessiveHalvingPruner,
        }
        self._study = optuna.create_study(sampler=sampler(seed=seed), pruner=pruners[pruner]())
        self._trials: dict[int, optuna.Trial] = {}
        self._distributions = distributions(curves.grid)

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        self._trials[ticket] = trial = self._study.ask(self._distributions)
        return dict(trial.params), 0

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        trial = self._trials[ticket]
        if row["val_loss"] is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return False
        trial.report(row["val_loss"], epoch)
        if epoch < EPOCHS and trial.should_prune():
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return False
        if epoch == EPOCHS:
            values = trial.storage.get_trial(trial._trial_id).intermediate_values
            self._study.tell(trial, min(values.values()))
        return epoch < EPOCHS


class SyneTune:
    """One of Syne Tune's baselines with its defaults."""

    def __init__(self, curves: Curves, seed: int, slots: int, clock: SimpleNamespace, baseline: str):
        from syne_tune.config_space import choice, loguniform
        from syne_tune.optimizer import baselines

        low, high = rate_range(curves.grid)
        config_space = {name: choice(list(choices)) for name, choices in curves.grid.items()}
        config_space["learning_rate"] = loguniform(low, high)
        named = {"time_attr": "epoch", "max_t": EPOCHS, "random_seed": seed}
        self._scheduler = getattr(baselines, baseline)(config_space, metric="val_loss", **named)
        self._trials: dict[int, Any] = {}

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        from datetime import datetime

        from syne_tune.backend.trial_status import Trial

        suggestion = self._scheduler.suggest()
        self._trials[ticket] = Trial(ticket, suggestion.config, datetime.now())
        self._scheduler.on_trial_add(self._trials[ticket])
        return suggestion.config, 0

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        result = {"epoch": epoch, "val_loss": 10.0 if row["val_loss"] is None else row["val_loss"]}
        if epoch == EPOCHS:
            self._scheduler.on_trial_complete(self._trials[ticket], result)
            return False
        return str(self._scheduler.on_trial_result(self._trials[ticket], result)) == "CONTINUE"


def rate_range(grid: Grid) -> tuple[float, float]:
    rates = grid["learning_rate"]
    return rates[0] / 2, rates[-1] * 2


def distributions(grid: Grid) -> dict[str, optuna.distributions.BaseDistribution]:
    named: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(choices) for name, choices in grid.items()
    }
    return named | {"learning_rate": optuna.distributions.FloatDistribution(*rate_range(grid), log=True)}


def learnt(curves: Curves) -> list[Row]:
    """The portfolio that is learnt from the other sets."""
    return points(curves, without(curves.name, PORTFOLIO_SIZE))


def worst(curves: Curves) -> list[Row]:
    """As bad a portfolio as there can be: the configurations that do worst on this set."""
    there = ranks(curves)
    return points(curves, sorted(there, key=lambda each: -there[each])[:PORTFOLIO_SIZE])


def points(curves: Curves, configurations: list[Key]) -> list[Row]:
    """Points of the set's space, in which batch norm may not be chosen."""
    found = [as_point(configuration) for configuration in configurations]
    return [{name: value for name, value in point.items() if name in curves.grid} for point in found]


def neps(curves: Curves, seed: int, slots: int, clock: SimpleNamespace, model: bool) -> Method:
    from benchmarks.peers import NePS

    return NePS(curves, seed, slots, clock, learnt(curves)[0], model)


def smac(curves: Curves, seed: int, slots: int, clock: SimpleNamespace) -> Method:
    from benchmarks.peers import Smac

    return Smac(curves, seed, slots, clock)


METHODS: dict[str, Callable[..., Method]] = {
    "product": partial(Product, portfolio=learnt),
    "ray-optuna-asha": StockRay,
    "optuna-hyperband": partial(OptunaAlone, pruner="hyperband"),
    "optuna-halving": partial(OptunaAlone, pruner="halving"),
    "optuna-gp-hyperband": partial(OptunaAlone, pruner="hyperband", sampler=optuna.samplers.GPSampler),
    "syne-asha": partial(SyneTune, baseline="ASHA"),
    "syne-bohb": partial(SyneTune, baseline="BOHB"),
    "syne-cqr": partial(SyneTune, baseline="ASHACQR"),
    "neps-priorband": partial(neps, model=False),
    "neps-priorband-bo": partial(neps, model=True),
    "smac": smac,
    # The product with one thing changed; from "no probe" on without a portfolio.
    "no promotion": partial(Product, portfolio=learnt, promote=False),
    "no local search": partial(Product, portfolio=learnt, local_search=False),
    "no portfolio": Product,
    "no local search, no promotion": partial(Product, portfolio=learnt, local_search=False, promote=False),
    "no local search, no portfolio": partial(Product, local_search=False),
    "no local search, worst portfolio": partial(Product, portfolio=worst, local_search=False),
    "no promotion, no portfolio": partial(Product, promote=False),
    "portfolio reversed": partial(Product, portfolio=lambda curves: learnt(curves)[::-1]),
    "worst portfolio": partial(Product, portfolio=worst),
    "no probe": partial(Product, probe=False),
    "compare best": partial(Product, compared="best"),
    "compare last": partial(Product, compared="last"),
    "compare mean": partial(Product, compared="mean"),
    "grace 2": partial(Product, grace_epochs=2),
    "grace 3": partial(Product, grace_epochs=3),
    "reduction 3": partial(Product, reduction_factor=3),
    "reduction 4": partial(Product, reduction_factor=4),
    "strata none": partial(Product, strata="none"),
    "strata unfrozen": partial(Product, strata="unfrozen"),
    "strata backbone": partial(Product, strata="backbone"),
    "strata both": partial(Product, strata="both"),
    "stopped as pruned": partial(Product, stopped_as="pruned"),
    "stopped not told": partial(Product, stopped_as="fail"),
    "stopped as complete": partial(Product, stopped_as="complete"),
    "warm start": partial(Product, warm_start=True),
    "random": partial(Product, sampler="random"),
    "random, no stopping": partial(Product, sampler="random", early_stopping=False),
}
ELSEWHERE = ("neps-priorband", "neps-priorband-bo", "smac")  # need an environment of their own
PEERS = ("ray-optuna-asha", "optuna-hyperband", "optuna-halving", "syne-asha", "syne-bohb", "syne-cqr")
PLOTTED = ("product", *PEERS)


# ---- one replay -------------------------------------------------------------------------------------------------


def replay(curves_name: str, method_name: str, slots: int, seed: int) -> pd.DataFrame:
    """Search until MAX_EPOCHS, or the method's FEWER_EPOCHS, are trained.

    Returns:
        A row per epoch: seconds (simulated, at its end) and best (val_loss so far).
    """
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    np.random.seed(seed)  # of peers that draw from the global generator
    curves, clock = curves_of(curves_name), SimpleNamespace(now=0.0)
    method = METHODS[method_name](curves, seed, slots, clock)
    epochs = FEWER_EPOCHS.get(method_name, MAX_EPOCHS)
    return pd.DataFrame(searched(method, curves, slots, clock, epochs), columns=["seconds", "best"])


def searched(
    method: Method, curves: Curves, slots: int, clock: SimpleNamespace, epochs: int
) -> list[tuple[float, float]]:
    """Search until so many epochs are trained; the rows of `replay`."""
    running: list[tuple[float, int, int]] = []  # end of the epoch, ticket, epoch
    keys: dict[int, Key] = {}
    tickets, best = itertools.count(), math.inf
    trace: list[tuple[float, float]] = []
    while len(trace) < epochs:
        while len(running) < slots:
            ticket = next(tickets)
            suggested = method.suggest(ticket)
            if suggested is None:
                break
            keys[ticket] = curves.key(suggested[0])
            heapq.heappush(running, (clock.now + curves.seconds[keys[ticket]], ticket, suggested[1] + 1))
        if not running:
            break
        clock.now, ticket, epoch = heapq.heappop(running)
        row = curves.row(keys[ticket], epoch)
        best = min(best, math.inf if row["val_loss"] is None else row["val_loss"])
        trace.append((clock.now, best))
        if method.report(ticket, epoch, row):
            heapq.heappush(running, (clock.now + curves.seconds[keys[ticket]], ticket, epoch + 1))
    return trace


def priors(curves_name: str, seed: int, searched: Space) -> list[Prior]:
    """What the product's trials on a data set, on one slot, tell a search in another's space."""
    curves, clock = curves_of(curves_name), SimpleNamespace(now=0.0)
    method = Product(curves, seed, 1, clock)
    searched(method, curves, 1, clock, WARM_EPOCHS)
    trials = make_tables(method.search.record, "val_loss")["trials"].to_pandas()
    return read_priors(trials, searched, "val_loss", SearchPlan(name="replay").warm_start_weight)[0]


def replayed(task: Task, out: Path) -> pd.DataFrame:
    """A replay's trace: the one that is there, or a new one."""
    path = out / ("-".join(map(str, task)) + ".parquet")
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        pq.write_table(pa.Table.from_pandas(replay(*task)), temporary)
        os.replace(temporary, path)
    return pd.read_parquet(path)


# ---- report -----------------------------------------------------------------------------------------------------


def reached(trace: pd.DataFrame, goal: float) -> tuple[float, float]:
    """Epochs and seconds until a loss was seen that is at most the goal; infinite where it was not."""
    there = np.flatnonzero(trace["best"].to_numpy() <= goal)
    return (float(there[0] + 1), float(trace["seconds"].iloc[there[0]])) if len(there) else (math.inf, math.inf)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with its 95% bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    medians = np.sort(np.quantile(drawn, 0.5, axis=1, method="lower"))
    return float(np.quantile(values, 0.5, method="lower")), float(medians[50]), float(medians[1949])


def rank_correlations(curves: Curves, signal: str) -> list[float]:
    """Spearman's, of a signal in each of the first epochs with the best loss that the configuration reaches."""
    best = pd.Series({key: curves.best(key) for key in curves.rows}).rank()
    found = []
    for epoch in SIGNALS_AT:
        values = pd.Series({key: curves.row(key, epoch)[signal] for key in curves.rows}, dtype=float)
        found.append(float(values.fillna(math.inf).rank().corr(best)))
    return found


def plot(traces: dict[Task, pd.DataFrame], flags: Flags, methods: tuple[str, ...]) -> None:
    """Regret against simulated time, median and quartiles of the seeds: a panel for each table and slot count."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (4 * len(flags.slots), 3.4 * len(flags.curves))
    figure, axes = pyplot.subplots(len(flags.curves), len(flags.slots), figsize=size, squeeze=False, sharey="row")
    for (row, name), (column, slots) in itertools.product(enumerate(flags.curves), enumerate(flags.slots)):
        panel, least = axes[row][column], curves_of(name).least
        ends = [
            traces[name, method, slots, seed]["seconds"].iloc[-1] for method in methods for seed in range(flags.seeds)
        ]
        times = np.linspace(0, np.median(ends), 300)  # a replay that has ended stays where it was
        for method in methods:
            regrets = []
            for seed in range(flags.seeds):
                trace = traces[name, method, slots, seed]
                place = np.searchsorted(trace["seconds"].to_numpy(), times, side="right") - 1
                regrets.append(np.where(place < 0, np.inf, trace["best"].to_numpy()[place] - least))
            low, middle, high = np.quantile(np.array(regrets), [0.25, 0.5, 0.75], axis=0, method="lower")
            (line,) = panel.plot(times, middle, label=method, linewidth=2.5 if method == "product" else 1.2)
            panel.fill_between(times, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        panel.set(ylim=(0, 0.6), title=f"{name}, {slots} slots", xlabel="simulated seconds")
    axes[0][0].set_ylabel("val_loss above the table's least")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(flags.out) / "replay.png", dpi=90)


def main() -> None:
    """Replay what isn't there yet, and print the figures."""
    flags = tyro.cli(Flags)
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    methods = flags.methods or tuple(name for name in METHODS if name not in ELSEWHERE)
    tasks = list(itertools.product(flags.curves, methods, flags.slots, range(flags.seeds)))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        traces = dict(zip(tasks, pool.imap(partial(replayed, out=out), tasks), strict=True))
    for name, signal in itertools.product(flags.curves, ("val_loss", "early_loss")):
        found = ", ".join(f"{value:.2f}" for value in rank_correlations(curves_of(name), signal))
        print(f"{name}: rank correlation of {signal} at epochs {SIGNALS_AT} with the best val_loss: {found}")
    for name, slots in itertools.product(flags.curves, flags.slots):
        goals = curves_of(name).goals
        print(
            f"\n{name}, {slots} slots: median of {flags.seeds} seeds [95% interval] to the best 5% and the best 1%; "
            f"least val_loss after {' and '.join(map(str, SHOWN_AFTER))} epochs"
        )
        for method in methods:
            cells = []
            for goal in goals.values():
                found = [reached(traces[name, method, slots, seed], goal) for seed in range(flags.seeds)]
                for place, unit in enumerate(("epochs", "s")):
                    middle, low, high = interval([each[place] for each in found])
                    cells.append(f"{middle:.0f} [{low:.0f}, {high:.0f}] {unit}")
            for epochs in SHOWN_AFTER:
                best = [traces[name, method, slots, seed]["best"].iloc[:epochs].iloc[-1] for seed in range(flags.seeds)]
                cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*interval(best)))
            print(f"{method:<24} " + "  ".join(f"{cell:<24}" for cell in cells))
    plot(traces, flags, tuple(method for method in methods if method in PLOTTED))


if __name__ == "__main__":
    main()
