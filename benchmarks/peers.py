"""NePS and SMAC3 as methods of `replay.py`, for an environment of their own: NePS wants pandas below 3.

    pip install "neural-pipeline-search==0.17.0" "smac==2.4.1"    # beside this project's packages

Both train a configuration further from its last epoch where they promote it. NePS gets the portfolio's first
configuration as its prior. ifBO is not among them: the weights of its surrogate are not in its package.
"""

import logging
import math
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any

from benchmarks.record import EPOCHS
from benchmarks.recorded import Curves, Row

REDUCTION = 3  # so that 9 epochs have rungs after 1, 3 and 9
STARTUP_TRIALS = 10  # of SMAC3, as of Optuna


class NePS:
    """PriorBand on asynchronous successive halving, or with Gaussian processes from the third full training on."""

    def __init__(self, curves: Curves, seed: int, slots: int, clock: SimpleNamespace, prior: Row, model: bool):
        import neps
        import torch
        from neps.optimizers import algorithms

        logging.getLogger("neps").setLevel(logging.ERROR)
        torch.manual_seed(seed)  # NePS draws from the global generators
        torch.set_num_threads(1)
        rates = curves.grid["learning_rate"]
        space: dict[str, Any] = {
            name: neps.Categorical(
                choices=list(choices), prior=choices.index(prior.get(name, choices[0])), prior_confidence="medium"
            )
            for name, choices in curves.grid.items()
            if name != "learning_rate"
        }
        space["learning_rate"] = neps.Float(
            lower=rates[0] / 2, upper=rates[-1] * 2, log=True, prior=prior["learning_rate"], prior_confidence="medium"
        )
        space["epochs"] = neps.IntegerFidelity(lower=1, upper=EPOCHS)
        given = {"bayesian_optimization_kick_in_point": 3} if model else {}
        pipeline = type("Space", (neps.PipelineSpace,), space)()
        self._told = neps.AskAndTell(algorithms.priorband(pipeline, eta=REDUCTION, base="asha", **given))
        self._trials: dict[int, Any] = {}
        self._best: dict[int, float] = {}

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        try:
            self._trials[ticket] = trial = self._told.ask()
        except AssertionError:
            # PriorBand's weights are no numbers where its densities are all 0, for all later asks too: the replay ends
            # here, and a goal that it had not reached counts as not reached.
            return None
        before = trial.metadata.previous_trial_id
        self._best[ticket] = math.inf
        return dict(trial.config), 0 if before is None else int(self._told.trials[before].config["epochs"])

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        trial = self._trials[ticket]
        self._best[ticket] = min(self._best[ticket], math.inf if row["val_loss"] is None else row["val_loss"])
        if row["val_loss"] is not None and epoch < trial.config["epochs"]:
            return True
        loss = self._best[ticket] if math.isfinite(self._best[ticket]) else 10.0
        self._told.tell(trial, {"objective_to_minimize": loss})
        return False


class Smac:
    """SMAC3's multi-fidelity facade: Hyperband with random forests."""

    def __init__(self, curves: Curves, seed: int, slots: int, clock: SimpleNamespace):
        from ConfigSpace import Categorical, ConfigurationSpace, Float
        from smac import MultiFidelityFacade, Scenario

        logging.getLogger("smac").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        self._folder = tempfile.TemporaryDirectory()
        space, rates = ConfigurationSpace(seed=seed), curves.grid["learning_rate"]
        for name, choices in curves.grid.items():
            if name != "learning_rate":
                space.add(Categorical(name, list(choices)))
        space.add(Float("learning_rate", (rates[0] / 2, rates[-1] * 2), log=True))
        scenario = Scenario(
            space,
            output_directory=self._folder.name,  # type: ignore[arg-type]
            deterministic=True,
            n_trials=10_000,
            min_budget=1,
            max_budget=EPOCHS,
            seed=seed,
            n_workers=1,
        )
        design = MultiFidelityFacade.get_initial_design(scenario, n_configs=STARTUP_TRIALS)
        intensifier = MultiFidelityFacade.get_intensifier(scenario, eta=REDUCTION)
        self._facade = MultiFidelityFacade(
            scenario,
            lambda config, seed, budget: 0.0,
            initial_design=design,
            intensifier=intensifier,
            overwrite=True,
            logging_level=logging.ERROR,
        )
        self._asked: dict[int, Any] = {}
        self._best: dict[int, float] = {}
        self._trained: dict[Any, int] = {}

    def suggest(self, ticket: int) -> tuple[Row, int] | None:
        self._asked[ticket] = asked = self._facade.ask()
        self._best[ticket] = math.inf
        return dict(asked.config), self._trained.get(asked.config, 0)

    def report(self, ticket: int, epoch: int, row: Row) -> bool:
        from smac.runhistory.dataclasses import TrialValue

        asked = self._asked[ticket]
        self._trained[asked.config] = epoch
        self._best[ticket] = min(self._best[ticket], math.inf if row["val_loss"] is None else row["val_loss"])
        if row["val_loss"] is not None and epoch < round(asked.budget):
            return True
        loss = self._best[ticket] if math.isfinite(self._best[ticket]) else 10.0
        self._facade.tell(asked, TrialValue(cost=loss), save=False)
        return False
