"""Errors of means and of their differences: clusters, several fits, and intervals that hold all at once."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, stdtrit

NUM_DRAWS = 20_000  # of the max-T bootstrap: the coverage it aims at is met within a standard error of .0015
SKEWNESS_FACTOR = 25  # Cochran's rule: a normal interval for a mean needs n > 25 γ²
ENOUGH_PER_MEAN = 20  # data or clusters for each mean, from which their estimated correlations serve for max-T
SAME = 1e-9  # of the largest standard error: a difference below it does not vary but for rounding


@dataclass(frozen=True)
class StandardError:
    """Standard error of a mean as the sum of independent parts, each with its degrees of freedom.

    Attributes:
        parts: (standard error, degrees of freedom) of each part; the first is that over draws of the test set, the
            others are those over fits.
        shared: error that all data have in common, such as that of an energy model's log Z: neither data nor their
            scatter tell of it. Normal.
    """

    parts: tuple[tuple[float, float], ...]
    shared: float = 0.0

    @property
    def value(self) -> float:
        """√Σ se²; NaN if there is a single datum."""
        return math.hypot(*(se for se, _ in self.parts), self.shared)

    @property
    def of_data(self) -> float:
        """The part over draws of the test set."""
        return self.parts[0][0]

    @property
    def of_fits(self) -> float | None:
        """The parts over fits, or None where nothing was fitted more than once."""
        return math.hypot(*(se for se, _ in self.parts[1:])) if len(self.parts) > 1 else None

    def half_widths(self, level: float) -> tuple[float, float, float]:
        """Half widths due to the data, to the fits and to what all share; that of the interval is their hypotenuse."""
        scaled = [_t_quantile(level, df) * se for se, df in self.parts]
        return scaled[0], math.hypot(*scaled[1:]), _t_quantile(level, math.inf) * self.shared

    def half_width(self, level: float) -> float:
        """Half of an interval with coverage at least `level`, √Σ t²(df) se²: for one part the ordinary t interval.

        Where parts with different degrees of freedom add up, its coverage is never below `level`, as that of
        Satterthwaite's approximation may be: in simulation with two fits, .87 for a 95% interval.

        Source: Banerjee, "Approximate confidence interval for linear functions of means of k populations when the
        population variances are not equal", Sankhya 22, 1960.
        """
        return math.hypot(*self.half_widths(level))


def _t_quantile(level: float, df: float) -> float:
    return float(stdtrit(df, (1 + level) / 2)) if df > 0 else math.nan


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which data belong together: those of one video, one writer; without groups each datum is its own cluster.

    Attributes:
        index: number of each datum's cluster, shape (n,), from 0.
        count: number of clusters.
        given: whether groups were given.
    """

    index: np.ndarray
    count: int
    given: bool

    @property
    def df(self) -> int:
        """Degrees of freedom of a standard error over these clusters."""
        return self.count - 1

    @property
    def effective(self) -> float:
        """n² / Σ n_g²: as many clusters of like size weigh as much."""
        return float(len(self.index) ** 2 / np.sum(np.bincount(self.index).astype(float) ** 2))


def clusters(num_data: int, groups: Any = None) -> Clusters:
    """The clusters of n data.

    Args:
        num_data: n.
        groups: n labels of any kind (numbers, texts); data with the same label are dependent. None if all data are
            independent.

    Raises:
        ValueError: not one label per datum, a label that is NaN, or fewer than 2 clusters.
    """
    if groups is None:
        return Clusters(np.arange(num_data), num_data, given=False)
    labels = np.asarray(groups)
    if labels.shape != (num_data,):
        raise ValueError(f"groups must have shape ({num_data},), one label per datum, got {labels.shape}")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(
            f"groups must hold a label for each datum, got NaN for datum {np.flatnonzero(labels != labels)[0]}"
        )
    names, index = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"groups must hold at least 2 clusters, got {len(names)}")
    return Clusters(index.ravel(), len(names), given=True)


