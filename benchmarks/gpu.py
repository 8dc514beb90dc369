"""Whether this product is right and fast on a GPU, in minutes: `make gpu`.

Parts run one after another, each in a process of its own with a limit. Each prints PASS, FAIL or SKIP with its figures,
which are appended to OUT/gpu.jsonl at once, so that a broken path is known after two minutes. Weights are random
and images are generated: nothing is downloaded. Parts 0 to 6 need no Ray. Without a GPU every part says why it is
skipped; `--rehearse` runs all of them on the CPU at toy size, which shows that they run, and no more.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tuning.data.phantoms import write_phantoms
from tuning.record.journal import best_epoch
from tuning.search.checkpoints import save
from tuning.settings.config import TrialConfig
from tuning.training import backbones, device
from tuning.training.checking import package_environment
from tuning.training.dataset import Data, placed, preparer
from tuning.training.distributed import finetune_on_all
from tuning.training.features import HeldOutputs
from tuning.training.finetune import finetune, out_of_memory
from tuning.training.models import Models
from tuning.training.prefix import split
from tuning.training.scores import calibrated_loss, predict_images
from tuning.training.state import Averaged, State

ROOT = Path(__file__).resolve().parent.parent
BACKBONES = ("resnet18", "vgg16", "densenet121", "convnext_tiny", "tf_efficientnet_lite0")
MOST_SYNCS = 3.0  # a training step
LEAST_SPEED = 0.5  # of a bare loop's images a second
NEAR = 1e-3  # between probabilities of the search and of the deployed model
Figures = dict[str, Any]


class Skip(Exception):
    """A part that can't be run here, and why."""


@dataclasses.dataclass
class Bench:
    """What the parts work on."""

    rehearse: bool
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def place(self) -> torch.device:
        return torch.device("cpu") if self.rehearse else device.accelerator()

    @property
    def backbones(self) -> tuple[str, ...]:
        return ("test_resnet",) if self.rehearse else BACKBONES

    @property
    def whole(self) -> str:
        """What `--gpus-per-trial` is for trials that share none."""
        return "0" if self.rehearse else "1"

    @property
    def side(self) -> int:
        return 32 if self.rehearse else 224

    def check(self, right: bool, fault: str) -> None:
        """Note a fault unless all is right."""
        if not right:
            self.faults.append(fault)

    def data(self, count: int) -> Data:
        """Noisy images whose brightness differs by class: two thirds for training, a third for validation."""
        count = 48 if self.rehearse else count
        rng, labels = np.random.default_rng(0), np.arange(count) % 2
        images = rng.integers(0, 120, (count, self.side, self.side, 1), dtype=np.uint8)
        images += (60 * labels[:, None, None, None]).astype(np.uint8)
        train, val = np.arange(count)[count // 3 :], np.arange(count)[: count // 3]
        return Data(placed(images, self.place), labels, train, val, val[:0], ("dark", "light"))

    def config(self, backbone: str, **values: Any) -> TrialConfig:
        given = {"backbone": backbone, "unfreeze_depth": 5, "image_size": self.side, "epochs": 3}
        given |= {"batch_size": 8 if self.rehearse else 32, "learning_rate": 3e-4}
        return TrialConfig(**given | values)

    def synchronize(self) -> None:
        if self.place.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], times: int = 3) -> float:
        """The median time of a call, after one to warm up."""
        found = []
        for _ in range(times + 1):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])


# ---- the parts ------------------------------------------------------------------------------------------------------


def facts(bench: Bench) -> Figures:
    """The device, its precision, its context's memory, and copies."""
    found: Figures = {"torch": torch.__version__, "python": sys.version.split()[0], "device": str(bench.place)}
    device.exercise(bench.place)
    if bench.place.type == "cuda":
        properties, capability = torch.cuda.get_device_properties(0), torch.cuda.get_device_capability(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"name": properties.name, "cuda": torch.version.cuda, "capability": capability}
        found |= {"total_gib": round(total / 2**30, 1), "in_use_mib": round((total - free) / 2**20)}
        found |= {"precision": str(device.mixed_precision(bench.place)), "compiled_for": torch.cuda.get_arch_list()}
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,compute_mode", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    block = torch.empty(2**20 if bench.rehearse else 2**28, dtype=torch.uint8)
    for name, source in (("pageable", block), ("pinned", block if bench.rehearse else block.pin_memory())):
        copy = bench.seconds(lambda source=source: source.to(bench.place, non_blocking=True, copy=True))
        found[f"copy_{name}_gb_s"] = round(block.nbytes / copy / 1e9, 2)
    return found


