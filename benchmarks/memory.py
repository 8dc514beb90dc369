"""How much memory a search takes: driver, trials and cache, on a generated set of many images.

Memory is what the processes themselves allocate (`RssAnon`); mapped files, which the system may drop, are shown apart.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import tyro
import yaml
from PIL import Image

from tuning.data.images import parallel_map

ROOT = Path(__file__).resolve().parent.parent
DEPTHS = (0, 2, 5)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure the memory of driver, trials and cache."""

    images: int = 20_000
    """Images, of two classes."""
    image_size: int = 224
    """Side in pixels."""
    backbone: str = "test_resnet"
    """timm model; a tiny one shows what the data take."""
    cache_bytes: int = 2_000_000_000
    """Budget for the outputs of frozen layers."""
    epochs: int = 2
    """Epochs of each trial."""
    out: str | None = None
    """Folder for images, cache and run; images that are there are used again. Default: a new temporary folder."""


def draw(folder: Path, count: int, side: int) -> None:
    """JPEG files of smooth noise, in two classes that differ in brightness."""

    def save(number: int) -> None:
        path = folder / ("dark", "light")[number % 2] / f"{number:06d}.jpg"
        if not path.exists():
            low = np.random.default_rng(number).integers(40, 160, (14, 14)) + 50 * (number % 2)
            Image.fromarray(low.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC).save(path)

    for name in ("dark", "light"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for _ in parallel_map(save, range(count)):
        pass


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of each process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(entry.name)] = (parent, (entry / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def resident(pid: int) -> tuple[float, float]:
    """MiB that a process has allocated, and that it maps from files and shared memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    taken = [int(lines.get(name, "0 kB").split()[0]) / 1024 for name in ("RssAnon", "RssFile", "RssShmem")]
    return taken[0], taken[1] + taken[2]


def below(pid: int, all_of_them: dict[int, tuple[int, str]]) -> list[int]:
    """A process's descendants."""
    children = [child for child, (parent, _) in all_of_them.items() if parent == pid]
    return children + [deeper for child in children for deeper in below(child, all_of_them)]


def bytes_below(folder: Path) -> int:
    """Of the kept outputs of frozen layers; files and folders may go meanwhile."""
    count = 0
    with suppress(FileNotFoundError):
        for file in folder.glob("*/*/*.n*"):
            with suppress(FileNotFoundError):
                count += file.stat().st_size
    return count


def main() -> int:
    """Search, look at the processes four times a second, print the peaks."""
    flags = tyro.cli(Flags)
    out = Path(tempfile.mkdtemp(prefix="memory-") if flags.out is None else flags.out).resolve()
    draw(out / "images", flags.images, flags.image_size)
    parameters = {"learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    parameters |= {"unfreeze_depth": {"type": "int", "low": 0, "high": 5}}
    fixed = {"backbone": flags.backbone, "image_size": flags.image_size, "augmentation": "light"}
    start = [{"unfreeze_depth": depth, "learning_rate": 1e-3} for depth in DEPTHS]
    (out / "space.yaml").write_text(yaml.safe_dump({"parameters": parameters, "fixed": fixed, "start": start}))
    command = [sys.executable, str(ROOT / "tuning/run_search.py"), "--data", str(out / "images")]
    command += ["--space", str(out / "space.yaml"), "--storage", str(out), "--name", f"run-{time.time_ns()}"]
    command += ["--trials", str(len(DEPTHS)), "--epochs", str(flags.epochs), "--no-early-stopping"]
    command += ["--set", "weights=random", f"cache_bytes={flags.cache_bytes}"]
    peaks: dict[str, tuple[float, float]] = {}
    cached = 0.0
    with open(out / "log.txt", "w") as log:
        search = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"FINETUNE_SEARCH_CACHE": str(out / "cache")}
        )
        while search.poll() is None:
            everything = processes()
            names = {search.pid: "driver"} | {
                pid: "trial" for pid in below(search.pid, everything) if "FinetuneTrial" in everything[pid][1]
            }
            for pid, name in names.items():
                peaks[name] = tuple(map(max, peaks.get(name, (0.0, 0.0)), resident(pid)))
            cached = max(cached, bytes_below(out / "cache" / "features") / MIB)
            time.sleep(0.25)
    decoded = sum(file.stat().st_size for file in (out / "cache" / "images").glob("*/*.npy")) / MIB
    print((out / "log.txt").read_text()[-600:])
    print(f"{flags.images} images of {flags.image_size} px, {flags.backbone}, exit status {search.returncode}")
    for name, (own, mapped) in peaks.items():
        print(f"{name:<7} {own:6.0f} MiB of its own at most, {mapped:6.0f} MiB mapped")
    print(f"cache   {cached:6.0f} MiB of frozen layers' outputs at most, {decoded:.0f} MiB of decoded images, on disk")
    return search.returncode


if __name__ == "__main__":
    sys.exit(main())