def influence(values: np.ndarray, grouping: Clusters) -> np.ndarray:
    r"""How far each cluster moves the mean: the covariance of the means of the columns is HᵀH.

    H_g = √((G-1)/G) Σ_{i in g} (x_i - x̄) / (n - n_g), the jackknife over clusters: the mean without cluster g differs
    from x̄ by -Σ_{i in g} (x_i - x̄)/(n - n_g). For clusters of one size it is the sandwich estimate with the factor
    G/(G-1), for single data s²/n; it does not understate where clusters differ much in size.

    Args:
        values: shape (n, num_means).
        grouping: of the n data.

    Returns:
        H, shape (G, num_means); NaN for a single cluster.

    Source: MacKinnon, Nielsen, Webb, "Cluster-robust inference: a guide to empirical practice", 2023, arXiv:2205.03285.
    """
    count = grouping.count
    if count < 2:
        return np.full((count, values.shape[1]), math.nan)
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, grouping.index, values - values.mean(0))
    rest = len(values) - np.bincount(grouping.index)
    return math.sqrt((count - 1) / count) * sums / rest[:, None]


def skewness(column: np.ndarray) -> float:
    """Skewness of the summands of a mean, shape (G,), mean about 0; 0 where they do not vary, NaN for one."""
    if len(column) < 2:
        return math.nan
    square = float(np.mean(column**2))
    return float(np.mean(column**3)) / square**1.5 if square > 0 else 0.0


def simultaneous_level(moves: np.ndarray, fit_variances: np.ndarray, level: float, seed: int = 0) -> float:
    r"""The level of each interval at which the intervals of all pairwise differences hold at once at `level`.

    With Gaussian multipliers ξ_g, one for each cluster, T = max_{a<b} |Σ_g ξ_g (H_ga - H_gb) + ζ_a - ζ_b| / se_ab,
    ζ_m ~ N(0, variance of m over fits). Given the data, the numerators are jointly Gaussian, so they are drawn from
    that law itself, which costs no more for many data. The quantile c of T gives the level 2Φ(c) - 1, at which each
    interval takes its own t quantile: that keeps the promise where fits are few. With fewer than 20 data or clusters
    for each mean the correlations are too uncertain (among six equal models and 10 data, false claims in 6.2% of
    simulated comparisons at 95%), and the level is that of Bonferroni.

    Args:
        moves: H of the means, shape (G, num_means); see `influence`.
        fit_variances: variance of each mean over fits, shape (num_means,); 0 for a single fit.
        level: probability that all intervals hold at once.
        seed: of the multipliers.

    Returns:
        A level between `level`, which it is for a single difference, and that of Bonferroni.

    Source: Chernozhukov, Chetverikov, Kato, "Gaussian approximations and multiplier bootstrap for maxima of sums of
    high-dimensional random vectors", 2013, arXiv:1212.6906.
    """
    count, num_means = moves.shape
    if num_means < 3 or not np.isfinite(moves).all():
        return level
    bonferroni = 1 - (1 - level) / math.comb(num_means, 2)
    if not suffices_for_max_t(count, num_means):
        return bonferroni
    moves = moves - moves.mean(1, keepdims=True)  # what all share is in no difference, and would only cost digits
    covariance = moves.T @ moves + np.diag(fit_variances)
    noise = np.random.default_rng(seed).standard_normal((NUM_DRAWS, num_means)) @ _root(covariance)
    largest = _largest(noise, covariance)
    joint = float(2 * ndtr(np.quantile(largest, level)) - 1)
    return min(max(joint, level), bonferroni)


def suffices_for_max_t(count: int, num_means: int) -> bool:
    """Whether there are enough data (clusters, if there are any) for the correlations of so many means."""
    return count >= ENOUGH_PER_MEAN * num_means


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root: the same draws whatever signs the eigenvectors come with."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _largest(noise: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Largest |difference| / standard error over all pairs, shape (num_draws,)."""
    variances = np.diag(covariance)
    errors = np.sqrt((variances[:, None] + variances - 2 * covariance).clip(min=0))  # (num_means, num_means)
    scale = np.where(errors > SAME * errors.max(), errors, math.inf)
    largest = np.zeros(len(noise))
    for a in range(len(covariance) - 1):
        ratios = np.abs(noise[:, a + 1 :] - noise[:, a, None]) / scale[a, a + 1 :]
        np.maximum(largest, ratios.max(1), out=largest)
    return largest
