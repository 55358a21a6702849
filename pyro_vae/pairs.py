"""Two rows of a comparison: their paired difference, its intervals, and what may be said of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pyro_vae import intervals
from pyro_vae.estimators.estimate import RAISE
from pyro_vae.intervals import Clusters, StandardError
from pyro_vae.rows import Row, combine, finite, flip

ENOUGH_FITS = 5  # from which a claim may be about a method


@dataclass(frozen=True)
class Pair:
    """Paired difference of two models on the same data, nats per datum.

    With d_n = log p_a(x_n) - log p_b(x_n), a having the higher mean, and B how far the truth may lie from each mean
    beyond its sampling error, the interval is [mean d - B_b - q se, mean d + B_a + q se] (for an upper bound B counts
    on the other side). q is a t quantile, raised so that the intervals of all pairs hold at once.

    Attributes:
        a: the model with the higher mean.
        b: the other.
        difference: mean d; over the fits too, where there are several.
        se: standard error of `difference` over draws of the test set (clusters of it, if there are any), with the Monte
            Carlo noise of both, and over fits where there are several; NaN for a single datum.
        low: lower end of the interval that holds together with those of all other pairs.
        high: upper end.
        direction: where the true difference lies in expectation, apart from the sampling error: "exact"; "unbiased";
            "lower": at least `difference`; "upper": at most `difference`; "unknown": two bounds on the same side, whose
            gaps pull against each other, or a bound beside an unbiased estimate.
        level: coverage of the interval.
        pointwise_low: lower end of the interval that covers at `level` for this pair alone.
        pointwise_high: upper end.
        mc_se: the Monte Carlo part alone, √Σ (s_a² + s_b²)/n: the error of `difference` for these data and fits.
        fit_se: the part of `se` over fits, or None where neither model was fitted more than once.
        bias_low: how far the true difference may lie below `difference` beyond its sampling error.
        bias_high: how far it may lie above.
        skewness: of d (of its sums over clusters).
        warnings: why the interval is not to be trusted, at most one reason for each model.
        error: `se` in its parts.
        joint_level: the pointwise level at which all intervals hold at once at `level`.
        count: number of data, or of clusters if there are any.
    """

    a: str
    b: str
    difference: float
    se: float
    low: float
    high: float
    direction: str
    level: float
    pointwise_low: float
    pointwise_high: float
    mc_se: float
    fit_se: float | None
    bias_low: float
    bias_high: float
    skewness: float
    warnings: tuple[str, ...]
    error: StandardError
    joint_level: float
    count: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval is above 0."""
        return self.low > 0

    @property
    def is_sure(self) -> bool:
        """Whether nothing speaks against the claim of `verdict`.

        "a above b" needs the lower end alone. Where the difference is a lower bound in expectation, that end holds
        whatever a warning says of the bias and of the Monte Carlo error, which can only have made it too low.
        """
        return self.warning is None or (self.told_apart and self.direction == "lower")

    def words(self, a: str, b: str) -> str:
        """The verdict in few words about models of these names."""
        if math.isnan(self.se):
            return "one datum gives no interval"
        words = f"{a} above {b}" if self.told_apart else f"{a} and {b} cannot be told apart"
        return words if self.is_sure else f"as estimated: {words}"

    @property
    def verdict(self) -> str:
        """What the interval and the direction allow one to say, as a sentence, with what speaks against it."""
        claim = self.words(self.a, self.b)
        if self.warning is None or math.isnan(self.se):
            return claim
        return f"{claim}{'; by how much is as estimated' * self.is_sure}; {self.warning}"

    @property
    def warning(self) -> str | None:
        """Why the interval is not to be trusted, or None."""
        return "; ".join(self.warnings) or None

    @property
    def is_skewed(self) -> bool:
        """Whether d is so skewed that an interval about its mean is rough: n < 25 γ².

        Source: Cochran, "Sampling Techniques", 3rd edition 1977, section 2.15.
        """
        return self.count < intervals.SKEWNESS_FACTOR * self.skewness**2

    def to_dict(self) -> dict[str, object]:
        """The figures under the keys of `comparison.json`; None for what is not a finite number."""
        hidden = ("error", "count", "joint_level", "warnings")
        said = {"warning": self.warning, "verdict": self.verdict}
        return finite({**{key: value for key, value in vars(self).items() if key not in hidden}, **said})

    def wanted(self, unit: str = "test data") -> str | None:
        """What would tell the two apart, were the true difference the estimated one; None if they already are.

        As a rule n (q se √n / (d - B))² data, at which the interval would end at 0; where most of se² is Monte Carlo
        noise, more particles in place of data; where the bias or the fits are in the way, that no data will help.

        Args:
            unit: of what there would be more, "test data" or "clusters".
        """
        if self.told_apart or math.isnan(self.se):
            return None
        target = self.difference - self.bias_low
        of_data, of_fits, of_shared = self.error.half_widths(self.joint_level)
        if self.bias_low > 0 and (target <= 0 or math.hypot(of_data, of_fits, of_shared) < self.difference):
            help_or_not = f"more {unit} will not help" if target <= 0 else "nothing else is in the way"
            return f"the bias may be {self.bias_low:.2g} nats: a tighter estimate (particles, annealing); {help_or_not}"
        if target <= 0:
            return "nothing, the estimates are equal"
        left = target**2 - of_fits**2 - of_shared**2  # what the half width due to the data may be, squared
        if left <= 0 and of_shared > of_fits:
            return f"a longer annealing of log Z, whose error all data share; more {unit} will not help"
        if left <= 0:
            return f"more fits, as they differ by more than the models do; more {unit} will not help"
        own = max(0.0, self.mc_se**2 - self.error.shared**2)  # without what all data share
        noise = of_data**2 * own / self.error.of_data**2  # of that half width, what is Monte Carlo noise now
        if of_data**2 / 2 < noise < math.inf and left > of_data**2 - noise:
            return f"{_rough(noise / (left - of_data**2 + noise))} times as many particles"
        return f"{_rough(self.count * of_data**2 / left)} {unit} (now {self.count:,})"


