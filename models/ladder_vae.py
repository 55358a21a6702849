"""Hierarchical variational autoencoder: several layers of latents, each a Gaussian given the one above."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..guides.mean_field import MeanField
from ..networks import MLPEncoder, make_decoder, make_encoder
from ..priors import StandardNormal
from ..spaces import Binary, Quantized, Real, Space
from ..traces import announce


class LadderVAE(nn.Module):
    r"""p(x) = ∫ p(x | z_1) p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L) dz, with p(z_L) = N(0, I).

    p(x | z_1) follows the space, as in `VAE`; every p(z_l | z_{l+1}) is a mean-field Gaussian by a network. Layer l is
    the site "z<l>", "z1" next to x. The posterior is

    - "bottom_up": q(z_1 | x) Π_l q(z_{l+1} | z_l), mean-field Gaussians by networks.
    - "top_down": a deterministic pass d_l = net(d_{l-1}), d_0 = x, reads Gaussians N(μ̂_l, σ̂_l²) off the data;
      q(z_L | x) is the top one, and q(z_l | z_{l+1}, x) the product of N(μ̂_l, σ̂_l²) and p(z_l | z_{l+1}). There is no
      batch normalisation, which would make the law of a datum depend on its batch.

    The two-layer model of Burda et al. is latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100)); one layer is
    `VAE`.

    Args:
        space: where the observations live.
        latent_dims: number of latents of each layer, from z_1 to the top.
        hidden_dims: widths of the encoder of each layer; the decoders mirror them. One tuple stands for all layers.
        inference: "bottom_up" or "top_down".
        network: between x and z_1, "mlp", "conv" or "resnet".
        activation: "tanh", "relu", "silu" or "elu".

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519; Sønderby, Raiko,
    Maaløe, Sønderby, Winther, "Ladder Variational Autoencoders", 2016, arXiv:1602.02282.
    """

    spaces = (Binary, Quantized, Real)

    def __init__(
        self,
        space: Space,
        *,
        latent_dims: Sequence[int] = (100, 50),
        hidden_dims: Sequence[int] | Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        inference: str = "bottom_up",
        network: str = "mlp",
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        if inference not in ("bottom_up", "top_down"):
            raise ValueError(f"inference must be 'bottom_up' or 'top_down', got {inference!r}")
        if not (isinstance(latent_dims, Sequence) and latent_dims and all(_is_size(each) for each in latent_dims)):
            raise ValueError(
                f"latent_dims must hold the positive whole size of at least one layer, got {latent_dims!r}"
            )
        widths = _widths(hidden_dims, len(latent_dims))
        self.space, self.latent_dims, self.inference = space, tuple(latent_dims), inference
        below = latent_dims if inference == "bottom_up" else [hidden[-1] for hidden in widths]
        first = make_encoder(network, space.shape, widths[0], activation)
        upper = [MLPEncoder((size,), hidden, activation) for size, hidden in zip(below, widths[1:], strict=False)]
        self.encoders = nn.ModuleList([first, *upper])
        self.posteriors = nn.ModuleList(
            [MeanField(hidden[-1], size) for hidden, size in zip(widths, latent_dims, strict=True)]
        )
        self.top_prior = StandardNormal(latent_dims[-1])
        self.priors = nn.ModuleList(
            [
                nn.Sequential(MLPEncoder((above,), hidden[::-1], activation), MeanField(hidden[0], size))
                for size, above, hidden in zip(latent_dims, latent_dims[1:], widths[1:], strict=False)
            ]
        )
        self.decoder = make_decoder(network, latent_dims[0], widths[0], space.num_params, space.shape, activation)

    def prior(self, layer: int, above: Tensor) -> TorchDistribution:
        """p(z_layer | z_{layer+1})."""
        return self.priors[layer - 1](above)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """p(x | z_1)."""
        return self.space.likelihood(self.decoder(z))

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x, z_1, ..., z_L)."""
        announce(self)
        top = len(self.latent_dims)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample(f"z{top}", self.top_prior())
            for layer in range(top - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.prior(layer, z))  # (batch, latent_dims[layer - 1])
            pyro.sample("obs", self.likelihood(z), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """q(z_1, ..., z_L | x)."""
        announce(self)
        infer = self._bottom_up if self.inference == "bottom_up" else self._top_down
        with pyro.plate("data", len(obs), dim=-1):
            infer(self.space.to_unit(obs))

    def _bottom_up(self, below: Tensor) -> None:
        for layer, (encoder, posterior) in enumerate(zip(self.encoders, self.posteriors, strict=True), start=1):
            below = pyro.sample(f"z{layer}", posterior(encoder(below)))

    def _top_down(self, below: Tensor) -> None:
        evidence = []  # of each layer, N(μ̂, σ̂²)
        for encoder, posterior in zip(self.encoders, self.posteriors, strict=True):
            below = encoder(below)
            evidence.append(posterior(below))
        z = pyro.sample(f"z{len(evidence)}", evidence[-1])
        for layer in range(len(evidence) - 1, 0, -1):
            z = pyro.sample(f"z{layer}", product(evidence[layer - 1], self.prior(layer, z)))

    def initialize(self, obs: Tensor) -> None:
        """Start the decoder at the mean image of the training data."""
        self.decoder.center(self.space.marginal_params(obs))


def product(first: TorchDistribution, second: TorchDistribution) -> TorchDistribution:
    """The normalised product of two mean-field Gaussians: precisions add, means are weighted by them."""
    precisions = 1 / first.variance, 1 / second.variance
    total = precisions[0] + precisions[1]
    loc = (first.mean * precisions[0] + second.mean * precisions[1]) / total
    return dist.Normal(loc, total.rsqrt(), validate_args=False).to_event(1)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _widths(hidden_dims: Any, num_layers: int) -> list[list[int]]:
    """Widths of every layer's encoder."""
    shared = all(isinstance(size, int) for size in hidden_dims)
    widths = [list(hidden_dims)] * num_layers if shared else [list(hidden) for hidden in hidden_dims]
    if len(widths) != num_layers or not all(widths):
        raise ValueError(
            f"hidden_dims must hold widths for each of the {num_layers} layers of latent_dims, got {hidden_dims!r}"
        )
    return widths
