"""Gaussian with a full covariance matrix, through its Cholesky factor."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.guides.heads import linear


class FullCovariance(nn.Module):
    r"""q(z | h) = N(μ, L Lᵀ) with L = diag(σ) (I + N), N strictly lower triangular; μ, log σ and N are linear in h.

    N has no unit, as each of its rows is multiplied by the σ_j of that row, and log det L = Σ_j log σ_j. It starts
    small: the start is close to the mean-field law.

    Args:
        in_dim: number of features.
        latent_dim: number of latents, at least 2.

    Raises:
        ValueError: there is one latent only.

    Source: Kingma, Welling, "An Introduction to Variational Autoencoders", 2019, arXiv:1906.02691, section 2.5.1.
    """

    has_density = True

    def __init__(self, in_dim: int, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"full_covariance needs latent_dim of at least 2, got {latent_dim}: use mean_field")
        self.latent_dim = latent_dim
        self.linear = linear(in_dim, 2 * latent_dim)
        self.lower = linear(in_dim, latent_dim * (latent_dim - 1) // 2, gain=0.1)

    def forward(self, features: Tensor) -> TorchDistribution:
        loc, log_scale = self.linear(features).chunk(2, -1)  # (..., latent_dim) each
        scale_tril = log_scale.exp()[..., None] * self._unit_lower(self.lower(features))
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)

    def _unit_lower(self, entries: Tensor) -> Tensor:
        """I + N, shape (..., latent_dim, latent_dim)."""
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, offset=-1, device=entries.device)
        eye = torch.eye(self.latent_dim, dtype=entries.dtype, device=entries.device)
        unit = eye.expand(*entries.shape[:-1], -1, -1).clone()
        unit[..., rows, columns] = entries
        return unit
