"""Gaussian whose covariance is diagonal plus one of low rank."""

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.guides.heads import linear


class LowRank(nn.Module):
    r"""q(z | h) = N(μ, diag(σ) (I + V Vᵀ) diag(σ)), V of shape (latent_dim, rank); μ, log σ and V are linear in h.

    The cost grows as latent_dim rank² where a full covariance costs latent_dim³. V starts small, close to the
    mean-field law, but not at zero, where its gradient would vanish.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.
        rank: number of columns of V.

    Raises:
        ValueError: the rank is below 1.

    Source: Ong, Nott, Smith, "Gaussian Variational Approximation with a Factor Covariance Structure", 2018,
    arXiv:1701.03208.
    """

    has_density = True

    def __init__(self, in_dim: int, latent_dim: int, *, rank: int = 5) -> None:
        super().__init__()
        check_count("rank", rank)
        self.rank = rank
        self.linear = linear(in_dim, 2 * latent_dim)
        self.factor = linear(in_dim, latent_dim * rank, gain=0.1)

    def forward(self, features: Tensor) -> TorchDistribution:
        loc, log_scale = self.linear(features).chunk(2, -1)  # (..., latent_dim) each
        factor = self.factor(features).unflatten(-1, (-1, self.rank))  # V, (..., latent_dim, rank)
        scale = log_scale.exp()
        return dist.LowRankMultivariateNormal(loc, scale[..., None] * factor, scale**2, validate_args=False)
