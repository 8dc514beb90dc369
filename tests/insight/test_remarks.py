"""What validation probabilities say is the same on the screen and in the report."""

import numpy as np
import pytest
from runs import make_run

from tuning.insight.analysis import searched, top
from tuning.insight.remarks import remarks
from tuning.record.predictions import predictions_file, write_predictions
from tuning.show import report
from tuning.show.sections import read


def make_judged(folder, sure):
    """A run whose trials give each image's own class, but for noise, a probability of `sure`."""
    run = read(make_run(folder, finalists=False))
    validation = run.samples[run.samples["split"] == "val"]
    classes = sorted(validation["label"].unique())
    own = validation["label"].to_numpy()[:, None] == np.array(classes)
    rng = np.random.default_rng(0)
    for row in searched(run.trials)[run.trials["val_loss"].notna()].itertuples():
        each = np.where(own, sure, 1 - sure) * np.exp(rng.normal(0, 0.1, own.shape))
        probabilities = each / each.sum(axis=1, keepdims=True)
        named = {"epoch": int(row.best_epoch), "val_loss": row.val_loss}
        write_predictions(predictions_file(folder, row.trial_id), validation, classes, probabilities, **named)
    chosen = top(run.trials, "val_loss")["trial_id"]
    return chosen, remarks(folder, searched(run.trials), run.samples, chosen)


@pytest.mark.parametrize(("sure", "better"), [(0.5, False), (0.97, True)])
def test_guesses_are_called_that_in_the_report_too(tmp_path, sure, better):
    chosen, (guessing, calibration) = make_judged(tmp_path / "run", sure)
    assert guessing.alarming is not better
    said = f"The best of the search, {chosen}, is {'' if better else 'no '}better than the class frequencies ("
    assert guessing.words.startswith(said)
    assert calibration.words.startswith(f"{chosen} is {'9' if better else '5'}") and "calibration" in calibration.words
    page = report.report(read(tmp_path / "run"))
    verdict = page.partition('<section id="verdict">')[2].partition("</section>")[0]
    assert f'<p class="{"note" if better else "warning"}">{guessing.words}</p>' in verdict
    assert f'<p class="note">{calibration.words}</p>' in verdict


def test_nothing_is_said_of_what_left_no_probabilities(tmp_path):
    run = read(make_run(tmp_path / "run", trials=3))
    assert remarks(run.folder, searched(run.trials), run.samples, "t00000") == []
