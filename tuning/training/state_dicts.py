"""State dicts as people have them: what wraps them, their prefixes, other heads and one-channel stems."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, clean_state_dict, load_state_dict
from torch import Tensor, nn

from tuning.settings.config import InputError
from tuning.settings.words import count
from tuning.training.weights import PACKAGES

StateDict = dict[str, Tensor]
COUNTER = "num_batches_tracked"  # of batch norms, which older files lack
DEEPEST = 3  # parts of a prefix, such as `module.encoder.model.`


def read(file: Path) -> StateDict:
    """Return the state dict of a file, or of the one entry that holds one, without the prefixes of wrappers.

    timm looks into the entries `state_dict`, `model` and their moving averages, which it prefers.

    Raises:
        InputError: several entries hold a state dict.
        Exception: the file can't be read, of any kind.
    """
    found = load_state_dict(str(file), weights_only=True)
    tensors = sum(isinstance(value, Tensor) for value in found.values())
    inner = {key: value for key, value in found.items() if _holds_tensors(value) and len(value) > tensors}
    if len(inner) > 1:
        raise InputError(f"weights: {file} holds {count(len(inner), 'state dict')}: {', '.join(inner)}; keep one")
    if inner:
        found = clean_state_dict(next(iter(inner.values())))
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def of_package(backbone: str, state: StateDict) -> list[Tensor] | None:
    """Return the tensors of a PyPI package, in the order of timm's state dict but under other names; None if others."""
    return list(state.values()) if backbone.partition(".")[0] in PACKAGES and "_conv_stem.weight" in state else None


def fitted(state: StateDict, blank: nn.Module, cfg: PretrainedCfg) -> tuple[StateDict, str]:
    """Fit a state dict to a model: without a prefix and what belongs to other modules, a grey stem for three channels.

    What is inside the model's own modules stays, so that strict loading finds what is missing or too much there.

    Args:
        state: of a file.
        blank: model of which only names and shapes matter.
        cfg: timm's, of the model.

    Returns:
        The state dict, and in words what of the file it holds; empty if the file has timm's layout, or one that timm's
        own loading renames, and nothing else.
    """
    wanted, classifier = blank.state_dict(), f"{cfg.classifier}."
    body = [key for key in wanted if not key.startswith(classifier) and not key.endswith(COUNTER)]
    prefix = _prefix(state, body)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    left_out = Counter(key.partition(".")[0] for key in state if not key.startswith(prefix))
    if all(key in inside for key in body):
        modules = {key.partition(".")[0] for key in wanted}
        others = [key for key in inside if key.partition(".")[0] not in modules]
        left_out.update(key.partition(".")[0] for key in others)
        inside = {key: value for key, value in inside.items() if key not in others}
        inside |= {
            key: torch.zeros((), dtype=torch.long) for key in wanted.keys() - inside.keys() if key.endswith(COUNTER)
        }
    said = [f"without the prefix {prefix!r}"] if prefix else []
    for name in (cfg.first_conv,) if isinstance(cfg.first_conv, str) else cfg.first_conv or ():
        key = f"{name}.weight"
        if key in inside and key in wanted and _grey(inside[key].shape, wanted[key].shape):
            inside[key] = inside[key].expand(wanted[key].shape) / wanted[key].shape[1]
            said.append(f"its {name} of one channel shared among three")
    if left_out:
        each = [f"{name} ({count(tensors, 'tensor')})" for name, tensors in left_out.items()]
        said.append(f"left out: {', '.join(each)}")
    used = sum(not key.startswith(classifier) for key in inside)
    return inside, "; ".join([count(used, "tensor"), *said]) if said else ""


def _prefix(state: StateDict, body: Sequence[str]) -> str:
    """Return the prefix with which most of a model's keys are there.

    Raises:
        InputError: all are there with several prefixes, as of a teacher and a student.
    """
    prefixes = {"": None}
    for key in state:
        parts = key.split(".")
        prefixes |= {f"{'.'.join(parts[:depth])}.": None for depth in range(1, min(DEEPEST, len(parts) - 1) + 1)}
    there = {prefix: sum(prefix + key in state for key in body) for prefix in prefixes}
    whole = [prefix for prefix, number in there.items() if number == len(body) > 0]
    if len(whole) > 1:
        raise InputError(
            f"holds several networks: {', '.join(prefix or 'one without prefix' for prefix in whole)}; keep one"
        )
    return max(there, key=lambda prefix: there[prefix])


def _grey(given: torch.Size, wanted: torch.Size) -> bool:
    """Return whether a convolution's weights [out, in, height, width] differ only by having one channel, not three."""
    return len(given) == 4 and given[1] == 1 and wanted[1] == 3 and given[0] == wanted[0] and given[2:] == wanted[2:]
