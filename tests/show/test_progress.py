"""What is printed while a search runs, in files and on a pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from runs import make_record
from shared import ONE_CORE

from tuning.record.journal import Journal, Row, Trial
from tuning.settings.config import SearchPlan
from tuning.show import progress
from tuning.show.live import BLOCKS
from tuning.show.progress import Progress

ROOT = Path(__file__).parents[2]
CONSOLE = {"highlight": False, "soft_wrap": True}
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


@contextmanager
def terminal(monkeypatch):
    """A pseudo-terminal as standard output; the list that is given has what was written there, once it is closed."""
    ours, theirs = pty.openpty()
    said = []

    def read():
        try:
            while part := os.read(ours, 65536):
                said.append(part.decode())
        except OSError:  # it was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(progress, "console", Console(**CONSOLE))  # looks at its terminal when it is made
        yield said
        monkeypatch.undo()
    reader.join()
    os.close(ours)


@pytest.fixture
def search(tmp_path):
    """A search as `Progress` sees it, of which two trials run."""
    (tmp_path / "journal.jsonl").touch()
    record = make_record(trials=10, epochs=8, running=2)
    running = {trial.trial_id: trial for trial in record.trials.values() if trial.status == "running"}
    journal = Journal(tmp_path / "journal.jsonl")
    yield SimpleNamespace(record=record, running=running, journal=journal, started_wall_s=0.0)
    journal.close()


PLAN = SearchPlan(name="x", trials=10, epochs=8)


@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_a_terminal_gets_its_cursor_back_however_a_search_ends(monkeypatch, search, how):
    monkeypatch.setenv("TERM", "xterm")
    with terminal(monkeypatch) as said:
        show = Progress(PLAN, 1.0, 0.1, 2)
        try:
            with show.watching(search):
                trial = search.running.pop("t00008")
                trial.status, trial.reason = "completed", "all epochs"
                show(search, trial)
                print("a stray line")
                if how is not None:
                    raise how
        except (ValueError, KeyboardInterrupt):
            pass
    text = "".join(said)
    assert text.count(HIDE) == text.count(SHOW) == 1 and text.index(HIDE) < text.index(SHOW)
    assert "9/10  t00008 completed" in text and "running   t00009" in text and "a stray line" in text
    after = text[text.rindex("running   t00009") :]
    assert "\x1b[2K" in after  # the block is taken away


@pytest.mark.parametrize("variable", [("TERM", "dumb"), None])
def test_no_escape_codes_where_they_would_not_be_understood(monkeypatch, search, capsys, variable):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.0)

    def report():
        show = Progress(PLAN, 1.0, 0.1, 2)
        with show.watching(search):
            show(search, search.running["t00009"])

    if variable is None:
        report()
        text = capsys.readouterr().out
    else:
        monkeypatch.setenv(*variable)
        with terminal(monkeypatch) as said:
            report()
        text = "".join(said)
    assert "\x1b" not in text
    assert re.search(
        r"8 of 10 trials, about \d+ min left.*; best val_tempered_loss 0\.\d{4} \(t0000\d\); running: t00008 \d", text
    )


@pytest.mark.parametrize(
    ("val_loss", "auroc", "warning"),
    [
        (0.69, 0.55, ": AUROC 0.55, not significantly better than guessing"),
        (0.91, 0.67, ": AUROC 0.67, it tells the classes apart, but its probabilities are overconfident"),
        (0.68, 0.67, ""),
        (0.30, None, ""),
    ],
)
def test_a_probe_is_judged_by_what_it_tells_apart(capsys, val_loss, auroc, warning):
    row = {"val_loss": val_loss, "val_accuracy": 0.5, "val_auroc": auroc, "seconds": 1.0, "wall_s": 2.0}
    probe = Trial("p00000", None, "probe", {}, {"backbone": "resnet18"}, status="completed", rows=[Row(row)])
    Progress(SearchPlan(name="x"), class_entropy=0.693, guess_error=0.06)(None, probe)
    assert capsys.readouterr().out == f"probe     resnet18 val_loss {val_loss:.4f}, accuracy 0.50{warning}\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", [None, signal.SIGTERM])
def test_a_search_on_a_terminal_gives_it_back(tmp_path, folder, how):
    space = {
        "parameters": {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
        "fixed": {"backbone": "test_resnet", "image_size": 32, "batch_size": 8},
        "search": {"trials": 16 if how is None else 200, "epochs": 4, "weights": "random", "finalists": 0},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    flags = ["--space", str(tmp_path / "space.yaml"), "--data", str(folder), "--name", "x"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    environment = os.environ | ONE_CORE | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tuning" / "run_search.py"), *flags],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    said = b""
    while process.poll() is None:
        if select.select([ours], [], [], 0.1)[0]:
            said += os.read(ours, 65536)
        if how is not None and re.search(rb"running   [^\n]* [1-4]/4", said):
            process.send_signal(how)
            how = None
    while select.select([ours], [], [], 0)[0]:
        said += os.read(ours, 65536)
    text = said.decode()
    assert process.returncode == (130 if "Interrupted" in text else 0), text
    assert text.count(HIDE) == text.count(SHOW) == 1 and text.index(HIDE) < text.index(SHOW)
    assert "running   " in text and (process.returncode == 0 or set(BLOCKS) & set(text))
    assert "running   " not in text[text.index(SHOW) :] and "Best" in text[text.index(SHOW) :]
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
