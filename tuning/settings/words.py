"""Counted nouns in messages."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 epoch`, `2,000 epochs`, `3 classes`.

    Args:
        number: how many.
        noun: its singular.
        plural: where it isn't the singular with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
