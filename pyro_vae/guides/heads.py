"""What the families share: linear maps of the features, and laws z = μ + σ f(ε) made of a map f of standard noise."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import AffineTransform

from pyro_vae import independent


def linear(in_dim: int, out_dim: int, gain: float = 1.0) -> nn.Linear:
    """A linear map with Glorot's weights times `gain`, and biases of zero."""
    made = nn.Linear(in_dim, out_dim)
    nn.init.xavier_uniform_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


@torch.no_grad()
def shrink(layer: Any, factor: float) -> None:
    """Multiply a linear layer's weights by `factor` and let its biases be zero: its flow starts near the identity."""
    layer.weight.mul_(factor)
    layer.bias.zero_()


def diagonal_normal(parameters: Tensor) -> TorchDistribution:
    """N(μ, diag σ²) of (μ, log σ), shape (..., 2 latent_dim)."""
    loc, log_scale = parameters.chunk(2, -1)
    return independent.diagonal_normal(loc, log_scale.exp())


def location_scale(parameters: Tensor, flows: Sequence[Transform]) -> TorchDistribution:
    """The law of z = μ + σ f(ε), ε ~ N(0, I).

    The flows f act on standard noise and come before μ and σ, so that they see inputs of one size whatever the datum
    is. Every part keeps its last input: log q of the law's own draw inverts nothing.

    Args:
        parameters: μ and log σ, shape (..., 2 latent_dim).
        flows: the parts of f, the first one first.
    """
    loc, log_scale = parameters.chunk(2, -1)
    noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc), validate_args=False).to_event(1)
    affine = AffineTransform(loc, log_scale.exp(), event_dim=1, cache_size=1)
    return dist.TransformedDistribution(noise, [*flows, affine], validate_args=False)
