"""Log p(missing | given) as log p(x) - log p(given pixels): its error and its direction, from those of the two."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.estimators.estimate import Direction, Estimate, PrecisionError, flags
from pyro_vae.restoration.chain_rule import Walk

DIRECTIONS: dict[tuple[str, str], Direction] = {  # of log p(x) and of log p(given)
    ("exact", "exact"): "exact",
    ("unbiased", "unbiased"): "unbiased",
    ("exact", "lower"): "upper",
}
MIN_PARTICLES = 20  # from which k-hat can be had
SMALL = 0.1  # standard errors, up to which a bias goes without a note
WHOLE, GIVEN = "log p(x)", "log p(given)"


def difference(whole: Estimate, part: Callable[[], Estimate]) -> Estimate:
    """Log p(x) - log p(y) from independent estimates of both; the variances add up, and the diagnostics are the worse.

    Log p(x) may lie up to B_x above its estimate, and log p(y) up to B_y above its own, so that the truth lies between
    B_y below and B_x above their difference. An upper bound has the former as its bias bound. Other results have a bias
    bound to one side only, above: their entries are lowered by B_y, and the bound is B_x + B_y. Multilevel estimates
    leave little there, of the order of 1e-5 nats. What speaks of one part alone, as a certificate, is not kept.

    Raises:
        ValueError: two lower bounds, whose difference lies on no known side.
    """
    if whole.direction not in ("exact", "unbiased"):
        raise ValueError(
            f"log p(missing | given) is the difference of two estimates, and that of two {whole.direction} bounds lies "
            f"on no known side: {whole.estimator} cannot give it; use multilevel(...), which is unbiased"
        )
    other = part()
    direction = DIRECTIONS[whole.direction, other.direction]
    bias, lowered = None, 0.0
    if whole.bias_bound is not None and other.bias_bound is not None:
        bias = whole.bias_bound + other.bias_bound
        lowered = other.bias_bound if direction == "unbiased" else 0.0
    khat = _worse(np.maximum, whole.khat, other.khat)
    unknown = khat is None and whole.direction != "exact"
    return Estimate(
        whole.log_prob - other.log_prob - lowered,
        whole.variance + other.variance,
        direction,
        whole.estimator,
        num_particles=whole.num_particles + other.num_particles,
        ess=_worse(np.minimum, whole.ess, other.ess),
        khat=khat,
        khat_particles=whole.khat_particles or whole.num_particles,
        bad=flags(whole) | flags(other) if unknown else None,
        bias_bound=bias,
        precision_error=_of_both(whole.precision_error, other.precision_error),
        notes=(*_joined(whole, other), *_said(lowered, whole.variance + other.variance)),
    )


def _joined(whole: Estimate, other: Estimate) -> tuple[str, ...]:
    """What both say, once; and what one says, with its name."""
    both = [note for note in whole.notes if note in other.notes]
    own = [f"{name}: {note}" for name, of in ((WHOLE, whole), (GIVEN, other)) for note in of.notes if note not in both]
    return (*both, *own, f"log p(missing | given) = {WHOLE} - {GIVEN}, each estimated by itself")


def _said(lowered: float, variance: np.ndarray) -> tuple[str, ...]:
    """A note where the bias that is left in log p(given) is no longer small beside the Monte Carlo error."""
    error = math.sqrt(float(variance.sum())) / len(variance)
    if lowered <= SMALL * error:
        return ()
    left = f"{GIVEN} may lie {lowered:.2g} nats above its estimate beside a Monte Carlo error of {error:.2g}"
    return (f"{left}; the difference is lowered by these, so that its interval holds both sides",)


def _of_both(whole: PrecisionError | None, other: PrecisionError | None) -> PrecisionError | None:
    """What shorter numbers cost the difference of two estimates in the same precision."""
    if whole is None or other is None:
        return whole or other
    return PrecisionError(
        whole.precision,
        mean=whole.mean - other.mean,
        largest=whole.largest + other.largest,
        num_data=min(whole.num_data, other.num_data),
        num_particles=min(whole.num_particles, other.num_particles),
        se=None if whole.se is None or other.se is None else math.hypot(whole.se, other.se),
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
