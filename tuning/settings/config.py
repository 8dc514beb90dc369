"""What can be set: the configuration of one trial and the plan of a whole search, both frozen and checked."""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    field_serializer,
)

DEPTH_ALL = 5  # stages from the head that make up a whole network; the word `all` means this
FORMATS = {  # of images, by the suffix of their files
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".dcm": "DICOM",
    ".dicom": "DICOM",
}
# user:password@ of a URL, up to the last @ before the path, and what follows ? and &: also what signs a URL.
_PASSWORD = re.compile(r"(?<=://)([^\s:/?#@]*):[^\s@]*@(?:[^\s/?#@]*@)*")
_SECRETS = r"[\w.-]*(?:passw|passphrase|pwd|token|secret|signature|credential)[\w.-]*"
_SECRETS += r"|(?:[\w.-]*[._-])?(?:key|sig|sas|auth)|[a-z]*key(?:id)?"
_SECRET_PART = re.compile(rf"[?&](?:{_SECRETS})=[^\s&'\"]*", re.IGNORECASE)
UNFROZEN = ("head", "part", "all")  # what a depth comes to


def unfrozen(unfreeze_depth: int) -> str:
    """How much of a network a depth unfreezes: head, part or all."""
    return UNFROZEN[0 if unfreeze_depth == 0 else 2 if unfreeze_depth == DEPTH_ALL else 1]


def without_secrets(text: str) -> str:
    """A text whose URLs have lost their passwords, tokens and secret keys; it is what may be written and shown."""
    return _SECRET_PART.sub(lambda part: part[0][0] if part[0][0] == "?" else "", _PASSWORD.sub(r"\1@", text))


