"""Variational autoencoder: a Gaussian code, a decoder p(x | z), an amortised posterior q(z | x)."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..checks import check_choice
from ..guides import family
from ..networks import make_decoder, make_encoder
from ..priors import initialize, make_prior
from ..spaces import Binary, Quantized, Real, Space
from ..spherical import Spherical
from ..traces import announce


class VAE(nn.Module):
    r"""p(x) = ∫ p(x | z) p(z) dz, the mixture of infinitely many simple laws; p(z) = N(0, I) unless told.

    p(x | z) follows the space: Bernoulli logits (Binary), discretised logistic masses (Quantized), normals with
    learned variance (Real). q(z | x) is a mean-field Gaussian unless told.

    Args:
        space: where the observations live.
        latent_dim: number of latents.
        hidden_dims: widths of the encoder's layers; the decoder mirrors them.
        network: "mlp", "conv" or "resnet".
        activation: "tanh", "relu", "silu" or "elu".
        guide: family of q(z | x): a name in guides/, "FILE.py:NAME", a class built as `Family(in_dim, latent_dim)`,
            or a module; see `pyro_vae.guides.family`.
        guide_options: further arguments of the family.
        prior: p(z): "standard", "mixture", "vamp" or "flow"; see `pyro_vae.priors`.
        prior_options: further arguments of the prior.
        observation: "pixelwise", the space's p(x | z), or "spherical", N(m(z), σ² I) with one learned σ (Real); see
            `pyro_vae.spherical`.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv:1312.6114.
    """

    spaces = (Binary, Quantized, Real)

    def __init__(
        self,
        space: Space,
        *,
        latent_dim: int = 50,
        hidden_dims: Sequence[int] = (200, 200),
        network: str = "mlp",
        activation: str = "tanh",
        guide: family.Choice = "mean_field",
        guide_options: Mapping[str, Any] | None = None,
        prior: str = "standard",
        prior_options: Mapping[str, Any] | None = None,
        observation: str = "pixelwise",
    ) -> None:
        super().__init__()
        self.space, self.latent_dim = space, latent_dim
        self.encoder = make_encoder(network, space.shape, hidden_dims, activation)
        self.posterior = family.make_posterior(guide, self.encoder.out_dim, latent_dim, guide_options)
        check_choice("observation", observation, ("pixelwise", "spherical"))
        self.observation = Spherical(space) if observation == "spherical" else None
        num_params = space.num_params if self.observation is None else 1
        self.decoder = make_decoder(network, latent_dim, hidden_dims, num_params, space.shape, activation)
        self.code_prior = make_prior(prior, latent_dim, space.shape, self.posterior, prior_options)

    def prior(self) -> TorchDistribution:
        """p(z)."""
        return self.code_prior(lambda inputs: self.posterior(self.encoder(inputs)))

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """p(x | z)."""
        likelihood = self.space.likelihood if self.observation is None else self.observation
        return likelihood(self.decoder(z))

    def hidden(self, obs: Tensor) -> Tensor:
        """What q(z | x) knows of x, (batch, hidden_dim)."""
        return self.encoder(self.space.to_unit(obs))

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x, z)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior())  # (batch, latent_dim)
            family.extend(self.posterior, z, lambda: self.hidden(obs))
            pyro.sample("obs", self.likelihood(z), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """q(z | x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            family.sample(self.posterior, self.hidden(obs), lambda z: self.log_joint(z, obs))

    def log_joint(self, z: Tensor, obs: Tensor) -> Tensor:
        """Log p(x, z), shape (..., batch), nats."""
        return self.prior().log_prob(z) + self.likelihood(z).log_prob(obs)

    def initialize(self, obs: Tensor) -> None:
        """Start the decoder at the mean image of the training data, and a VampPrior at images of it."""
        place = self.space if self.observation is None else self.observation
        self.decoder.center(place.marginal_params(obs))
        initialize(self.code_prior, self.space.to_unit(obs))
