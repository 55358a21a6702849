"""Planar flows whose planes a network reads off its features."""

import math

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms.planar import ConditionedPlanar
from torch import Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.guides.heads import linear, location_scale


class Planar(nn.Module):
    r"""q(z | h): z = μ + σ (f_F ∘ ... ∘ f_1)(ε), ε ~ N(0, I), f(ε) = ε + u tanh(wᵀε + b); all are linear in h.

    Pyro bends u, so that wᵀu > -1 and f has an inverse, but one that no formula gives: log q is known at the law's own
    draws only.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.
        num_flows: F.

    Raises:
        ValueError: there is no flow.

    Source: Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015, arXiv:1505.05770.
    """

    has_density = False  # log q(z | x) can be had at the law's own draws only

    def __init__(self, in_dim: int, latent_dim: int, *, num_flows: int = 8) -> None:
        super().__init__()
        check_count("num_flows", num_flows)
        self.num_flows, self.latent_dim = num_flows, latent_dim
        self.linear = linear(in_dim, 2 * latent_dim)
        self.bias = linear(in_dim, num_flows)
        self.push = linear(in_dim, num_flows * latent_dim, gain=0.1)
        self.normal = linear(in_dim, num_flows * latent_dim)
        nn.init.normal_(self.normal.bias, std=latent_dim**-0.5)  # planes that differ, with |w| about 1, whatever h is

    def forward(self, features: Tensor) -> TorchDistribution:
        bias, push, normal = (
            layer(features).unflatten(-1, (self.num_flows, -1)).unbind(-2)
            for layer in (self.bias, self.push, self.normal)
        )
        flows = [ConditionedPlanar((b, u + _still(w), w)) for b, u, w in zip(bias, push, normal, strict=True)]
        return location_scale(self.linear(features), flows)


def _still(normal: Tensor) -> Tensor:
    """The u that Pyro's constraint, wᵀû = softplus(wᵀu) - 1, turns into û = 0: the flow starts near the identity."""
    return math.log(math.e - 1) * normal / torch.linalg.vecdot(normal, normal)[..., None]
