import shutil

import pytest
from runs import make_run

from tuning.insight.verdict import judged
from tuning.record.tables import read_table
from tuning.settings.config import SearchPlan
from tuning.show.summary import summarize


@pytest.fixture
def told(tmp_path, capsys):
    """What is printed at the end of a search."""
    run = make_run(tmp_path / "run")

    def summary(**changed):
        trials, samples = read_table(run / "trials.parquet"), read_table(run / "samples.parquet")
        plan = SearchPlan(name="run", trials=24, epochs=8)
        compared, verdict = judged(run, trials, samples, plan.metric, val_drawn=True)
        options = {"halted": None, "slots": 2, "since": 0.0} | changed
        summarize(run, "results/run", plan, verdict, compared, **options)
        return capsys.readouterr().out

    return run, summary


def test_a_model_from_before_is_told_and_no_command_is_given_that_would_be_refused(told):
    run, summary = told
    assert "python tuning/train_final.py results/run        # test the best" in summary()
    (run / "model").mkdir()
    assert "write model/; model/ is from before, move it away first\n" in summary()
    shutil.rmtree(run / "model")
    assert "from before" not in summary()


def test_why_a_search_ended_early_is_told_first(told):
    assert told[1](halted="the time budget is used up").startswith("\nThe search ended early: the time budget is used")
