"""Real pixels with one variance for all: p(x | z) = N(m(z), σ² I)."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.checks import check_number
from pyro_vae.spaces import MIN_SCALE, Real, Space


class Spherical(nn.Module):
    r"""N(x; m, σ² I), with one σ for all pixels of all images.

    Where the data are dequantised grey levels, which lie in [0, 1], m is the logistic function of what the network
    gives, so that a mean is an image; elsewhere it is the network's numbers themselves.

    Args:
        space: `Real`.
        noise_scale: σ in units of the data; learned (`log_scale`, a parameter) if None.

    Raises:
        ValueError: another space, or a noise_scale that is not positive.

    Source: Wu, Burda, Salakhutdinov, Grosse, "On the quantitative analysis of decoder-based generative models", 2017,
    arXiv:1611.04273.
    """

    log_scale: Tensor

    def __init__(self, space: Space, noise_scale: float | None = None) -> None:
        super().__init__()
        if not isinstance(space, Real):
            raise ValueError(f"normal noise of one scale lives on Real, got {space}")
        self.event_dim, self.is_unit = len(space.shape), space.levels is not None
        if noise_scale is None:
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            check_number("noise_scale", noise_scale, above=0)
            self.register_buffer("log_scale", torch.tensor(float(noise_scale)).log())

    @property
    def is_learned(self) -> bool:
        """Whether σ is a parameter."""
        return isinstance(self.log_scale, nn.Parameter)

    def mean(self, params: Tensor) -> Tensor:
        """The mean m (..., *shape) by a network's numbers (..., 1, *shape)."""
        numbers = params.squeeze(-1 - self.event_dim)
        return numbers.sigmoid() if self.is_unit else numbers

    def forward(self, params: Tensor) -> TorchDistribution:
        """p(x | z) of a network's numbers (..., 1, *shape)."""
        loc = self.mean(params)
        return dist.Normal(loc, self.log_scale.exp().expand_as(loc), validate_args=False).to_event(self.event_dim)

    @torch.no_grad()
    def marginal_params(self, obs: Tensor) -> Tensor:
        """The network's numbers (1, *shape) whose mean is that of `obs`; a learned σ becomes the spread around it."""
        loc = obs.mean(0)
        if self.is_learned:
            self.set_scale((obs - loc).square().mean().sqrt())
        return (loc.clamp(MIN_SCALE, 1 - MIN_SCALE).logit() if self.is_unit else loc).unsqueeze(0)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Let a learned σ be `scale`, or `MIN_SCALE` if that is more: no density is infinite."""
        self.log_scale.copy_(scale.clamp(min=MIN_SCALE).log())
