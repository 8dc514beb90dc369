"""What the tests share: a tiny labelled folder, one Ray, and the cache and working folder kept out of the user's."""

import gc
import inspect
import os
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SOAK
from hypothesis import HealthCheck, settings
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

# Before Ray, which it tells to listen on the loopback.
from tuning.search.cluster import TOKEN, ray_nodes, restored_environment, start_ray

# isort: split
import ray
from ray.cluster_utils import Cluster

from tuning.settings.config import SearchPlan
from tuning.training.dataset import Data

# A busy machine is no fault. The examples are the same each time, so that what a change breaks can be told from what
# it only finds; the soak run (`make test-soak`) tries others, and SOAK_EXAMPLES times as many.
SOAK_EXAMPLES = 10
settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not SOAK,
    print_blob=True,
    max_examples=100 * (SOAK_EXAMPLES if SOAK else 1),
)
settings.load_profile("tests")


def examples(count: int) -> Callable[..., Callable[..., None]]:
    """A decorator for a property whose examples take long: so many are tried, in the soak run SOAK_EXAMPLES times."""
    return settings(max_examples=count * (SOAK_EXAMPLES if SOAK else 1))


os.environ["RAY_gcs_server_port_wait_time_s"] = "600"  # 30 s are few on a machine that stands still for a while
os.environ["RAY_AUTH_TOKEN"] = TOKEN  # one for all: Ray reads it once in a process
Cluster._wait_for_node.__defaults__ = (600,)
if "wait_for_processes" in inspect.signature(ray.shutdown).parameters:  # else what is left of them warns anywhere later
    ray.shutdown = partial(ray.shutdown, wait_for_processes=True)
ONE_CORE = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}  # for one trial at a time: Ray starts a worker on each core
LARGER = (  # backbones of other families than the tiny ones
    "resnet50",
    "regnety_002",
    "vgg16",
    "densenet121",
    "convnext_tiny",
    "efficientnetv2_rw_t",
    "tf_efficientnetv2_b0",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_rmlp_pico_rw_256",
    "mobilenetv3_large_100",
    "edgenext_xx_small",
    "mobilevit_s",
    "convnextv2_atto",
    "nfnet_l0",
    "mixer_s32_224",
    "cait_xxs24_224",
    "fastvit_t8",
)
CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
on_each_device = pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])


class Operations(TorchDispatchMode):
    """Notes the names of PyTorch's operations: what becomes a kernel on a GPU, and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def shared_ray() -> list[tuple[int, float]]:
    """The nodes of a Ray of this machine that tests share which aren't about starting one."""
    if not ray.is_initialized():
        with restored_environment():  # not for the commands that tests start: they have Rays of their own
            os.environ["RAY_preload_python_modules"] = ""  # torch is loaded by the workers that need it
            start_ray(SearchPlan(name="test"))
    return ray_nodes()


@pytest.fixture
def no_ray() -> None:
    """For tests that start a Ray of their own in this process."""
    ray.shutdown()


@pytest.fixture
def on_shared_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_search.run` in this process uses the shared Ray and starts none."""

    @contextmanager
    def running(plan: SearchPlan) -> Iterator[Callable[[], list[tuple[int, float]]]]:
        shared_ray()
        yield ray_nodes

    monkeypatch.setattr("tuning.search.cluster.ray_running", running)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Each test begins with one thread: `train_final.py` takes all cores, which other tests' processes need."""
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # else each of a trial's collections looks through all that was imported, which takes half a second


def pytest_sessionfinish() -> None:
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images of all tests."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_SEARCH_CACHE"] = str(folder)
    return folder


def draw_folder(folder: Path, *, classes: tuple[str, ...] = ("dark", "light"), count: int = 30, side: int = 40) -> Path:
    """Class folders of noisy grey PNG images that differ in brightness, easily told apart."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            level = 60 + 120 * index / max(len(classes) - 1, 1)
            pixels = rng.normal(level, 40, (side, side)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 30 images each, without splits."""
    return draw_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def s3_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3") / "log.txt"


@pytest.fixture
def requests(s3_log: Path) -> Callable[[], list[str]]:
    """A function that gives the S3 server's requests so far: method and path."""
    return lambda: re.findall(r"[A-Z]+ /\S* HTTP", s3_log.read_text())


@pytest.fixture(scope="session")
def s3(s3_log: Path) -> Iterator[str]:
    """Address of an S3 server on this machine, which the environment names."""
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", "0"]
    with open(s3_log, "w") as log:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    while (serves := re.search(r"Running on (http://127.0.0.1:\d+)", s3_log.read_text())) is None:
        assert server.poll() is None, s3_log.read_text()
        time.sleep(0.1)
    address = serves[1]
    named = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        yield address
    server.terminate()
    server.wait()


def removable(uri: str) -> Path:
    """An empty folder of this machine that can be taken away, and brought back, in one instant."""
    place = Path(uri.removeprefix("file://"))
    place.with_name("there").mkdir()
    place.symlink_to(place.with_name("there"))
    return place


def take_away(place: Path) -> None:
    """Have a file where a removable folder was: nothing can be written there."""
    place.with_name("file").touch()
    os.replace(place.with_name("file"), place)


def bring_back(place: Path) -> None:
    """The folder again, with what it held."""
    place.with_name("link").symlink_to(place.with_name("there"))
    os.replace(place.with_name("link"), place)


@pytest.fixture(params=["file", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place in a storage."""
    if request.param == "file":
        return f"file://{tmp_path}/storage"
    name = f"bucket-{uuid.uuid4().hex}"
    made = urllib.request.Request(f"{request.getfixturevalue('s3')}/{name}", method="PUT")
    urllib.request.urlopen(made).close()
    return f"s3://{name}"


def make_data(count=48, side=32, classes=2):
    """Noisy grey images that differ in brightness by class: two thirds for training, a sixth each for the rest."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = rng.normal(80 + 60 * labels[:, None, None, None], 30, (count, side, side, 1)).clip(0, 255).astype(np.uint8)
    order = np.arange(count)
    third = count // 3
    return Data(
        images, labels, order[third:], order[: third // 2], order[third // 2 : third], tuple("abcdefgh"[:classes])
    )


def losses(epochs):
    """The losses of what `finetune` yields."""
    return [(row["train_loss"], row["train_eval_loss"], row["val_loss"]) for row, _ in epochs]
