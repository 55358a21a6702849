"""How well a score tells outliers from inliers: the area under the ROC curve, with an interval."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import expit, logit
from scipy.stats import rankdata


@dataclass(frozen=True)
class Auroc:
    """P(an outlier scores above an inlier), ties counted half: 0.5 is chance; below it the score has the wrong sign.

    Attributes:
        value: the share of pairs in the right order.
        se: its standard error over draws of both samples, by DeLong.
        low: lower end of the interval.
        high: upper end.
        level: its coverage.
    """

    value: float
    se: float
    low: float
    high: float
    level: float


def auroc(outliers: np.ndarray, inliers: np.ndarray, *, level: float = 0.95) -> Auroc:
    r"""Area under the ROC curve of scores of which the higher is more of an outlier.

    A = mean over all pairs of 1{s > t} + ½ 1{s = t}. With V_i the share of inliers below outlier i and W_j the share of
    outliers above inlier j, se² = var(V)/m + var(W)/n. The interval is taken on the scale of log(A/(1 - A)). Where all
    pairs are in one order, or all tie, there is no variance to estimate, and se = 0 says nothing: none of the min(m, n)
    disjoint pairs was otherwise, so that by Clopper and Pearson a share 1 - e of all pairs at most is, with
    e = ((1 - level)/2)^(1/min(m, n)). These could lie in either order: the interval is [e A, 1 - e (1 - A)].

    The interval is about the laws of which both are samples; where one is an enumeration, it does not apply.

    Args:
        outliers: scores (m,).
        inliers: scores (n,).
        level: coverage of the interval.

    Raises:
        ValueError: fewer than two of either, or a NaN.

    Source: DeLong, DeLong, Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", 1988 (Biometrics); Qin, Hotilovac, "Comparison of non-parametric confidence intervals for
    the area under the ROC curve", 2008.
    """
    above, below = np.asarray(outliers, dtype=np.float64), np.asarray(inliers, dtype=np.float64)
    for name, values in (("outliers", above), ("inliers", below)):
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"{name} must hold at least two scores, shape (n,), got shape {values.shape}")
        if np.isnan(values).any():
            raise ValueError(f"{name} must not be NaN, but that of datum {int(np.isnan(values).argmax())} is")
    together = rankdata(np.concatenate([above, below]))
    of_outliers = (together[: len(above)] - rankdata(above)) / len(below)  # V
    of_inliers = 1 - (together[len(above) :] - rankdata(below)) / len(above)  # W
    value = float(of_outliers.mean())
    se = math.sqrt(of_outliers.var(ddof=1) / len(above) + of_inliers.var(ddof=1) / len(below))
    low, high = _interval(value, se, min(len(above), len(below)), level)
    return Auroc(value, se, low, high, level)


def _interval(value: float, se: float, num_pairs: int, level: float) -> tuple[float, float]:
    if se == 0:
        alike = ((1 - level) / 2) ** (1 / num_pairs)
        return alike * value, 1 - alike * (1 - value)
    half = NormalDist().inv_cdf((1 + level) / 2) * se / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))
