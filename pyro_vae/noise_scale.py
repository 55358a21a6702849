"""The σ of N(m(z), σ² I) that makes data most probable, for a decoder m that stays as it is."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

NUM_STARTS = 1000  # prior draws, the nearest of which each datum starts from
TARGET_ACCEPTANCE = 0.65
ADAPTATION = 0.3  # log step size per unit of acceptance off its target


def likeliest_scale(
    mean: Callable[[Tensor], Tensor], latent_dim: int, obs: Tensor, *, num_iterations: int = 200, num_leapfrog: int = 5
) -> Tensor:
    r"""Maximise Σ_n log ∫ N(z; 0, I) N(x_n; m(z), σ² I) dz over σ, by stochastic EM.

    An iteration moves one z of each datum by Hamiltonian Monte Carlo with a Metropolis test, which leaves p(z | x_n) at
    the present σ as it is, and then has σ² = mean over data and pixels of (x_n - m(z_n))², the maximum over σ given
    z. In the second half of the iterations the step sizes stay and that σ² is averaged, so that it converges. As σ
    begins wide, the chains cool slowly; those that end in a lesser mode make σ too large, never the density wrong.
    Random numbers are torch's own: seed before.

    Args:
        mean: m, from codes (..., latent_dim) to (..., *shape), differentiable.
        latent_dim: entries of a code.
        obs: data (n, *shape), on the device and of the dtype of m.
        num_iterations: of EM.
        num_leapfrog: leapfrog steps of a move.

    Returns:
        σ, shape (), in units of the data.

    Source: Delyon, Lavielle, Moulines, "Convergence of a stochastic approximation version of the EM algorithm", 1999
    (Annals of Statistics).
    """
    flat = obs.flatten(1)

    def squares(z: Tensor) -> Tensor:
        return (mean(z).flatten(1) - flat).square().sum(-1)  # (n,)

    with torch.no_grad():
        z = _nearest(mean, latent_dim, flat)
        variance = squares(torch.randn_like(z)).mean() / flat.shape[1]
    log_size = torch.full_like(z[:, :1], -0.25 * math.log(latent_dim))
    warm_up = num_iterations // 2
    for iteration in range(num_iterations):
        z, probability = _moved(partial(_log_joint, squares, variance), z, log_size, num_leapfrog)
        with torch.no_grad():
            found = squares(z).mean() / flat.shape[1]
        if iteration < warm_up:
            log_size = log_size + ADAPTATION * (probability.unsqueeze(-1) - TARGET_ACCEPTANCE)
            variance = found
        else:
            variance = torch.lerp(variance, found, 1 / (iteration - warm_up + 1))
    return variance.sqrt()


def _log_joint(squares: Callable[[Tensor], Tensor], variance: Tensor, z: Tensor) -> Tensor:
    """Log p(x_n, z_n) up to a constant, (n,), nats."""
    return -squares(z) / (2 * variance) - z.square().sum(-1) / 2


def _nearest(mean: Callable[[Tensor], Tensor], latent_dim: int, flat: Tensor) -> Tensor:
    """For each datum the prior draw whose mean is nearest, of draws that all share, (n, latent_dim)."""
    draws = torch.randn(NUM_STARTS, latent_dim, dtype=flat.dtype, device=flat.device)
    return draws[torch.cdist(flat, mean(draws).flatten(1)).argmin(1)]


def _moved(
    log_density: Callable[[Tensor], Tensor], z: Tensor, log_size: Tensor, num_leapfrog: int
) -> tuple[Tensor, Tensor]:
    """One Hamiltonian move of each datum's z and the probabilities (n,) with which it was accepted."""
    size, momentum = log_size.exp(), torch.randn_like(z)
    before, slope = _with_gradient(log_density, z)
    energy = before - momentum.square().sum(-1) / 2
    there, momentum = z, momentum + size / 2 * slope
    for leap in range(num_leapfrog):
        there = there + size * momentum
        after, slope = _with_gradient(log_density, there)
        momentum = momentum + size * (0.5 if leap == num_leapfrog - 1 else 1.0) * slope
    change = (after - momentum.square().sum(-1) / 2 - energy).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    probability = change.clamp(max=0).exp()
    accepted = torch.rand_like(probability) < probability
    return torch.where(accepted.unsqueeze(-1), there, z), probability


def _with_gradient(log_density: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = log_density(z)
        return values.detach(), torch.autograd.grad(values.sum(), z)[0]
