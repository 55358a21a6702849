"""The law of x = g(z), g(z) = z/10 + z/|z|, z ~ N(0, I): a ring in the plane whose density is known."""

import math

import torch
from pyro.distributions import TorchDistribution, constraints


def ring(z):
    """g(z) = z/10 + z/|z|, (..., 2): one to one from the plane without its origin onto all outside the unit circle."""
    return z / 10 + z / z.norm(dim=-1, keepdim=True)


class RingLaw(TorchDistribution):
    r"""g keeps the angle and takes the radius ρ = |z| to r = |x| = 1 + ρ/10, so that p(x) is known.

    ρ has the density ρ exp(-ρ²/2) (a Rayleigh law), dρ = 10 dr, and the circle of radius r has the length 2π r:

        p(x) = 10 ρ exp(-ρ²/2) / (2π r),  ρ = 10 (r - 1),  for r > 1;  p(x) = 0 inside the unit circle.

    Source: Doersch, "Tutorial on Variational Autoencoders", 2016, arXiv:1606.05908, figure 2, for the map g.
    """

    arg_constraints, support = {}, constraints.real_vector

    def __init__(self):
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape=()):
        return ring(torch.randn(*sample_shape, 2))

    def log_prob(self, x):
        """Log p(x), nats, (...), in float64, as ρ is a small difference of radii; -inf inside the unit circle."""
        radius = x.double().norm(dim=-1)
        rho = 10 * (radius - 1)
        outside = rho > 0
        log_density = rho.where(outside, 1.0).log() - rho.square() / 2 - (radius * math.pi / 5).log()
        return log_density.where(outside, -math.inf)
