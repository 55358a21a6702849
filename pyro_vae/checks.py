"""What an argument must be: a choice, a whole number, a finite number; an error names it, and what it may be and is.

And how rows are gone through that are all to be checked.
"""

import math
from collections.abc import Collection, Iterator
from numbers import Integral, Real
from typing import Any

BLOCK_ROWS = 256


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a ValueError that lists the choices, unless `value` is one of them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise a ValueError unless `value` is a whole number, True and False aside, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_number(name: str, value: object, above: float | None = None) -> None:
    """Raise a ValueError unless `value` is a finite number, True and False aside, above `above` if that is given."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if above is not None and not float(value) > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value!r}")


def blocks(rows: Any) -> Iterator[tuple[int, Any]]:
    """Rows of an array, a tensor or `Mapped` in turn, each block with the number of its first row.

    For what has to see all of them, which may be more than fit into memory.
    """
    for start in range(0, len(rows), BLOCK_ROWS):
        yield start, rows[start : start + BLOCK_ROWS]
