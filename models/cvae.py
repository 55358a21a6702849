"""Conditional VAE: p(y | x) with a recognition network q(z | y, x) and a learned conditional prior p(z | x)."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..guides.mean_field import MeanField
from ..networks import MLPEncoder, make_decoder, make_encoder
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
        network: "mlp" or "conv" (whole images only).
        activation: "tanh", "relu", "silu" or "elu".

    Source: Sohn, Lee, Yan, "Learning Structured Output Representation using Deep Conditional Generative Models",
    2015 (NeurIPS).
    """

    spaces = (Binary, Quantized, Real)
    zero: Tensor

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
    ) -> None:
        super().__init__()
        if prior not in ("learned", "standard"):
            raise ValueError(f"prior must be 'learned' or 'standard', got {prior!r}")
        self.space, self.context, self.latent_dim = space, context, latent_dim
        self.encoder = make_encoder(network, space.shape, hidden_dims, activation, context.num_dims)
        self.posterior = MeanField(self.encoder.out_dim, latent_dim)
        self.prior_net = None
        if prior == "learned":
            prior_encoder = MLPEncoder((context.num_dims,), hidden_dims[-1:], activation)
            self.prior_net = nn.Sequential(prior_encoder, MeanField(prior_encoder.out_dim, latent_dim))
        self.decoder = make_decoder(
            network, latent_dim + context.num_dims, hidden_dims, space.num_params, space.shape, activation
        )
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def prior(self, context: Tensor) -> TorchDistribution:
        """p(z | x), or N(0, I)."""
        if self.prior_net is not None:
            return self.prior_net(context)
        loc = self.zero.expand(self.latent_dim)
        return dist.Normal(loc, loc + 1, validate_args=False).to_event(1)

    def model(self, obs: Tensor, context: Tensor) -> None:
        """p(y, z | x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior(context))  # (batch, latent_dim)
            code = torch.cat([z, context.expand(*z.shape[:-1], -1)], -1)  # (batch, latent_dim + context_dim)
            pyro.sample("obs", self.space.likelihood(self.decoder(code)), obs=obs)  # p(y | z, x)

    def guide(self, obs: Tensor, context: Tensor) -> None:
        """q(z | y, x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            features = self.encoder(self.space.to_unit(obs), context)  # (batch, hidden_dim)
            pyro.sample("z", self.posterior(features))

    def initialize(self, obs: Tensor) -> None:
        """Start the decoder at the mean image of the training data."""
        self.decoder.center(self.space.marginal_params(obs))
