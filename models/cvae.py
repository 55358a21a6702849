"""Conditional VAE: p(y | x) with a recognition network q(z | y, x) and a learned conditional prior p(z | x)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..guides import family
from ..networks import make_decoder, make_encoder
from ..priors import LearnedConditional, StandardNormal
from ..spaces import Binary, Labels, Quadrants, Quantized, Real, Space
from ..traces import announce


class CVAE(nn.Module):
    r"""p(y | x) = ∫ p(y | z, x) p(z | x) dz, where the context x is a class label or the given part of an image.

    Args:
        space: where the observations y live.
        context: what the context x is.
        latent_dim: number of latents.
        hidden_dims: widths of the recognition network's layers; the decoder mirrors them.
        prior: "learned" for p(z | x) by a network of the context, "standard" for N(0, I).
        network: "mlp", or "conv" or "resnet" (whole images only).
        activation: "tanh", "relu", "silu" or "elu".
        guide: family of q(z | y, x): a name in guides/, "FILE.py:NAME", a class built as `Family(in_dim, latent_dim)`,
            or a module; see `pyro_vae.guides.family`.
        guide_options: further arguments of the family.

    Source: Sohn, Lee, Yan, "Learning Structured Output Representation using Deep Conditional Generative Models",
    2015 (NeurIPS).
    """

    spaces = (Binary, Quantized, Real)

    def __init__(
        self,
        space: Space,
        context: Labels | Quadrants,
        *,
        latent_dim: int = 50,
        hidden_dims: Sequence[int] = (200, 200),
        prior: str = "learned",
        network: str = "mlp",
        activation: str = "tanh",
        guide: family.Choice = "mean_field",
        guide_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if prior not in ("learned", "standard"):
            raise ValueError(f"prior must be 'learned' or 'standard', got {prior!r}")
        self.space, self.context, self.latent_dim = space, context, latent_dim
        self.encoder = make_encoder(network, space.shape, hidden_dims, activation, context.num_dims)
        self.posterior = family.make_posterior(guide, self.encoder.out_dim, latent_dim, guide_options)
        self.prior_net = (
            LearnedConditional(context.num_dims, hidden_dims[-1], latent_dim, activation)
            if prior == "learned"
            else StandardNormal(latent_dim)
        )
        self.decoder = make_decoder(
            network, latent_dim + context.num_dims, hidden_dims, space.num_params, space.shape, activation
        )

    def prior(self, context: Tensor) -> TorchDistribution:
        """p(z | x), or N(0, I)."""
        return self.prior_net(context)

    def likelihood(self, z: Tensor, context: Tensor) -> TorchDistribution:
        """p(y | z, x)."""
        code = torch.cat([z, context.expand(*z.shape[:-1], -1)], -1)  # (batch, latent_dim + context_dim)
        return self.space.likelihood(self.decoder(code))

    def hidden(self, obs: Tensor, context: Tensor) -> Tensor:
        """What q(z | y, x) knows of y and x, (batch, hidden_dim)."""
        return self.encoder(self.space.to_unit(obs), context)

    def model(self, obs: Tensor, context: Tensor) -> None:
        """p(y, z | x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior(context))  # (batch, latent_dim)
            family.extend(self.posterior, z, lambda: self.hidden(obs, context))
            pyro.sample("obs", self.likelihood(z, context), obs=obs)

    def guide(self, obs: Tensor, context: Tensor) -> None:
        """q(z | y, x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            family.sample(self.posterior, self.hidden(obs, context), lambda z: self.log_joint(z, obs, context))

    def log_joint(self, z: Tensor, obs: Tensor, context: Tensor) -> Tensor:
        """Log p(y, z | x), shape (..., batch), nats."""
        return self.prior(context).log_prob(z) + self.likelihood(z, context).log_prob(obs)

    def initialize(self, obs: Tensor) -> None:
        """Start the decoder at the mean image of the training data."""
        self.decoder.center(self.space.marginal_params(obs))
