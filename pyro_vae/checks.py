"""What an argument must be: a choice, a whole number, a finite number; an error names it, and what it may be and is."""

import math
from collections.abc import Collection
from numbers import Integral, Real


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
