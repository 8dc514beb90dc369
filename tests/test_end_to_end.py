"""The commands as a user types them, in processes of their own, from another folder."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import yaml
from shared import ONE_CORE, SOAK

from tuning.model.folder import load_model
from tuning.record.journal import FINAL, PROMOTED, read_journal, read_record
from tuning.record.tables import read_table
from tuning.search.stopping import Rungs

ROOT = Path(__file__).parent.parent
SPACE = {
    "parameters": {
        "unfreeze_depth": {"type": "categorical", "choices": [0, 2, "all"]},
        "learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
    },
    "fixed": {"backbone": "test_resnet", "image_size": 32, "batch_size": 8},
    "search": {"trials": 10, "epochs": 6, "reduction_factor": 3, "weights": "random", "concurrent": 1}
    | {"finalist_epochs": 36},  # one finalist and the default, three times each
}

pytestmark = pytest.mark.slow


def command(name, *arguments):
    return [sys.executable, str(ROOT / "tuning" / name), *map(str, arguments)]


def start(folder, *arguments, environment=ONE_CORE):
    """run_search.py in the background, from a folder that is not the checkout; as a rule with one slot."""
    with open(folder / "log.txt", "w") as log:
        options = {"cwd": folder, "stdout": log, "stderr": log, "env": os.environ | environment}
        return subprocess.Popen(command("run_search.py", *arguments), **options)


@pytest.fixture
def workplace(tmp_path, folder):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return tmp_path, ["--space", "space.yaml", "--data", str(folder)]


def wait_for_events(journal, count, process):
    """False where the search ends before."""
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def stand_still(process):
    """Stop a process where it is; SIGCONT lets it go on."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def stand_still_in_a_trial(journal, process, count):
    """Stop a search after so many events where a trial runs whose next epoch is no rung, so that ASHA won't end it."""
    while wait_for_events(journal, count, process):
        stand_still(process)
        record = read_record(journal)
        running = [trial for trial in record.trials.values() if trial.started_at is not None and not trial.ended]
        if any(len(trial.rows) in (1, 3, 4) for trial in running):  # of 6 epochs, with rungs at 1 and 3
            return
        process.send_signal(signal.SIGCONT)
    pytest.fail("the search has ended")


def outcome(run):
    trials = read_table(run / "trials.parquet")
    columns = [name for name in trials.columns if name.startswith(("config_", "val_"))]
    epochs = read_table(run / "epochs.parquet").sort_values(["trial_id", "epoch"])
    return (
        trials[["trial_id", "status", "reason", "epochs", *columns]].to_dict("records"),
        epochs[["trial_id", "epoch", "train_loss", "val_loss"]].to_dict("records"),
        read_table(run / "decisions.parquet").drop(columns="seq").to_dict("records"),
    )


def ended(journal):
    return {event["trial_id"]: event for event in read_journal(journal) if event["event"] == "ended"}


KILLS = 20 if SOAK else 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_driver_killed_at_random_instants_goes_on_as_if_never_killed(workplace):
    folder, arguments = workplace
    whole = start(folder, *arguments, "--name", "whole")
    assert whole.wait() == 0
    expected = outcome(folder / "results" / "whole")
    best = yaml.safe_load((folder / "results" / "whole" / "best.yaml").read_text())["provenance"]
    assert (
        best["verdict"] in ("winner", "nothing beats the default")
        and best["verdict"] in (folder / "log.txt").read_text()
    )
    assert len(best["best_epochs"]) == 3
    rng = random.Random(0)
    kills = 0
    for number in range(KILLS):
        run = folder / "results" / f"killed{number}"
        journal = run / "journal.jsonl"
        process = start(folder, *arguments, "--name", run.name)
        while kills < KILLS:
            known = journal.read_bytes().count(b"\n") if journal.exists() else 0
            if not wait_for_events(journal, known + rng.randrange(1, 16), process):
                break  # the search has ended
            time.sleep(rng.random() / 10)
            process.kill()
            process.wait()
            kills += 1
            before = {trial_id: event for trial_id, event in ended(journal).items() if event["status"] in FINAL}
            process = start(folder, "--resume", "--name", run.name)
        assert process.wait() == 0
        assert {trial_id: event for trial_id, event in ended(journal).items() if trial_id in before} == before
        assert outcome(run) == expected
        if kills == KILLS:
            return


