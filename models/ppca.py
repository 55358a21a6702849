"""Probabilistic PCA: a linear Gaussian code, summed out."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import CorrelatedComponents, Mixture
from ..em_pass import accumulate
from ..normal_em import principal_components
from ..spaces import Real, Space
from ..traces import announce


class PPCA(nn.Module):
    r"""x = μ + W z + σ ε with z and ε standard normal, so p(x) = N(x; μ, W W' + σ² I) exactly.

    Args:
        space: `Real`.
        latent_dim: q, the number of columns of W, less than the number of pixels D.
        min_scale: least σ of the closed-form fit, in units of the data.

    The parameters are `loc` μ (D,), `loadings` W (D, q) and `log_scale` log σ ().

    Source: Tipping, Bishop, "Probabilistic principal component analysis", 1999 (JRSS B).
    """

    spaces = (Real,)

    def __init__(self, space: Space, *, latent_dim: int = 10, min_scale: float = 1e-3) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            raise ValueError(f"PPCA lives on Real, got {space}")
        if not 1 <= latent_dim < space.num_dims:
            raise ValueError(f"latent_dim must be from 1 to {space.num_dims - 1}, got {latent_dim}")
        if min_scale <= 0:
            raise ValueError(f"min_scale must be positive, got {min_scale}")
        self.space, self.latent_dim, self.min_scale = space, latent_dim, min_scale
        self.loc = nn.Parameter(torch.zeros(space.num_dims))
        self.loadings = nn.Parameter(0.1 * torch.randn(space.num_dims, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def distribution(self) -> Mixture:
        """p(x), as a mixture of one."""
        scale = self.log_scale.exp().view(1, 1)
        law = CorrelatedComponents(self.loc.unsqueeze(0), self.loadings.unsqueeze(0), scale)
        return Mixture(torch.zeros_like(self.loc[:1]), law, self.space.shape)

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", self.distribution(), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """No latent sites: the code is integrated out."""

    def features(self, obs: Tensor, context: None = None) -> Tensor:
        """E[z | x] = (W'W + σ² I)^-1 W'(x - μ), shape (batch, latent_dim)."""
        loadings = self.loadings.double()
        noise = (2 * self.log_scale.double()).exp() * torch.eye(self.latent_dim).to(loadings)  # σ² I
        projected = (obs.flatten(1).double() - self.loc.double()) @ loadings  # (batch, latent_dim)
        return torch.linalg.solve(loadings.T @ loadings + noise, projected.T).T.to(self.loc.dtype)

    def decode(self, code: Tensor) -> Tensor:
        """E[x | z] = μ + W z, shape (batch, *shape)."""
        return (self.loc + code @ self.loadings.T).unflatten(-1, self.space.shape)

    def prior(self) -> dist.TorchDistribution:
        """p(z) = N(0, I)."""
        return dist.Normal(torch.zeros_like(self.loadings[0]), 1.0).to_event(1)

    def initialize(self, obs: Tensor) -> None:
        """Start at the mean of the training data."""
        with torch.no_grad():
            self.loc.copy_(obs.flatten(1).mean(0))

    @torch.no_grad()
    def maximum_likelihood(self, obs: Tensor) -> list[float]:
        """Fit in closed form: W = U_q (Λ_q - σ² I)^½ with σ² the mean of the discarded eigenvalues of the covariance.

        Args:
            obs: data (n, *shape).

        Returns:
            Mean log p(x) of the data, nats per datum, one entry.
        """
        self.space.check(obs)
        rows = obs.flatten(1).to(self.loc.device, torch.float64)
        centered = rows - rows.mean(0)
        loadings, scale = principal_components(centered.T @ centered / len(rows), self.latent_dim, self.min_scale)
        self.load_state_dict({"loc": rows.mean(0), "loadings": loadings, "log_scale": scale.log()})
        law = CorrelatedComponents(rows.mean(0, keepdim=True), loadings.unsqueeze(0), scale.view(1, 1))
        (total,) = accumulate(lambda block: (law.log_prob(block).sum(),), rows)
        return [float(total) / len(rows)]
