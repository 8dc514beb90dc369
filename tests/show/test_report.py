import json
import os
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from runs import make_audit, make_run

from tuning.record.journal import Journal, read_record
from tuning.record.tables import make_tables, read_table, write_tables
from tuning.report import Flags
from tuning.report import run as run_report
from tuning.settings.config import InputError
from tuning.show import frames, report
from tuning.show.sections import AUDIT_ROWS, read

LIMIT = 6_000_000  # bytes of a report
EVIL = "<script>alert(1)</script>"


def page(folder):
    return report.write(folder).read_text()


def data(html):
    return json.loads(re.search(r'id="packed-data">(.*?)</script>', html, re.DOTALL)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", trials=40)


def test_from_the_verdict_down(folder):
    html = page(folder)
    sections = re.findall(r'<section id="(\w+)"', html)
    assert sections == [
        *("verdict", "best", "progress", "importance", "depth", "gap", "ends", "cost"),
        *("finalists", "errors", "data", "trials"),
    ]
    assert re.search(r'class="sentence">[^<]*\(9\d% confidence interval -?[\d.]+ to -?[\d.]+, 5 paired runs', html)
    assert '<pre id="config">backbone: ' in html and "\nepochs: 8\nseed: 0</pre>" in html


def test_one_file_that_asks_for_nothing(folder):
    html = page(folder)
    assert len(html.encode()) < LIMIT / 2
    assert html.count("default-src 'none'") == 1
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(?!data:)\w""", html.partition('id="packed-history"')[0])


def test_figures_are_given_what_the_tables_hold(folder):
    found, run = data(page(folder)), read(folder)
    assert len(found["ids"]) == len(run.trials) == 55
    origins = found["trials"]["origin"]
    assert origins.index("finalist") == 40 and set(origins[40:]) == {"finalist"}
    losses = [loss for loss in found["trials"]["val_loss"][:40] if loss is not None]
    assert losses == sorted(losses)
    assert sum(found["importance"]["importance"]) == pytest.approx(1, abs=1e-3)
    assert sum(found["ends"]["trials"]) == sum(found["depths"]["trials"]) == 40


def test_markup_in_names_is_text(tmp_path):
    folder = make_run(tmp_path / "run", classes=(EVIL, "b\n"), backbones=(EVIL, "vgg16"), reason=EVIL)
    make_audit(folder, paths=("a</script>\n🫁'\".png", EVIL))
    html = page(folder)
    assert EVIL not in html and "alert(1)<" not in html
    assert '<td class="long">&lt;script&gt;alert(1)&lt;/script&gt;</td>' in html
    assert "a&lt;/script&gt;\\n🫁&#x27;&quot;.png" in html
    assert data(html)["trials"]["reason"][0].endswith(EVIL)


@pytest.mark.slow
def test_what_a_verdict_still_needs_can_be_typed(folder, tmp_path):
    """Where the run is now, and only what the search itself doesn't make."""
    html = page(make_run(tmp_path / "short", finalists=False))
    typed = f"python tuning/run_search.py --resume --name short --storage {tmp_path} --set finalist_epochs=120"
    assert f"To compare them by 15 more runs, with other seeds: {typed}" in html
    assert "finalist_epochs" not in page(folder)
    assert "finalist_epochs" not in page(make_run(tmp_path / "killed", killed=True))
    assert "finalist_epochs" not in page(make_run(tmp_path / "unjudged", trials=100, finalists=False))


@pytest.mark.slow
def test_the_audit_is_shown_where_there_is_one(tmp_path):
    folder = make_run(tmp_path / "run", trials=1)
    assert 'id="audit"' not in page(folder)
    make_audit(folder, paths=("a.png", "b.png"), rows=AUDIT_ROWS + 1)
    html = page(folder)
    assert html.index('id="cost"') < html.index('id="audit"') < html.index('id="data"')
    assert html.count('<td class="short">a.png</td>') == AUDIT_ROWS + 1 and f"{AUDIT_ROWS} of 101" in html
    make_audit(folder, paths=("a.png", "b.png"), rows=0)
    assert "No findings" in page(folder)


def test_a_killed_run_gives_what_there_is(tmp_path):
    html = page(make_run(tmp_path / "run", killed=True))
    assert "not finished: 22 of 24 trials" in html and "was not compared with the default" in html


def test_a_run_killed_before_its_first_tables(tmp_path):
    folder = make_run(tmp_path / "run", trials=1)
    for name in ("trials", "epochs", "decisions"):
        (folder / f"{name}.parquet").unlink()
    assert "No trial has started" in page(folder)
    config = read(folder).document["space"]["start"][0]
    journal = Journal(folder / "journal.jsonl")
    journal.append("asked", trial_id="t00000", number=0, origin="start", params=config, config=config | FIXED)
    journal.append("started", trial_id="t00000", gpus=0.0)
    journal.close()
    assert data(page(folder))["trials"]["status"] == ["running"]


def test_a_run_killed_while_its_tables_were_written(tmp_path):
    """The journal tells more than they do, or one of them more than the others: it is taken, whatever is newer."""
    folder = make_run(tmp_path / "run", trials=1)
    config = read(folder).document["space"]["start"][0]
    journal = Journal(folder / "journal.jsonl")
    for number in range(2):
        named = {"trial_id": f"t{number:05d}", "number": number, "origin": "start"}
        journal.append("asked", **named, params=config, config=config | FIXED)
        journal.append("started", trial_id=named["trial_id"], gpus=0.0)
        made = make_tables(read_record(folder / "journal.jsonl"), "val_loss")
        write_tables(made if number == 0 else {"trials": made["trials"]}, folder)
        assert len(data(page(folder))["ids"]) == number + 1
    journal.append("asked", **named | {"trial_id": "t00002", "number": 2}, params=config, config=config | FIXED)
    journal.append("started", trial_id="t00002", gpus=0.0)
    journal.close()
    os.utime(folder / "journal.jsonl", (1, 1))  # a copy has times of its own
    assert len(data(page(folder))["ids"]) == 3


FIXED = {
    "seed": 0,
    **{"stage_lr_decay": 1.0, "optimizer": "adamw", "schedule": "cosine", "warmup_epochs": 0.0, "weight_decay": 0.0},
    **{"label_smoothing": 0.0, "head_init": "random", "head_dropout": 0.0, "class_weighting": "none"},
    **{"batch_norm": "train", "batch_size": 32, "image_size": 224, "epochs": 10},
}


def test_tables_of_an_older_version_are_shown(tmp_path):
    folder = make_run(tmp_path / "run", finalists=False)
    table = pq.read_table(folder / "trials.parquet")
    pq.write_table(table.drop_columns(["finalist_of", "seed"]), folder / "trials.parquet")
    assert len(data(page(folder))["ids"]) == 24


def test_only_the_best_of_very_many_are_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TRIALS_SHOWN", 10)
    monkeypatch.setattr(report, "EPOCHS_KEPT", 30)
    monkeypatch.setattr(report, "CURVES", 3)
    folder = make_run(tmp_path / "run", trials=40)
    found = data(page(folder))
    assert len(found["ids"]) == 10 and len(found["curves"]) == 3 and found["curves"][0] == found["ids"][0]
    kept = report.history(read(folder), report._with_history(report._ranked(read(folder))))
    assert sum(len(columns[0]) for columns in kept["epochs"]["trials"].values()) <= 30


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(InputError, match=r"has no plan\.yaml; give the folder of a run"):
        run_report(Flags((str(tmp_path),)))
    with pytest.raises(InputError, match="give the folder of a run"):
        run_report(Flags(()))


def test_a_place_that_cannot_be_written_is_told(folder, tmp_path):
    with pytest.raises(InputError, match="choose another file by --out"):
        run_report(Flags((str(folder),), out=str(tmp_path / "none" / "a.html")))


def test_several_runs_are_compared(folder, tmp_path):
    other = make_run(tmp_path / "other", trials=30, backbones=("resnet18", "resnet50"), seed=1)
    path = run_report(Flags((str(folder), str(other))))
    assert path == folder.parent / "comparison.html"
    html = path.read_text()
    assert [one["name"] for one in data(html)["runs"]] == ["run", "other"]
    assert (
        "resnet18, resnet50" in html and "learning_rate" not in html.partition('id="spaces"')[2].partition("<script")[0]
    )
    assert "40 of 40" in html and "30 of 30" in html and "The runs used different" not in html
    first = Path(shutil.copytree(folder, tmp_path / "first"))
    for place, digests in ((first, {"resnet18": "a", "vgg16": "b"}), (other, {"resnet18": "c", "resnet50": "d"})):
        document = yaml.safe_load((place / "plan.yaml").read_text())
        document["provenance"]["weights"] = digests
        (place / "plan.yaml").write_text(yaml.safe_dump(document))
    html = run_report(Flags((str(first), str(other)))).read_text()
    assert "The runs used different pretrained weights of resnet18." in html
    assert run_report(Flags((str(folder), str(other)), out=str(tmp_path / "c.html"))) == tmp_path / "c.html"


def test_names_of_runs_and_settings_are_text_in_a_comparison(tmp_path):
    odd = "<img src=x onerror=alert(1)> 'a' \"b\" 🫁\n"
    made = [make_run(tmp_path / name, trials=2, backbones=(f"{odd}{name}",)) for name in ("a", "b")]
    folders = [folder.rename(tmp_path / f"{odd}{folder.name}") for folder in made]
    html = run_report(Flags(tuple(map(str, folders)), out=str(tmp_path / "c.html"))).read_text()
    told = html.partition('id="packed-data"')[0]
    assert "<img" not in told and "&lt;img src=x onerror=alert(1)&gt; &#x27;a&#x27; &quot;b&quot; 🫁\\n" in told
    assert "<img" not in html.partition('id="packed-data"')[2].partition("</script>")[0]
    assert [one["name"] for one in data(html)["runs"]] == [f"{odd}a", f"{odd}b"]


def test_the_command_of_a_run_whose_folder_has_a_space_can_be_typed(folder, tmp_path):
    place = tmp_path / "my results" / "run"
    shutil.copytree(folder, place)
    told = page(place)
    typed = told.partition("python tuning/train_final.py ")[2].partition("<")[0]
    assert shlex.split(unescape(typed)) == [str(place)]


def test_it_is_refreshed_when_it_is_due(folder):
    now = [0.0]
    path = folder / "report.html"
    refresh = report.refresher(folder, clock=lambda: now[0])
    for seconds, written in ((1, False), (report.REFRESH_SECONDS, True), (report.REFRESH_SECONDS + 1, False)):
        path.unlink(missing_ok=True)
        now[0] = seconds
        refresh()
        assert path.exists() == written


def test_a_report_that_fails_is_told_once_and_ends_nothing(tmp_path, capsys):
    now = [0.0]
    refresh = report.refresher(tmp_path, clock=lambda: now[0])
    for seconds in (100, 1000):
        now[0] = seconds
        refresh()
    said = capsys.readouterr().err
    assert said.count("report.html could not be written (InputError") == 1 and "no plan.yaml" in said


def test_early_stopping_that_saved_nothing_is_said_in_words(folder):
    trials = read_table(folder / "trials.parquet").assign(epochs=8)
    assert frames.early_stopping(trials, 8) == "Early stopping ended no trial before its last epoch."
