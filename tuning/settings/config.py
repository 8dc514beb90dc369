"""All settings: the configuration of one trial and the plan of a whole search, both frozen and checked."""

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_serializer,
)

from tuning.settings.values import (
    DEPTH_ALL,
    MODEL,
    Augmentation,
    Depth,
    GivenWeights,
    Gpus,
    Names,
    Pattern,
    Seconds,
    SplitFiles,
    rule,
)

FORMATS = {  # of images, by the suffix of their files
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".dcm": "DICOM",
    ".dicom": "DICOM",
    ".ima": "DICOM",  # Siemens'
}
# user:password@ of a URL, up to the last @ before the path; and its query's secret parameters, signatures included.
_PASSWORD = re.compile(r"(?<=://)([^\s:/?#@]*):[^\s@]*@(?:[^\s/?#@]*@)*")
_SECRETS = r"[\w.-]*(?:passw|passphrase|pwd|token|secret|signature|credential)[\w.-]*"
_SECRETS += r"|(?:[\w.-]*[._-])?(?:key|sig|sas|auth)|[a-z]*key(?:id)?"
_SECRET_PART = re.compile(rf"[?&](?:{_SECRETS})=[^\s&'\"]*", re.IGNORECASE)
UNFROZEN = ("head", "part", "all")


def unfrozen(unfreeze_depth: int) -> str:
    """Return how much of a network a depth unfreezes: head, part or all."""
    return UNFROZEN[0 if unfreeze_depth == 0 else 2 if unfreeze_depth == DEPTH_ALL else 1]


def without_secrets(text: str) -> str:
    """Return a text, safe to write and show, without the passwords, tokens and secret keys of the URLs in it."""
    return _SECRET_PART.sub(lambda part: part[0][0] if part[0][0] == "?" else "", _PASSWORD.sub(r"\1@", text))