@pytest.mark.soak
def test_with_two_slots_a_killed_driver_loses_and_repeats_nothing(workplace):
    folder, arguments = workplace
    run = folder / "results" / "two"
    journal = run / "journal.jsonl"
    process = start(folder, *arguments, "--concurrent", "2", "--name", run.name, environment={})
    rng = random.Random(1)
    for _ in range(4 if SOAK else 1):
        known = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if not wait_for_events(journal, known + rng.randrange(4, 20), process):
            break
        process.kill()
        process.wait()
        process = start(folder, "--resume", "--name", run.name, environment={})
    assert process.wait() == 0
    events = read_journal(journal)
    finals = Counter(event["trial_id"] for event in events if event["event"] == "ended" and event["status"] in FINAL)
    promoted = [event for event in events if event.get("verdict") == PROMOTED]
    finals -= Counter(event["trial_id"] for event in promoted)
    assert finals == Counter([*(f"f{n:05d}" for n in range(6)), "p00000", *(f"t{n:05d}" for n in range(10))])
    rungs = Rungs(grace_epochs=1, reduction_factor=3, epochs=6)
    for event in events:
        if event["event"] == "decision" and event not in promoted:
            decided = rungs.decide(event["trial_id"], event["epoch"], event["value"], event["stratum"])
            is_default = event["trial_id"] == "t00000"  # which is never stopped
            verdict = "kept" if is_default and decided.verdict == "stop" else decided.verdict
            assert (verdict, decided.cutoff) == (event["verdict"], event["cutoff"])


def test_a_search_that_is_stopped_in_every_way_goes_on(workplace):
    """By Ctrl-C, SIGTERM and SIGKILL; meanwhile a second driver is refused, and after the kill there is a report."""
    folder, arguments = workplace
    run = folder / "results" / "stopped"
    journal = run / "journal.jsonl"
    # timm loads it in the workers; the driver has no use for it
    (folder / "wandb.py").write_text(f"import os; open(f'{folder}/loaded-{{os.getpid()}}', 'w').close()")
    beside = ONE_CORE | {"PYTHONPATH": str(folder)}
    process = start(folder, *arguments, "--name", run.name, environment=beside)
    stand_still_in_a_trial(journal, process, 8)
    loaded = [path.name for path in folder.glob("loaded-*")]
    assert loaded and f"loaded-{process.pid}" not in loaded
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()  # workers alone have it
    second = subprocess.run(
        command("run_search.py", "--resume", "--name", run.name),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2
    assert "another search is writing this run" in second.stderr
    for stop in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(stop)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=600) == 130
        assert f"python tuning/run_search.py --resume --name {run.name}" in (folder / "log.txt").read_text()
        trials = read_table(run / "trials.parquet")
        assert "running" not in set(trials["status"]) and "interrupted" in set(trials["status"])
        process = start(folder, "--resume", "--name", run.name)
        stand_still_in_a_trial(journal, process, journal.read_bytes().count(b"\n") + 12)
    process.kill()
    process.wait()
    check_report(folder, run)
    assert start(folder, "--resume", "--name", run.name).wait() == 0
    trials = read_table(run / "trials.parquet")
    assert len(trials) == 17 and trials["status"].isin(FINAL).all()


def check_report(folder, run):
    """A search that was killed in the middle has a report of what there is."""
    events = read_journal(run / "journal.jsonl")
    begun = {event["trial_id"] for event in events if event["event"] == "started"}
    written = subprocess.run(command("report.py", run), cwd=folder, capture_output=True, text=True, check=True)
    assert written.stdout == f"written: {run}/report.html\n" and not written.stderr
    html = (run / "report.html").read_text()
    (count,) = re.findall(r"not finished: (\d+) of 10 trials", html)
    final = [trial_id for trial_id, event in ended(run / "journal.jsonl").items() if event["status"] in FINAL]
    assert int(count) == sum(trial_id.startswith("t") for trial_id in final)
    shown = json.loads(re.search(r'id="packed-data">(.*?)</script>', html, re.DOTALL)[1])["ids"]
    assert len(shown) >= 2 and set(shown) == begun


STRACE = shutil.which("strace")
TRACE = [STRACE, "-f", "--seccomp-bpf", "-qqq", "-e", "signal=none", "-e", "trace=connect"]


