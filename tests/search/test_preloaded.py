"""What workers load ahead of their first trial."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tuning.search

PRELOADED = Path(tuning.search.__file__).with_name("preloaded.py")
CODE = "import os; os.cpu_count = lambda: {cores}; import tuning.search.preloaded, sys; print('torch' in sys.modules)"


def waits_for_a_lock(pid: int) -> bool:
    return any(line.split()[1] == "->" and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_two_cores_workers_load_one_after_the_other():
    command = [sys.executable, "-c", CODE.format(cores=2)]
    options = {"env": os.environ | {"PYTHONPATH": str(PRELOADED.parents[2])}, "stdout": subprocess.PIPE, "text": True}
    with open(PRELOADED) as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # as the worker that loads has it
        with subprocess.Popen(command, **options) as worker:
            while not waits_for_a_lock(worker.pid):
                assert worker.poll() is None
                time.sleep(0.01)
            assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()
            more = subprocess.run([sys.executable, "-c", CODE.format(cores=4)], **options)
            assert more.stdout == "True\n"  # on more cores none waits
            assert worker.poll() is None
            turn.close()
            assert worker.communicate()[0] == "True\n"
    assert worker.returncode == 0
