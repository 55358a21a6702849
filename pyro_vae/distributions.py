"""Observation distributions that Pyro lacks: logistic and normal laws cut into grey levels."""

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid


def log_interval_logistic(low: Tensor, high: Tensor) -> Tensor:
    r"""Log of σ(high) - σ(low), stable in both tails: log σ(high) + log σ(-low) + log(1 - exp(low - high))."""
    return logsigmoid(high) + logsigmoid(-low) + torch.log(-torch.expm1(low - high))


def log_interval_normal(low: Tensor, high: Tensor) -> Tensor:
    r"""Log of Φ(high) - Φ(low); an interval right of 0 is mirrored, so that no digits cancel."""
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))


class _Discretized(TorchDistribution):
    """A continuous law Y cut into the levels 0..L-1 by rounding; all that lies beyond falls to the end levels."""

    arg_constraints = {"loc": pyro_constraints.real, "scale": pyro_constraints.positive}  # noqa: RUF012
    has_enumerate_support = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "_Discretized":
        return type(self)(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        low = (value - 0.5 - self.loc) / self.scale
        high = (value + 0.5 - self.loc) / self.scale
        low = torch.where(value <= 0, torch.full_like(low, -OPEN), low)
        high = torch.where(value >= self.levels - 1, torch.full_like(high, OPEN), high)
        return self._log_interval(low, high)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            draw = self.loc + self.scale * self._standard(shape)
            return draw.round().clamp(0, self.levels - 1)

    def _log_interval(self, low: Tensor, high: Tensor) -> Tensor:
        raise NotImplementedError

    def _standard(self, shape: torch.Size) -> Tensor:
        raise NotImplementedError


OPEN = 1e30  # stands for an infinite end: σ and Φ are 0 or 1 there to the last bit, and gradients stay finite


class DiscretizedLogistic(_Discretized):
    r"""Logistic law rounded to grey levels, p(x) = σ((x + ½ - μ)/s) - σ((x - ½ - μ)/s), end levels open.

    Args:
        loc: μ, in grey levels, any shape.
        scale: s > 0, in grey levels, broadcastable with `loc`.
        levels: number L of grey levels; the support is 0..L-1 and the L masses sum to 1.

    Source: Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, arXiv:1701.05517.
    """

    def _log_interval(self, low: Tensor, high: Tensor) -> Tensor:
        return log_interval_logistic(low, high)

    def _standard(self, shape: torch.Size) -> Tensor:
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.logit(uniform.clamp(torch.finfo(uniform.dtype).tiny, 1 - torch.finfo(uniform.dtype).eps))


class DiscretizedNormal(_Discretized):
    r"""Normal law rounded to grey levels, p(x) = Φ((x + ½ - μ)/σ) - Φ((x - ½ - μ)/σ), end levels open.

    Args:
        loc: μ, in grey levels, any shape.
        scale: σ > 0, in grey levels, broadcastable with `loc`.
        levels: number L of grey levels; the support is 0..L-1 and the L masses sum to 1.
    """

    def _log_interval(self, low: Tensor, high: Tensor) -> Tensor:
        return log_interval_normal(low, high)

    def _standard(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
