"""The device that trials run on: how this process is set up for it, and whether it works."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

FAULT_SECONDS = 120.0  # for a process that loads torch and tries a GPU


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for its next tensors.

    glibc returns large blocks to the system at once, and each new tensor's pages are then created and zeroed again: on
    one CPU thread the frozen layers of EfficientNet-lite1 at 128 px took 5.8 ms an image instead of 2.7, training the
    whole network 19.5 instead of 16.7. If the C library has no `mallopt`, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**26)


def set_up(device: torch.device) -> None:
    """Prepare this process for trials on a device: on a CPU by `keep_memory`, on CUDA by convolutions without TF32.

    What is evaluated is in float32, as it is deployed; TF32 has float16's 10 bits of precision.
    """
    if device.type == "cpu":
        keep_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """Return the type of training's mixed precision: on CUDA bfloat16, or float16 without it; None: float32 alone."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def exercise(device: torch.device) -> None:
    """Run a convolution's forward and backward pass, in training's precision, and wait for it.

    Raises:
        RuntimeError: the device doesn't work: no driver, no kernels for it, in another process's exclusive use, broken.
    """
    half = mixed_precision(device)
    layer = nn.Conv2d(3, 8, 3).to(device)
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        output = layer(torch.rand(2, 3, 32, 32, device=device))
    output.float().sum().backward()
    assert layer.weight.grad is not None
    float(layer.weight.grad.sum())


def fault(device: str) -> str | None:
    """Return what is wrong with a device of this machine, tried by a process of its own; None if it works."""
    code = f"import torch; from {__name__} import exercise; exercise(torch.device({device!r}))"
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=FAULT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {FAULT_SECONDS:g} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit status {done.returncode}"]
    return lines[-1].strip()
