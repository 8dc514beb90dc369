"""Files with flipped, lost and added bytes, or other values, are read as they were, or refused with an `InputError`."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from runs import make_audit, make_run
from shared import draw_folder, examples

from tuning.data.samples import load_samples
from tuning.model.folder import load_model, save_model
from tuning.record import tables
from tuning.record.journal import METRICS, Journal, read_journal, read_record
from tuning.record.predictions import predictions_file, read_predictions, write_predictions
from tuning.record.tables import read_table
from tuning.run_search import Flags, planned
from tuning.settings.config import InputError, SearchPlan, TrialConfig
from tuning.settings.space_file import SHIPPED, load
from tuning.show import report, sections
from tuning.train_final import Flags as FinalFlags
from tuning.train_final import _median_best_epoch, _read_best
from tuning.training import backbones

CONFIG = TrialConfig(backbone="test_resnet", image_size=32, epochs=3)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.integers(), st.text(), max_size=2),
)
few = examples(8)


@st.composite
def damaged(draw, content):
    """The content with one to three faults."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(("flip", "lose", "add")))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "lose":
            del content[place : place + draw(st.integers(1, 30))]
        else:
            content[place:place] = draw(st.binary(min_size=1, max_size=4))
    return bytes(content)


def places(document, path=()):
    """Yield the path of every value in nested mappings and lists."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def swapped(draw, document):
    """The document with one of its values deleted or replaced."""
    document = json.loads(json.dumps(document))
    *above, last = draw(st.sampled_from(list(places(document))))
    part = document
    for key in above:
        part = part[key]
    if isinstance(part, dict) and draw(st.booleans()):
        del part[last]
    else:
        part[last] = draw(ODD)
    return document


def read_or_refused(path, read):
    """Return what `read` does; None if it refuses the file by its name."""
    try:
        return read()
    except InputError as error:
        assert all(path.name in fault for fault in error.faults), error.faults
        return None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with a journal, an audit and a best.yaml."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", trials=6, epochs=3)
    make_audit(run, ("normal/3.png", "pneumonia/4.png"))
    journal = Journal(run / "journal.jsonl")
    row = dict.fromkeys(("learning_rate", "cache_hits", "peak_memory_mb", "micro_batch", "ends", "reason"))
    row |= dict.fromkeys(("seconds", "data_seconds", "prefix_seconds", "train_seconds", "evaluate_seconds"), 0.5)
    row |= dict.fromkeys(METRICS, 0.5) | {"images": 64, "unfreeze_depth": 0}
    for number in range(2):
        named = {"trial_id": f"t{number:05d}"}
        params = {"learning_rate": 1e-3}
        journal.append("asked", **named, number=number, origin="start", params=params, config=CONFIG.model_dump())
        journal.append("started", **named, gpus=0.0)
        journal.append("epoch", **named, epoch=1, **row)
        decided = {"epoch": 1, "rung": 1, "stratum": "all", "value": 0.5, "cutoff": 0.6, "verdict": "continue"}
        journal.append("decision", **named, **decided)
        journal.append("checkpoint", **named, epoch=1)
        journal.append("lost", **named, started=True, error="the worker died")
        journal.append("resumed", **named, from_epoch=1)
        journal.append("ended", **named, status="completed", reason="all 3 epochs", error=None)
    journal.close()
    plan = SearchPlan(name="run", final_data="train+val").model_dump()
    provenance = {"trial_id": "t00001", "fingerprint": "f" * 64, "settings": plan, "best_epochs": [2, 3]}
    (run / "best.yaml").write_text(yaml.safe_dump(CONFIG.model_dump() | {"provenance": provenance}))
    return run


@pytest.fixture(scope="module")
def spoilt(run):
    """A function that replaces the content of a file of the run, and restores all others."""
    kept = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def spoil(name, content):
        for path, was in kept.items():
            path.write_bytes(was)
        (run / name).write_bytes(content)
        return run / name

    return spoil


@pytest.mark.parametrize("name", ["trials", "epochs", "decisions", "samples", "audit"])
@few
@given(data=st.data())
def test_tables(run, spoilt, name, data):
    spoilt("best.yaml", b"")
    whole = read_table(run / f"{name}.parquet")
    path = spoilt(f"{name}.parquet", data.draw(damaged((run / f"{name}.parquet").read_bytes())))
    found = read_or_refused(path, lambda: read_table(path))
    assert found is None or found.equals(whole)


@pytest.mark.parametrize(("column", "lost"), [("best_epoch", False), ("best_epoch", True), ("seed", True)])
def test_a_table_without_values_that_every_such_trial_has(run, spoilt, column, lost):
    spoilt("best.yaml", b"")  # the tables are whole again
    table = pq.read_table(run / "trials.parquet")
    place = table.schema.get_field_index(column)
    emptied = pa.array([None, *table[column].to_pylist()[1:]], pa.int64())
    table = table.remove_column(place) if lost else table.set_column(place, table.schema.field(place), emptied)
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    path = spoilt("trials.parquet", content.getvalue().to_pybytes())
    with pytest.raises(InputError, match=f"trials.parquet: is damaged: .*{column}"):
        read_table(path)


@pytest.mark.parametrize("damage", [b"{", b"\xff"])
def test_metadata_of_pandas_in_a_table_is_ignored(run, spoilt, damage):
    spoilt("best.yaml", b"")
    whole, table = read_table(run / "samples.parquet"), pq.read_table(run / "samples.parquet")
    content = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"pandas": damage}), content)
    assert read_table(spoilt("samples.parquet", content.getvalue().to_pybytes())).equals(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trials", "epochs", "decisions", "samples"])
@examples(20)
@given(data=st.data())
def test_tables_with_another_value_or_type_or_without_a_column(run, spoilt, name, data):
    """A well-made file that holds what no search writes: the report is made, or says which table is wrong."""
    spoilt("best.yaml", b"")
    path = run / f"{name}.parquet"
    table = pq.read_table(path)
    place = data.draw(st.integers(0, table.num_columns - 1))
    field, values = table.schema.field(place), table.column(place).to_pylist()
    odd = data.draw(st.sampled_from(("null", "type", "lost", "empty")))
    if odd == "null":
        table = table.set_column(place, field, pa.array([None, *values[1:]], field.type))
    elif odd == "type":
        table = table.set_column(place, field.name, pa.array(list(map(str, values))))
    elif odd == "lost":
        table = table.remove_column(place)
    else:
        table = table.slice(0, 0)
    kept = path.read_bytes()
    pq.write_table(table, path)
    content, _ = path.read_bytes(), path.write_bytes(kept)
    path = spoilt(path.name, content)
    read_or_refused(path, lambda: report.report(sections.read(run)))


@few
@given(data=st.data())
def test_plans(run, spoilt, data):
    spoilt("best.yaml", b"")
    content = (run / "plan.yaml").read_bytes()
    odd = swapped(yaml.safe_load(content)).map(lambda document: yaml.safe_dump(document).encode())
    path = spoilt("plan.yaml", data.draw(damaged(content) | odd))
    read_or_refused(path, lambda: planned(Flags(name="run", storage=str(run.parent), resume=True)))
    read_or_refused(path, lambda: sections.read(run))


@pytest.mark.slow
@examples(30)
@given(data=st.data())
def test_reports_of_plans_with_another_value(run, spoilt, data):
    spoilt("best.yaml", b"")
    document = data.draw(swapped(yaml.safe_load((run / "plan.yaml").read_bytes())))
    path = spoilt("plan.yaml", yaml.safe_dump(document).encode())
    read_or_refused(path, lambda: report.report(sections.read(run)))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SearchPlan.model_fields)
def test_reports_of_plans_without_a_setting(run, spoilt, setting):
    spoilt("best.yaml", b"")
    document = yaml.safe_load((run / "plan.yaml").read_bytes())
    del document["settings"][setting]
    path = spoilt("plan.yaml", yaml.safe_dump(document).encode())
    read_or_refused(path, lambda: report.report(sections.read(run)))


@examples(12)
@given(data=st.data())
def test_best_configurations(run, spoilt, data):
    spoilt("plan.yaml", b"")
    content = (run / "best.yaml").read_bytes()
    odd = swapped(yaml.safe_load(content)).map(lambda document: yaml.safe_dump(document).encode())
    path = spoilt("best.yaml", data.draw(damaged(content) | odd))
    read_or_refused(path, lambda: _median_best_epoch(_read_best(path, FinalFlags(str(path)))))


@examples(15)
@given(data=st.data())
def test_journals(run, spoilt, data):
    spoilt("best.yaml", b"")
    content = (run / "journal.jsonl").read_bytes()
    whole = read_journal(run / "journal.jsonl")
    path = spoilt("journal.jsonl", data.draw(damaged(content)))
    found = read_or_refused(path, lambda: (read_record(path), read_journal(path))[1])
    assert found is None or found == whole[: len(found)]  # a half-written last line is dropped
    read_or_refused(path, lambda: Journal(path).close())


@examples(15)
@given(data=st.data())
def test_journals_without_checksums_that_hold_other_values(run, spoilt, data):
    spoilt("best.yaml", b"")
    events = data.draw(swapped(read_journal(run / "journal.jsonl")))
    path = spoilt("journal.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())
    read_or_refused(path, lambda: tables.make_tables(read_record(path), "val_loss"))


@few
@given(data=st.data())
def test_predictions(run, data):
    """A file that is damaged is left out, as one that is missing."""
    samples, trials = read_table(run / "samples.parquet"), read_table(run / "trials.parquet").head(1)
    validation = samples[samples["split"] == "val"]
    given = np.random.default_rng(0).dirichlet((1, 1), len(validation))
    path = predictions_file(run, trials["trial_id"][0])
    best = {"epoch": int(trials["best_epoch"][0]), "val_loss": trials["val_loss"][0]}
    write_predictions(path, validation, ("normal", "pneumonia"), given, **best)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = read_predictions(run, trials, samples)
    assert not found.trial_ids or (found.probabilities[0] == given).all()
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("name", ["quick", "chest_xray"])
@few
@given(data=st.data())
def test_spaces(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(data.draw(damaged((SHIPPED / f"{name}.yaml").read_bytes())))
    read_or_refused(path, lambda: load(str(path)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images with a manifest of each kind beside them."""
    folder = draw_folder(tmp_path_factory.mktemp("pictures") / "images", count=6).parent
    rows = [
        {"path": f"images/{label}/{number:03d}.png", "label": label, "group": f"p{number // 2}", "split": split}
        for label in ("dark", "light")
        for number, split in enumerate(("train", "train", "val", "val", "test", "test"))
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "manifest.parquet")
    table.to_pandas().to_csv(folder / "manifest.csv", index=False)
    return folder


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@examples(10)
@given(data=st.data())
def test_manifests(pictures, kind, data):
    path = pictures / f"damaged.{kind}"
    path.write_bytes(data.draw(damaged((pictures / f"manifest.{kind}").read_bytes())))
    found = read_or_refused(path, lambda: load_samples(str(path)))
    assert found is None or set(found["split"]) <= {"train", "val", "test"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder, and what it predicts."""
    folder = tmp_path_factory.mktemp("models") / "model"
    built = {"classes": 2, "image_size": 32, "head_dropout": 0.0, "seed": 0, "weights": None}
    save_model(folder, backbones.build("test_resnet", **built), CONFIG, ["dark", "light"], temperature=1.5)
    return folder


@examples(6)
@given(data=st.data())
def test_weights_of_a_model(model, data):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    tensors = load_model(model).network.state_dict()
    try:
        path.write_bytes(data.draw(damaged(whole)))
        found = read_or_refused(path, lambda: load_model(model))
        assert found is None or all((found.network.state_dict()[name] == tensors[name]).all() for name in tensors)
    finally:
        path.write_bytes(whole)


@examples(12)
@given(data=st.data())
def test_configuration_of_a_model(model, data):
    path = model / "config.yaml"
    whole = path.read_bytes()
    odd = swapped(yaml.safe_load(whole) | data.draw(st.sampled_from(({}, {"ensemble": {"a": 0.5, "..": 0.5}}))))
    try:
        path.write_bytes(data.draw(damaged(whole) | odd.map(lambda document: yaml.safe_dump(document).encode())))
        found = read_or_refused(path, lambda: load_model(model))
        assert found is None or (len(set(found.classes)) == 2 and 0 < found.temperature < float("inf"))
    finally:
        path.write_bytes(whole)


def test_an_unknown_backbone_is_named_with_its_file(model):
    path = model / "config.yaml"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole.replace(b"test_resnet", b"uest_resnet"))
        with pytest.raises(InputError, match=r"config.yaml: backbone: 'uest_resnet'"):
            load_model(model)
    finally:
        path.write_bytes(whole)
