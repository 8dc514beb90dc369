import json
import multiprocessing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.record.journal import Journal, Record, Row, read_journal, read_record
from tuning.record.tables import make_tables, read_table, replacing, up_to_date, write_tables
from tuning.settings.config import InputError, TrialConfig

CONFIG = TrialConfig(backbone="test_resnet", epochs=3).model_dump()


def row(epoch, val_loss, **other):
    values = dict.fromkeys(("train_loss", "train_eval_loss", "val_accuracy", "val_balanced_accuracy", "val_auroc"))
    values |= {"epoch": epoch, "val_loss": val_loss, "learning_rate": 0.1, "seconds": 2.0, "data_seconds": 0.5}
    values |= {"prefix_seconds": None, "train_seconds": 1.0, "evaluate_seconds": 0.5, "cache_hits": None, "images": 64}
    values |= {"micro_batch": 32, "trained_parameters": 10, "peak_memory_mb": None, "unfreeze_depth": 0}
    return values | {"ends": None, "reason": None} | other


def ask(journal, number=0, trial_id="t00000"):
    journal.append("asked", trial_id=trial_id, number=number, origin="start", params={}, config=CONFIG)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    yield journal
    journal.close()


@given(
    st.dictionaries(
        st.text(),
        st.one_of(st.none(), st.booleans(), st.text(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False)),
    )
)
def test_a_row_is_what_the_event_was(fields):
    kept = Row(fields)
    assert dict(kept) == fields and len(kept) == len(fields)
    assert [type(value) for value in kept.values()] == [type(value) for value in fields.values()]


def test_best_epoch_gap_and_sums(journal, tmp_path):
    ask(journal)
    journal.append("started", trial_id="t00000", gpus=0.5)
    for epoch, loss in enumerate((0.9, 0.5, 0.7), 1):
        journal.append("epoch", trial_id="t00000", **row(epoch, loss, train_eval_loss=0.4, val_auroc=loss))
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
        journal.append("epoch", trial_id=f"t{number}", **row(1, 0.5, latency_ms=measured))
    made = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")
    assert made["trials"]["latency_ms"].to_pylist() == [2.0, 2.0, 9.0, 2.0, None]


def test_a_diverged_epoch_has_a_row_and_missing_is_null(journal, tmp_path):
    ask(journal)
    journal.append("started", trial_id="t00000", gpus=0.0)
    journal.append("epoch", trial_id="t00000", **row(1, None, ends="diverged"))
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


def test_resumed_voids_later_rows_and_decisions(journal, tmp_path):
    ask(journal)
    journal.append("started", trial_id="t00000", gpus=0.0)
    for epoch in (1, 2, 3):
        journal.append("epoch", trial_id="t00000", **row(epoch, 1 / epoch))
        decided = {"rung": epoch, "stratum": "all", "value": 0.5, "cutoff": 0.5, "verdict": "continue"}
        journal.append("decision", trial_id="t00000", epoch=epoch, **decided)
    journal.append("resumed", trial_id="t00000", from_epoch=1)
    journal.append("epoch", trial_id="t00000", **row(2, 0.7))
    tables = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")
    assert tables["epochs"]["val_loss"].to_pylist() == [1.0, 0.7]
    assert tables["decisions"]["epoch"].to_pylist() == [1]


def test_lost_workers_are_counted_by_whether_the_trial_had_begun_there(journal, tmp_path):
    ask(journal)
    for started in (True, False, True):
        journal.append("lost", trial_id="t00000", started=started, error="the node is dead")
    trial = read_record(tmp_path / "journal.jsonl").trials["t00000"]
    assert (trial.losses, trial.lost_starts, trial.status) == (2, 1, None)


@given(st.binary(max_size=40).filter(lambda torn: b"\n" not in torn))
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path_factory, torn):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    first = Journal(path)
    ask(first)
    first.close()
    with open(path, "ab") as file:
        file.write(torn)
    assert len(read_journal(path)) == 1
    again = Journal(path)
    ask(again, 1, "t00001")
    again.close()
    assert [event["seq"] for event in read_journal(path)] == [1, 2]


def test_a_damaged_line_is_named(journal, tmp_path):
    ask(journal)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"seq": 2, "eve\n' + path.read_bytes())
    with pytest.raises(InputError, match="line 2 is damaged"):
        read_journal(path)


def test_wall_time_goes_on_over_starts(journal, tmp_path):
    ask(journal)
    path = tmp_path / "later.jsonl"
    path.write_text(json.dumps({"seq": 1, "wall_s": 100.0, "time": 0.0}) + "\n")
    later = Journal(path, clock=iter([5.0, 5.5]).__next__)
    assert later.append("asked")["wall_s"] == 100.5
    later.close()


def _open(path: Path, answer) -> None:
    try:
        Journal(path).close()
        answer.put("opened")
    except InputError as error:
        answer.put(str(error))


def test_a_second_writer_is_refused(journal, tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_open, args=(tmp_path / "journal.jsonl", answer))
    process.start()
    assert "another search is writing this run" in answer.get()
    process.join()


def test_tables_come_back_and_newer_or_foreign_ones_are_refused(tmp_path):
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


def test_tables_know_whether_they_tell_of_all_events(journal, tmp_path):
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
