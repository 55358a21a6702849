"""Gaussian whose axes are turned by reflections that a network reads off its features."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from pyro_vae.checks import check_count
from pyro_vae.guides.heads import linear


class Householder(nn.Module):
    r"""q(z | h): z = μ + H_R ... H_1 (σ ε), with ε ~ N(0, I) and H_r = I - 2 v_r v_rᵀ / |v_r|²; v is linear in h.

    That is N(μ, H diag(σ²) Hᵀ). The paper reflects μ + σ ε as a whole, which is the same family, as any mean m is
    H Hᵀ m; here μ stays outside, so that a turn of the axes leaves the mean where it is. With latent_dim reflections
    every rotation, and with it every Gaussian, can be had; the volume stays as it is.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.
        num_reflections: R; with fewer latents than that R is latent_dim, as more reflections add no law.

    Raises:
        ValueError: there is no reflection.

    Source: Tomczak, Welling, "Improving Variational Auto-Encoders using Householder Flow", 2016, arXiv:1611.09630.
    """

    has_density = True

    def __init__(self, in_dim: int, latent_dim: int, *, num_reflections: int = 10) -> None:
        super().__init__()
        check_count("num_reflections", num_reflections)
        self.num_reflections = min(num_reflections, latent_dim)
        self.linear = linear(in_dim, 2 * latent_dim)
        self.normals = linear(in_dim, self.num_reflections * latent_dim)
        nn.init.normal_(self.normals.bias)  # features of zero have to name a direction too

    def forward(self, features: Tensor) -> TorchDistribution:
        loc, log_scale = self.linear(features).chunk(2, -1)  # (..., latent_dim) each
        noise = dist.Normal(torch.zeros_like(loc), log_scale.exp(), validate_args=False).to_event(1)
        turn = ConditionedHouseholder(self.normals(features).unflatten(-1, (self.num_reflections, -1)))
        shift = AffineTransform(loc, 1.0, event_dim=1, cache_size=1)
        return dist.TransformedDistribution(noise, [turn, shift], validate_args=False)
