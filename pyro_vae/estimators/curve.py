"""The importance-weighted bounds L_K of several K, all from one stream of particles."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.estimators.estimate import Estimate
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.streaming import Accumulator, Blocks
from pyro_vae.traces import Pair


@dataclass(frozen=True, eq=False)
class Curve:
    """E L_K of each datum for several K, nats, each a mean over disjoint groups of K of the particles drawn.

    Attributes:
        num_particles: the K, ascending, from 1 (the ELBO) to all particles that were drawn.
        bounds: shape (len(num_particles), n), nats; in expectation nondecreasing in K and at most log p(x_n).
        variance: Monte Carlo variance of each entry, same shape, nats².
    """

    num_particles: tuple[int, ...]
    bounds: np.ndarray
    variance: np.ndarray


def flat(num_particles: Sequence[int], log_prob: np.ndarray) -> Curve:
    """The curve of a model without latent sites, where every bound is log p(x) itself, (n,), nats."""
    bounds = np.tile(log_prob, (len(num_particles), 1))
    return Curve(tuple(num_particles), bounds, np.zeros_like(bounds))


def sample_curve(
    num_particles: Sequence[int],
    pair: Pair,
    args: tuple[Tensor, ...],
    seed: int,
    progress: Callable[[int], object] = lambda num: None,
) -> tuple[Curve, Estimate]:
    r"""L_K = E log (1/K) Σ_k p(x, z_k)/q(z_k | x), z_k ~ q(z | x), for several K from the same particles.

    With M = max K particles of each datum, L_K is a mean over ⌊M/K⌋ disjoint groups, so that small K are known well;
    what fills no group is left out for that K. K = M gives the digits of `importance_sampling(M)` with the same seed.

    Args:
        num_particles: the K, ascending, the first 1 and the last at least 2.
        pair: model and guide, with latent sites.
        args: obs (n, ...) and, if the model has one, context (n, ...).
        seed: of the particles.
        progress: called with the number of data that are done.

    Returns:
        The curve, and the figures of importance sampling with all particles.

    Raises:
        ValueError: the ELBO of a datum is not finite, or a weight is NaN or infinite.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519, Theorem 1.
    """
    total = num_particles[-1]
    blocks = Blocks(pair, args, total, seed, tiled=not traces.broadcasts(pair, args))
    parts, curves = [], []
    for start, stop in blocks.data_ranges():
        whole = Accumulator(total, stop - start, args[0].device, jackknife=False)
        groups = [_Groups(size, stop - start, args[0].device) for size in num_particles[1:-1]]
        for log_weights in blocks.particles(start, stop):
            whole.update(log_weights)
            for each in groups:
                each.update(log_weights)
        figures = whole.finish()
        _check_elbo(figures["elbo"], start)
        parts.append(figures)
        curves.append(_curve(figures, groups, total))
        progress(stop - start)
    joined = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    bounds, variance = torch.cat(curves, -1).cpu().numpy()
    estimate = importance_sampling(total).estimate(joined, blocks.notes())
    return Curve(tuple(num_particles), bounds, variance), estimate


def _curve(figures: dict[str, Tensor], groups: Sequence["_Groups"], total: int) -> Tensor:
    """Bounds and variances of one block of data, shape (2, number of K, n)."""
    bounds = [figures["elbo"], *(each.mean for each in groups), figures["log_prob"]]
    variances = [figures["spread"] / total, *(each.variance(figures, total) for each in groups), figures["variance"]]
    return torch.stack([torch.stack(bounds), torch.stack(variances)])


def _check_elbo(elbo: Tensor, start: int) -> None:
    bad = (~elbo.isfinite()).nonzero()
    if len(bad):
        datum = int(bad[0])
        raise ValueError(
            f"the ELBO of datum {start + datum} is {float(elbo[datum])} ({len(bad)} such data in its block): the guide "
            "draws latents at which p(x, z) is 0, so there is no gap to compare"
        )


class _Groups:
    """Mean and variance over disjoint groups of `size` particles of log (1/size) Σ w, for a block of data."""

    def __init__(self, size: int, num_data: int, device: torch.device) -> None:
        self.size, self.filled, self.count = size, 0, 0
        self.open = torch.full((num_data,), -math.inf, dtype=torch.float64, device=device)  # log Σ w of the last group
        self.mean = torch.zeros(num_data, dtype=torch.float64, device=device)
        self.squares = torch.zeros(num_data, dtype=torch.float64, device=device)  # Σ (L - mean)²

    def update(self, log_weights: Tensor) -> None:
        """Take in log weights (k, n): close the open group, add those that lie within, open the next."""
        first = min(self.size - self.filled, len(log_weights)) if self.filled else 0
        self._fill(log_weights[:first])
        rest = log_weights[first:]
        inside = len(rest) // self.size
        if inside:
            self._add(rest[: inside * self.size].unflatten(0, (inside, self.size)).logsumexp(1))
        self._fill(rest[inside * self.size :])

    def _fill(self, log_weights: Tensor) -> None:
        if len(log_weights) == 0:
            return
        self.open = torch.logaddexp(self.open, log_weights.logsumexp(0))
        self.filled += len(log_weights)
        if self.filled == self.size:
            self._add(self.open[None])
            self.open, self.filled = torch.full_like(self.open, -math.inf), 0

    def _add(self, log_sums: Tensor) -> None:
        """Groups (g, n), merged as Chan, Golub and LeVeque (1983) do."""
        bounds = log_sums - math.log(self.size)
        added, mean = len(bounds), bounds.mean(0)
        delta, total = mean - self.mean, self.count + added
        self.squares = self.squares + (bounds - mean).square().sum(0) + delta**2 * (self.count * added / total)
        self.mean, self.count = self.mean + delta * (added / total), total

    def variance(self, figures: dict[str, Tensor], total: int) -> Tensor:
        """Variance of `mean`; for a single group by the delta method, with the relative variance of all weights."""
        if self.count == 1:
            return figures["variance"] * (total / self.size)
        return self.squares / (self.count * (self.count - 1))
