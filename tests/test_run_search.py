"""Bad input: one clear error that names the place and the cure, before any trial starts, and nothing lost."""

import math
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import tyro
import yaml
from PIL import Image
from runs import make_run
from shared import ONE_CORE, draw_folder

from tuning.checks.audit import load_checked
from tuning.checks.findings import notes_in_words
from tuning.data.images import parallel_map, read_facts
from tuning.insight.best import config_digest, write_best
from tuning.insight.verdict import Verdict
from tuning.record.journal import Record, Trial
from tuning.record.tables import make_tables, read_table
from tuning.run_search import (
    Flags,
    _data,
    _priors,
    _search,
    main,
    planned,
    run,
)
from tuning.search import driver as search
from tuning.search.plans import check_new, claimed, without_effect, write_run
from tuning.settings.config import ADDED, RESUME_MAY_CHANGE, InputError, SearchPlan
from tuning.settings.space import sizes_of_backbones
from tuning.settings.space_file import load, parse
from tuning.settings.values import Weights
from tuning.show import report
from tuning.training.checking import weights_checked
from tuning.training.digests import digests

ROOT = Path(__file__).parent.parent
SPACE = {
    "parameters": {
        "unfreeze_depth": {"type": "categorical", "choices": [0, "all"]},
        "learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    },
    "fixed": {"backbone": "test_resnet", "image_size": 32, "batch_size": 8},
    "start": [{"unfreeze_depth": "all", "learning_rate": 3e-3}],
    "search": {"trials": 2, "epochs": 2, "weights": "random"},
}


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in ONE_CORE.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    return str(path)


def without_ray(flags):
    """What `run` does until Ray is needed, which takes five seconds to start and to end."""
    plan, space, folder = planned(flags)
    never = partial(pytest.fail, "it was not reported before Ray was needed")
    with weights_checked(sizes_of_backbones(space), plan.weights) as weights:
        return _search(plan, space, folder, None, never, list, weights, flags.resume)


def faults(run=without_ray, **flags):
    """What is told of these flags; the working folder must stay as it is."""
    before = sorted(str(path) for path in Path.cwd().rglob("*"))
    flags["set"] = (tuple(flags.get("set", ())),)
    with pytest.raises(InputError) as caught:
        run(Flags(**flags))
    left = sorted(str(path) for path in Path.cwd().rglob("*") if path.name != "results")
    assert left == [path for path in before if Path(path).name != "results"]
    return caught.value.faults


def checked(plan):
    """What of the data goes into a new run's folder."""
    data = load_checked(plan, [32])
    return data.samples, data.audit, data.fingerprint


def manifest(folder, rows, header="path,label"):
    path = folder.parent / f"{folder.name}.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"trials": 0}, "--trials: must be greater than or equal to 1, got 0"),
        ({"epochs": 0}, "--epochs: must be greater than or equal to 1, got 0"),
        ({"seed": -1}, "--seed: must be greater than or equal to 0"),
        ({"time_budget": "soon"}, "--time-budget: must be a duration such as 90s, 45m, 2h"),
        ({"gpus_per_trial": -1.0}, "--gpus-per-trial: must be greater than or equal to 0"),
        ({"gpus_per_trial": 2.0}, "--gpus-per-trial 2: give at most 1, since a trial trains on one GPU"),
        ({"cpus_per_trial": 0}, "--cpus-per-trial: must be greater than or equal to 1"),
        ({"concurrent": 0}, "--concurrent: must be greater than or equal to 1"),
        ({"name": "../elsewhere"}, "--name: must be letters"),
        ({"set": ["patiance=3"]}, "--set patiance: no such setting; did you mean patience?"),
        ({"set": ["finalist_seeds=1e20"]}, "--set finalist_seeds: must be"),
        ({"set": [f"finalist_seeds={10**20}"]}, "--set finalist_seeds: must be less than or equal to 1000"),
        ({"set": ["image_size=12"]}, "--set image_size: must be greater than or equal to 32"),
        ({"space": "quik"}, "quick"),
        ({"space": "nowhere.yaml"}, "nowhere.yaml"),
        ({"resume": True}, "--resume: give the name of the run by --name"),
        ({"resume": True, "name": "nothing"}, "--resume: there is no run results/nothing; runs there: none"),
        ({"data": "nowhere"}, "nowhere: no such folder or file; give a folder of class folders"),
        ({"set": ["backbone=resnet81"]}, "resnet18"),
        ({"set": ["backbone=resnet18", "weights=auto"]}, "--set weights=random"),
        ({"set": ["weights=nowhere"]}, "nowhere' is not a folder"),
    ],
)
def test_flags(space, flags, said):
    assert said in "\n".join(faults(**{"space": space} | flags))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("speed", {}, "speed"),
        ("parameters", {"learning_rat": {"type": "float", "low": 0.1, "high": 1.0}}, "learning_rate"),
        ("parameters", {"learning_rate": {"type": "flot", "low": 0.1, "high": 1.0}}, "float"),
        ("parameters", {"learning_rate": {"type": "float", "low": 1.0, "high": 0.1}}, "low"),
        ("parameters", {"learning_rate": {"type": "float", "low": "1e-4", "high": 0.1}}, "write 0.0001"),
        ("parameters", {"learning_rate": {"type": "float", "low": 0.1, "high": 1.0, "when": "speed > 1"}}, "speed"),
        ("start", [{"unfreeze_depth": 0, "learning_rate": 5.0}], "learning_rate"),
        ("search", {"patiance": 3}, "patience"),
    ],
)
def test_spaces(tmp_path, monkeypatch, key, value, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(SPACE | {key: value}))
    told = "\n".join(faults(space="bad.yaml"))
    assert "bad.yaml" in told and said in told


