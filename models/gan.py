"""Generative adversarial network with normal noise on its images, which gives it a density."""

import math
from collections.abc import Callable, Sequence

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..adversarial import train
from ..checks import check_count, check_number
from ..data import Data
from ..networks import make_decoder, make_encoder
from ..noise_scale import likeliest_scale
from ..priors import StandardNormal
from ..randomness import NOISE, START, derived_seed, own_randomness
from ..spaces import Real, Space
from ..spherical import Spherical
from ..traces import announce


class GAN(nn.Module):
    r"""p(x) = ∫ N(x; G(z), σ² I) N(z; 0, I) dz, where G learned to deceive a discriminator; σ is fitted afterwards.

    The generator's images alone have no density in pixel space: they fill a surface of `latent_dim` dimensions. With
    the noise there is one, but no encoder: the guide is the prior. That is a valid guide and a bad one. Importance
    sampling with it is far too low, and says so (k-hat, ESS); score this model by
    `annealed_importance_sampling(start="prior")`. The discriminator is no part of p(x), and is not kept.

    Args:
        space: `Real`.
        latent_dim: number of latents.
        hidden_dims: widths of the discriminator's layers; the generator mirrors them, as a VAE's decoder its encoder.
        network: "mlp", "conv" or "resnet".
        activation: the generator's: "tanh", "relu", "silu" or "elu".
        noise_scale: σ in units of the data; fitted on validation data if None.

    Source: Goodfellow et al., "Generative adversarial nets", 2014, arXiv:1406.2661; Wu, Burda, Salakhutdinov, Grosse,
    "On the quantitative analysis of decoder-based generative models", 2017, arXiv:1611.04273.
    """

    spaces = (Real,)
    no_codes = "it has no encoder, and its guide is the prior"

    def __init__(
        self,
        space: Space,
        *,
        latent_dim: int = 10,
        hidden_dims: Sequence[int] = (200, 200),
        network: str = "mlp",
        activation: str = "tanh",
        noise_scale: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            raise ValueError(f"GAN lives on Real, got {space}")
        check_count("latent_dim", latent_dim)
        self.space, self.latent_dim, self.hidden_dims, self.network = space, latent_dim, hidden_dims, network
        self.generator = make_decoder(network, latent_dim, hidden_dims, 1, space.shape, activation)
        self.prior = StandardNormal(latent_dim)
        self.observation = Spherical(space, noise_scale)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """p(x | z) = N(x; G(z), σ² I)."""
        return self.observation(self.generator(z))

    def mean(self, z: Tensor) -> Tensor:
        """The image G(z), (..., *shape)."""
        return self.observation.mean(self.generator(z))

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x, z)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior())  # (batch, latent_dim)
            pyro.sample("obs", self.likelihood(z), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """The prior p(z), for want of an encoder."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.prior())

    def initialize(self, obs: Tensor) -> None:
        """Start the generator at the mean image of the training data."""
        self.generator.center(self.observation.marginal_params(obs))

    def own_training(
        self,
        data: Data,
        *,
        seed: int,
        progress: Callable[[dict[str, float | None]], None],
        num_epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        penalty: float = 0.1,
        num_noise: int | None = None,
    ) -> list[dict[str, float | None]]:
        """Train G against a discriminator, then fit σ (unless it was given) to validation data by maximum likelihood.

        Args:
            data: what is fitted; the last epoch's generator is kept, averaged over steps.
            seed: of everything random.
            progress: called with each epoch's row.
            num_epochs: passes over the training data.
            batch_size: of data and of draws.
            learning_rate: of generator and discriminator.
            penalty: γ on the discriminator's gradient; see `adversarial.train`.
            num_noise: validation data that σ is fitted to, a seeded subset; 200 if None. Refused where σ was given.

        Returns:
            A row for each epoch; see `adversarial.train`.
        """
        if num_noise is not None and not self.observation.is_learned:
            raise ValueError(f"num_noise is of the fit of the noise scale, which was given, got num_noise={num_noise}")
        num_noise = 200 if num_noise is None else num_noise
        for name, count in (("num_epochs", num_epochs), ("batch_size", batch_size), ("num_noise", num_noise)):
            check_count(name, count)
        check_number("learning_rate", learning_rate, above=0)
        if not penalty >= 0:
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        device = self.observation.log_scale.device
        with own_randomness(derived_seed(seed, START), device):
            self.initialize(data.train.obs[:])
            opponent = self._opponent().to(self.observation.log_scale)
            rows = train(
                self.generator,
                opponent,
                lambda count: self.mean(self.prior().expand([count]).sample()),
                data.train.obs,
                num_epochs=num_epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                penalty=penalty,
                progress=progress,
            )
        if self.observation.is_learned:
            few = data.valid.subset(min(num_noise, len(data.valid)), seed).obs
            with own_randomness(derived_seed(seed, NOISE), device):
                scale = likeliest_scale(self.mean, self.latent_dim, few.to(self.observation.log_scale))
            if not math.isfinite(scale):
                raise ArithmeticError(f"the noise scale that fits the validation data is {scale}: G has diverged")
            self.observation.set_scale(scale)
        return rows

    def _opponent(self) -> nn.Module:
        """A discriminator: from images (n, *shape) to logits (n, 1)."""
        encoder = make_encoder(self.network, self.space.shape, self.hidden_dims, "silu")
        return nn.Sequential(encoder, nn.Linear(encoder.out_dim, 1))
