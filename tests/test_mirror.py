import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tuning import mirror, storage
from tuning.config import InputError
from tuning.mirror import Mirror, borrowed, fetch, fetch_files, mirrored, run_folder
from tuning.tables import Journal, read_journal


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "here" / "xray"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "plan.yaml").write_text("plan")
    (folder / "checkpoints" / "t00000.state.safetensors").write_bytes(b"weights")
    (folder / "checkpoints" / ".half-written").write_bytes(b"x")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def journal(folder, events, more=b""):
    """Append events until there are so many; `more` is what a killed driver left."""
    there = Journal(folder / "journal.jsonl")
    for _ in range(events - len(read_journal(folder / "journal.jsonl"))):
        there.append("priors", priors=[])
    there.close()
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(more)


def test_what_is_sent_comes_back_the_same(run, bucket, tmp_path):
    journal(run, 3, b'{"torn')
    here = Mirror(run, f"{bucket}/xray")
    here.push()
    journal(run, 5)
    (run / "plan.yaml").write_text("plan, longer")
    here.push()
    here.push()
    names = sorted(storage.files_below(f"{bucket}/xray"))
    segments = ["journal/00000001.jsonl", "journal/00000002.jsonl"]
    assert names == ["checkpoints/t00000.state.safetensors", *segments, "plan.yaml"]
    there = tmp_path / "there" / "xray"
    Mirror(there, f"{bucket}/xray").fetch()
    (run / "checkpoints" / ".half-written").unlink()
    assert contents(there) == contents(run)
    assert [event["seq"] for event in read_journal(there / "journal.jsonl")] == [1, 2, 3, 4, 5]


def test_what_goes_here_goes_there(run, bucket):
    here = Mirror(run, f"{bucket}/xray")
    here.push()
    (run / "checkpoints" / "t00000.state.safetensors").unlink()
    storage.write_bytes(f"{bucket}/xray/checkpoints/t00001.best.safetensors", b"of another node")
    here.forget("checkpoints/t00001.best.safetensors")
    here.push()
    assert list(storage.files_below(f"{bucket}/xray")) == ["plan.yaml"]


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_what_other_nodes_have_put_there_comes_here_and_nothing_else(run, bucket):
    here = Mirror(run, f"{bucket}/xray")
    here.push()
    (run / "plan.yaml").write_text("plan, newer")
    for name in ("plan.yaml", "predictions/t00001.parquet", "checkpoints/t00000.state.safetensors"):
        storage.write_bytes(f"{bucket}/xray/{name}", b"there")
    here.fetch_others()
    assert (run / "plan.yaml").read_text() == "plan, newer"
    assert (run / "predictions" / "t00001.parquet").read_bytes() == b"there"
    assert (run / "checkpoints" / "t00000.state.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_of_two_journals_the_longer_goes_on_and_of_two_histories_the_one_in_the_storage(run, bucket, tmp_path):
    journal(run, 3)
    Mirror(run, f"{bucket}/xray").push()
    journal(run, 5)  # killed before this was sent
    here = Mirror(run, f"{bucket}/xray")
    here.fetch()
    assert len(read_journal(run / "journal.jsonl")) == 5
    other = tmp_path / "there" / "xray"
    there = Mirror(other, f"{bucket}/xray")
    there.fetch()
    journal(other, 4)
    with_another_end = (other / "journal.jsonl").read_bytes()
    there.push()
    fetch(run, f"{bucket}/xray")
    assert (run / "journal.jsonl").read_bytes() == with_another_end


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_state_comes_with_the_best_weights_it_belongs_to(run, bucket):
    names = ["checkpoints/t00000.best.safetensors", "checkpoints/t00000.state.safetensors"]
    for name in names:
        storage.write_bytes(f"{bucket}/xray/{name}", b"old, there")
    (run / names[1]).touch()
    fetch_files(run, f"{bucket}/xray", names)
    assert (run / names[1]).read_bytes() == b"weights"
    assert not (run / names[0]).exists()
    os.utime(run / names[1], (1, 1))
    fetch_files(run, f"{bucket}/xray", names)
    assert [(run / name).read_bytes() for name in names] == [b"old, there"] * 2


def test_a_search_sends_as_it_goes_and_leaves_no_copy(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.05)
    folder = run_folder(bucket, "xray")
    with mirrored(folder, bucket) as kept:
        assert not folder.exists()
        folder.mkdir(parents=True)
        events = Journal(folder / "journal.jsonl")
        events.append("priors", priors=[])
        for _ in range(200):
            if "journal/00000001.jsonl" in storage.files_below(f"{bucket}/xray"):
                break
            time.sleep(0.05)
        else:
            pytest.fail("nothing was sent")
        with pytest.raises(InputError, match="another search, on"), mirrored(folder, bucket):
            pass
        events.append("priors", priors=[])
        events.close()
    assert kept.uri == f"{bucket}/xray"
    assert not folder.parent.exists()
    assert sorted(storage.files_below(f"{bucket}/xray")) == ["journal/00000001.jsonl", "journal/00000002.jsonl"]


def test_a_run_here_has_no_mirror(tmp_path):
    assert run_folder(str(tmp_path), "xray") == tmp_path / "xray"
    with mirrored(tmp_path / "xray", str(tmp_path)) as kept:
        assert kept is None


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_the_claim_of_a_driver_that_is_gone_does_not_hold(run, bucket):
    for claim in (
        {"host": "elsewhere", "pid": 1, "time": time.time() - 100},
        {"host": os.uname().nodename, "pid": 2**22 + 1, "time": time.time()},
    ):
        storage.write_bytes(f"{bucket}/xray/driver.json", json.dumps(claim).encode())
        fetch(run, f"{bucket}/xray")
    claim = {"host": "elsewhere", "pid": 1, "time": time.time()}
    storage.write_bytes(f"{bucket}/xray/driver.json", json.dumps(claim).encode())
    with pytest.raises(InputError, match="another search, on elsewhere, is writing this run"):
        fetch(run, f"{bucket}/xray")


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_storage_that_fails_for_a_while_gets_everything_later(run, bucket, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "LAST_TRY_SECONDS", 0.05)
    place = Path(bucket.removeprefix("file://"))
    with mirrored(run, bucket):
        shutil.rmtree(place)
        place.touch()  # a file where the folder was: nothing can be written
        (run / "best.yaml").write_text("best")
        time.sleep(0.5)
        place.unlink()
        Mirror(run, f"{bucket}/xray")
    assert capsys.readouterr().err.count("the storage fails") == 1
    assert storage.read_bytes(f"{bucket}/xray/best.yaml") == b"best"


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_what_could_not_be_sent_stays_here(run, bucket, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "LAST_TRY_SECONDS", 0.01)
    place = Path(bucket.removeprefix("file://"))
    with mirrored(run, bucket):
        shutil.rmtree(place)
        place.touch()
    assert (run / "plan.yaml").exists()
    assert "it is in" in capsys.readouterr().err


def test_a_borrowed_run_is_sent_back(run, bucket):
    Mirror(run, f"{bucket}/xray").push()
    with borrowed(f"{bucket}/xray/", without=("checkpoints/",)) as folder:
        assert folder.name == "xray"
        assert list(contents(folder)) == ["plan.yaml"]
        (folder / "report.html").write_text("report")
    assert not folder.exists()
    there = storage.files_below(f"{bucket}/xray")
    assert sorted(there) == ["checkpoints/t00000.state.safetensors", "plan.yaml", "report.html"]
    with borrowed(str(run)) as folder:
        assert folder == run
