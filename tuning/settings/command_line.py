"""Shared by all commands: settings from flags and `--set`, and the exit code."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NoReturn, TextIO

import tyro

from tuning.settings.config import PARAMETERS, SETTINGS, InputError, SearchPlan, TrialConfig, check_value, visible
from tuning.settings.words import nearest

DONE, BAD_INPUT, NO_FINITE_LOSS, INTERRUPTED = 0, 2, 3, 130
Pairs = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # of every --set


def flag(setting: str, metavar: str) -> Any:
    """Return the help of a setting's flag: its description, and its default, which a search space may override."""
    field = SearchPlan.model_fields[setting]
    default = f"{field.default}, or the space's" if setting in SETTINGS else field.default
    hint = "" if field.is_required() or field.default is None else f"(default: {default})"
    help = " ".join((field.description or "").replace("`", "").split())
    return tyro.conf.arg(metavar=metavar, help=help, help_behavior_hint=hint)


def exit_code(command: Callable[[], int | None], interrupted: str = "") -> int:
    """Run a command and return its exit code; wrong input and an interruption are printed, not raised.

    Args:
        interrupted: what an interruption leaves, for its message.
    """
    try:
        code = command() or DONE
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # what read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it as it exits
        return DONE
    except InputError as error:
        for fault in error.faults:
            print(f"error: {visible(fault)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("; ".join(filter(None, ("interrupted", interrupted))), file=sys.stderr)
        return INTERRUPTED


def leave(code: int) -> NoReturn:
    """End the process at once: Python's own exit takes 1.4 to 2 s, for torch and its like."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if the shell has closed it
        stream.flush()
    os._exit(code)


def endure() -> None:
    """Let the work go on if standard output or standard error break, which may be one place, such as a job's log."""
    sys.stdout, sys.stderr = Enduring(sys.stdout), Enduring(sys.stderr)


class Enduring:
    """Output that may break, as what reads it ends or its disk is full: the work goes on without it."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream  # None if the shell has closed it, and once it has broken
        self._first = stream
        self.encoding = "utf-8" if stream is None else stream.encoding

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _try(self, act: Callable[[TextIO], object]) -> None:
        try:
            if self._stream is not None:
                act(self._stream)
        except OSError as error:
            self._stream = None
            print(f"standard output: can't be written ({error.strerror}); going on without it", file=sys.stderr)

    def fileno(self) -> int:
        """Return the file number, for which Ray asks: that of nothing if the shell has closed the stream."""
        return _nothing() if self._first is None else self._first.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)


@cache
def _nothing() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def command_line(flags: Mapping[str, Any], pairs: Iterable[Iterable[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the search and the parameters of its trials that flags and the pairs of `--set` give.

    Raises:
        InputError: each wrong value, unknown key, key given twice, and pair without `=`.
    """
    faults: list[str] = []
    given: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    entries = [(key, value, f"--{key.replace('_', '-')}") for key, value in flags.items() if value is not None]
    for pair in (pair for group in pairs for pair in group):
        key, equals, text = pair.partition("=")
        if not equals:
            faults.append(f"--set {pair}: must be key=value")
        elif key in (*SETTINGS, *PARAMETERS):
            entries.append((key, text, f"--set {key}"))
        else:
            cure = f"; use the flag --{key}" if key in flags else nearest(key, (*SETTINGS, *PARAMETERS))
            faults.append(f"--set {key}: no such setting{cure}")
    for key, value, where in entries:
        model, values = (SearchPlan, given) if key in SearchPlan.model_fields else (TrialConfig, overrides)
        if key in values:
            faults.append(f"{where}: is given twice; give it once")
            continue
        try:
            values[key] = check_value(model, key, value, text=where.startswith("--set"))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise InputError(faults)
    return given, overrides
