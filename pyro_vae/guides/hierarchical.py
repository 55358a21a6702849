"""Hierarchical posterior: a Gaussian given an auxiliary Gaussian, integrated out by a second network of the model."""

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.guides.family import AUXILIARY, LogJoint
from pyro_vae.guides.heads import diagonal_normal, linear


class Hierarchical(nn.Module):
    r"""q(a, z | h) = q(a | h) q(z | a, h), diagonal Gaussians, against p(x, z) r(a | z, h).

    The law of z alone, ∫ q(a | h) q(z | a, h) da, is a mixture of infinitely many Gaussians that has no formula. The
    model is given r(a | z, h), which integrates to 1 over a and so leaves p(x) as it is; the ELBO is below that of z
    alone by E KL(q(a | z, h) || r(a | z, h)). There is a density at (a, z), but none at z.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.
        auxiliary_dim: number of entries of a.
        hidden_dim: width of the hidden layer of q(z | a, h) and of r(a | z, h).

    Raises:
        ValueError: a has no entry, or the networks no hidden unit.

    Source: Ranganath, Tran, Blei, "Hierarchical Variational Models", 2016, arXiv:1511.02386; Maaløe, Sønderby,
    Sønderby, Winther, "Auxiliary Deep Generative Models", 2016, arXiv:1602.05473.
    """

    has_density = True

    def __init__(self, in_dim: int, latent_dim: int, *, auxiliary_dim: int = 10, hidden_dim: int = 100) -> None:
        super().__init__()
        check_count("auxiliary_dim", auxiliary_dim)
        check_count("hidden_dim", hidden_dim)
        self.auxiliary = linear(in_dim, 2 * auxiliary_dim)
        self.code = _Given(in_dim, auxiliary_dim, hidden_dim, latent_dim)
        self.reverse = _Given(in_dim, latent_dim, hidden_dim, auxiliary_dim)

    def sample_latents(self, features: Tensor, log_joint: LogJoint) -> None:
        """Draw a ~ q(a | h) at the site "z_auxiliary" and z ~ q(z | a, h) at the site "z"."""
        law = diagonal_normal(self.auxiliary(features))
        auxiliary = pyro.sample("z_auxiliary", law, infer=AUXILIARY)  # (..., auxiliary_dim)
        pyro.sample("z", self.code(features, auxiliary))

    def extend_model(self, z: Tensor, features: Tensor) -> None:
        """The model's law of the site "z_auxiliary", r(a | z, h)."""
        pyro.sample("z_auxiliary", self.reverse(features, z))


class _Given(nn.Module):
    """N(μ, diag σ²) with μ and log σ a network of one hidden layer of the features h and of a value v."""

    def __init__(self, in_dim: int, value_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.features = linear(in_dim, hidden_dim)
        self.value = linear(value_dim, hidden_dim)
        self.out = linear(hidden_dim, 2 * out_dim)

    def forward(self, features: Tensor, value: Tensor) -> TorchDistribution:
        hidden = torch.tanh(self.features(features) + self.value(value))  # the features once for all particles
        return diagonal_normal(self.out(hidden))
