"""The kinds of values that settings have, with their checks: durations, files, lists, patterns, weights."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    WrapValidator,
    field_serializer,
)

from tuning.settings.augmentation import written
from tuning.settings.words import as_number, show

DEPTH_ALL = 5  # stages from the head that make up a whole network; the word `all` means this
# Fields are described by the docstrings below them.
MODEL = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def parse_duration(value: Any) -> Any:
    """Return the seconds in `90s`, `45m`, `2h`, `1h30m` or a plain number; raise ValueError for other text."""
    if not isinstance(value, str):
        return value
    number = r"\d+(?:\.\d+)?"
    pattern = rf"(?:({number})h)?(?:({number})m)?(?:({number})s)?"
    parts = re.fullmatch(pattern, f"{value.strip()}s" if re.fullmatch(number, value.strip()) else value.strip())
    if parts is None or not any(parts.groups()):
        raise ValueError("must be a duration such as 90s, 45m, 2h or 1h30m")
    return sum(float(number or 0) * unit for number, unit in zip(parts.groups(), (3600, 60, 1), strict=True))


def _number_or_auto(value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise ValueError("must be greater than or equal to 0, or `auto`") from None


def _channels(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ValueError("must be one number, or one for each of three channels")
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("must be of pixels from 0 to 1; divide by 255 what is of 0 to 255")
    return values * (3 // len(values))


def _above_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(values):
        raise ValueError("must be greater than 0")
    return values


def _from_yaml(value: Any) -> Any:
    """Return the list or mapping that a text holds, as a command line gives it; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError("must be YAML, such as [one, two] or {one: FILE}") from None
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from None
    return value


def _weights(value: Any) -> Any:
    """Return `auto`, `random` or a folder as it is, and backbones' files, also as the text of a YAML mapping, checked.

    Raises:
        ValueError: the rule that is broken.
    """
    value = _from_yaml(value)
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("must be `auto`, `random`, a folder, or a mapping of backbones to their files")
    found = {}
    for name, given in value.items():
        try:
            found[name] = Weights.model_validate({"file": given} if isinstance(given, str) else given)
        except ValidationError as error:
            fault = error.errors()[0]
            known = {"missing": "is missing", "extra_forbidden": "no such key", "model_type": "must be a file"}
            broken = known.get(fault["type"]) or rule(fault["msg"], fault["input"]).partition(", got ")[0]
            place = ": ".join([name, *map(str, fault["loc"][:1])])
            raise ValueError(f"{place}: {broken}, got {given}") from None
    return found


def rule(message: str, value: Any, *, text: bool = False) -> str:
    """Return pydantic's message in plainer words, with the value."""
    rule = message.removeprefix("Value error, ").partition(", unable to")[0]
    if ", got " in rule:  # of a value inside this one
        return rule
    rule = re.sub("^(Input|String) should", "must", rule).replace("a valid integer", "an integer")
    rule = rule.replace("a valid boolean", "true or false").replace("a valid", "a")
    rule = re.sub("match pattern .*", "be letters, digits, '.', '_' and '-', with a letter or digit first", rule)
    number = None if text else as_number(value)
    if number and (rule == "must be a number" or (rule == "must be an integer" and "." not in number)):
        return f"{rule}, got the text {show(value)}; write {number}"
    return f"{rule}, got {show(value)}"


Channels = Annotated[tuple[float, ...], Strict(False), AfterValidator(_channels)]
Names = Annotated[list[str], Field(min_length=1), BeforeValidator(_from_yaml)]
SplitFiles = Annotated[dict[Literal["train", "val", "test"], str], BeforeValidator(_from_yaml)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Depth = Annotated[int, BeforeValidator(lambda depth: DEPTH_ALL if depth == "all" else depth)]
Seconds = Annotated[float, BeforeValidator(parse_duration)]
Augmentation = Annotated[str, BeforeValidator(lambda value: written(_from_yaml(value)))]
Gpus = Annotated[Annotated[float, Field(ge=0)] | Literal["auto"] | None, WrapValidator(_number_or_auto)]


class Weights(BaseModel):
    """A file of pretrained weights, and the mean and standard deviation of the images they were trained on."""

    model_config = MODEL

    file: Annotated[Path, Strict(False)]
    """State dict: .safetensors, or a PyTorch file."""
    mean: Channels | None = None
    """Mean of the channels' pixels in [0, 1]: three, or one for all. None: timm's, of the backbone."""
    std: Annotated[Channels, AfterValidator(_above_zero)] | None = None
    """Their standard deviation. None: timm's."""

    @field_serializer("file")
    def _path(self, file: Path) -> str:
        return str(file)


GivenWeights = Annotated[str | dict[str, Weights], BeforeValidator(_weights)]
