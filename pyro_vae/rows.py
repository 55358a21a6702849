"""One row of a comparison: a model, scored after one fit or after several of the same recipe."""

import math
from dataclasses import dataclass
from functools import cached_property, reduce
from statistics import NormalDist

import numpy as np

from pyro_vae.estimators.result import Interval, LogLikelihood
from pyro_vae.intervals import StandardError
from pyro_vae.spaces import Real

OF_THE_GROUP = ("n", "space", "sha256")  # entries of a result's summary that all rows have in common


@dataclass(frozen=True)
class Row:
    """One model: its name, the results of its fits, the errors of their mean, and the seconds that fitting took.

    With S fits the figures are means over them, and the errors are those of the recipe: they hold the variance over
    fits beside that over draws of the test set.

    Attributes:
        model: name.
        fits: results, one for each fit; all for the same data.
        error: standard error of `mean`: its part over draws of the test set (with the Monte Carlo noise) and, with
            several fits, its part over fits.
        level: of `interval`.
        train_seconds: seconds that the fits took, None if unknown.
    """

    model: str
    fits: tuple[LogLikelihood, ...]
    error: StandardError
    level: float = 0.95
    train_seconds: float | None = None

    @property
    def result(self) -> LogLikelihood:
        """The result of the only fit, or of the first."""
        return self.fits[0]

    @cached_property
    def log_prob(self) -> np.ndarray:
        """Mean over the fits of the log p of each datum, shape (n,), nats."""
        return np.mean([fit.log_prob for fit in self.fits], axis=0)

    @cached_property
    def mean(self) -> float:
        """Mean log p over data and fits, nats."""
        return float(np.mean(self.log_prob))

    @property
    def mc_se(self) -> float:
        """Monte Carlo standard error of `mean` for these data and these fits, nats."""
        return math.hypot(*(fit.mc_se for fit in self.fits)) / len(self.fits)

    @property
    def test_se(self) -> float:
        """Standard error of `mean` over draws of the test set, Monte Carlo noise (all that data share, too), nats."""
        return math.hypot(self.error.of_data, self.error.shared)

    @property
    def fit_sd(self) -> float | None:
        """Standard deviation of the mean log p over fits, nats; None for a single fit."""
        return float(np.std([fit.mean for fit in self.fits], ddof=1)) if len(self.fits) > 1 else None

    @cached_property
    def direction(self) -> str:
        """The side on which the truth lies in expectation; that of the sum of all fits."""
        directions: list[str] = [fit.direction for fit in self.fits]
        return reduce(combine, directions)

    @cached_property
    def bias_bound(self) -> float | None:
        """How far the truth may lie from `mean` beyond its sampling error, nats; None where that is unknown.

        It may lie above; below if `direction` is "upper".
        """
        known = [bound for bound in map(_bias_bound, self.fits) if bound is not None]
        return float(np.mean(known)) if len(known) == len(self.fits) else None

    @cached_property
    def bias(self) -> tuple[float, float]:
        """How far the truth may lie below and above `mean` beyond its sampling error, nats; an unknown bound is 0."""
        bounds = [(fit.direction == "upper", _bias_bound(fit) or 0.0) for fit in self.fits]
        below, above = (sum(bound for is_upper, bound in bounds if is_upper is side) for side in (True, False))
        return below / len(bounds), above / len(bounds)

    @cached_property
    def warning(self) -> str | None:
        """Why the error of `mean` is not to be trusted, or None; that of the first fit that has one."""
        warnings = [fit.warning for fit in self.fits if fit.warning is not None]
        if not warnings or len(self.fits) == 1:
            return warnings[0] if warnings else None
        return f"{warnings[0]} ({len(warnings)} of {len(self.fits)} fits have such a warning)"

    @property
    def interval(self) -> Interval:
        """Interval for the mean over the population that the data (and the fits, if several) are drawn from, nats.

        [mean - t se, mean + B + t se] with B the bias bound, on the other side for an upper bound. It is about this row
        alone; differences of rows have intervals of their own, which are narrower.
        """
        half, (below, above) = self.error.half_width(self.level), self.bias
        return Interval(self.mean - below - half, self.mean + above + half, self.level, self.warning)

    @property
    def fixed_interval(self) -> Interval:
        """Interval for the mean of exactly these data and fits, [mean - z mc_se, mean + B + z mc_se], nats."""
        half, (below, above) = NormalDist().inv_cdf((1 + self.level) / 2) * self.mc_se, self.bias
        return Interval(self.mean - below - half, self.mean + above + half, self.level, self.warning)

    @property
    def bits_per_dim(self) -> float | None:
        """Bits per dimension of the grey levels, or None where the space has none."""
        return self.result.space.bits_per_dim(self.mean)

    @property
    def bits_direction(self) -> str:
        """The side on which the true bits/dim of the grey levels lie.

        A lower bound on log p is an upper bound on bits/dim. For dequantised data (`Real` with levels) the
        density itself bounds the grey levels' log P from below, a second bound of the same kind.
        """
        dequantised = isinstance(self.result.space, Real)
        return flip(combine(self.direction, "lower" if dequantised else "exact"))

    @property
    def frac_khat_high(self) -> float | None:
        """Share of the data with k-hat above 0.7, averaged over the fits; None where a fit has no k-hat."""
        shares = [fit.frac_khat_high for fit in self.fits]
        known = [share for share in shares if share is not None]
        return float(np.mean(known)) if len(known) == len(shares) else None

    @property
    def seconds(self) -> float:
        """Seconds that the estimates of all fits took together."""
        return sum(fit.seconds for fit in self.fits)

    def to_dict(self) -> dict[str, object]:
        """The figures under the keys of `comparison.json`; None for what is not a finite number.

        With several fits, what differs from fit to fit is None, and `fits` holds the summary of each.
        """
        summaries = [_summary(fit) for fit in self.fits]
        common = {key: value if _same(summaries, key) else None for key, value in summaries[0].items()}
        own = {
            "direction": self.direction,
            "mean_log_prob": self.mean,
            "mc_se": self.mc_se,
            "test_se": self.test_se,
            "interval_low": self.interval.low,
            "interval_high": self.interval.high,
            "bias_bound": self.bias_bound,
            "warning": self.warning,
            "bits_per_dim": self.bits_per_dim,
            "bits_per_dim_direction": self.bits_direction,
            "frac_khat_above_0.7": self.frac_khat_high,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "num_fits": len(self.fits),
            "fit_sd": self.fit_sd,
            "fit_se": self.error.of_fits,
        }
        fits = {"fits": summaries} if len(self.fits) > 1 else {}
        return finite({"model": self.model, **common, **own, **fits})


def _bias_bound(fit: LogLikelihood) -> float | None:
    return 0.0 if fit.bias_bound is None and fit.direction == "exact" else fit.bias_bound


def _summary(fit: LogLikelihood) -> dict[str, object]:
    return finite({key: value for key, value in fit.summary().items() if key not in OF_THE_GROUP})


def _same(summaries: list[dict[str, object]], key: str) -> bool:
    return all(summary.get(key) == summaries[0][key] for summary in summaries)


def flip(direction: str) -> str:
    """The direction of minus an estimate."""
    return {"lower": "upper", "upper": "lower"}.get(direction, direction)


def combine(first: str, second: str) -> str:
    """The direction of the sum of two estimates.

    "exact" is neutral; like bounds add up to the same bound; a lower and an upper bound add up to "unknown".
    An "unbiased" estimate promises no side, so that beside a bound it leaves "unknown" too.
    """
    if first == second or second == "exact":
        return first
    return second if first == "exact" else "unknown"


def finite(values: dict[str, object]) -> dict[str, object]:
    """The same dictionary with None in place of NaN and infinities, in dictionaries inside it too."""
    return {key: _finite(value) for key, value in values.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return finite(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
