import errno
import fcntl
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from shared import bring_back, removable, take_away

from tuning.record import claim, mirror, storage, transfer
from tuning.record.claim import segments_among
from tuning.record.journal import Journal, read_journal
from tuning.record.mirror import Mirror, borrowed, fetch, mirrored, run_folder
from tuning.record.transfer import fetch_files, push_file
from tuning.settings.config import InputError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "here" / "xray"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "plan.yaml").write_text("plan")
    (folder / "checkpoints" / "t00000.state.safetensors").write_bytes(b"weights")
    (folder / "checkpoints" / ".half-written").write_bytes(b"x")
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(mirror, "SYNC_SECONDS", 0.05)
    monkeypatch.setattr(transfer, "RETRY_SECONDS", 0.05)


def driver(folder, uri):
    """A mirror as a driver has it, without its threads."""
    made = Mirror(folder, uri)
    made.claim = claim.take(uri)
    return made


def segments(uri):
    """Return which driver wrote each segment of the journal in the storage, and where it begins."""
    names = (Path(name).stem.split("-") for name in segments_among(storage.files_below(uri)))
    return [(int(driver), int(begin)) for driver, _, begin in names]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def journal(folder, events, more=b""):
    """Append events until there are `events`; `more` is what a killed driver left."""
    there = Journal(folder / "journal.jsonl")
    for _ in range(events - len(read_journal(folder / "journal.jsonl"))):
        there.append("priors", priors=[])
    there.close()
    with open(folder / "journal.jsonl", "ab") as file:
        file.write(more)


@pytest.mark.slow
def test_a_run_that_was_sent_is_fetched_unchanged(run, bucket, tmp_path):
    journal(run, 3, b'{"half')
    here = driver(run, f"{bucket}/xray")
    here.push()
    half = len((run / "journal.jsonl").read_bytes()) - len(b'{"half')
    journal(run, 5)
    (run / "plan.yaml").write_text("plan, longer")
    here.push()
    here.push()
    claim.release(here.uri, here.claim)
    assert segments(here.uri) == [(1, 0), (1, half)]
    names = sorted(name for name in storage.files_below(here.uri) if not name.startswith("journal/"))
    assert names == ["checkpoints/t00000.state.safetensors", "plan.yaml"]
    there = tmp_path / "there" / "xray"
    Mirror(there, f"{bucket}/xray").fetch()
    (run / "checkpoints" / ".half-written").unlink()
    assert contents(there) == contents(run)
    assert [event["seq"] for event in read_journal(there / "journal.jsonl")] == [1, 2, 3, 4, 5]


def test_a_file_deleted_here_is_deleted_in_the_storage(run, bucket):
    here = Mirror(run, f"{bucket}/xray")
    here.push()
    (run / "checkpoints" / "t00000.state.safetensors").unlink()
    storage.write_bytes(f"{bucket}/xray/checkpoints/t00001.best.safetensors", b"of another node")
    here.forget("checkpoints/t00001.best.safetensors")
    here.push()
    assert list(storage.files_below(f"{bucket}/xray")) == ["plan.yaml"]


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_files_of_other_nodes_are_fetched_and_no_others(run, bucket):
    here = Mirror(run, f"{bucket}/xray")
    here.push()
    (run / "plan.yaml").write_text("plan, newer")
    for name in ("plan.yaml", "predictions/t00001.parquet", "checkpoints/t00000.state.safetensors"):
        storage.write_bytes(f"{bucket}/xray/{name}", b"there")
    here.fetch_others()
    assert (run / "plan.yaml").read_text() == "plan, newer"
    assert (run / "predictions" / "t00001.parquet").read_bytes() == b"there"
    assert (run / "checkpoints" / "t00000.state.safetensors").read_bytes() == b"there"


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_the_longer_of_two_journals_is_kept_and_the_storages_if_they_differ(run, bucket, tmp_path):
    journal(run, 3)
    uri = f"{bucket}/xray"
    here = driver(run, uri)
    here.push()
    claim.release(uri, here.claim)
    journal(run, 5)  # killed before this was sent
    (run / "checkpoints" / "t00001.state.safetensors").write_bytes(b"of a history that is not continued")
    Mirror(run, uri).fetch()
    assert len(read_journal(run / "journal.jsonl")) == 5
    other = tmp_path / "there" / "xray"
    there = driver(other, uri)
    there.fetch()
    journal(other, 4)
    there.push()
    claim.release(uri, there.claim)
    fetch(run, uri)
    assert contents(run) == contents(other)


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_state_is_fetched_with_its_best_weights(run, bucket):
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


