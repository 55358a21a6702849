"""Independent Student-t latents: tails heavier than the Gaussian's, as far as the data ask for them."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.guides.heads import linear

MIN_DF, MAX_DF = 2.0, 100.0  # a variance below; nearly a normal above, where lgamma loses digits of float32
START = -2.4  # logit of the share of the way at which df is 10


class StudentT(nn.Module):
    r"""q(z | h) = Π_j t_ν_j(z_j; μ_j, σ_j), with μ, log σ and the logit of ν, ν in (2, 100), linear in the features h.

    Importance weights of a posterior with tails heavier than a Gaussian's are bounded under it where they are not
    under a normal guide. The start is near ν = 10.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.

    Source: Domke, Sheldon, "Importance Weighting and Variational Inference", 2018, arXiv:1808.09034 (tails and
    importance weights).
    """

    has_density = True

    def __init__(self, in_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.linear = linear(in_dim, 2 * latent_dim)
        self.tail = linear(in_dim, latent_dim, gain=0.1)

    def forward(self, features: Tensor) -> TorchDistribution:
        loc, log_scale = self.linear(features).chunk(2, -1)  # (..., latent_dim) each
        df = MIN_DF + (MAX_DF - MIN_DF) * torch.sigmoid(self.tail(features) + START)
        return dist.StudentT(df, loc, log_scale.exp(), validate_args=False).to_event(1)
