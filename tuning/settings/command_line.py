"""What all commands have in common: settings by flags and `--set`, and the exit code."""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tuning.settings.config import PARAMETERS, SETTINGS, InputError, SearchPlan, TrialConfig, check_value, visible

DONE, BAD_INPUT, NO_FINITE_LOSS, INTERRUPTED = 0, 2, 3, 130


def exit_code(command: Callable[[], int]) -> int:
    """The exit code of a command; wrong input and an interruption are printed, not raised."""
    try:
        return command()
    except InputError as error:
        for fault in error.faults:
            print(f"error: {visible(fault)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def command_line(flags: Mapping[str, Any], pairs: Iterable[Iterable[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a search and parameters of its trials that a command line gives, checked.

    Args:
        flags: by field of `SearchPlan`; null where not given.
        pairs: the `key=value` of every `--set`.

    Raises:
        InputError: each wrong value, unknown key, key given twice, and pair without `=`.
    """
    faults = []
    given: dict[str, Any] = {}
    overrides: dict[str, Any] = {}

    def take(key: str, value: Any, where: str, *, text: bool) -> None:
        model, values = (SearchPlan, given) if key in SearchPlan.model_fields else (TrialConfig, overrides)
        if key in values:
            faults.append(f"{where}: given twice; give it once")
            return
        try:
            values[key] = check_value(model, key, value, text=text)
        except ValueError as error:
            faults.append(f"{where}: {error}")

    for key, value in flags.items():
        if value is not None:
            take(key, value, f"--{key.replace('_', '-')}", text=False)
    for pair in (pair for group in pairs for pair in group):
        key, equals, value = pair.partition("=")
        if not equals:
            faults.append(f"--set {pair}: must be key=value")
        elif key in (*SETTINGS, *PARAMETERS):
            take(key, value, f"--set {key}", text=True)
        else:
            near = difflib.get_close_matches(key, (*SETTINGS, *PARAMETERS), n=3)
            faults.append(f"--set {key}: no such key" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if faults:
        raise InputError(faults)
    return given, overrides
