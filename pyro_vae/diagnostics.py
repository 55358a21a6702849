"""What the importance weights say of themselves: effective sample size, k-hat, delta variance, doubling check."""

import math

import numpy as np
import torch
from torch import Tensor

KHAT_LIMIT = 0.7  # above it, the variance of the weights is no guide to the error (Vehtari et al. 2015, 1507.02646)
KHAT_SE = 2.0  # standard errors of k-hat that a single datum's flag adds to it
SPAN = 1e-3  # nats from the threshold to the largest weight, below which a tail is none
RATIO_LIMIT = 0.8  # of the gains of two doublings: above it what is left cannot be told from them


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = (Σ w)² / Σ w² over the first axis, from log weights (K, ...)."""
    return torch.exp(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0))


def delta_variance(ess: Tensor, num_particles: int) -> Tensor:
    """Variance of log mean w by the delta method, (1/ESS - 1/K) K/(K-1), nats²; infinite for a single particle."""
    if num_particles < 2:
        return torch.full_like(ess, math.inf)
    return ((1 / ess - 1 / num_particles) * num_particles / (num_particles - 1)).clamp(min=0)


def tail_length(num_particles: int) -> int:
    """How many of the largest weights k-hat is fitted to, min(0.2 K, 3 √K) rounded up."""
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def pareto_khat(largest: Tensor) -> Tensor:
    r"""Shape k of the generalised Pareto law of the largest weights.

    Below 0.5 the weights have a variance, below 1 a mean; above 0.7 the error of importance sampling is not to be
    trusted. It is a diagnostic, not an estimate, and it is blind to a mode that the guide never visits.

    Args:
        largest: the M + 1 largest log weights of each datum in any order, shape (M + 1, n); the smallest of them is
            the threshold.

    Returns:
        k-hat, shape (n,); -inf where the largest weights are equal to 1e-3 nats, inf where they are too far apart to
        tell, NaN where more than a quarter of them tie with the threshold, as they may with discrete latents.

    Source: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2015, arXiv:1507.02646; the
    fit is by Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto distribution", 2009.
    """
    ordered = (largest - largest.max(0).values).sort(0).values.double()
    excess = ordered[1:].exp() - ordered[0].exp()  # (M, n), ascending
    khat = _fit_shape(excess)
    ties = ordered[1 + int(len(excess) / 4 + 0.5) - 1] == ordered[0]
    khat = torch.where(khat.isnan(), torch.where(ties, math.nan, math.inf), khat)
    # A tail that spans so little cannot move the mean, and near rounding no shape can be had.
    return torch.where(ordered[-1] - ordered[0] < SPAN, -math.inf, khat)


def _fit_shape(excess: Tensor) -> Tensor:
    """Posterior mean of k under the Zhang-Stephens prior, pulled a little to 0.5 as PSIS does."""
    size = len(excess)
    grid_size = 30 + int(math.sqrt(size))
    grid = torch.arange(1, grid_size + 1, dtype=excess.dtype, device=excess.device) - 0.5
    quartile = excess[int(size / 4 + 0.5) - 1]
    b = (1 - torch.sqrt(grid_size / grid))[:, None] / (3 * quartile) + 1 / excess[-1]  # (grid, n)
    k = torch.log1p(-b[:, None] * excess).mean(1)  # (grid, n)
    log_likelihood = size * (torch.log(-b / k) - k - 1)
    weights = torch.softmax(log_likelihood, 0)
    b_mean = (b * weights).sum(0)
    k_mean = torch.log1p(-b_mean * excess).mean(0)
    return (size * k_mean + 5) / (size + 10)


def khat_limit(num_particles: int) -> float:
    """The k-hat up to which the errors may be trusted, min(1 - 1/log10 K, 0.7)."""
    return min(1 - 1 / math.log10(num_particles), KHAT_LIMIT) if num_particles > 1 else KHAT_LIMIT


def khat_se(khat: np.ndarray, num_particles: int) -> np.ndarray:
    """Standard error of k-hat, (1 + k)/√M with M tail weights: the asymptotic one of maximum likelihood."""
    return np.maximum(1 + np.where(np.isneginf(khat), -1.0, khat), 0) / math.sqrt(tail_length(num_particles))


def khat_flags(khat: np.ndarray, num_particles: int, num_se: float = KHAT_SE) -> np.ndarray:
    """Which data have weights too heavy for their error to be trusted: k-hat + `num_se` SE is above the limit.

    A k-hat that could not be had (NaN) is flagged too.

    Args:
        khat: shape (n,).
        num_particles: K, the particles of each datum that k-hat rests on.
        num_se: standard errors that are added, since a case at the limit falls below it half the time.

    Returns:
        Booleans (n,).
    """
    with np.errstate(invalid="ignore"):
        return ~(khat + num_se * khat_se(khat, num_particles) <= khat_limit(num_particles))


def doubling_check(quarter: Tensor, half: Tensor, whole: Tensor) -> tuple[float | None, float | None]:
    """Bias that is left in the mean of log p, from its growth as the particles are doubled twice.

    With D1 = mean(L_{K/2} - L_{K/4}), D2 = mean(L_K - L_{K/2}) and r = D2/D1, later doublings add about D2 r/(1 - r).

    Args:
        quarter: L from the first K/4 particles, shape (n,), nats.
        half: L from the first K/2 particles.
        whole: L from all K.

    Returns:
        The remaining bias in nats, to be added, and r, near 0.5 where all is well. Both are None where a gain is within
        3 of its standard errors over the data: it is then noise. The bias alone is None where r is above 0.8, as the
        series does not settle.
    """
    gains = torch.stack([half - quarter, whole - half]).double()  # (2, n)
    if gains.shape[1] < 2:
        return None, None
    first, second = gains.mean(1).tolist()
    noise = gains.std(1) / math.sqrt(gains.shape[1])
    if bool((gains.mean(1) < 3 * noise).any()) or first <= 0:
        return None, None
    ratio = second / first
    return (second * ratio / (1 - ratio) if ratio <= RATIO_LIMIT else None), ratio
