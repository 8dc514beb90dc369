"""The device that trials run on: which it is, in what precision it computes, and whether it works."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tuning.settings.config import InputError


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


def prepare_gpu(*, deterministic: bool) -> None:
    """Have GPUs compute the same from the same, or as fast as they can: to be called before CUDA's first use."""
    torch.backends.cudnn.benchmark = not deterministic  # tries the algorithms of each convolution once
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS's results depend on its streams
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def in_float32() -> Iterator[None]:
    """Have CUDA's convolutions compute in float32, as the model is deployed, not in TF32 with float16's precision."""
    was, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = was


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


def accelerator() -> torch.device:
    """Return the GPU that torch can use here: CUDA's (or ROCm's), or Apple's. Without one CUDA's, whose use fails."""
    return torch.device("mps" if torch.backends.mps.is_available() else "cuda")


def chosen(name: str) -> torch.device:
    """Return the device that `cpu`, `cuda`, `mps` or `auto` (the GPU that torch can use, else the CPU) names.

    Raises:
        InputError: torch finds none of this name.
    """
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(each for each, there in usable.items() if there)
    if not usable.get(name):
        raise InputError(f"--device {name}: torch finds no such device here; use auto or cpu")
    return torch.device(name)


def ready(name: str, *, threads: int, deterministic: bool) -> torch.device:
    """Return the device that a name chooses, see `chosen`, made ready for training in this process."""
    device = chosen(name)
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_memory()
    else:
        prepare_gpu(deterministic=deterministic)
    return device


def all_gpus(device: torch.device) -> list[torch.device]:
    """Return all devices of this machine that are like a GPU of CUDA, or the device itself."""
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def gpus() -> list[tuple[str, str | None]]:
    """Return each GPU of this machine in words, and what is wrong with it; None if it works."""
    if not torch.cuda.is_available():
        device = accelerator()
        return [("Apple GPU" if device.type == "mps" else "GPU", _tried(device))]
    found = []
    for number in range(torch.cuda.device_count()):
        device, facts = torch.device("cuda", number), torch.cuda.get_device_properties(number)
        words = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {str(mixed_precision(device))[6:]}"
        found.append((words, _tried(device)))
    return found


def _tried(device: torch.device) -> str | None:
    try:
        exercise(device)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None