class InputError(ValueError):
    """Wrong input by the user; each of `faults` names the place, the rule, the value and the cure."""

    def __init__(self, faults: str | list[str]):
        self.faults = [without_secrets(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
        super().__init__("\n".join(self.faults))


# Characters that move the cursor, end a line, or turn the direction of writing.
_CODES = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
CONTROLS = {code: repr(chr(code))[1:-1] for code in _CODES}


def visible(value: object) -> str:
    """Return anything as one line of text: a newline in a file's name as \\n, and nothing that moves the cursor."""
    return str(value).translate(CONTROLS)


class TrialConfig(BaseModel):
    """How one trial fine-tunes. A search space can vary or fix every field but `epochs` and `seed`."""

    model_config = MODEL

    backbone: str
    """timm model name, such as `resnet18`."""
    unfreeze_depth: Depth = Field(0, ge=0, le=DEPTH_ALL)
    """Number of trained stages, counted from the head: 0 the classifier alone, 5 or `all` the whole network."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the classifier and the last stage, above 0."""
    stage_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate for each stage further from the head, above 0 and at most 1."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer: `adamw`, or `sgd` with Nesterov momentum 0.9."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up: `constant`, or `cosine` decay to 0."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear learning rate warm-up in epochs, such as 0.5."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay, not applied to biases and normalisation layers."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the training loss, from 0 to below 1; the validation loss is never smoothed."""
    head_init: Literal["random", "probe"] = "random"
    """Initial classifier: `random`, or the `probe`'s weights (random if the classifier alone is trained)."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability before the classifier, from 0 to below 1."""
    class_weighting: Literal["none", "balanced"] = "none"
    """Class weights in the training loss: `none`, or `balanced` (inverse class frequencies)."""
    batch_norm: Literal["train", "frozen"] = "train"
    """Batch norm in unfrozen stages: `train`, or `frozen` with its pretrained statistics and affine weights."""
    augmentation: Augmentation = "light"
    """Augmentation: `none`, `light`, `medium` or `strong` (which mirror half), or strengths, as `medium flip=0`."""
    batch_size: int = Field(32, ge=2)
    """Number of images per optimizer step, at least 2."""
    image_size: int = Field(224, ge=32, le=1024)
    """Side of the square input images in pixels, from 32 to 1024."""
    epochs: int = Field(10, ge=1)
    """Number of planned epochs, at whose end the cosine schedule reaches 0."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Random seed of the new classifier, the batches, augmentation and dropout."""


# What a search space may vary or fix: epochs and the seed belong to the whole search.
PARAMETERS = tuple(name for name in TrialConfig.model_fields if name not in ("epochs", "seed"))


class SearchPlan(BaseModel):
    """All settings of a search but its space. Flags and `--set` fill it; `plan.yaml` records it."""

    model_config = MODEL

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run and of its folder. Default: the space and the time."""
    data: str | None = None
    """Folder of class folders (train/val/test above them are optional), manifest (CSV, JSON, Excel, Parquet), or URI.
    Default: generated chest radiographs."""
    space: str = "quick"
    """Search space: the name of a shipped one (quick, chest_xray), or a YAML file."""
    trials: int = Field(20, ge=1, le=100_000)
    """Number of trials: the start points, the portfolio, then suggestions. Probes and finalists are not counted."""
    epochs: int = Field(10, ge=1, le=10_000)
    """Number of epochs of a trial that is not ended early."""
    seed: int = Field(0, ge=0, lt=2**31 - 1000)  # finalists' runs have the next ones
    """Random seed of the sampler and of every trial."""
    time_budget: Seconds | None = Field(None, gt=0)
    """Time after which the search ends, once the running epochs are done: 90s, 45m, 2h. Default: no limit."""
    trial_timeout: Seconds | None = Field(None, gt=0)
    """Time without a finished epoch after which a trial ends as `failed`: 90s, 45m, 2h. Default: no limit."""
    gpus_per_trial: Gpus = None
    """GPU per trial: 1, a fraction of it, 0 for CPUs, or `auto` (by measured memory). Default: 1, or 0 if none."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of trials and the final model: `cpu`, `cuda`, `mps` (Apple's GPU), or `auto`: a GPU if there is one."""
    deterministic: bool = False
    """Whether a seed gives the same results on a GPU too, which is slower. On CPUs it always does."""
    cuda_graphs: bool = False
    """Whether trials try CUDA graphs of their training steps, and take them where they are faster. Untried on a GPU."""
    cpus_per_trial: int | None = Field(None, ge=1)
    """CPU threads per trial. Default: 1, or on GPUs its share of the cores."""
    concurrent: int | None = Field(None, ge=1)
    """Maximum number of concurrent trials, on a cluster also for nodes that join later. Default: what fits."""
    storage: str = "results"
    """Folder or URI that the run's folder is created in."""
    early_stopping: bool = True
    """ASHA, `patience`, divergence rules, probes and finalists. If false, only a non-finite loss ends a trial early."""

    metric: Literal[
        "val_loss",
        "val_tempered_loss",
        "val_balanced_accuracy",
        "val_f1",
        "val_auroc",
        "val_auprc",
        "val_sensitivity_at_90",
        "val_sensitivity_at_95",
    ] = "val_tempered_loss"
    """By what epochs and trials are chosen: `val_loss`, `val_tempered_loss`, `val_balanced_accuracy`, `val_auroc`,
    `val_auprc`, `val_f1`, `val_sensitivity_at_90` or `val_sensitivity_at_95` (percent specificity)."""
    portfolio: bool = True
    """Whether configurations that did well on other data are tried after the start points, where the space has them."""
    probe: bool = True
    """Whether the search starts with a linear probe of each backbone (not if `early_stopping` is false)."""
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    """Optuna sampler that suggests trials: `tpe`, `gp` (Gaussian process) or `random`."""
    local_search: bool = True
    """Whether most suggestions, with `sampler: tpe`, are neighbours of the best configurations so far."""
    warm_start: str | None = None
    """Folder of another run, whose trials the sampler learns from."""
    warm_start_weight: float = Field(0.3, gt=0, le=1)
    """Fraction of the trials of `warm_start` that the sampler learns from, above 0 and at most 1."""
    optuna_storage: str | None = None
    """Where to copy the study for optuna-dashboard: a database URL, or a path ending in .log."""
    track: Literal["none", "mlflow", "tensorboard"] = "none"
    """Experiment tracking of trials and epochs: `none`, `mlflow` or `tensorboard`."""
    grace_epochs: int = Field(1, ge=1)
    """Number of epochs before ASHA can stop a trial: the first rung."""
    strata: Literal["none", "head", "unfrozen", "backbone", "both"] = "head"
    """Trials that ASHA compares: all; all but head-only ones; those with the same part unfrozen, backbone, or both."""
    compared: Literal["early_loss", "best", "last", "mean"] = "early_loss"
    """Value that ASHA compares: `early_loss`, or the metric's `best`, `last`, or `mean` of the last two epochs."""
    early_loss: Literal["rungs", "always"] = "rungs"
    """Epochs in which `early_loss` is measured: those of ASHA's `rungs`, or `always`."""
    reduction_factor: int = Field(2, ge=2)
    """ASHA keeps the best 1/`reduction_factor` of the trials at each rung."""
    promote: bool = True
    """Whether a stopped trial continues if by now it is among those that ASHA keeps, or to use idle slots or time."""
    patience: int = Field(5, ge=1)
    """Number of epochs without improvement after which a trial ends as `converged`."""
    divergence_factor: float = Field(10.0, gt=1)
    """A trial ends as `diverged` if in two epochs its loss exceeds this times the class entropy, or its own best."""
    finalists: int = Field(2, ge=0)
    """Number of best trials that are retrained and compared with the default. 0: none is retrained."""
    finalist_seeds: int = Field(5, ge=3, le=1000)
    """Number of seeds that each finalist and the default are retrained with; fewer if `finalist_epochs` is short."""
    finalist_epochs: int | None = Field(None, ge=0)
    """Maximum number of epochs of retrained runs, also the default's. Default: a fifth of what early stopping saved."""
    final_data: Literal["train", "train+val"] = "train"
    """Training data of the final model: `train`, or `train+val` up to the median best epoch of its retrained runs."""
    ensemble: bool | Literal["auto"] = "auto"
    """Whether the final model is the mean of the best kept trials: `true`, `false`, or `auto`: if clearly better."""
    weights: GivenWeights = "auto"
    """Pretrained weights: `auto` (installed, cached or downloaded), a folder, files by backbone, or `random`."""
    fit: Literal["squash", "crop", "letterbox"] = "squash"
    """How images are made square: `squash`, `crop` (to the centre) or `letterbox` (black bars)."""
    drop_colour: bool = False
    """Whether all images are converted to grey, so that colour can't give a class away."""
    skip_unreadable: bool = False
    """Whether unreadable images are left out. If false, they are listed and the search doesn't start."""
    on_leak: Literal["stop", "warn", "move"] = "stop"
    """If identical images or a group are in several splits: `stop`, `warn`, or `move` them into one split."""
    path_column: str = "path"
    """Manifest column of the image paths."""
    label_column: str = "label"
    """Manifest column of the classes."""
    split_column: str = "split"
    """Manifest column of the splits: train, val or test. Optional, unless another name is given."""
    group_column: str = "group"
    """Manifest column of groups that stay in one split, such as patients. Optional, unless another name is given."""
    columns: Names | None = None
    """Names of the columns of a manifest without a header: [group, path, label]."""
    label_columns: Names | None = None
    """Manifest columns of ones and zeros, one for each label: [normal, covid]. Default: `label_column` alone."""
    finding: str | None = None
    """One of several labels that an image may have; the classes are the images with it, and all others."""
    multi_label: bool = False
    """Whether an image may have several labels, or none; each is then predicted by itself."""
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    """What -1 in `label_columns`, or a draw of readers, means for a label: `ignore`, `positive` or `negative`."""
    blank: Literal["negative", "ignore"] = "negative"
    """What an empty cell in `label_columns` means with `multi_label`: `negative`, or `ignore` (unknown)."""
    label_pattern: Pattern | None = None
    """Regular expression whose first group is the class in a manifest's paths: `study\\d_([a-z]+)`."""
    group_pattern: Pattern | None = None
    """Regular expression whose first group is the group in the images' paths: `(patient\\d+)`."""
    subgroups: Names | None = None
    """Manifest columns by which figures on the test set are given too: [sex, view]."""
    images: str | None = None
    """Folder in which a manifest's images are, at any depth. Default: the manifest's, where a path leads nowhere."""
    join: str | None = None
    """Another manifest, whose columns are added to rows that agree in the columns that both have."""
    split_files: SplitFiles | None = None
    """Files of the splits, with names of images or rows as in the manifest: {val: valid.csv, test: test_list.txt}."""
    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of the images (of the training images, if splits are given) for a missing validation split."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Fraction of the images for the test split, if no splits are given."""
    disk_cache_bytes: int = Field(20_000_000_000, ge=0)
    """Maximum bytes on disk of decoded images, which are kept between runs."""
    cache_bytes: int = Field(20_000_000_000, ge=0)
    """Maximum bytes of frozen layers' outputs that are kept during a search: per node, on a GPU per process."""
    checkpoint_bytes: int = Field(20_000_000_000, ge=0)
    """Maximum bytes of all checkpoints. Beyond it the kept weights of the worst trials are deleted."""

    @field_serializer(
        *("optuna_storage", "data", "storage", "weights", "warm_start", "images", "join", "split_files"),
        mode="wrap",
        when_used="unless-none",
    )
    def _written(self, value: Any, plain: SerializerFunctionWrapHandler) -> Any:
        """Keep secrets out of plan.yaml, best.yaml and reports."""
        if isinstance(value, str):
            return without_secrets(value)
        shown: Any = plain(value)
        return {key: without_secrets(each) if isinstance(each, str) else each for key, each in shown.items()}

    @property
    def on_gpus(self) -> bool:
        """Whether trials are to run on GPUs, if there are any."""
        return self.device != "cpu" and self.gpus_per_trial != 0

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        storage = "" if self.storage == "results" else f" --storage {shlex.quote(without_secrets(self.storage))}"
        return f"python tuning/run_search.py --resume --name {self.name}{visible(storage)}"


# Keys of --set and of a space's search section; the other four are flags alone.
SETTINGS = tuple(name for name in SearchPlan.model_fields if name not in ("name", "data", "space", "storage"))
SAMPLE_SETTINGS = (  # of `load_samples`
    *("path_column", "label_column", "split_column", "group_column", "columns", "label_columns", "finding"),
    *("multi_label", "uncertain", "blank", "label_pattern", "group_pattern", "subgroups"),
    *("images", "join", "split_files", "val_fraction", "test_fraction"),
)
STRUCTURED = ("augmentation", "weights", "columns", "label_columns", "subgroups", "split_files")  # lists and mappings
RESUME_MAY_CHANGE = (
    *("trials", "finalist_epochs", "time_budget", "trial_timeout"),
    *("concurrent", "gpus_per_trial", "cpus_per_trial", "device", "cuda_graphs"),
    *("optuna_storage", "track"),
    *("data", "images", "join", "split_files"),  # the same images and labels in another place
)
# Settings whose defaults do what versions without them did.
ADDED = (
    *("columns", "label_columns", "finding", "multi_label", "uncertain", "blank", "label_pattern", "group_pattern"),
    *("subgroups", "deterministic", "cuda_graphs", "portfolio"),
)
# What versions without a setting did, where its default does something else.
FORMERLY = {"promote": False, "local_search": False}


def cache_folder() -> Path:
    """Return the folder that is kept between runs: $FINETUNE_SEARCH_CACHE, else ~/.cache/finetune-search.

    If that can't be written, as for a container's arbitrary user, it is a folder of this user for temporary files.
    """
    if named := os.environ.get("FINETUNE_SEARCH_CACHE"):
        return Path(named).expanduser().resolve()
    try:
        folder = Path("~/.cache/finetune-search").expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # no home at all
        pass
    folder = Path(tempfile.gettempdir()) / f"finetune-search-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} is another user's; name a folder for the cache by FINETUNE_SEARCH_CACHE")
    _warn_once(f"~/.cache can't be written: the cache is {folder}; FINETUNE_SEARCH_CACHE names another folder")
    return folder


@cache
def _warn_once(message: str) -> None:
    print(message, file=sys.stderr)


Model = TypeVar("Model", bound=BaseModel)


def check_value(model: type[BaseModel], key: str, value: Any, *, text: bool = False) -> Any:
    """Return a field's value, parsed from `text` or as it is; raise ValueError with the rule that it breaks."""
    adapter = _adapter(model, key, text)
    try:
        return adapter.validate_strings(value) if text else adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(rule(error.errors()[0]["msg"], value, text=text)) from None


@cache
def _adapter(model: type[BaseModel], key: str, text: bool) -> TypeAdapter[Any]:
    field = model.model_fields[key]
    rule: Any = Annotated[field.annotation, field]
    return TypeAdapter[Any](rule, config=ConfigDict(strict=not text, allow_inf_nan=False))


def build(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Return a model with the values from `where`; raise InputError with each unknown, missing or wrong field."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        without_value = {"extra_forbidden": "no such setting", "missing": "is missing"}
        faults = [
            (fault["loc"][0], without_value.get(fault["type"]) or rule(fault["msg"], fault["input"]))
            for fault in error.errors()
        ]
        raise InputError([f"{where}: {key}: {rule}" for key, rule in faults]) from None
