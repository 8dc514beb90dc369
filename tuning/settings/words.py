"""Nouns, names, values and examples as messages show them."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

SCALARS = (str, int, float, bool, type(None))
EXAMPLES = 5  # that a message names
LARGEST_INT = 2**53  # Optuna keeps numbers as floats, which are exact up to here


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 epoch`, `2,000 epochs`, or with a `plural` of its own `3 classes`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def are(number: int, noun: str) -> str:
    """Return a number with its noun and verb: `1 image is`, `2 images are`."""
    return f"{count(number, noun)} {'is' if number == 1 else 'are'}"


def show(value: Any) -> str:
    """Return a value as messages quote it, in at most 80 characters."""
    if type(value) not in SCALARS:
        return "a mapping" if isinstance(value, dict) else f"a {type(value).__name__}"
    if type(value) is int and abs(value) > LARGEST_INT:
        return "a number beyond 2**53"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: Any, known: Iterable[Any]) -> str:
    """Return the end of a message that proposes the known name most like a word; empty if none is."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1) if isinstance(word, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def as_number(text: Any) -> str | None:
    """Return the number in a text as YAML reads it: 1e-5 -> 1.0e-05, since PyYAML takes 1e-5 as text; None if none."""
    try:
        number = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if number.is_integer() and abs(number) < LARGEST_INT:
        return str(int(number))
    return repr(number) if "." in repr(number) else repr(number).replace("e", ".0e")


def examples(values: Iterable[object]) -> str:
    """Return the first of several values, and how many more there are: `a, b, c, d, e and 4 more`."""
    shown = [str(value) for value in values]
    return ", ".join(shown[:EXAMPLES]) + (f" and {len(shown) - EXAMPLES} more" if len(shown) > EXAMPLES else "")
