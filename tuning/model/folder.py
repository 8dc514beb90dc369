"""The final model's folder: save it, load it, predict with it."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tuning.data.decoding import decode
from tuning.insight.calibration import logarithms, tempered
from tuning.record.tables import replacing
from tuning.settings.conditions import show
from tuning.settings.config import InputError, SearchPlan, TrialConfig, build, check_value
from tuning.settings.documents import check_parts, read_mapping

if TYPE_CHECKING:  # torch and timm take seconds to load, and --help needs neither
    from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
NOT_LOADED = ("model.onnx", "mistakes.html")
AT_ONCE = 256  # images that predict decodes before it classifies them
FITS = {"squash": "squashed to", "crop": "the centre square, at", "letterbox": "in a black square of"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained classifier as `load_model` gives it."""

    network: "nn.Module"
    config: TrialConfig
    classes: tuple[str, ...]
    fit: str = "squash"
    drop_colour: bool = False
    temperature: float = 1.0  # that logits are divided by

    def predict(self, files: str | Path | Sequence[str | Path]) -> NDArray[np.float64]:
        """Probabilities [files, classes] for image files, or for one.

        Raises:
            InputError: the files that can't be read.
        """
        import torch

        from tuning.training.dataset import preparer
        from tuning.training.finetune import predict_images

        decoded, faults = [], []
        for file in [files] if isinstance(files, str | Path) else files:
            try:
                image, _ = decode(str(file), self.config.image_size, fit=self.fit, drop_colour=self.drop_colour)
            except InputError as error:
                faults.append(f"{file}: {error}")
                continue
            decoded.append(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))
        if faults:
            raise InputError(faults)
        prepare = preparer(np.stack(decoded), self.config.backbone, torch.device("cpu"))
        return tempered(predict_images(self.network, prepare, np.arange(len(decoded))), self.temperature)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Classifiers whose probabilities are averaged, as `load_model` gives them."""

    members: "tuple[Model | Ensemble, ...]"
    shares: tuple[float, ...]  # of each member in the average
    classes: tuple[str, ...]
    temperature: float  # that the average's logarithms are divided by

    def predict(self, files: str | Path | Sequence[str | Path]) -> NDArray[np.float64]:
        """Probabilities [files, classes] for image files, or for one.

        Raises:
            InputError: the files that can't be read.
        """
        each = np.stack([member.predict(files) for member in self.members])
        return tempered(logarithms(np.tensordot(self.shares, each, axes=1)), self.temperature)


def save_model(
    folder: Path,
    network: "nn.Module",
    config: TrialConfig,
    classes: Sequence[str],
    *,
    fit: str = "squash",
    drop_colour: bool = False,
    temperature: float = 1.0,
    **described: Any,
) -> None:
    """Write weights and `config.yaml` (configuration, classes, preprocessing, what is `described`) to a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, temporary)
    document = {"config": config.model_dump(), "classes": list(classes), "temperature": temperature}
    document |= {"weights_sha256": _digest(folder)}
    _write_config(folder, document | {"preprocessing": preprocessing(config, fit, drop_colour), **described})


def preprocessing(config: TrialConfig, fit: str, drop_colour: bool) -> dict[str, Any]:
    """How an image becomes the network's input, in words and numbers."""
    from tuning.training import backbones

    mean, std = backbones.input_mean_std(config.backbone)
    return {
        "fit": fit,
        "drop_colour": drop_colour,
        "resize": f"{FITS[fit]} {config.image_size} x {config.image_size} pixels, antialiased (Lanczos)",
        "channels": f"{'grey' if drop_colour else 'RGB; grey is'} repeated three times",
        "scale": "0 to 1",
        "mean": list(mean),
        "std": list(std),
        "layout": "batch, channel, row, column",
    }


def save_ensemble(
    folder: Path, shares: Mapping[str, float], classes: Sequence[str], temperature: float, **described: Any
) -> None:
    """Write the `config.yaml` that makes one model of the model folders in this folder; `shares` by their names."""
    _write_config(folder, {"ensemble": dict(shares), "classes": list(classes), "temperature": temperature, **described})


def _write_config(folder: Path, document: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_model(folder: str | Path) -> Model | Ensemble:
    """The classifier in a model folder.

    Raises:
        InputError: not a model folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tuning.training import backbones

    folder = Path(folder)
    document = _read_config(folder)
    classes, temperature = tuple(document["classes"]), float(document.get("temperature", 1.0))
    shares: dict[str, float] = document.get("ensemble", {})
    if not shares:
        config = build(TrialConfig, document["config"], str(folder / CONFIG))
        told = document["preprocessing"]
        try:
            shaping = {key: check_value(SearchPlan, key, told[key]) for key in ("fit", "drop_colour") if key in told}
        except ValueError as error:
            raise InputError(f"{folder / CONFIG}: preprocessing: {error}") from None
        try:
            if document.get("weights_sha256", digest := _digest(folder)) != digest:
                raise ValueError(f"{WEIGHTS} is damaged, or of another {CONFIG}")
            tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{folder}: not a model folder ({error}); train_final.py writes one") from None
    if shares:
        return Ensemble(
            tuple(load_model(folder / name) for name in shares), tuple(shares.values()), classes, temperature
        )
    try:
        network = backbones.build(
            config.backbone,
            classes=len(classes),
            image_size=config.image_size,
            head_dropout=config.head_dropout,
            seed=config.seed,
            weights=None,
        )
    except InputError as error:
        raise InputError([f"{folder / CONFIG}: {fault}" for fault in error.faults]) from None
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{folder / WEIGHTS}: not the weights of {config.backbone} ({error})") from None
    return Model(network.eval(), config, classes, **shaping, temperature=temperature)


def _digest(folder: Path) -> str:
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    """The checked `config.yaml` of one model or of an ensemble."""
    path = folder / CONFIG
    document = read_mapping(path)
    check_parts(document, path, {"classes": list})
    shares, temperature = document.get("ensemble"), document.get("temperature", 1.0)
    check_parts(document, path, {"config": dict, "preprocessing": dict} if shares is None else {"ensemble": dict})
    names = document["classes"]
    faults = []
    if len(names) < 2 or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
        faults.append("classes must be two names or more, each once")
    if not _is_positive(temperature):
        faults.append(f"temperature must be a number above 0, got {show(temperature)}")
    if shares is not None and not (shares and all(_is_positive(share) for share in shares.values())):
        faults.append("ensemble must hold shares above 0")
    # A folder is loaded of each: none but those in this one.
    outside = [name for name in shares or {} if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name))]
    if outside:
        faults.append(f"ensemble must name folders in it, not {show(outside[0])}")
    if faults:
        raise InputError([f"{path}: is damaged: {fault}; restore it from a copy" for fault in faults])
    return document


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
