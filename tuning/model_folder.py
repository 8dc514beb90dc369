"""The final model's folder: save it, load it, predict with it."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import csv
import dataclasses
import glob
import hashlib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
import yaml
from numpy.typing import NDArray

from tuning.calibration import logarithms, tempered
from tuning.conditions import show
from tuning.config import FORMATS, InputError, SearchPlan, TrialConfig, build, check_value, visible
from tuning.decoding import decode
from tuning.documents import check_parts, read_mapping
from tuning.mirror import borrowed
from tuning.storage import files_below, is_uri, joined, stored
from tuning.tables import replacing

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

        from tuning.data import preparer
        from tuning.finetune import predict_images

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
    from tuning import backbones

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

    from tuning import backbones

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


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images: a row each, with the class and every class's probability.

    Images that can't be read are told and have no row; the exit code is then 2.

    Example: python tuning/model_folder.py predict results/xray/model films/ "more/*.png" --out predictions.csv
    """

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, or its URI."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders of them, URIs of these, or globs in quotes (** for folders in folders)."""
    out: str | None = None
    """Where to write, .csv or .parquet. Default: CSV to the standard output."""


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = [_not_a_flag(word) for word in sys.argv[1:]]
    flags = tyro.extras.subcommand_cli_from_dict({"predict": Predict}, args=arguments)
    try:
        faults = run(flags)
    except InputError as error:
        faults = error.faults
    for fault in faults:
        print(f"error: {visible(fault)}", file=sys.stderr)
    return 2 if faults else 0


def _not_a_flag(word: str) -> str:
    """A file whose name begins with a dash, as the shell's * gives it, in a way that is no flag."""
    return f"./{word}" if word.startswith("-") and os.path.lexists(word) else word


def run(flags: Predict) -> list[str]:
    """Classify the images and write the table; returns what is wrong with those that have no row.

    Raises:
        InputError: nothing can be classified, or written.
    """
    if flags.out is not None and Path(flags.out).suffix not in (".csv", ".parquet"):
        raise InputError(f"--out: must end in .csv or .parquet, got {flags.out}")
    try:
        files, faults = named_images(flags.images)
    except OSError as error:
        raise InputError(f"predict: {error}; is the storage reached, and are its keys given?") from None
    if not files:
        raise InputError(faults or ["predict: give at least one image file"])
    with borrowed(flags.model, without=NOT_LOADED) as folder:
        model = load_model(folder)
    known: list[str] = []
    rows: list[NDArray[np.float64]] = []
    for start in range(0, len(files), AT_ONCE):
        part = files[start : start + AT_ONCE]
        found, unreadable = _predict_readable(model, part)
        known += [file for file, row in zip(part, found, strict=True) if row is not None]
        rows += [row for row in found if row is not None]
        faults += unreadable
    if rows or flags.out is None:
        _write_table(flags.out, known, model.classes, np.array(rows).reshape(len(rows), len(model.classes)))
    return faults


def named_images(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Image files that files, folders and globs stand for, in order, and what is wrong with the rest.

    In folders, images are what has the suffix of one; hidden files and folders are left out.
    """
    files, faults = [], []
    for word in words:
        if is_uri(word):
            there, found = [], _stored(word)
            what = "neither an image nor a folder of images"
        else:
            there = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
            found = [
                str(Path(file)) for place in there for file in (_below(place) if os.path.isdir(place) else [place])
            ]
            what = "no images in this folder" if there else "no such file or folder, and no file matches it as a glob"
        if not found:
            faults.append(f"{word}: {what}; give image files, folders or globs")
        files += found
    return list(dict.fromkeys(files)), faults


def _stored(uri: str) -> list[str]:
    if stored([uri]) != [None]:
        return [uri]
    images = [name for name in sorted(files_below(uri)) if os.path.splitext(name)[1].lower() in FORMATS]
    return [joined(uri, name) for name in images if not any(part.startswith(".") for part in name.split("/"))]


def _below(folder: str) -> list[str]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in names if os.path.splitext(name)[1].lower() in FORMATS and not name.startswith(".")]
        found += [os.path.join(place, name) for name in images]
    return sorted(found)


def _predict_readable(
    model: Model | Ensemble, files: Sequence[str]
) -> tuple[list[NDArray[np.float64] | None], list[str]]:
    """Probabilities of each file, null where it can't be read, and why; halves are tried until the faulty are alone."""
    try:
        return list(model.predict(files)), []
    except InputError as error:
        if len(files) == 1:
            return [None], error.faults[:1]
    halves = [_predict_readable(model, part) for part in (files[: len(files) // 2], files[len(files) // 2 :])]
    return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]


def _write_table(
    out: str | None, files: Sequence[str], classes: Sequence[str], probabilities: NDArray[np.float64]
) -> None:
    """Rows of path, predicted class and each class's probability, as CSV or Parquet."""
    predicted = [classes[place] for place in probabilities.argmax(axis=1)]
    heads = ["path", "predicted", *(f"probability_{name}" for name in classes)]
    try:
        if out is not None and out.endswith(".parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            named = [os.fsencode(file).decode("utf-8", "replace") for file in files]  # Parquet holds Unicode alone
            columns = [pa.array(values, pa.string()) for values in (named, predicted)]
            columns += [pa.array(values) for values in probabilities.T]
            pq.write_table(pa.Table.from_arrays(columns, names=heads), out)
            return
        with ExitStack() as stack:
            if out is None:
                sys.stdout.reconfigure(errors="surrogateescape", newline="")  # type: ignore[union-attr]
                stream: Any = sys.stdout
            else:
                opened = open(out, "w", encoding="utf-8", errors="surrogateescape", newline="")
                stream = stack.enter_context(opened)
            writer = csv.writer(stream)
            writer.writerow(heads)
            for file, label, row in zip(files, predicted, probabilities, strict=True):
                writer.writerow([file, label, *(f"{value:.6f}" for value in row)])
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror}); choose another place by --out") from None


if __name__ == "__main__":
    sys.exit(main())
