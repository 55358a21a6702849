"""Split-conformal p-values of outlier scores, and which data to flag at a rate of false discoveries."""

import numpy as np

from pyro_vae.checks import check_choice
from pyro_vae.uses import SIDES


def conformal_p_values(calibration: np.ndarray, scores: np.ndarray, *, sides: str = "one", seed: int = 0) -> np.ndarray:
    r"""Conformal p-value of each score against those of n inliers that had no part in the fit.

    p = (1 + #{i: s_i at least as extreme as s}) / (n + 1), where each score that ties with s is put before or behind it
    by one seeded draw of its rank among the ties. If s and the s_i are exchangeable, the rank of s among all n + 1 is
    uniform, so that p is uniform on {1, ..., n + 1}/(n + 1): P(p <= t) = t for each of these values, discrete scores
    included, whatever the model is worth. For `sides` "two" a low score is as extreme as a high one,
    p = min(1, 2 min(r, n + 2 - r) / (n + 1)) with the rank r from the top.

    That holds for data and calibration together, on average over draws of the calibration set. It breaks where the
    model, or a choice made for it (an epoch, a threshold), has seen the calibration data. p-values of several data
    share the calibration set and so depend on each other; `false_discoveries` bears with that.

    Args:
        calibration: scores of the n inliers, shape (n,); higher is more of an outlier.
        scores: shape (m,).
        sides: "one": high scores are extreme; "two": low ones too.
        seed: of the draws among ties.

    Returns:
        Shape (m,).

    Raises:
        ValueError: a score is NaN, or there is no calibration score.

    Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005; Bates, Candès, Lei, Romano, Sesia,
    "Testing for outliers with conformal p-values", 2023, arXiv:2104.08279.
    """
    check_choice("sides", sides, SIDES)
    calibration, scores = _checked("calibration", calibration), _checked("scores", scores)
    if len(calibration) == 0:
        raise ValueError("calibration must hold at least one score, got none")
    ordered, size = np.sort(calibration), len(calibration) + 1
    above = len(ordered) - np.searchsorted(ordered, scores, side="right")
    ties = len(ordered) - np.searchsorted(ordered, scores, side="left") - above
    rank = 1 + above + np.random.default_rng(seed).integers(0, ties + 1)  # from the top, 1..n + 1
    if sides == "one":
        return rank / size
    return np.minimum(1.0, 2 * np.minimum(rank, size + 1 - rank) / size)


def false_discoveries(p_values: np.ndarray, level: float = 0.1) -> np.ndarray:
    r"""Which data to flag, so that the expected share of inliers among them is at most `level`; booleans (m,).

    Benjamini and Hochberg: flag the k smallest p-values, k the largest with p_(k) <= level k/m. Conformal p-values of
    inliers are positively dependent on a subset, for which this holds (Bates et al., theorem 2). With n calibration
    scores none is below 1/(n + 1), so that a single outlier among m data needs n + 1 >= m/level to be flagged.

    Source: Benjamini, Hochberg, "Controlling the false discovery rate", 1995 (JRSS B); Bates et al. 2023,
    arXiv:2104.08279.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    p_values = _checked("p_values", p_values)
    order = np.argsort(p_values, kind="stable")
    passes = p_values[order] <= level * np.arange(1, len(order) + 1) / len(order)
    flagged = np.zeros(len(order), dtype=bool)
    if passes.any():
        flagged[order[: np.flatnonzero(passes)[-1] + 1]] = True
    return flagged


def _checked(name: str, values: np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), got {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name} must not be NaN, but that of datum {int(np.isnan(array).argmax())} is")
    return array