def _rough(number: float) -> str:
    """A number to two digits, "about 3,400"; that is as much as such a forecast is worth."""
    if number >= 1e9:
        return "more than 1,000,000,000"
    digits = max(0, math.floor(math.log10(number)) - 1)
    return f"about {math.ceil(number / 10**digits) * 10**digits:,}" if number >= 10 else f"about {number:.1f}"


def all_pairs(rows: Sequence[Row], clusters: Clusters, level: float, seed: int) -> tuple[Pair, ...]:
    """The paired difference of every two rows, the higher one first, with intervals that hold all at once.

    Args:
        rows: best mean first.
        clusters: which data belong together.
        level: probability that all intervals hold.
        seed: of the bootstrap that finds their common level.
    """
    moves = intervals.influence(np.stack([row.log_prob for row in rows], 1), clusters)  # (G, num_rows)
    # What the data of one row share is as independent of the other rows as a fit is.
    fit_variances = np.array([(row.error.of_fits or 0.0) ** 2 + row.error.shared**2 for row in rows])
    joint_level = intervals.simultaneous_level(moves, fit_variances, level, seed)
    return tuple(_pair(a, b, clusters, level, joint_level) for a, b in combinations(rows, 2))


def _side(row: Row) -> str:
    """The side that a row promises of log p(x): RAISE bounds the law of its sampler, which may lie above it."""
    return "unknown" if any(fit.estimator == RAISE for fit in row.fits) else row.direction


def _pair(a: Row, b: Row, clusters: Clusters, level: float, joint_level: float) -> Pair:
    gain = a.log_prob - b.log_prob  # (n,)
    difference = float(np.mean(gain))
    moves = intervals.influence(gain[:, None], clusters)[:, 0]  # of the gain itself: no digits are lost
    parts = ((float(np.linalg.norm(moves)), clusters.df), *a.error.parts[1:], *b.error.parts[1:])
    error = StandardError(parts, math.hypot(a.error.shared, b.error.shared))
    bias_low, bias_high = a.bias[0] + b.bias[1], a.bias[1] + b.bias[0]
    half, alone = error.half_width(joint_level), error.half_width(level)
    warnings = [f"{row.model}: {row.warning}" for row in (a, b) if row.warning is not None]
    return Pair(
        a=a.model,
        b=b.model,
        difference=difference,
        se=error.value,
        low=difference - bias_low - half,
        high=difference + bias_high + half,
        direction=combine(_side(a), flip(_side(b))),
        level=level,
        pointwise_low=difference - bias_low - alone,
        pointwise_high=difference + bias_high + alone,
        mc_se=math.hypot(a.mc_se, b.mc_se),
        fit_se=error.of_fits,
        bias_low=bias_low,
        bias_high=bias_high,
        skewness=intervals.skewness(moves),
        warnings=tuple(warnings),
        error=error,
        joint_level=joint_level,
        count=clusters.count,
    )
