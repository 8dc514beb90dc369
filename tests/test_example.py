"""The committed run and the page of questions to it."""

import hashlib
import importlib.util
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import save_file

from tuning import train_final
from tuning.data import phantoms
from tuning.model.folder import load_model
from tuning.record.journal import read_record
from tuning.record.tables import FINALISTS, make_tables, read_table
from tuning.report import Flags
from tuning.report import run as run_report
from tuning.training import backbones

ROOT = Path(__file__).parent.parent
EXAMPLE, PAGE = ROOT / "results" / "example", (ROOT / "results" / "ANALYSIS.md").read_text()
spec = importlib.util.spec_from_file_location("example", ROOT / "benchmarks" / "example.py")
example = importlib.util.module_from_spec(spec)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Where the page is run: the example, and a copy of it as the other run."""
    pytest.importorskip("duckdb", reason="needs duckdb (the extra `dev`)")
    spec.loader.exec_module(example)
    for name in ("example", "other"):
        shutil.copytree(EXAMPLE, tmp_path / "results" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def test_every_block_of_the_page_runs(runs):
    again = example.answered(PAGE)
    shape = re.compile(r"```text\n.*?```", re.DOTALL)
    assert shape.sub("", again) == shape.sub("", PAGE)
    assert len(re.findall(r"^## \d+\. ", PAGE, re.MULTILINE)) == 10
    answers = [answer.splitlines() for answer in shape.findall(again)]
    assert len(answers) == len(shape.findall(PAGE)) >= 10
    empty = [answer for answer in answers if any("Empty DataFrame" in line for line in answer)]
    assert len(empty) == 1  # a run and its copy differ in nothing


def test_answers_are_those_of_the_committed_run(runs):
    """The questions to `example` alone are answered in the page as its tables answer them."""
    shutil.rmtree(runs / "other")
    names = {}
    blocks = [found for found in example.BLOCK.finditer(PAGE) if found[1] == "python" and "other" not in found[2]]
    example.run_python('from tuning.insight import analysis\ntrials = analysis.load_trials("results/example")', names)
    alone = [found for found in blocks if 'trials["run"] == "example"' in found[2] and "overfitting" not in found[2]]
    assert len(alone) == 2
    for found in alone:
        assert example.run_python(found[2], names) in found[3]


def test_the_example_shows_every_usual_end_and_a_verdict():
    trials = read_table(EXAMPLE / "trials.parquet")
    assert set(trials["status"]) == {"completed", "stopped", "converged", "diverged"}
    assert set(trials["origin"]) == {"start", "suggested", "probe", "finalist"}
    finalists = read_table(EXAMPLE / "finalists.parquet")
    assert list(finalists) == FINALISTS.names and (finalists["runs"] >= 3).all() and len(finalists) >= 2


def test_the_example_is_small_and_tells_nothing_of_a_machine():
    made = {"model", "report.html", "test_readings.jsonl"}  # here, by who tries the commands; git ignores them
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and path.relative_to(EXAMPLE).parts[0] not in made]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    for path in files:
        assert not re.search(rb"/(root|home|Users|tmp|work)/", path.read_bytes()), path
    samples = read_table(EXAMPLE / "samples.parquet")
    assert samples["file"].equals(samples["path"])


def test_its_report_is_made_from_the_tables(tmp_path):
    written = run_report(Flags((str(EXAMPLE),), out=str(tmp_path / "report.html")))
    assert 'id="finalists"' in written.read_text()
    assert pd.read_parquet(EXAMPLE / "trials.parquet")["latency_ms"].notna().all()


# ---- The example was made by an earlier version: what that one left is still read. ----------------------------------


def test_its_journal_gives_its_tables():
    made = make_tables(read_record(EXAMPLE / "journal.jsonl"), "val_loss")
    for name in ("trials", "epochs", "decisions"):
        assert made[name].to_pandas().equals(read_table(EXAMPLE / f"{name}.parquet"))


@pytest.mark.slow
def test_it_is_trained_finally_and_predicted_with(tmp_path, cache):
    run = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("model", "test_readings.jsonl"))
    films = phantoms.write_phantoms(cache / f"phantoms-{phantoms.VERSION}")  # may differ by a grey level here
    model = train_final.run(train_final.Flags(str(run), data=str(films), set=(("epochs=1",),)), onnx=False)
    (file, *_) = sorted(films.rglob("*.png"))
    probabilities = load_model(model).predict(file)
    assert probabilities.shape == (1, 3) and probabilities.sum() == pytest.approx(1)
    assert "t00001" in (model / "README.md").read_text() and "winner" in (model / "README.md").read_text()


BEFORE = """config:
  backbone: test_resnet
  unfreeze_depth: 0
  learning_rate: 0.001
  stage_lr_decay: 1.0
  optimizer: adamw
  schedule: cosine
  warmup_epochs: 0.0
  weight_decay: 0.01
  label_smoothing: 0.0
  head_init: random
  head_dropout: 0.0
  class_weighting: none
  batch_norm: train
  augmentation: light
  batch_size: 32
  image_size: 32
  epochs: 10
  seed: 5
classes:
- dark
- light
temperature: 1.5
weights_sha256: {digest}
preprocessing:
  fit: letterbox
  drop_colour: false
  resize: in a black square of 32 x 32 pixels, antialiased (Lanczos)
  channels: RGB; grey is repeated three times
  scale: 0 to 1
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
  layout: batch, channel, row, column
provenance:
  trial_id: t00001
"""


def test_a_model_folder_of_before_is_read(tmp_path):
    """Its config.yaml is that of `save_model` as of version 0.1.0, to the letter, but for the hash of the weights."""
    network = backbones.build("test_resnet", classes=2, image_size=32, head_dropout=0.0, seed=5, weights=None)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "config.yaml").write_text(BEFORE.format(digest=digest))
    model = load_model(tmp_path)
    assert (model.classes, model.fit, model.drop_colour, model.temperature) == (
        ("dark", "light"),
        "letterbox",
        False,
        1.5,
    )