TRIALS = 20 if SOAK else 8


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_default_search_on_generated_radiographs(tmp_path, monkeypatch):
    """No flags (but fewer trials, unless it is the soak run), no network, another folder: a search, a final model, a
    prediction. Nothing is left below HOME but the cache, and no name is looked up: the libraries' telemetry is off."""
    home, trace = tmp_path / "home", tmp_path / "trace.txt"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in (
        "RAY_AUTH_TOKEN",
        "FINETUNE_SEARCH_CACHE",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "MPLCONFIGDIR",
    ):
        monkeypatch.delenv(name, raising=False)

    def traced(name, *arguments):
        words = command(name, *arguments)
        words = [*TRACE, "-A", "-o", str(trace), *words] if STRACE else words
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = traced("run_search.py", *([] if SOAK else ["--trials", TRIALS]))
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "results").iterdir()
    trials = read_table(run / "trials.parquet")
    assert list(trials["origin"]).count("probe") == 3
    trials = trials[trials["origin"] != "probe"]
    assert len(trials) == TRIALS and trials["status"].isin(FINAL).all() and not (trials["status"] == "failed").any()
    assert {"completed", "stopped"} <= set(trials["status"])
    top = trials.loc[trials["val_loss"].idxmin()]
    best = yaml.safe_load((run / "best.yaml").read_text())
    assert best["provenance"]["trial_id"] == top["trial_id"]
    for said in (top["trial_id"], "Overfitting", "Early stopping saved", f"train_final.py results/{run.name}"):
        assert said in done.stdout
    assert top["val_loss"] < 0.6  # predicting the class frequencies costs 1.10

    assert (run / "report.html").stat().st_size < 6_000_000
    again = traced("report.py", f"results/{run.name}")
    assert again.stdout == f"written: results/{run.name}/report.html\n" and not again.stderr

    final = traced("train_final.py", f"results/{run.name}")
    assert final.returncode == 0, final.stderr
    metrics = json.loads((run / "model" / "metrics.json").read_text())
    assert metrics["test"]["images"] == 96 and metrics["test"]["accuracy"] > 0.65
    sample = read_table(run / "samples.parquet").iloc[0]
    said = traced("model_folder.py", "predict", run / "model", sample["file"])
    (row,) = csv.DictReader(said.stdout.splitlines())
    assert row["predicted"] in {"normal", "focal_opacity", "diffuse_opacity"}
    assert traced("audit.py", Path(sample["file"]).parents[1]).returncode in (0, 2)
    assert not any(name.startswith(("ray", "__pycache__")) for name in os.listdir(tmp_path))
    cache = home / ".cache" / "finetune-search"
    assert not [path for path in home.rglob("*") if path.is_file() and cache not in path.parents]
    if STRACE:
        asked = [line for line in trace.read_text().splitlines() if "htons(53)" in line]
        assert trace.stat().st_size and not asked, asked[:3]


def test_weights_of_ones_own_are_a_choice_beside_others(workplace):
    place, _ = workplace
    networks = {name: timm.create_model("test_resnet", in_chans=channels) for name, channels in (("a", 3), ("grey", 1))}
    for name, network in networks.items():
        torch.save({"state_dict": {f"model.{key}": value for key, value in network.state_dict().items()}}, place / name)
    named = {"test_resnet": "a", "test_resnet.radiologynet": {"file": "grey", "mean": [0.4], "std": [0.2]}}
    choices = {"backbone": {"type": "categorical", "choices": list(named)}}
    fixed = {"image_size": 32, "batch_size": 8, "unfreeze_depth": 0}
    points = [{"backbone": "test_resnet.radiologynet"}, {"backbone": "test_resnet"}]
    space = {"parameters": choices, "fixed": fixed, "start": points, "search": {"weights": named, "epochs": 1}}
    (place / "own.yaml").write_text(yaml.safe_dump(space))
    flags = ["--space", "own.yaml", "--data", workplace[1][-1], "--name", "own", "--no-early-stopping", "--trials", "2"]
    assert start(place, *flags).wait() == 0
    said = (place / "log.txt").read_text()
    assert f"test_resnet.radiologynet: {place / 'grey'}: " in said and "one channel shared among three" in said
    trials = read_table(place / "results" / "own" / "trials.parquet")
    assert list(trials["config_backbone"]) == ["test_resnet.radiologynet", "test_resnet"]
    assert set(trials["status"]) == {"completed"}

    best = yaml.safe_load((place / "results" / "own" / "best.yaml").read_text())
    assert best["provenance"]["settings"]["weights"]["test_resnet.radiologynet"]["file"] == str(place / "grey")
    final = command("train_final.py", "results/own", "--set", "ensemble=true")
    subprocess.run(final, cwd=place, check=True, capture_output=True)
    model = load_model(place / "results" / "own" / "model")
    means = {member.config.backbone: member.network.pretrained_cfg["mean"] for member in model.members}
    assert means == {"test_resnet.radiologynet": (0.4, 0.4, 0.4), "test_resnet": (0.5, 0.5, 0.5)}
