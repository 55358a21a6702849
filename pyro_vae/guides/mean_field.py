"""Mean-field Gaussian: independent normal latents whose mean and scale a network reads off its features."""

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.guides.heads import diagonal_normal, linear


class MeanField(nn.Module):
    r"""q(z | h) = Π_j N(z_j; μ_j(h), σ_j(h)²), with μ and log σ linear in the features h.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, arXiv:1312.6114.
    """

    has_density = True  # log q(z | x) can be had at any z, not only at its own draws

    def __init__(self, in_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.linear = linear(in_dim, 2 * latent_dim)

    def forward(self, features: Tensor) -> TorchDistribution:
        return diagonal_normal(self.linear(features))
