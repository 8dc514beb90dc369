"""Standard output that breaks while a search runs."""

import os
import sys
from contextlib import suppress

from tuning.settings.command_line import Enduring, endure


def test_what_reads_the_output_may_end_and_a_disk_may_be_full(capsys):
    read, write = os.pipe()
    os.close(read)
    for stream in (open(write, "w"), open("/dev/full", "w")):
        enduring = Enduring(stream)
        for _ in range(3):
            print("still here", file=enduring, flush=True)
        assert capsys.readouterr().err.count("standard output: can't be written (") == 1
        with suppress(OSError):  # what it holds can't be written either
            stream.close()


def test_there_may_be_no_output_at_all(capsys):
    enduring = Enduring(None)  # as sys.stdout is if the shell has closed it
    print("nobody", file=enduring, flush=True)
    assert not enduring.isatty() and capsys.readouterr().err == ""
    print("somebody", file=Enduring(sys.stdout), flush=True)
    assert capsys.readouterr().out == "somebody\n"


def test_output_and_errors_may_break_together(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))
    broken = [sys.stdout, sys.stderr]
    endure()
    for _ in range(2):
        print("still here", flush=True)
        print("and here", file=sys.stderr, flush=True)
    for stream in broken:
        with suppress(OSError):
            stream.close()


def test_what_is_closed_or_broken_still_has_a_file_number():
    assert os.fstat(Enduring(None).fileno())
    with open("/dev/full", "w") as stream:
        broken = Enduring(stream)
        print("still here", file=broken, flush=True)
        assert os.fstat(broken.fileno())
        with suppress(OSError):
            stream.close()
