"""A guide of your own: independent skew-normal latents. This file is all that has to be written."""

import math

import torch
from pyro.distributions import Normal, TorchDistribution, constraints
from torch import nn


class SkewNormalLaw(TorchDistribution):
    """z = μ + σ (δ|e₀| + √(1-δ²) e₁), whose density is 2/σ φ(t) Φ(αt) with t = (z-μ)/σ and α = δ/√(1-δ²)."""

    arg_constraints, support, has_rsample = {}, constraints.real, True

    def __init__(self, loc, scale, delta):
        self.loc, self.scale, self.delta = torch.broadcast_tensors(loc, scale, delta)
        super().__init__(self.loc.shape, validate_args=False)

    def rsample(self, sample_shape=()):
        e0, e1 = torch.randn((2, *sample_shape, *self.batch_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * (self.delta * e0.abs() + (1 - self.delta**2).sqrt() * e1)

    def log_prob(self, z):
        t, alpha = (z - self.loc) / self.scale, self.delta / (1 - self.delta**2).sqrt()
        return math.log(2) - self.scale.log() + Normal(0, 1).log_prob(t) + torch.special.log_ndtr(alpha * t)


class SkewNormal(nn.Module):
    """q(z | h) = Π_j SkewNormal(z_j; μ_j, σ_j, δ_j), all three linear in the features h, up to exp and tanh."""

    def __init__(self, in_dim, latent_dim):
        super().__init__()
        self.linear = nn.Linear(in_dim, 3 * latent_dim)

    def forward(self, features):
        loc, log_scale, skew = self.linear(features).chunk(3, -1)  # (..., latent_dim) each
        return SkewNormalLaw(loc, log_scale.exp(), 0.995 * skew.tanh()).to_event(1)  # |δ| < 1 keeps α finite
