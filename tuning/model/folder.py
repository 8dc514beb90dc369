"""The final model's folder: save it, load it, predict with it."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray

from tuning.data.decoding import Pixels, decode
from tuning.data.images import parallel_map
from tuning.model import familiar
from tuning.record.tables import replacing
from tuning.record.temperature import Temperature, logarithms, plain, tempered
from tuning.settings.config import InputError, SearchPlan, TrialConfig, build, check_value
from tuning.settings.documents import check_parts, read_mapping
from tuning.settings.values import Weights
from tuning.settings.words import show

if TYPE_CHECKING:  # torch and timm take seconds to load, and --help needs neither
    from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
Files: TypeAlias = str | Path | Sequence[str | Path]
FITS = {"squash": "squashed to", "crop": "the centre square, at", "letterbox": "in a black square of"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained classifier, from `load_model`."""

    network: "nn.Module"
    config: TrialConfig
    classes: tuple[str, ...]
    fit: str = "squash"
    drop_colour: bool = False
    temperature: Temperature = 1.0  # divides the logits; of several labels, one for each
    multi_label: bool = False  # whether an image may have several of the classes, each of which is predicted by itself
    usual: familiar.Fitted | None = None  # what tells images unlike those that the model was made from

    def predict(self, files: Files, notes: dict[str, str] | None = None) -> NDArray[np.float64]:
        """Return probabilities [files, classes] for one or more image files; arguments and errors as in `look`."""
        return self.look(files, notes)[0]

    def look(
        self, files: Files, notes: dict[str, str] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return probabilities [files, classes], and how unlike the training images each file is [files].

        Above 1 it is more so than 99% of the validation images; None of a model of an older version.

        Args:
            files: one or more image files.
            notes: is given what a user should know of how files were read, by file, such as that one has no window.

        Raises:
            InputError: names every file that can't be read.
        """

        def read(file: str | Path) -> tuple[Pixels, str | None] | InputError:
            try:
                image, facts = decode(str(file), self.config.image_size, fit=self.fit, drop_colour=self.drop_colour)
            except InputError as error:
                return error
            return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2), facts.notes

        named = [files] if isinstance(files, str | Path) else list(files)
        decoded, faults = [], []
        for file, found in zip(named, parallel_map(read, named), strict=True):
            if isinstance(found, InputError):
                faults.append(f"{file}: {found}")
                continue
            decoded.append(found[0])
            if found[1] and notes is not None:
                notes[str(file)] = found[1]
        if faults:
            raise InputError(faults)
        if not decoded:
            return np.empty((0, len(self.classes))), None if self.usual is None else np.empty(0)
        return self.of_images(np.stack(decoded), np.arange(len(decoded)))

    def of_images(
        self, images: NDArray[np.uint8], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return what `look` does of some of the images [n, side, side, channels] that were decoded for this model."""
        from tuning.training.dataset import preparer

        prepare = preparer(images, self.network, next(self.network.parameters()).device)
        logits, unlike = familiar.predicted(self.network, prepare, rows, self.usual)
        return tempered(logits, self.temperature, multi_label=self.multi_label), unlike


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Classifiers whose probabilities are averaged, from `load_model`."""

    members: "tuple[Model | Ensemble, ...]"
    shares: tuple[float, ...]  # each member's weight in the average
    classes: tuple[str, ...]
    temperature: Temperature  # divides the logarithms of the average, of several labels those of its odds
    multi_label: bool = False

    def predict(self, files: Files, notes: dict[str, str] | None = None) -> NDArray[np.float64]:
        """Return probabilities [files, classes], as `Model.predict` does."""
        return self.look(files, notes)[0]

    def look(
        self, files: Files, notes: dict[str, str] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return what `Model.look` does; how unlike images are is by the first member that knows."""
        return self.combined([member.look(files, notes) for member in self.members])

    def combined(
        self, each: Sequence[tuple[NDArray[np.float64], NDArray[np.float64] | None]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return the ensemble's answer, given those of its members, see `Model.look`."""
        unlike = next((of_member for _, of_member in each if of_member is not None), None)
        mean = np.tensordot(self.shares, np.stack([probabilities for probabilities, _ in each]), axes=1)
        logs = logarithms(mean, multi_label=self.multi_label)
        return tempered(logs, self.temperature, multi_label=self.multi_label), unlike


def save_model(
    folder: Path,
    network: "nn.Module",
    config: TrialConfig,
    classes: Sequence[str],
    *,
    fit: str = "squash",
    drop_colour: bool = False,
    temperature: Temperature = 1.0,
    multi_label: bool = False,
    **described: Any,
) -> None:
    """Write weights and `config.yaml` (configuration, classes, preprocessing and `described`) to a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, temporary)
    document = {"config": config.model_dump(), **_outputs(classes, temperature, multi_label)}
    document |= {"weights_sha256": _digest(folder), "preprocessing": preprocessing(network, config, fit, drop_colour)}
    _write_config(folder, document | described)


def preprocessing(network: "nn.Module", config: TrialConfig, fit: str, drop_colour: bool) -> dict[str, Any]:
    """Return how an image becomes the network's input, in words and numbers."""
    from tuning.training import backbones

    mean, std = backbones.input_mean_std(network)
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
    folder: Path,
    shares: Mapping[str, float],
    classes: Sequence[str],
    temperature: Temperature,
    *,
    multi_label: bool = False,
    **described: Any,
) -> None:
    """Write the `config.yaml` that makes an ensemble of model folders in this folder; `shares` are by their names."""
    _write_config(folder, {"ensemble": dict(shares), **_outputs(classes, temperature, multi_label), **described})


def _outputs(classes: Sequence[str], temperature: Temperature, multi_label: bool) -> dict[str, Any]:
    """Return what `config.yaml` says of the outputs."""
    several = {"multi_label": True} if multi_label else {}
    return {"classes": list(classes), **several, "temperature": plain(temperature)}


def _write_config(folder: Path, document: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_model(folder: str | Path, device: str = "cpu") -> Model | Ensemble:
    """Load the classifier from a model folder.

    Args:
        device: `cpu`, `cuda`, `mps` or `auto` (a GPU if there is one).

    Raises:
        InputError: the folder holds no model, or a damaged one, or there is no such device.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tuning.training.device import chosen

    folder = Path(folder)
    document = _read_config(folder)
    classes, given = tuple(document["classes"]), document.get("temperature", 1.0)
    temperature = np.array(given, dtype=np.float64) if isinstance(given, list) else float(given)
    several = document.get("multi_label", False)
    if shares := document.get("ensemble"):
        members = tuple(load_model(folder / name, device) for name in shares)
        return Ensemble(members, tuple(shares.values()), classes, temperature, several)
    config = build(TrialConfig, document["config"], str(folder / CONFIG))
    shaped = document["preprocessing"]
    try:
        shaping = {key: check_value(SearchPlan, key, shaped[key]) for key in ("fit", "drop_colour") if key in shaped}
        normal = {key: check_value(Weights, key, shaped[key]) for key in ("mean", "std") if key in shaped}
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: preprocessing: {error}") from None
    try:
        if document.get("weights_sha256", digest := _digest(folder)) != digest:
            raise ValueError(f"{WEIGHTS} is damaged or belongs to another {CONFIG}")
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder}: not a model folder ({error}); train_final.py writes one") from None
    try:
        network = build_network(config, len(classes))
    except InputError as error:
        raise InputError([f"{folder / CONFIG}: {fault}" for fault in error.faults]) from None
    network.pretrained_cfg |= normal  # type: ignore[operator]
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{folder / WEIGHTS}: not the weights of {config.backbone} ({error})") from None
    outputs: dict[str, Any] = {"temperature": temperature, "multi_label": several, "usual": familiar.read(folder)}
    return Model(network.eval().to(chosen(device)), config, classes, **shaping, **outputs)


def build_network(config: TrialConfig, classes: int, weights: Weights | None = None) -> "nn.Module":
    """Build a trial's network before training; its backbone has random weights unless a file is given."""
    from tuning.training import backbones

    return backbones.build(
        config.backbone,
        classes=classes,
        image_size=config.image_size,
        head_dropout=config.head_dropout,
        seed=config.seed,
        weights=weights,
    )


def _digest(folder: Path) -> str:
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    """Read and check the `config.yaml` of one model or of an ensemble."""
    path = folder / CONFIG
    document = read_mapping(path)
    check_parts(document, path, {"classes": list})
    names, shares, temperature = document["classes"], document.get("ensemble"), document.get("temperature", 1.0)
    check_parts(document, path, {"config": dict, "preprocessing": dict} if shares is None else {"ensemble": dict})
    # Each name of an ensemble is loaded as a folder, which must lie in this one.
    outside = [name for name in shares or {} if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name))]
    several = document.get("multi_label", False)
    least = 1 if several is True else 2
    each = temperature if several is True and isinstance(temperature, list) else [temperature] * len(names)
    rules = {
        f"classes must be at least {'one name' if several is True else 'two different names'}": all(
            isinstance(name, str) for name in names
        )
        and len(set(names)) == len(names) >= least,
        f"multi_label must be true or false, got {show(several)}": isinstance(several, bool),
        f"temperature must be a number above 0, got {show(temperature)}": len(each) == len(names)
        and all(map(_is_positive, each)),
        "ensemble must hold shares above 0": shares is None or (shares and all(map(_is_positive, shares.values()))),
        f"ensemble must name subfolders of the model folder, got {show(next(iter(outside), None))}": not outside,
    }
    faults = [f"{path}: is damaged: {rule}; restore it from a copy" for rule, holds in rules.items() if not holds]
    if faults:
        raise InputError(faults)
    return document


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