def path(bench: Bench) -> Figures:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        raise Skip("pytest and hypothesis are not installed")
    if importlib.util.find_spec("ray") is None:
        raise Skip("the tests import Ray, which is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=package_environment())
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    bench.check(done.returncode == 0, last)
    return {"pytest": last}


def mix(bench: Bench) -> Figures:
    """Waits for the device in a training step, of every backbone at three depths."""
    found: Figures = {}
    data = bench.data(240)
    for backbone in bench.backbones:
        for depth in (0, 2, 5):
            plan = bench.config(backbone, unfreeze_depth=depth, epochs=2, augmentation="light")
            epochs = finetune(plan, data, device=bench.place, weights=None, features=HeldOutputs(bench.place))
            next(epochs)
            places: Counter[str] = Counter()
            with waits(places, bench.place):
                row, _ = next(epochs)
            syncs = sum(places.values()) / (row["images"] / row["batch_size"])
            found[f"{backbone} {depth}"] = round(syncs, 2)
            worst = ", ".join(f"{name} {times}" for name, times in places.most_common(3))
            bench.check(syncs <= MOST_SYNCS, f"{backbone}, depth {depth}: {syncs:.1f} waits a step ({worst})")
    return {"waits_a_step": found}


@contextmanager
def waits(places: Counter[str], place: torch.device) -> Iterator[None]:
    """Count where the host waits for CUDA."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if place.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        yield
        if place.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    places.update(f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))


def numbers(bench: Bench) -> Figures:
    """Losses against a CPU's, what is evaluated against what is deployed, a resumed trial against a straight one."""
    found: Figures = {}
    for backbone in bench.backbones[:1] + bench.backbones[-1:]:
        plan = bench.config(backbone, image_size=min(bench.side, 64), augmentation="none", batch_norm="frozen")
        data = bench.data(240)
        images = in_memory(data).images[:, : plan.image_size, : plan.image_size]
        data = dataclasses.replace(data, images=images)
        here = trained(plan, data, bench.place)
        reference = trained(plan, data, torch.device("cpu"))
        apart = max(abs(a["val_loss"] / b["val_loss"] - 1) for (a, _), (b, _) in zip(here, reference, strict=True))
        bench.check(apart <= 0.05, f"{backbone}: val_loss is {apart:.1%} from the CPU's")

        state = here[-1][1]
        models = Models()
        shape = {"classes": 2, "image_size": plan.image_size, "seed": plan.seed, "weights": None}
        network = models.get(backbone, **shape, device=bench.place)
        best = {name[5:]: tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
        network.begin(5, batch_norm="frozen", head_dropout=0.0)
        network.model.load_state_dict(best, strict=False)
        logits = predict_images(network.model, preparer(images, network.model, bench.place), data.val)
        kept = state.tensors["validation/logits"].double()
        difference = float((kept.softmax(1) - torch.from_numpy(logits).double().softmax(1)).abs().max())
        bench.check(difference <= NEAR, f"{backbone}: a deployed probability is {difference:.4f} from the search's")

        resumed = trained(plan, data, bench.place, state=here[0][1])
        again = abs(resumed[-1][0]["val_loss"] - here[-1][0]["val_loss"])
        bench.check(again <= 0.02, f"{backbone}: a resumed trial's val_loss is {again:.4f} from a straight one's")
        spread = abs(trained(plan, data, bench.place)[-1][0]["val_loss"] - here[-1][0]["val_loss"])
        found[backbone] = {"from_cpu": apart, "deployed": difference, "resumed": again, "two_runs": spread}
    return found


def same(bench: Bench) -> Figures:
    """With `deterministic=true`, two trainings of one seed."""
    if bench.place.type != "cpu":
        device.prepare_gpu(deterministic=True)
    found: Figures = {}
    for backbone in bench.backbones[:2]:
        plan = bench.config(backbone, epochs=2, augmentation="medium")
        found[backbone] = [trained(plan, bench.data(120), bench.place)[-1][0]["val_loss"] for _ in range(2)]
        bench.check(found[backbone][0] == found[backbone][1], f"{backbone}: {found[backbone]}")
    return found


def trained(
    plan: TrialConfig, data: Data, place: torch.device, state: State | None = None
) -> list[tuple[dict[str, Any], State]]:
    """Each epoch's row with a snapshot."""
    return [(row, take()) for row, take in finetune(plan, data, device=place, weights=None, state=state)]


def memory(bench: Bench) -> Figures:
    """The most memory of each backbone, and what a full GPU does to a trial."""
    peaks, data = {}, bench.data(120)
    for backbone in bench.backbones:
        rows = [row for row, _ in finetune(bench.config(backbone, epochs=1), data, device=bench.place, weights=None)]
        peaks[backbone] = rows[0]["peak_memory_mb"]
    found: Figures = {"peak_mib": peaks}
    if bench.place.type != "cuda":
        return found
    for left_mib in (int(peaks["resnet18"] * 0.75), int(peaks["resnet18"] * 0.4)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        full = torch.empty(torch.cuda.mem_get_info()[0] - left_mib * 2**20, dtype=torch.uint8, device=bench.place)
        plan, ended = bench.config("resnet18", epochs=1), ""
        try:
            row, _ = next(finetune(plan, data, device=bench.place, weights=None))
            ended = f"micro_batch {row['micro_batch']}"
        except Exception as error:
            ended = "out of memory" if out_of_memory(error) else repr(error)
            bench.check(out_of_memory(error), f"{left_mib} MiB left: {error!r}")
        del full
        torch.cuda.empty_cache()
        kept = (torch.cuda.memory_reserved() - before) / 2**20
        bench.check(kept < 200, f"{left_mib} MiB left: {kept:.0f} MiB are still reserved afterwards")
        found[f"{left_mib} MiB left"] = ended
    return found


def speed(bench: Bench) -> Figures:
    """Images a second of training, beside a bare loop over random tensors in the GPU's memory."""
    found, data = {}, bench.data(3072)
    for backbone in bench.backbones:
        plan = bench.config(backbone, epochs=3, augmentation="light")
        rows = [row for row, _ in finetune(plan, data, device=bench.place, weights=None)]
        product = rows[-1]["images"] / rows[-1]["train_seconds"]
        bare = bare_speed(bench, plan, min(rows[-1]["images"] // plan.batch_size, 40))
        found[backbone] = {"product": round(product), "bare": round(bare), "ratio": round(product / bare, 2)}
        found[backbone]["evaluate_share"] = round(rows[-1]["evaluate_seconds"] / rows[-1]["seconds"], 2)
        rows = [row for row, _ in finetune(plan, in_memory(data), device=bench.place, weights=None)]
        found[backbone]["read_ahead"] = round(
            rows[-1]["images"] / (rows[-1]["train_seconds"] + rows[-1]["data_seconds"])
        )
        slow = f"{backbone}: {product:.0f} images/s, {product / bare:.0%} of a bare loop's"
        bench.check(bench.rehearse or product >= LEAST_SPEED * bare, slow)
    return found


def in_memory(data: Data) -> Data:
    """The same images, not on the GPU."""
    return dataclasses.replace(data, images=np.asarray(torch.as_tensor(data.images).cpu()))


def bare_speed(bench: Bench, plan: TrialConfig, steps: int) -> float:
    model = backbones.build(
        plan.backbone, classes=2, image_size=plan.image_size, head_dropout=0.0, seed=0, weights=None
    ).to(bench.place, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    half, side = device.mixed_precision(bench.place), plan.image_size
    images = torch.rand(plan.batch_size, 3, side, side, device=bench.place)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(plan.batch_size, dtype=torch.long, device=bench.place)

    def some_steps() -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(bench.place.type, dtype=half, enabled=half is not None):
                loss = functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()

    return steps * plan.batch_size / bench.seconds(some_steps)


def graphs(bench: Bench) -> Figures:
    """CUDA graphs of the training step: images a second and losses, with them and without."""
    found: Figures = {}
    for backbone in bench.backbones:
        plan, data = bench.config(backbone, epochs=3, augmentation="light"), bench.data(2048)
        said, rows = io.StringIO(), {}
        for name in ("with", "without"):
            given: Figures = {"device": bench.place, "weights": None, "graphs": name == "with"}
            with redirect_stderr(said):
                rows[name] = [row for row, _ in finetune(plan, data, **given)][-1]
        speeds = {name: round(row["images"] / row["train_seconds"]) for name, row in rows.items()}
        apart = abs(rows["with"]["val_loss"] / rows["without"]["val_loss"] - 1)
        found[backbone] = speeds | {"val_loss_apart": apart}
        bench.check(bench.rehearse or not said.getvalue(), f"{backbone}: {said.getvalue().strip()}")
        bench.check(apart <= 0.05, f"{backbone}: val_loss is {apart:.1%} from that without graphs")
    return found


def several(bench: Bench) -> Figures:
    """The final training on all GPUs of the machine: its losses, and an epoch's seconds beside one GPU's."""
    devices = [bench.place] * 2 if bench.rehearse else device.all_gpus(bench.place)
    if len(devices) == 1:
        raise Skip("there is one GPU")
    found: Figures = {"devices": len(devices)}
    for backbone in bench.backbones[:2]:
        plan = bench.config(backbone, epochs=5, batch_size=16 * len(devices), augmentation="light", batch_norm="frozen")
        how: Figures = {"weights": None, "metric": "val_loss", "features": HeldOutputs(bench.place)}
        data = in_memory(bench.data(3072))
        how |= {"least_seconds": 0.0, "least_gain": 0.0}
        rows = [row for row, _ in finetune_on_all(devices, plan, data, **how)]
        alone = [row for row, _ in finetune(plan, data, device=bench.place, weights=None)]
        bench.check(len(rows) == len(alone), f"{backbone}: training on all GPUs failed")
        apart = abs(rows[-1]["val_loss"] / alone[-1]["val_loss"] - 1)
        bench.check(apart <= 0.1, f"{backbone}: val_loss is {apart:.1%} from one GPU's")
        found[backbone] = {"seconds": rows[-1]["seconds"], "on_one": alone[-1]["seconds"], "val_loss_apart": apart}
    return found


def costs(bench: Bench) -> Figures:
    """Seconds and sizes of what isn't training."""
    found: Figures = {backbone: costs_of(bench, backbone) for backbone in bench.backbones[:2]}
    logits = np.random.default_rng(0).normal(size=(225, 2)).astype(np.float32)
    found["calibrated_loss_s"] = round(bench.seconds(lambda: calibrated_loss(logits, np.arange(225) % 2)), 4)
    return found


def costs_of(bench: Bench, backbone: str) -> Figures:
    plan, models = bench.config(backbone, epochs=1), Models()
    given: dict[str, Any] = {"device": bench.place, "weights": None, "models": models, "early_loss_epochs": (1, 2)}
    row, take = next(finetune(plan, bench.data(120), **given))
    network = next(iter(models._networks.values()))
    state = take()
    best = best_epoch(state.history, "val_loss")
    averaged = Averaged(network.model, list(network.model.state_dict()), 10)

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), "t0", state, best, plan.model_dump(), ended=False)

    def in_place() -> None:
        with averaged.in_place():
            pass

    return {
        "state_mb": round(sum(tensor.nbytes for tensor in state.tensors.values()) / 1e6, 1),
        "snapshot_s": round(bench.seconds(take, 1), 3),
        "only_best_s": round(bench.seconds(lambda: take(only_best=True), 1), 3),
        "write_s": round(bench.seconds(write, 1), 3),
        "average_s": round(bench.seconds(averaged.update), 5),
        "in_place_s": round(bench.seconds(in_place), 4),
        "cut_s": round(bench.seconds(lambda: split(network.model, network.stages, 2, plan.image_size), 1), 3),
        "latency_ms": round(row["latency_ms"], 2),
    }


def packing(bench: Bench) -> Figures:
    """Whole searches with one, two and four trials on a GPU, and what `train_final.py` makes of one."""
    needs_ray()
    found: Figures = {}
    shares = ("0",) if bench.rehearse else ("1", "0.5", "0.25", "auto")
    with tempfile.TemporaryDirectory() as place:
        write_space(bench, Path(place))
        for share in shares:
            began = time.perf_counter()
            trials = "4" if bench.rehearse else "12"
            given = ("--trials", trials, "--epochs", "2", "--gpus-per-trial", share)
            last = run(place, *search(f"share-{share}", *given))
            seconds = time.perf_counter() - began
            bench.check(last is None, f"--gpus-per-trial {share}: {last}")
            if last is None:
                ended = ends(Path(place) / "results" / f"share-{share}")
                bench.check(set(ended) == {"completed"}, f"--gpus-per-trial {share}: {dict(ended)}")
                found[f"share {share}"] = {"seconds": round(seconds, 1), "ended": dict(ended)}
        one = f"results/share-{shares[0]}"
        for settings in ([], ["--set", "ensemble=true"]):
            last = run(place, "tuning/train_final.py", one, *settings)
            bench.check(last is None, f"train_final.py {' '.join(settings)}: {last}")
            shutil.rmtree(Path(place) / one / "model", ignore_errors=True)
    return found


def killed(bench: Bench) -> Figures:
    """Kill the worker of a trial, whose trial another one goes on with."""
    needs_ray()
    with tempfile.TemporaryDirectory() as place:
        write_space(bench, Path(place))
        given = search("killed", "--trials", "1", "--epochs", "30", "--gpus-per-trial", bench.whole)
        command = [sys.executable, str(ROOT / given[0]), *given[1:]]
        with (
            open(Path(place) / "said", "w+") as said,
            subprocess.Popen(command, cwd=place, env=package_environment(), stdout=said, stderr=said) as driver,
        ):
            journal, begun = Path(place) / "results" / "killed" / "journal.jsonl", False
            while driver.poll() is None and not begun:
                time.sleep(0.2)
                begun = journal.exists() and '"event": "epoch"' in journal.read_text()
            workers = worker_ids(driver.pid)
            for worker in workers:  # of which one has the only trial
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            driver.wait()
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no output"])[-1]
        bench.check(driver.returncode == 0, last)
        bench.check(bool(workers), "no worker was found")
        events = Counter(json.loads(line)["event"] for line in journal.read_text().splitlines())
        found = {"events": dict(events), "ended": dict(ends(journal.parent))}
    bench.check(events["lost"] >= 1, "no trial has lost its worker")
    bench.check(found["ended"] == {"completed": 1}, f"ended: {found['ended']}")
    return found


def worker_ids(driver: int) -> list[int]:
    """Ids of the processes of trials below a driver."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::FinetuneTrial"):
                parents = [int(folder.name)]
                while parents[-1] > 1:
                    parents.append(int(Path(f"/proc/{parents[-1]}/stat").read_text().rsplit(")")[-1].split()[1]))
                found += [parents[0]] if driver in parents else []
    return sorted(found)


def recipe(bench: Bench) -> Figures:
    """The same configurations by Ray Tune's documented recipe (`recipe.py`) and by the product, in seconds."""
    needs_ray()
    with tempfile.TemporaryDirectory() as place:
        films = write_phantoms(Path(place) / "films", images_per_class=16 if bench.rehearse else 200, side=bench.side)
        chosen = [{"backbone": name, "unfreeze_depth": depth} for name in bench.backbones[:2] for depth in (5, 2)]
        common = {"augmentation": "light", "epochs": 1 if bench.rehearse else 3}
        trials = [bench.config(**config, **common).model_dump() for config in chosen]
        task = {"data": str(films), "slots": 1, "trials": trials, "weights": "random"}
        (Path(place) / "task.json").write_text(json.dumps(task))
        began = time.perf_counter()
        last = run(place, "benchmarks/recipe.py", str(Path(place) / "task.json"))
        seconds = {"recipe": time.perf_counter() - began}
        bench.check(last is None, f"recipe.py: {last}")

        choices = {name: sorted({config[name] for config in chosen}) for name in chosen[0]}
        parameters = {name: {"type": "categorical", "choices": values} for name, values in choices.items()}
        fixed = {name: trials[0][name] for name in ("augmentation", "image_size", "batch_size", "learning_rate")}
        space = {"parameters": parameters, "fixed": fixed, "start": chosen}
        (Path(place) / "space.yaml").write_text(json.dumps(space))
        given = ("--data", str(films), "--trials", str(len(chosen)), "--epochs", str(common["epochs"]))
        began = time.perf_counter()
        last = run(place, *search("product", *given, "--gpus-per-trial", bench.whole))
        seconds["product"] = time.perf_counter() - began
        bench.check(last is None, f"run_search.py: {last}")
    ratio = seconds["recipe"] / seconds["product"]
    return {name: round(value, 2) for name, value in (seconds | {"ratio": ratio}).items()}


def ends(folder: Path) -> Counter[str]:
    """How the trials of a run ended."""
    from tuning.record.tables import read_table

    return Counter(read_table(folder / "trials.parquet")["status"])


def needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise Skip("Ray is not installed")


def write_space(bench: Bench, place: Path) -> None:
    """Write `space.yaml` of one network and a learning rate to search."""
    fixed = {"backbone": bench.backbones[0], "unfreeze_depth": 5, "image_size": bench.side}
    fixed |= {"batch_size": 8 if bench.rehearse else 32}
    rates = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
    (place / "space.yaml").write_text(json.dumps({"parameters": {"learning_rate": rates}, "fixed": fixed}))


def search(name: str, *given: str) -> list[str]:
    """The command of a search in `space.yaml` that stops nothing."""
    settings = ["weights=random", "early_stopping=false", "on_leak=warn"]
    return ["tuning/run_search.py", "--space", "space.yaml", "--name", name, *given, "--set", *settings]


def run(place: str, script: str, *arguments: str) -> str | None:
    """Run one of the project's scripts; the last line that it printed if it failed."""
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=package_environment())
    lines = (done.stdout + done.stderr).strip().splitlines()
    return None if done.returncode == 0 else (lines or ["no output"])[-1]


# ---- all of them ----------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Bench], Figures], float]] = {  # with their limits in seconds
    "facts": (facts, 40.0),
    "path": (path, 60.0),
    "mix": (mix, 60.0),
    "numbers": (numbers, 60.0),
    "same": (same, 40.0),
    "memory": (memory, 60.0),
    "speed": (speed, 100.0),
    "graphs": (graphs, 90.0),
    "several": (several, 90.0),
    "costs": (costs, 40.0),
    "packing": (packing, 240.0),
    "killed": (killed, 60.0),
    "recipe": (recipe, 90.0),
}


def main() -> int:
    """Run the parts; return 1 if one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts (default: 8)")
    parser.add_argument("--out", default="build/gpu", help="folder of the results (default: build/gpu)")
    parser.add_argument("--rehearse", action="store_true", help="run all parts on the CPU at toy size")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return inside(given.parts[0], Bench(given.rehearse), Path(given.out))
    out, until, failed = Path(given.out), time.monotonic() + 60 * given.minutes, False
    out.mkdir(parents=True, exist_ok=True)
    for name in given.parts:
        found = apart(name, given.rehearse, until - time.monotonic())
        with open(out / "gpu.jsonl", "a") as file:
            file.write(json.dumps({"part": name, "time": time.time(), **found}) + "\n")
        failed = failed or found["status"] == "FAIL"
        said = "; ".join(found["faults"]) or json.dumps(found["figures"])
        print(f"{found['status']} {name} ({found['seconds']:.0f} s): {said}", flush=True)
        if found["faults"] and found["figures"]:
            print(f"     {json.dumps(found['figures'])}", flush=True)
    return int(failed)


def apart(name: str, rehearse: bool, left: float) -> dict[str, Any]:
    """Run a part in a process of its own; its status, faults, figures and seconds."""
    began, limit = time.monotonic(), min(PARTS[name][1], left)
    found: dict[str, Any] = {"status": "SKIP", "faults": ["no time is left"], "figures": {}, "seconds": 0.0}
    if left < PARTS[name][1]:
        return found | {"faults": [f"less than {PARTS[name][1]:.0f} s are left"]}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--inside", "--parts", name, "--out", folder]
        command += ["--rehearse"] if rehearse else []
        with open(Path(folder) / "said", "w+") as said:
            options: dict[str, Any] = {"stdout": said, "stderr": said, "start_new_session": True}
            with subprocess.Popen(command, env=package_environment(), **options) as process:
                try:
                    process.wait(limit)
                except subprocess.TimeoutExpired:  # with all that it has started, which would slow the next part
                    os.killpg(process.pid, signal.SIGKILL)
                    said.write(f"\nnot done after {limit:.0f} s")
            said.seek(0)
            last = (said.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        result = Path(folder) / "result.json"
        found |= json.loads(result.read_text()) if result.exists() else {"status": "FAIL", "faults": [last]}
    return found | {"seconds": time.monotonic() - began}


def inside(name: str, bench: Bench, out: Path) -> int:
    """Run a part in this process; its result is left in `out`."""
    found: dict[str, Any] = {"status": "PASS", "faults": [], "figures": {}}
    try:
        if not bench.rehearse and (wrong := device.gpus()[0][1]) is not None:
            raise Skip(f"no GPU can be used: {wrong}")
        found["figures"] = PARTS[name][0](bench)
        if bench.faults:
            found |= {"status": "FAIL", "faults": bench.faults}
    except Skip as why:
        found |= {"status": "SKIP", "faults": [str(why)]}
    except Exception as error:
        found |= {"status": "FAIL", "faults": [*bench.faults, f"{type(error).__name__}: {error}"]}
    (out / "result.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
