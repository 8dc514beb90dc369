import pytest

from tuning.record.journal import Record, Row
from tuning.search.optimizer import Optimizer
from tuning.search.proposals import LEAST_TRAINED, searched_trial
from tuning.settings.config import SearchPlan
from tuning.settings.space_file import parse

RATES = {"learning_rate": {"type": "float", "low": 1e-5, "high": 0.1, "log": True}}


def points(*rates):
    return [{"learning_rate": rate} for rate in rates]


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_the_portfolio_is_tried_until_there_is_something_to_learn_from(slots):
    """As many trials as there are slots run, and of these the first has an epoch behind it before the next is asked."""
    listed = [1e-4 * number for number in range(1, 21)]
    lists = {"start": points(0.01), "enqueue": points(0.02, 0.03), "portfolio": points(*listed)}
    space = parse({"parameters": RATES, "fixed": {"backbone": "test_resnet"}} | lists, "x")
    plan, record = SearchPlan(name="x", trials=40), Record()
    optimizer = Optimizer(space, seed=0, metric=plan.metric)
    for number in range(40):
        asked = searched_trial(number, space, plan, optimizer, {}, record)
        record.apply({"event": "asked", "seq": number, "finalist_of": None, **asked})
        if number >= slots - 1:
            record.trials[f"t{number - slots + 1:05d}"].rows.append(Row({"epoch": 1}))
    origins = [trial.origin for trial in record.trials.values()]
    known = LEAST_TRAINED + slots - 1  # those that were asked for before so many had an epoch behind them
    tried = min(known, 3 + len(listed))
    assert origins == ["start"] + ["enqueued"] * (tried - 1) + ["suggested"] * (40 - tried)
    rates = [trial.params["learning_rate"] for trial in record.trials.values()]
    assert rates[:tried] == [0.01, 0.02, 0.03, *listed][:tried]