def test_a_search_sends_while_it_runs_and_leaves_no_copy(bucket):
    folder = run_folder(bucket, "xray")
    with mirrored(folder, bucket) as kept:
        assert not folder.exists()
        folder.mkdir(parents=True)
        with closing(Journal(folder / "journal.jsonl")) as events:
            events.append("priors", priors=[])
            for _ in range(200):
                if segments(f"{bucket}/xray"):
                    break
                time.sleep(0.05)
            else:
                pytest.fail("nothing was sent")
            with pytest.raises(InputError, match="another search"), mirrored(folder, bucket):
                pass
            events.append("priors", priors=[])
    assert kept.uri == f"{bucket}/xray"
    assert not folder.parent.exists()
    assert [number for number, _ in segments(kept.uri)] == [1, 1]
    assert len(storage.files_below(kept.uri)) == 2  # no claim is left


def test_a_run_here_has_no_mirror(tmp_path):
    assert run_folder(str(tmp_path), "xray") == tmp_path / "xray"
    with mirrored(tmp_path / "xray", str(tmp_path)) as kept:
        assert kept is None


def test_a_second_driver_is_refused_until_the_first_has_died_by_the_storages_clock(bucket, monkeypatch):
    uri = f"{bucket}/xray"
    monkeypatch.setattr(claim.platform, "node", lambda: "elsewhere")
    first = claim.take(uri)
    monkeypatch.undo()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's clock has no say
    with pytest.raises(InputError, match="another search, on elsewhere, is writing this run"):
        claim.take(uri)
    monkeypatch.setattr(claim, "CLAIM_SECONDS", 0.0)
    second = claim.take(uri)
    assert (first[:5], second[:5]) == ("0001-", "0002-")
    claim.check_mine(uri, second)
    for late in (claim.check_mine, claim.renew):
        with pytest.raises(InputError, match="another search has taken this run over"):
            late(uri, first)
    storage.write_bytes(f"{uri}/journal/{second}-000000000000.jsonl", b"{}\n")
    claim.release(uri, second)
    with pytest.raises(InputError, match="taken this run over"):  # also when that one has ended
        claim.check_mine(uri, first)
    assert len(storage.files_below(uri)) == 1


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_driver_that_was_killed_on_this_machine_is_dead_at_once(bucket):
    code = f"from tuning.record import claim; print(claim.take('{bucket}/xray'))"
    killed = subprocess.run([sys.executable, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout
    assert claim.take(f"{bucket}/xray") > killed


def test_a_driver_that_was_cut_off_writes_nothing_more(run, bucket, tmp_path, monkeypatch, capsys):
    uri = f"{bucket}/xray"
    journal(run, 3)
    first = driver(run, uri)
    first.push()
    journal(run, 5)  # cut off
    monkeypatch.setattr(claim, "CLAIM_SECONDS", 0.0)
    other = tmp_path / "there" / "xray"
    second = driver(other, uri)
    second.fetch()
    journal(other, 4)
    second.push()
    late = f"{first.claim}-{first._journal_bytes:012d}.jsonl"  # was on its way when the second began
    storage.write_bytes(f"{uri}/journal/{late}", b"".join((run / "journal.jsonl").read_bytes().splitlines(True)[3:]))
    there = storage.files_below(uri)
    (run / "plan.yaml").write_text("of the first")
    assert not first.sent_at_last()
    assert "taken this run over" in first.taken
    with pytest.raises(InputError, match="taken this run over"):  # what its workers would send
        push_file(run, uri, "plan.yaml", first.claim)
    assert storage.files_below(uri) == there
    third = tmp_path / "anywhere" / "xray"
    Mirror(third, uri).fetch()
    assert contents(third) == contents(other)


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_search_whose_run_is_taken_over_ends_with_an_error_and_leaves_no_copy(run, bucket, monkeypatch):
    monkeypatch.setattr(claim, "CLAIM_SECONDS", 0.0)
    with pytest.raises(InputError, match="taken this run over"), mirrored(run, bucket) as kept:
        claim.take(kept.uri)
        (run / "best.yaml").write_text("best")  # there is something to send
    assert not run.exists()


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_journal_with_a_gap_is_refused(run, bucket):
    storage.write_bytes(f"{bucket}/xray/journal/0001-00ff-000000000010.jsonl", b"{}\n")
    with pytest.raises(InputError, match="doesn't continue the journal"):
        Mirror(run, f"{bucket}/xray").fetch()


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_segments_of_an_older_version_are_read_and_continued(run, bucket, tmp_path):
    uri = f"{bucket}/xray"
    journal(run, 5)
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for number, first in ((9_999, 0), (10_000, 2), (10_001, 3)):  # counted; the later ones sort after 0001-...
        storage.write_bytes(f"{uri}/journal/{number:08d}.jsonl", b"".join(lines[first : first + 2 - (first == 2)]))
    storage.write_bytes(f"{uri}/driver.json", b"{}")
    there = tmp_path / "there" / "xray"
    resumed = driver(there, uri)
    resumed.fetch()
    assert contents(there) == {"journal.jsonl": b"".join(lines)}
    journal(there, 6)
    resumed.push()
    claim.release(uri, resumed.claim)
    claim.check_mine(uri, resumed.claim)  # they are no later driver's
    third = tmp_path / "anywhere" / "xray"
    Mirror(third, uri).fetch()
    assert contents(third) == contents(there)


def test_a_name_that_leads_out_of_the_run_is_refused(run, tmp_path):
    files, place = MemoryFileSystem(), f"/{tmp_path.name}/xray"

    def put(name):
        files.store[f"{place}/{name}"] = MemoryFile(files, f"{place}/{name}", b"evil")

    here = Mirror(run, f"fsspec+memory://{place}")
    put("checkpoints/x/../../../evil.txt")
    with pytest.raises(InputError, match="leads out of the run's folder"):
        here.fetch_others()
    files.store.clear()
    put(f"{tmp_path}/evil.txt")
    with pytest.raises(InputError, match="leads out of the run's folder"):
        here.fetch()
    files.store.clear()
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_copy_on_nfs_can_be_locked(run, bucket, monkeypatch):
    """There flock is a lock of bytes, and an exclusive one needs a file that is open for writing (flock(2))."""
    flock = fcntl.flock

    def as_on_nfs(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    journal(run, 2)
    fetch(run, f"{bucket}/xray")
    writing = Journal(run / "journal.jsonl")
    with pytest.raises(InputError, match="another search is writing this run"):
        fetch(run, f"{bucket}/xray")
    writing.close()


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_reading_a_storages_clock_leaves_nothing_after_the_next_release(bucket, monkeypatch):
    uri = f"{bucket}/xray"
    name = claim.take(uri)
    storage.write_bytes(f"{uri}/drivers/now-of-a-driver-that-was-killed", b"now")
    claim.release(uri, name)
    assert not storage.files_below(uri)
    listed, releases = claim.files_below, iter([True, False, False])

    def released_meanwhile(place):
        if next(releases, False):
            claim.release(uri, name)
        return listed(place)

    monkeypatch.setattr(claim, "files_below", released_meanwhile)
    assert claim._now(uri) > 0
    assert not storage.files_below(uri)


def test_after_a_resume_new_files_of_other_nodes_are_fetched(run, bucket, tmp_path):
    uri, name = f"{bucket}/xray", "checkpoints/t00000.state.safetensors"
    Mirror(run, uri).push()
    there = tmp_path / "there" / "xray"
    resumed = Mirror(there, uri)
    resumed.fetch()
    resumed.push()
    storage.write_bytes(f"{uri}/predictions/t00000.parquet", b"another")
    time.sleep(1.1 if bucket.startswith("s3") else 0.05)  # S3's times are whole seconds
    storage.write_bytes(f"{uri}/{name}", b"WEIGHTS")
    resumed.fetch_others()
    assert (there / name).read_bytes() == b"WEIGHTS"
    assert (there / "predictions" / "t00000.parquet").read_bytes() == b"another"
    (there / name).write_bytes(b"of this node")
    resumed.fetch_others()
    assert (there / name).read_bytes() == b"of this node"


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_storage_that_fails_for_a_while_gets_everything_later(run, bucket, capsys):
    place = removable(bucket)
    with mirrored(run, bucket) as kept:
        take_away(place)
        (run / "best.yaml").write_text("best")
        while not kept._failing:
            time.sleep(0.01)
        bring_back(place)
    assert capsys.readouterr().err.count("the storage fails") == 1
    assert storage.read_bytes(f"{bucket}/xray/best.yaml") == b"best"


@pytest.mark.parametrize("bucket", ["file"], indirect=True)
def test_a_copy_that_could_not_be_sent_is_kept(run, bucket, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.1)
    place = removable(bucket)
    with mirrored(run, bucket):
        take_away(place)
        (run / "best.yaml").write_text("best")
    assert (run / "plan.yaml").exists() and (run / "best.yaml").exists()
    assert "--resume sends it from" in capsys.readouterr().err


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
