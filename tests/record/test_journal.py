import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import ask, epoch_fields

from tuning.record.journal import Journal, Row, read_journal, read_record
from tuning.record.tables import make_tables
from tuning.settings.config import InputError


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


def test_resumed_voids_later_rows_and_decisions(journal, tmp_path):
    ask(journal)
    journal.append("started", trial_id="t00000", gpus=0.0)
    for epoch in (1, 2, 3):
        journal.append("epoch", trial_id="t00000", **epoch_fields(epoch, 1 / epoch))
        decided = {"rung": epoch, "stratum": "all", "value": 0.5, "cutoff": 0.5, "verdict": "continue"}
        journal.append("decision", trial_id="t00000", epoch=epoch, **decided)
    journal.append("resumed", trial_id="t00000", from_epoch=1)
    journal.append("epoch", trial_id="t00000", **epoch_fields(2, 0.7))
    tables = make_tables(read_record(tmp_path / "journal.jsonl"), "val_loss")
    assert tables["epochs"]["val_loss"].to_pylist() == [1.0, 0.7]
    assert tables["decisions"]["epoch"].to_pylist() == [1]


def test_lost_workers_are_counted_by_whether_the_trial_had_begun_there(journal, tmp_path):
    ask(journal)
    for started in (True, False, True):
        journal.append("lost", trial_id="t00000", started=started, error="the node is dead")
    trial = read_record(tmp_path / "journal.jsonl").trials["t00000"]
    assert (trial.losses, trial.lost_starts, trial.status) == (2, 1, None)


@given(st.binary(max_size=40).filter(lambda half: b"\n" not in half))
def test_a_half_written_last_line_is_dropped_and_overwritten(tmp_path_factory, half):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    first = Journal(path)
    ask(first)
    first.close()
    with open(path, "ab") as file:
        file.write(half)
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


def test_wall_time_is_summed_over_starts(journal, tmp_path):
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


@pytest.mark.slow
def test_a_second_writer_is_refused(journal, tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_open, args=(tmp_path / "journal.jsonl", answer))
    process.start()
    assert "another search is writing this run" in answer.get()
    process.join()