def test_a_class_without_images(space, tmp_path):
    folder = draw_folder(tmp_path / "images", count=5)
    (folder / "empty").mkdir()
    assert "empty" in "\n".join(faults(space=space, data=str(folder)))


def test_one_class_only(space, tmp_path):
    assert "only one class" in "\n".join(
        faults(space=space, data=str(draw_folder(tmp_path / "images", classes=("a",))))
    )


def test_classes_that_differ_between_splits(space, tmp_path):
    draw_folder(tmp_path / "images" / "train", count=5)
    draw_folder(tmp_path / "images" / "val", classes=("dark", "bright"), count=5)
    assert "classes differ between splits" in "\n".join(faults(space=space, data=str(tmp_path / "images")))


def test_manifests(space, tmp_path):
    folder = draw_folder(tmp_path / "images", count=10)
    files = [f"images/{name}/{number:03d}.png" for name in ("dark", "light") for number in range(10)]
    rows = [f"{file},{file.split('/')[1]}" for file in files]

    def told(rows, header="path,label", **flags):
        return "\n".join(faults(space=space, data=manifest(folder, rows, header), **flags))

    assert "path_column" in told(rows, "file,label")
    assert "nowhere.png" in told([*rows, "images/nowhere.png,dark"])
    assert "trainn" in told([f"{row},trainn" for row in rows], "path,label,split")
    assert "patient" in told(rows, set=["group_column=patient"])
    torn = [f"{row},{'train' if index % 2 else 'val'},p1" for index, row in enumerate(rows)]
    assert "1 group (20 images) in more than one split, such as group p1: 10 in train, 10 in val" in told(
        torn, "path,label,split,group"
    )


