"""Log p(missing | given) as log p(x) - log p(given pixels): its error and its direction, from those of the two."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.estimators.estimate import Direction, Estimate, flags
from pyro_vae.restoration.chain_rule import Walk

DIRECTIONS: dict[tuple[str, str], Direction] = {  # of log p(x) and of log p(given)
    ("exact", "exact"): "exact",
    ("unbiased", "unbiased"): "unbiased",
    ("exact", "lower"): "upper",
}
MIN_PARTICLES = 20  # from which k-hat can be had


def difference(whole: Estimate, part: Callable[[], Estimate]) -> Estimate:
    """Log p(x) - log p(y) from independent estimates of both; the variances add up, and the diagnostics are the worse.

    Raises:
        ValueError: two lower bounds, whose difference lies on no known side.
    """
    if whole.direction not in ("exact", "unbiased"):
        raise ValueError(
            f"log p(missing | given) is the difference of two estimates, and that of two {whole.direction} bounds lies "
            f"on no known side: {whole.estimator} cannot give it; use multilevel(...), which is unbiased"
        )
    other = part()
    bias = None
    if whole.bias_bound is not None and other.bias_bound is not None:
        bias = whole.bias_bound + other.bias_bound
    khat = _worse(np.maximum, whole.khat, other.khat)
    unknown = khat is None and whole.direction != "exact"
    return replace(
        whole,
        log_prob=whole.log_prob - other.log_prob,
        variance=whole.variance + other.variance,
        direction=DIRECTIONS[whole.direction, other.direction],
        num_particles=whole.num_particles + other.num_particles,
        ess=_worse(np.minimum, whole.ess, other.ess),
        khat=khat,
        khat_particles=whole.khat_particles or whole.num_particles,
        elbo=None,
        spread=None,
        bad=flags(whole) | flags(other) if unknown else None,
        bias_bound=bias,
        doubling_bias=None,
        doubling_ratio=None,
        notes=(*whole.notes, "log p(missing | given) = log p(x) - log p(given), each estimated by itself"),
    )


def exact_estimate(log_prob: np.ndarray) -> Estimate:
    """Values without any error."""
    return Estimate(log_prob, np.zeros_like(log_prob), "exact", "exact", 0, bias_bound=0.0)


def from_walk(log_prob: Tensor, found: Walk) -> Estimate:
    """From log p(x) (n,), exact, and a walk: exact too, or an upper bound in expectation."""
    if found.is_exact:
        return exact_estimate((log_prob - found.log_weights[0]).cpu().numpy())
    num = len(found.log_weights)
    log_given = found.log_weights.logsumexp(0) - np.log(num)
    ess = diagnostics.effective_sample_size(found.log_weights)
    variance = diagnostics.delta_variance(ess, num)
    khat = None
    if num >= MIN_PARTICLES:
        tail = diagnostics.tail_length(num)
        khat = diagnostics.pareto_khat(found.log_weights.topk(tail + 1, dim=0).values).cpu().numpy()
    return Estimate(
        (log_prob - log_given).cpu().numpy(),
        variance.cpu().numpy(),
        "upper",
        "likelihood_weighting",
        num,
        ess=ess.cpu().numpy(),
        khat=khat,
        bias_bound=float(variance.mean()) / 2 if bool(torch.isfinite(variance).all()) else None,
        notes=("log p(missing | given) = log p(x) - log p(given): the first exact, the second a lower bound",),
    )


def _worse(of: Callable[..., np.ndarray], a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return None if a is None or b is None else of(a, b)
