"""What the library promises, measured against known answers: one file and one function of rows per promise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, what was seen, what was asked for, and whether it holds.

    `holds` is None where nothing was promised and the figure is only reported.
    """

    item: str
    case: str
    seen: str
    asked: str
    holds: bool | None


def binomial_band(repeats: int, probability: float = 0.95, level: float = 0.999) -> tuple[float, float]:
    """The central interval that a share of `repeats` with this probability falls into, both ends inclusive."""
    from scipy.stats import binom

    low, high = binom.interval(level, repeats, probability)
    return low / repeats, high / repeats
