"""What the tests share: a tiny labelled folder, and the cache and working folder kept out of the user's."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import tuning.cluster  # noqa: F401 (before Ray, which it tells to listen on the loopback)
from tuning.data import Data

torch.set_num_threads(1)
settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault
settings.load_profile("no deadline")
ONE_CORE = {"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}  # for one trial at a time: Ray starts a worker on each core
CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
on_each_device = pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with open(s3_log, "w") as log:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    named = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        for _ in range(600):
            try:
                urllib.request.urlopen(address).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield address
    server.terminate()
    server.wait()


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