class InputError(ValueError):
    """Something the user gave is wrong; each of `faults` names the place, the rule, the value and the cure."""

    def __init__(self, faults: str | list[str]):
        self.faults = [without_secrets(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
        super().__init__("\n".join(self.faults))


# What moves a cursor, ends a line, or turns the direction of writing.
_CODES = (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
CONTROLS = {code: repr(chr(code))[1:-1] for code in _CODES}


def visible(value: object) -> str:
    """Anything as one line of text: a newline in a file's name shows as \\n, and nothing moves a terminal's cursor."""
    return str(value).translate(CONTROLS)


def _depth(value: Any) -> Any:
    return DEPTH_ALL if value == "all" else value


def parse_duration(value: Any) -> Any:
    """Seconds from `90s`, `45m`, `2h` or `1h30m`; a plain number is taken as seconds.

    Raises:
        ValueError: the text is not a duration.
    """
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", value.strip())
    if parts is None or not any(parts.groups()):
        raise ValueError("a duration is written like 90s, 45m, 2h or 1h30m")
    return sum(float(number or 0) * unit for number, unit in zip(parts.groups(), (3600, 60, 1), strict=True))


def _number_or_auto(value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError("must be greater than or equal to 0, or `auto`") from None


_MODEL = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TrialConfig(BaseModel):
    """How one trial fine-tunes. Every field but `epochs` and `seed` can be a parameter of a search space."""

    model_config = _MODEL

    backbone: str = Field(description="timm model name")
    unfreeze_depth: Annotated[int, BeforeValidator(_depth)] = Field(
        0,
        ge=0,
        le=DEPTH_ALL,
        description="stages trained, counted from the head: 0 the classifier alone, 5 (`all`) everything",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of the classifier and the last stage")
    stage_lr_decay: float = Field(
        1.0, gt=0, le=1, description="each stage further from the head has its learning rate multiplied by this"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="`adamw`, or `sgd` with Nesterov momentum 0.9")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up; fractions allowed")
    weight_decay: float = Field(0.01, ge=0, description="not applied to biases and norms")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the training loss; validation is never smoothed")
    head_init: Literal["random", "probe"] = Field(
        "random", description="the new classifier: drawn, or, where more than it is trained, a linear probe's"
    )
    head_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier")
    class_weighting: Literal["none", "balanced"] = Field(
        "none", description="`balanced` weights the training loss by inverse class frequency"
    )
    batch_norm: Literal["train", "frozen"] = Field(
        "train", description="batch norm of unfrozen stages: trained, or statistics and affine weights kept"
    )
    augmentation: Literal["none", "light", "medium", "strong"] = Field("light", description="augmentation policy")
    batch_size: int = Field(32, ge=2, description="images per optimizer step")
    image_size: int = Field(224, ge=32, le=1024, description="side in pixels; images are resized to a square")
    epochs: int = Field(10, ge=1, description="planned epochs; the cosine schedule ends there")
    seed: int = Field(0, ge=0, lt=2**31, description="draws the new head, the batches, the augmentation and dropout")


# What a search space may vary or fix: epochs and the seed belong to the whole search.
PARAMETERS = tuple(name for name in TrialConfig.model_fields if name not in ("epochs", "seed"))


class SearchPlan(BaseModel):
    """Everything about a search except its space. Flags and `--set` fill it; `plan.yaml` records it."""

    model_config = _MODEL

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="run folder below the storage folder"
    )
    data: str | None = Field(
        None, description="folder of class folders, or CSV or Parquet manifest; none: generated images"
    )
    space: str = Field("quick", description="shipped space by name, or a YAML file")
    trials: int = Field(20, ge=1, le=100_000, description="start points and suggested trials")
    epochs: int = Field(10, ge=1, le=10_000, description="epochs of a trial that nothing ends early")
    seed: int = Field(0, ge=0, lt=2**31, description="of the sampler and of every trial")
    time_budget: Annotated[float, BeforeValidator(parse_duration)] | None = Field(
        None,
        gt=0,
        description="the search ends cleanly after this (90s, 45m, 2h), at the end of the epochs then running",
    )
    trial_timeout: Annotated[float, BeforeValidator(parse_duration)] | None = Field(
        None, gt=0, description="a trial that reports nothing for so long (90s, 45m, 2h) hangs, and ends as `failed`"
    )
    gpus_per_trial: Annotated[
        Annotated[float, Field(ge=0)] | Literal["auto"] | None, WrapValidator(_number_or_auto)
    ] = Field(
        None,
        description="a fraction up to 1, a whole number, or `auto`: by measured memory; default 1, or 0 without a GPU",
    )
    cpus_per_trial: int | None = Field(
        None, ge=1, description="threads of a trial; default 1, or the share of a GPU's cores"
    )
    concurrent: int | None = Field(
        None,
        ge=1,
        description="trials at once; default as many as the resources allow; on a cluster (`RAY_ADDRESS`) also more, "
        "for nodes that join later",
    )
    storage: str = Field("results", description="folder that run folders are made in")
    early_stopping: bool = Field(True, description="false: only a non-finite loss ends a trial early")

    metric: Literal["val_loss", "val_balanced_accuracy", "val_auroc"] = Field(
        "val_loss",
        description="drives the sampler and the choice of the best trial, and ASHA where `compared` says so",
    )
    probe: bool = Field(
        True,
        description="begin with a linear probe of each backbone, unless early_stopping is off",
    )
    sampler: Literal["tpe", "gp", "random"] = Field("tpe", description="Optuna's sampler of suggested trials")
    warm_start: str | None = Field(None, description="folder of another run, from whose trials the sampler learns")
    warm_start_weight: float = Field(
        0.3,
        gt=0,
        le=1,
        description="what a trial of that run counts beside one of this: so large a share is taken",
    )
    optuna_storage: str | None = Field(
        None, description="where a copy of the study is kept for optuna-dashboard: a database's URL, or a path in .log"
    )
    track: Literal["none", "mlflow", "tensorboard"] = Field(
        "none", description="where a copy of trials and epochs is kept as the search runs"
    )
    grace_epochs: int = Field(1, ge=1, description="epochs before ASHA may stop a trial: its first rung")
    strata: Literal["none", "unfrozen", "backbone", "both"] = Field(
        "none",
        description="what ASHA compares a trial with: all, those with as much unfrozen, of its backbone, or both",
    )
    compared: Literal["early_loss", "best", "last", "mean"] = Field(
        "early_loss",
        description="what ASHA compares: `early_loss`, or `metric`: of the best epoch, the last, or the mean of two",
    )
    early_loss: Literal["rungs", "always"] = Field(
        "rungs", description="epochs in which `early_loss` is measured: those where ASHA compares it, or all"
    )
    reduction_factor: int = Field(2, ge=2, description="ASHA keeps the best 1/reduction_factor of each rung")
    patience: int = Field(5, ge=1, description="a trial with no better epoch for so many is `converged`")
    divergence_factor: float = Field(
        10.0, gt=1, description="a loss so many times the class entropy, or its own best, twice running is `diverged`"
    )
    finalists: int = Field(
        2, ge=0, description="best trials that are trained again beside the default, with the same seeds; 0: no verdict"
    )
    finalist_seeds: int = Field(
        5, ge=3, le=1000, description="runs of each of them; fewer where `finalist_epochs` allows no more"
    )
    finalist_epochs: int | None = Field(
        None, ge=0, description="epochs of all these runs, at most; default a quarter of what the search took"
    )
    final_data: Literal["train", "train+val"] = Field(
        "train",
        description="what train_final.py trains on: `train`, or `train+val` to the median best epoch of the finalists",
    )
    ensemble: bool = Field(
        False, description="train_final.py makes its model of the kept trials that go together best, and trains none"
    )
    weights: str = Field("auto", description="`auto`, a folder of weight files, or `random`")
    fit: Literal["squash", "crop", "letterbox"] = Field(
        "squash", description="how images become square: squashed, cropped to the centre, or with black bars"
    )
    drop_colour: bool = Field(False, description="make every image grey, so that colour can't give a class away")
    skip_unreadable: bool = Field(False, description="leave out images that can't be read instead of stopping")
    on_leak: Literal["stop", "warn", "move"] = Field(
        "stop",
        description="equal images or groups in several splits: stop, go on with them, or bring each into one split",
    )
    path_column: str = Field("path", description="column of a manifest")
    label_column: str = Field("label", description="column of a manifest")
    split_column: str = Field("split", description="column of a manifest; optional there")
    group_column: str = Field("group", description="column of a manifest (patients, say); optional there")
    val_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of the images for validation where no split is given"
    )
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="share of the images for the test where no split is given"
    )
    disk_cache_bytes: int = Field(20_000_000_000, ge=0, description="decoded images kept on disk between runs")
    cache_bytes: int = Field(
        20_000_000_000, ge=0, description="outputs of frozen layers kept on a node while a search runs"
    )
    checkpoint_bytes: int = Field(
        20_000_000_000, ge=0, description="best weights of the best five trials; the worst go first"
    )

    @field_serializer("optuna_storage", "data", "storage", "weights", "warm_start", when_used="unless-none")
    def _written(self, url: str) -> str:
        """What `model_dump` gives goes to plan.yaml, best.yaml and reports."""
        return without_secrets(url)

    @property
    def resume_command(self) -> str:
        """What goes on with the run."""
        storage = "" if self.storage == "results" else f" --storage {shlex.quote(without_secrets(self.storage))}"
        return f"python tuning/run_search.py --resume --name {self.name}{visible(storage)}"


# Where a run lives and what it is called is said by flags alone.
SETTINGS = tuple(name for name in SearchPlan.model_fields if name not in ("name", "data", "space", "storage"))
COPIES = ("optuna_storage", "track")
RESUME_MAY_CHANGE = (
    *("trials", "finalist_epochs", "time_budget", "trial_timeout"),
    *("concurrent", "gpus_per_trial", "cpus_per_trial"),
    *COPIES,
)


def cache_folder() -> Path:
    """Where decoded images outlive a run: $FINETUNE_SEARCH_CACHE, else ~/.cache/finetune-search."""
    return Path(os.environ.get("FINETUNE_SEARCH_CACHE") or "~/.cache/finetune-search").expanduser().resolve()


Model = TypeVar("Model", bound=BaseModel)


def check_value(model: type[BaseModel], key: str, value: Any, *, text: bool = False) -> Any:
    """One field's value, checked by its rule.

    Args:
        model: the model whose field `key` is.
        key: field name.
        value: the value; with `text` a string from the command line, read by the field's type.
        text: whether to read `value` as text.

    Raises:
        ValueError: the rule that is broken, in words.
    """
    adapter = _adapter(model, key, text)
    try:
        return adapter.validate_strings(value) if text else adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(_rule(error.errors()[0]["msg"], value)) from None


@cache
def _adapter(model: type[BaseModel], key: str, text: bool) -> TypeAdapter[Any]:
    field = model.model_fields[key]
    rule: Any = Annotated[field.annotation, field]
    return TypeAdapter[Any](rule, config=ConfigDict(strict=not text, allow_inf_nan=False))


def _rule(message: str, value: Any) -> str:
    rule = message.removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value) and "valid" in rule:
        return f"{rule}, got the text {value!r}; write it without quotes, and with a dot before any e, as in 1.0e-4"
    return f"{rule}, got {value!r}"


def build(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """A checked model, or all its faults at once.

    Args:
        model: `TrialConfig` or `SearchPlan`.
        values: field values.
        where: what the values come from, for the messages.

    Raises:
        InputError: each unknown, missing or wrong field.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(
            [
                f"{where}: {fault['loc'][0]}: "
                + ("no such key" if fault["type"] == "extra_forbidden" else _rule(fault["msg"], fault["input"]))
                for fault in error.errors()
            ]
        ) from None
