"""Independent pixels: the baseline that every model must beat."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import Levels, log_shares
from ..spaces import MIN_SCALE, Binary, Quantized, Real, Space
from ..traces import announce


class IndependentPixel(nn.Module):
    r"""p(x) = Π_d p_d(x_d): a Bernoulli (Binary), a free histogram (Quantized) or a normal law (Real) for each pixel.

    Args:
        space: where the observations live.
        pseudo_count: counts added to each pixel's own, spread evenly over its values: ½ to either for `Binary`,
            1 / levels to each grey level. `Real` has a least standard deviation of 0.001 instead.
    """

    spaces = (Binary, Quantized, Real)

    def __init__(self, space: Space, *, pseudo_count: float = 1.0) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            raise ValueError(f"independent pixels live on Binary, Quantized or Real, got {space}")
        if pseudo_count <= 0:
            raise ValueError(f"pseudo_count must be positive, got {pseudo_count}")
        self.space, self.pseudo_count = space, pseudo_count
        num_params = space.levels if isinstance(space, Quantized) else space.num_params
        self.params = nn.Parameter(torch.zeros(num_params, *space.shape))

    def distribution(self) -> dist.TorchDistribution:
        """p(x); `params` are logits of the grey levels, or what `space.likelihood` takes."""
        if isinstance(self.space, Quantized):
            logits = self.params.movedim(0, -1)  # (*shape, levels)
            return Levels(logits=logits, validate_args=False).to_event(len(self.space.shape))
        return self.space.likelihood(self.params)

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", self.distribution(), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """No latent sites."""

    def initialize(self, obs: Tensor) -> None:
        """Start at the fitted parameters."""
        self.maximum_likelihood(obs)

    @torch.no_grad()
    def maximum_likelihood(self, obs: Tensor) -> list[float]:
        """Fit in closed form.

        Args:
            obs: data (n, *shape).

        Returns:
            Mean log p(x) of the data, nats per datum, one entry.
        """
        self.space.check(obs)
        obs = obs.to(self.params.device)
        self.params.copy_(self._moments(obs) if isinstance(self.space, Real) else self._shares(obs))
        law = self.distribution()
        total = sum(float(law.log_prob(block).sum(dtype=torch.float64)) for block in obs.split(4096))
        return [total / len(obs)]

    def _shares(self, obs: Tensor) -> Tensor:
        """Smoothed logit (1, *shape) of a bit, or log share (levels, *shape) of each grey level."""
        levels = self.space.levels if isinstance(self.space, Quantized) else 2
        log_share = log_shares(obs, levels, self.pseudo_count).T
        if levels == 2 and not isinstance(self.space, Quantized):
            log_share = log_share[1:] - log_share[:1]
        return log_share.reshape(-1, *self.space.shape)

    def _moments(self, obs: Tensor) -> Tensor:
        """Mean and log standard deviation above `MIN_SCALE`, (2, *shape)."""
        spread = obs.double().std(0, correction=0) - MIN_SCALE
        return torch.stack([obs.double().mean(0), spread.clamp(min=1e-12 * MIN_SCALE).log()])
