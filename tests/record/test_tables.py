import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import CONFIG, ask, epoch_fields

from tuning.record.journal import Journal, Record, read_record
from tuning.record.tables import make_tables, read_table, replacing, up_to_date, write_tables
from tuning.settings.config import InputError


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    yield journal
    journal.close()


def test_best_epoch_gap_and_sums(journal, tmp_path):
    ask(journal)
    journal.append("started", trial_id="t00000", gpus=0.5)
    for epoch, loss in enumerate((0.9, 0.5, 0.7), 1):
        journal.append("epoch", trial_id="t00000", **epoch_fields(epoch, loss, train_eval_loss=0.4, val_auroc=loss))
    journal.append("ended", trial_id="t00000", status="completed", reason="all 3 epochs", error=None)
    record = read_record(tmp_path / "journal.jsonl")
    trial = make_tables(record, "val_loss")["trials"].to_pylist()[0]
    assert (trial["epochs"], trial["best_epoch"], trial["val_loss"], trial["status"]) == (3, 2, 0.5, "completed")
    assert trial["gap"] == pytest.approx(0.1)
    assert (trial["seconds"], trial["gpu_seconds"], trial["images_per_second"]) == (6.0, 3.0, 64.0 / 1.5)
    assert trial["started_at"] < trial["ended_at"]
    by_auroc = make_tables(record, "val_auroc")["trials"].to_pylist()[0]
    assert (by_auroc["best_epoch"], by_auroc["val_loss"]) == (1, 0.9)


def test_a_networks_latency_is_the_least_that_was_measured_of_it(journal, tmp_path):
    for number, (backbone, measured) in enumerate([("a", 3.0), ("a", 2.0), ("b", 9.0), ("a", None), ("c", None)]):
        named = {"trial_id": f"t{number}", "config": CONFIG | {"backbone": backbone}}
        journal.append("asked", number=number, origin="start", params={}, **named)
        journal.append("started", trial_id=f"t{number}", gpus=0.0)
        journal.append("epoch", trial_id=f"t{number}", **epoch_fields(1, 0.5, latency_ms=measured))
    made = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")
    assert made["trials"]["latency_ms"].to_pylist() == [2.0, 2.0, 9.0, 2.0, None]


def test_a_diverged_epoch_has_a_row_and_missing_is_null(journal, tmp_path):
    ask(journal)
    journal.append("started", trial_id="t00000", gpus=0.0)
    journal.append("epoch", trial_id="t00000", **epoch_fields(1, None, ends="diverged"))
    tables = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")
    trial = tables["trials"].to_pylist()[0]
    assert (trial["epochs"], trial["val_loss"], trial["best_epoch"], trial["gap"]) == (1, None, None, None)
    assert tables["epochs"]["val_loss"].to_pylist() == [None]
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append("epoch", trial_id="t00000", val_loss=float("nan"))


def test_a_trial_has_a_row_from_its_start(journal, tmp_path):
    ask(journal)
    assert make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")["trials"].num_rows == 0
    journal.append("started", trial_id="t00000", gpus=0.0)
    trials = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")["trials"].to_pylist()
    assert (trials[0]["status"], trials[0]["epochs"]) == ("running", 0)


def test_tables_are_read_back_and_newer_or_foreign_ones_are_refused(tmp_path):
    write_tables(make_tables(Record(), "val_loss"), tmp_path)
    assert read_table(tmp_path / "trials.parquet").empty
    table = pq.read_table(tmp_path / "trials.parquet")
    pq.write_table(table.replace_schema_metadata({"schema_version": "99"}), tmp_path / "newer.parquet")
    with pytest.raises(InputError, match="schema_version 99 is newer"):
        read_table(tmp_path / "newer.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    for name in ("foreign", "text"):
        with pytest.raises(InputError, match="not a table of a run"):
            read_table(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="no such table"):
        read_table(tmp_path / "none.parquet")


def test_tables_know_whether_they_are_up_to_date(journal, tmp_path):
    ask(journal)
    assert not up_to_date(tmp_path)  # there are none yet
    write_tables(make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss"), tmp_path)
    assert up_to_date(tmp_path)
    journal.append("started", trial_id="t00000", gpus=0.0)
    assert not up_to_date(tmp_path)
    made = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")
    for name in ("trials", "epochs", "decisions"):  # a driver killed between these has written some of them
        assert not up_to_date(tmp_path)
        write_tables({name: made[name]}, tmp_path)
    assert up_to_date(tmp_path)
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "trials.parquet").write_text("no table")
    assert up_to_date(tmp_path)  # there is nothing else to be read


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
