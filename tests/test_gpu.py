"""`make gpu`: that all its parts run, on the CPU, and what it says where there is no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared import ONE_CORE, SOAK

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu"] = gpu  # dataclasses look their module up
spec.loader.exec_module(gpu)


def inside(name, out):
    gpu.inside(name, gpu.Bench(rehearse=True), out)
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_a_killed_worker_is_found_and_its_trial_goes_on(tmp_path):
    found = inside("killed", tmp_path)
    assert (found["status"], found["faults"]) == ("PASS", []) and found["figures"]["events"]["lost"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["facts", "mix", "numbers", "same", "memory", "speed", "graphs", "several", "costs"])
def test_a_part_runs_at_toy_size_on_the_cpu(tmp_path, name):
    found = inside(name, tmp_path)
    assert (found["status"], found["faults"]) == ("PASS", []) and found["figures"]


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="takes minutes")
def test_all_parts_run_at_toy_size_on_the_cpu(tmp_path):
    command = [sys.executable, SCRIPT, "--rehearse", "--minutes", "60", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_CORE)
    assert done.returncode == 0, done.stdout
    found = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(part["part"], part["status"]) for part in found] == [(name, "PASS") for name in gpu.PARTS]
    figures = {part["part"]: part["figures"] for part in found}
    assert figures["packing"]["share 0"]["ended"] == {"completed": 4} and figures["killed"]["events"]["lost"] == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_part_says_why_it_is_skipped(tmp_path):
    command = [sys.executable, SCRIPT, "--parts", "facts", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("SKIP facts") and "Found no NVIDIA driver" in done.stdout


def test_what_a_part_finds_wrong_is_kept_and_so_is_an_error(tmp_path, monkeypatch):
    def wrong(bench):
        bench.check(True, "this is right")
        bench.check(False, "a loss is 9% from the CPU's")
        return {"loss": 1.09}

    def fails(bench):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setitem(gpu.PARTS, "facts", (wrong, 1.0))
    monkeypatch.setitem(gpu.PARTS, "mix", (fails, 1.0))
    faults = ["a loss is 9% from the CPU's"]
    assert inside("facts", tmp_path) == {"status": "FAIL", "faults": faults, "figures": {"loss": 1.09}}
    found = inside("mix", tmp_path)
    assert (found["status"], found["faults"]) == ("FAIL", ["RuntimeError: CUDA error: unspecified launch failure"])
