"""Variational autoencoder: a Gaussian code, a decoder p(x | z), an amortised posterior q(z | x)."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..guides.mean_field import MeanField
from ..networks import make_decoder, make_encoder
from ..spaces import Binary, Quantized, Real, Space
from ..traces import announce


class VAE(nn.Module):
    r"""p(x) = ∫ p(x | z) N(z; 0, I) dz, the mixture of infinitely many simple laws.

    p(x | z) follows the space: Bernoulli logits (Binary), discretised logistic masses (Quantized), normals with
    learned variance (Real). q(z | x) is a mean-field Gaussian.

    Args:
        space: where the observations live.
        latent_dim: number of latents.
        hidden_dims: widths of the encoder's layers; the decoder mirrors them.
        network: "mlp" or "conv".
        activation: "tanh", "relu", "silu" or "elu".

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv:1312.6114.
    """

    spaces = (Binary, Quantized, Real)
    zero: Tensor

    def __init__(
        self,
        space: Space,
        *,
        latent_dim: int = 50,
        hidden_dims: Sequence[int] = (200, 200),
        network: str = "mlp",
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.space, self.latent_dim = space, latent_dim
        self.encoder = make_encoder(network, space.shape, hidden_dims, activation)
        self.posterior = MeanField(self.encoder.out_dim, latent_dim)
        self.decoder = make_decoder(network, latent_dim, hidden_dims, space.num_params, space.shape, activation)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def prior(self) -> TorchDistribution:
        """p(z) = N(0, I)."""
        loc = self.zero.expand(self.latent_dim)
        return dist.Normal(loc, loc + 1, validate_args=False).to_event(1)

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x, z)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior())  # (batch, latent_dim)
            pyro.sample("obs", self.space.likelihood(self.decoder(z)), obs=obs)  # p(x | z)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """q(z | x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            features = self.encoder(self.space.to_unit(obs))  # (batch, hidden_dim)
            pyro.sample("z", self.posterior(features))

    def initialize(self, obs: Tensor) -> None:
        """Start the decoder at the mean image of the training data."""
        self.decoder.center(self.space.marginal_params(obs))