def test_unreadable_images_are_listed_together(space, tmp_path):
    folder = draw_folder(tmp_path / "images", count=20)
    (folder / "dark" / "000.png").write_bytes(b"")
    (folder / "light" / "001.png").write_bytes((folder / "light" / "002.png").read_bytes()[:200])
    (folder / "light" / "003.png").write_text("no image")
    bomb = bytearray((folder / "light" / "004.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "light" / "004.png").write_bytes(bomb)
    told = faults(space=space, data=str(folder))
    assert [Path(fault.split(":")[0]).name for fault in told[:4]] == ["000.png", "001.png", "003.png", "004.png"]
    reasons = ("is empty", "can't be decoded", "is not an image", "50000 x 50000 pixels")
    assert all(reason in fault for reason, fault in zip(reasons, told, strict=False))
    assert "4 of 40 images can't be read" in told[4] and "--set skip_unreadable=true" in told[4]


def test_what_was_told_of_images_is_a_line_a_kind(tmp_path):
    folder = draw_folder(tmp_path / "images", count=20)
    for name in ("003", "004"):
        (folder / "dark" / f"{name}.png").rename(folder / "dark" / f"{name}.jpg")
    frames = Image.linear_gradient("L")
    frames.save(folder / "light" / "005.jpg", format="GIF", save_all=True, append_images=[Image.new("L", (256, 256))])
    plan = SearchPlan(name="x", data=str(folder))
    table, folders, *_ = load_checked(plan, [32])
    assert notes_in_words(table["path"], read_facts(folders[32])["notes"]) == [
        "1 image (light/005.jpg): has several frames, only the first is used",
        "1 image (light/005.jpg): is a GIF file named .jpg",
        "2 images (dark/003.jpg, ...): is a PNG file named .jpg",
    ]
    table, folders, *_ = load_checked(SearchPlan(name="x", data=str(folder), fit="crop", drop_colour=True), [32])
    assert len(notes_in_words(table["path"], read_facts(folders[32])["notes"])) == 3
    clean = draw_folder(tmp_path / "clean", count=10)
    table, folders, *_ = load_checked(SearchPlan(name="x", data=str(clean)), [32])
    assert notes_in_words(table["path"], read_facts(folders[32])["notes"]) == []


@pytest.mark.slow
def test_more_gpus_than_there_are(space, folder, on_shared_ray):
    assert "no GPU; use 0 to train on CPUs" in "\n".join(faults(run, space=space, data=str(folder), gpus_per_trial=1.0))


def test_a_run_once_made_is_not_touched(space, folder, tmp_path):
    plan = SearchPlan(name="once", data=str(folder), space=space, trials=2, epochs=2, weights="random")
    (tmp_path / "results").mkdir()
    run_folder = tmp_path / "results" / "once"
    write_run(run_folder, plan, load(space), *checked(plan))
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert "results/once exists" in faults(space=space, name="once")[0]
    assert "can't change epochs (2 in this run, not 3)" in faults(resume=True, name="once", epochs=3)[0]
    assert "can't change image_size" in faults(resume=True, name="once", set=["image_size=64"])[0]
    assert "can't change the space" in faults(resume=True, name="once", space="quick")[0]
    edited = SPACE | {"fixed": SPACE["fixed"] | {"batch_size": 16}}
    Path(space).write_text(yaml.safe_dump(edited))
    assert "can't change the space" in faults(resume=True, name="once", space=space)[0]
    other = draw_folder(tmp_path / "other", count=20)
    assert "20 missing images (dark/020.png," in faults(resume=True, name="once", data=str(other))[0]
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    recorded = yaml.safe_load((run_folder / "plan.yaml").read_text())
    assert recorded["settings"]["trials"] == 2 and recorded["settings"]["patience"] == 5
    assert {"fingerprint", "git_commit", "packages", "python"} <= recorded["provenance"].keys()
    run_folder.rename(run_folder.with_name("another"))
    assert "plan.yaml is of the run 'once'; rename the folder" in faults(resume=True, name="another")[0]


def test_searches_that_start_in_the_same_second_have_names_of_their_own(space, folder):
    plan, _, first = planned(Flags(space=space, data=str(folder)))
    with claimed(first) as held, claimed(first) as again:
        assert held and not again
        assert "another search is starting under this name" in faults(run, space=space, name=plan.name)[0]
    first.mkdir()
    with claimed(first) as held:
        assert not held
    other, *_ = planned(Flags(space=space, data=str(folder)))
    assert other.name != plan.name
    assert [path.name for path in first.parent.iterdir()] == [plan.name]


def test_weights_of_no_backbone_of_the_space_are_told(space, folder, tmp_path):
    (tmp_path / "mine.pth").touch()
    given = ("weights={test_resnet.mine: mine.pth}",)
    assert faults(run, space=space, data=str(folder), set=given) == [
        "weights: test_resnet.mine is no backbone of the space; did you mean test_resnet?"
    ]


def test_a_run_of_a_version_without_a_setting_goes_on_where_the_default_is_what_it_did(space, folder, tmp_path):
    plan = SearchPlan(name="older", data=str(folder), space=space, trials=2, epochs=2)
    (tmp_path / "results").mkdir()
    run_folder = tmp_path / "results" / "older"
    write_run(run_folder, plan, load(space), *checked(plan))
    recorded = yaml.safe_load((run_folder / "plan.yaml").read_text())
    for key in {*RESUME_MAY_CHANGE, *ADDED} - {"trials", "data"}:
        del recorded["settings"][key]
    (run_folder / "plan.yaml").write_text(yaml.safe_dump(recorded))
    again, *_ = planned(Flags(name="older", resume=True))
    assert again == plan
    del recorded["settings"]["promote"]
    (run_folder / "plan.yaml").write_text(yaml.safe_dump(recorded))
    plan = plan.model_copy(update={"promote": False})  # as it did then
    again, *_ = planned(Flags(name="older", resume=True, set=(("trial_timeout=60",),)))
    assert again == plan.model_copy(update={"trial_timeout": 60.0})
    assert (
        "can't change portfolio (True in this run, not False)"
        in faults(resume=True, name="older", set=["portfolio=false"])[0]
    )
    del recorded["settings"]["early_loss"]
    (run_folder / "plan.yaml").write_text(yaml.safe_dump(recorded))
    assert "of an older version (without early_loss); resume" in faults(resume=True, name="older")[0]


def test_a_run_has_the_portfolio_in_its_plan_unless_it_is_told_not_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, space, _ = planned(Flags(space="quick", name="with"))
    assert len(space.portfolio) >= 12 and len(space.document["portfolio"]) == len(space.portfolio)
    _, space, _ = planned(Flags(space="quick", name="without", set=(("portfolio=false",),)))
    assert space.portfolio == () and "portfolio" not in space.document


def test_a_password_is_used_but_not_kept(space, folder, tmp_path):
    url = "postgresql://me:geheim@host/db"
    Path(space).write_text(yaml.safe_dump(SPACE | {"search": SPACE["search"] | {"optuna_storage": url}}))
    plan, parsed, run_folder = planned(Flags(space=space, data=str(folder), name="secret"))
    assert plan.optuna_storage == url
    write_run(run_folder, plan, parsed, *checked(plan))
    verdict = Verdict("not enough runs", "t00000", "the best of the search")
    record = Record({"t00000": Trial("t00000", 0, "start", {}, {"backbone": "test_resnet"})})
    nothing = make_tables(Record(), "val_loss")["trials"].to_pandas()
    write_best(run_folder, plan, record.trials["t00000"], nothing, verdict, {"fingerprint": "f" * 64})
    assert {"plan.yaml", "best.yaml"} <= {path.name for path in run_folder.iterdir()}
    assert not [path for path in run_folder.iterdir() if b"geheim" in path.read_bytes()]
    again, *_ = planned(Flags(name="secret", resume=True))
    assert again.optuna_storage == "postgresql://me@host/db"
    again, *_ = planned(Flags(name="secret", resume=True, set=((f"optuna_storage={url}",),)))
    assert again.optuna_storage == url


@pytest.mark.parametrize("driver", ["", "+pysqlite"])
def test_a_relative_database_is_the_same_in_any_folder(space, folder, tmp_path, driver):
    given = {"space": space, "data": str(folder), "name": "one", "set": ((f"optuna_storage=sqlite{driver}:///st.db",),)}
    assert planned(Flags(**given))[0].optuna_storage == f"sqlite{driver}:///{Path.cwd()}/st.db"


def test_names_of_any_kind_are_text_on_the_screen(tmp_path, capsys):
    odd = ("[red]x[/red]", "<script>alert(1)</script> :smile:\n\x1b[31m")
    folder = draw_folder(tmp_path / "[bold]films", count=10)
    rows = [f"{path.parent.name}/{path.name}" for path in sorted(folder.rglob("*.png"))]
    rows[0] = "dark/a 'b' \"c\"\n[red] 🫁.jpg"
    (folder / "dark" / "000.png").rename(folder / rows[0])
    table = pd.DataFrame({"path": rows, "label": [odd[path.startswith("light")] for path in rows]})
    table.to_parquet(folder / "films.parquet")
    plan = SearchPlan(name="x", data=str(folder / "films.parquet"))
    _data(plan, load("quick"), None, parallel_map)
    said = capsys.readouterr().out
    assert f"data: {folder}/films.parquet\n" in said
    assert "\n  [red]x[/red]: 2 test" in said and ":smile:\\n\\x1b[31m: 2 test" in said and "\x1b" not in said
    assert "1 image (dark/a 'b' \"c\"\\n[red] 🫁.jpg): is a PNG file named .jpg" in said


@pytest.mark.slow
def test_a_search_says_what_to_type_next_and_reports_meanwhile(
    space, folder, tmp_path, capsys, monkeypatch, on_shared_ray
):
    monkeypatch.setattr(report, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(report, "REFRESH_SHARE", math.inf)
    monkeypatch.setattr(search, "TABLE_SECONDS", 0.0)
    monkeypatch.setattr(search, "TABLE_SHARE", math.inf)
    made, page_of = [], report.report
    monkeypatch.setattr(report, "report", lambda of: made.append(list(of.trials["status"])) or page_of(of))
    assert run(Flags(space=space, data=str(folder), name="once")) == 0
    said = capsys.readouterr().out
    assert "Best" in said and "python tuning/train_final.py results/once" in said
    (typed,) = (line for line in said.splitlines() if line.startswith("  python -c "))
    shown = subprocess.run([sys.executable, *shlex.split(typed)[1:]], capture_output=True, text=True, check=True).stdout
    assert "t00000" in shown
    assert "Report: results/once/report.html" in said
    assert any("running" in statuses for statuses in made) and "running" not in made[-1]
    assert " the classes apart" in said and "expected calibration error" in said
    assert "Median gap by augmentation" in said and "best epoch to its last" in said
    files = {path.name for path in (tmp_path / "results" / "once").iterdir()}
    assert files >= {"plan.yaml", "best.yaml", "trials.parquet", "samples.parquet", "report.html", "audit.parquet"}
    document = yaml.safe_load(Path("results/once/best.yaml").read_text())
    assert document.pop("provenance")["config_sha256"] == config_digest(document)
    assert "read, decoded, audited in" in said and "audit: " in said

    assert "on the same" in said.partition("Verdict: ")[2] or "than guessing" in said.partition("Verdict: ")[2]
    (typed,) = (line for line in said.splitlines() if line.startswith("  python tuning/run_search.py"))
    command, _, why = typed.partition("        # ")
    assert (
        command.endswith("--resume --name once --set finalist_epochs=20")
        and why == "compares them by 10 more runs, with other seeds"
    )
    assert run(tyro.cli(Flags, args=shlex.split(command)[2:])) == 0
    said = capsys.readouterr().out
    assert re.search("Verdict: (winner|nothing beats the default)", said) and "--resume" not in said
    why = yaml.safe_load((tmp_path / "results" / "once" / "best.yaml").read_text())["provenance"]["why"]
    assert "paired runs" in why


@pytest.mark.slow
def test_labels_that_the_images_say_nothing_of_are_called_that(space, tmp_path, capsys, on_shared_ray):
    rng = np.random.default_rng(0)
    for name in ("heads", "tails"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(60):
            noise = rng.integers(0, 256, (40, 40), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / name / f"{number}.png")
    flags = {"space": space, "data": str(tmp_path / "images"), "trials": 12, "epochs": 3}
    assert run(Flags(**flags, name="guesses", set=(("probe=false", "finalists=0"),))) == 0
    said = capsys.readouterr().out
    assert "does not tell the classes apart significantly better than guessing" in said
    trials = read_table(tmp_path / "results" / "guesses" / "trials.parquet")
    assert f"correction for selection bias (best of {trials['epochs'].sum()} epochs)" in said
    told = (tmp_path / "results" / "guesses" / "report.html").read_text().partition('<p class="warning">')[2]
    words = told.partition("</p>")[0]
    assert "does not tell the classes apart significantly" in words and words in " ".join(said.split())


def test_a_run_whose_data_has_changed_does_not_go_on(space, tmp_path):
    folder = draw_folder(tmp_path / "images", count=12)
    plan = SearchPlan(name="changed", data=str(folder), space=space, weights="random")
    (tmp_path / "results").mkdir()
    write_run(tmp_path / "results" / "changed", plan, load(space), *checked(plan))
    Image.new("L", (40, 40)).save(folder / "dark" / "000.png")
    assert "has changed since changed started" in faults(resume=True, name="changed")[0]


def test_a_run_whose_weights_have_changed_does_not_go_on(space, tmp_path, folder, capsys):
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "test_resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    plan = SearchPlan(name="changed", data=str(folder), space=space, weights=str(file.parent))
    (tmp_path / "results").mkdir()
    run_folder = tmp_path / "results" / "changed"
    write_run(run_folder, plan, load(space), *checked(plan), digests({"test_resnet": Weights(file=file)}))
    recorded = yaml.safe_load((run_folder / "plan.yaml").read_text())
    recorded["provenance"]["packages"]["timm"] = "0.9.0"
    (run_folder / "plan.yaml").write_text(yaml.safe_dump(recorded))
    resumed = Flags(resume=True, name="changed")
    with pytest.raises(pytest.fail.Exception, match="before Ray was needed"):  # all is as it was
        without_ray(resumed)
    assert f"other versions than when the run started: timm {timm.__version__} (was 0.9.0)" in capsys.readouterr().out
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    assert "the pretrained weights of test_resnet have changed since changed started" in faults(**vars(resumed))[0]


@pytest.mark.slow
def test_a_finite_space_is_tried_once_and_moved_images_are_found(space, tmp_path, capsys, on_shared_ray):
    depth = {"unfreeze_depth": {"type": "categorical", "choices": [0, 1, "all"]}}
    short = SPACE["search"] | {"probe": False, "finalists": 0, "epochs": 1}
    finite = {"parameters": depth, "start": [], "search": short}
    Path(space).write_text(yaml.safe_dump(SPACE | finite))
    images = draw_folder(tmp_path / "images", count=12)
    assert run(Flags(space=space, data=str(images), name="finite", trials=5)) == 0
    said = capsys.readouterr().out
    assert "the space has 3 configurations in all: the search ends when each has been tried once" in said
    trials = read_table(tmp_path / "results" / "finite" / "trials.parquet")
    assert sorted(trials["config_unfreeze_depth"]) == [0, 1, 5]

    images.rename(tmp_path / "moved")
    missing = faults(resume=True, name="finite")[0]
    assert "000.png: is missing" in missing and "the images were moved to by --data" in missing
    assert run(Flags(resume=True, name="finite", data="moved")) == 0
    samples = read_table(tmp_path / "results" / "finite" / "samples.parquet")
    assert samples["file"].str.startswith(str(tmp_path / "moved")).all()
    assert yaml.safe_load((tmp_path / "results" / "finite" / "plan.yaml").read_text())["settings"]["data"] == str(
        tmp_path / "moved"
    )


@pytest.mark.parametrize(
    ("warmup", "settings", "said"),
    [
        (
            7.5,
            {},
            ["warmup_epochs=7.5 of 5 epochs: the learning rate doesn't reach its peak; give less, or more epochs"],
        ),
        (5.0, {}, []),
        (0.0, {"grace_epochs": 5}, ["grace_epochs=5 of 5 epochs: ASHA stops no trial"]),
        (0.0, {"grace_epochs": 5, "early_stopping": False}, []),
    ],
)
def test_settings_without_effect_are_named(warmup, settings, said):
    parameters = {"warmup_epochs": {"type": "float", "low": 0.0, "high": warmup}} if warmup else {}
    space = parse({"fixed": {"backbone": "test_resnet"}, "parameters": parameters}, "x")
    assert without_effect(space, SearchPlan(name="x", epochs=5, **settings)) == said


def test_no_permission_to_write():
    with tempfile.TemporaryDirectory() as parent:
        locked = Path(parent) / "locked"
        os.chmod(parent, 0o755)
        locked.mkdir(mode=0o555)
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)  # root may write anywhere
        try:
            with pytest.raises(InputError, match="no permission to write there; choose another"):
                check_new(locked / "run", SearchPlan(name="run", storage=str(locked)))
        finally:
            os.seteuid(user)


def test_a_storage_folder_that_cannot_be_made(space, tmp_path, folder):
    (tmp_path / "file").write_text("")
    assert "can't be created" in "\n".join(faults(space=space, data=str(folder), storage=str(tmp_path / "file" / "x")))


@pytest.mark.skipif(sys.platform != "linux", reason="their folders refuse even root")
@pytest.mark.parametrize("place", ["/sys", "/proc"])
def test_a_storage_folder_that_takes_no_folders(place):
    with pytest.raises(InputError, match=f"--storage {place}: .*; choose another"):
        check_new(Path(place) / "run", SearchPlan(name="run", storage=place))


def test_a_run_to_learn_from_that_is_not_there_is_told_before_images_are_decoded(space, folder, capsys):
    (said,) = faults(space=space, data=str(folder), set=("warm_start=results/typo",))
    assert "results/typo" in said and "data: " not in capsys.readouterr().out


def test_errors_go_to_stderr_with_exit_code_2(space, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_search.py", "--space", space, "--trials", "0", "--epochs", "0"])
    assert main() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(":")[1] for line in told.err.splitlines()] == [" --trials", " --epochs"]


@pytest.mark.slow
def test_no_finite_loss_leaves_tables_and_no_best(space, tmp_path, folder, capsys, on_shared_ray):
    document = SPACE | {"fixed": SPACE["fixed"] | {"optimizer": "sgd", "unfreeze_depth": "all"}, "start": []}
    document["parameters"] = {"learning_rate": {"type": "float", "low": 1e9, "high": 1e12, "log": True}}
    Path(space).write_text(yaml.safe_dump(document))
    assert run(Flags(space=space, data=str(folder), name="lost")) == 3
    assert (tmp_path / "results" / "lost" / "trials.parquet").exists()
    assert not (tmp_path / "results" / "lost" / "best.yaml").exists()
    assert "No trial had a finite loss" in capsys.readouterr().out


@pytest.mark.slow
def test_a_used_up_time_budget_names_the_command_to_continue(space, folder, capsys, on_shared_ray):
    assert run(Flags(space=space, data=str(folder), name="short", epochs=10_000, time_budget="3")) == 0
    said = capsys.readouterr().out
    assert "of up to 10,000 epochs, in at most 3 s, space" in said and "time budget is used up" in said
    assert "To continue for as long again: python tuning/run_search.py --resume --name short\n" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run_search.py", "audit.py", "train_final.py", "evaluate.py", "model_folder.py"])
def test_help_shows_an_example_from_any_folder(tmp_path, command):
    arguments = ["predict", "--help"] if command == "model_folder.py" else ["--help"]
    said = subprocess.run(
        [sys.executable, str(ROOT / "tuning" / command), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": ""},
    ).stdout
    assert f"python tuning/{command}" in said


def test_another_run_to_learn_from_may_lie_in_a_storage(space, tmp_path, capsys):
    make_run(tmp_path / "store" / "first")
    plan = SearchPlan(name="second", warm_start=f"file://{tmp_path}/store/first")
    assert _priors(plan, load(space)) == []
    assert "outside this space, and are left out" in " ".join(capsys.readouterr().out.split())
