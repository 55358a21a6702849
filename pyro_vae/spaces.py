"""Where observations live (Binary, Quantized, Real): base measure, checks, bits/dim, the default p(x | ·)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pyro_vae.checks import blocks
from pyro_vae.masks import GivenPixels

if TYPE_CHECKING:
    from pyro.distributions import TorchDistribution
    from torch import Tensor


@dataclass(frozen=True)
class Space(ABC):
    """The set that one observation belongs to, with its base measure.

    Two log-likelihoods can be compared only if they are taken in the same space: a mass and a density have no common
    scale.

    Args:
        shape: event shape of one observation, for example (28, 28) or (3, 32, 32).
    """

    shape: tuple[int, ...]
    num_params: ClassVar[int]
    is_discrete: ClassVar[bool]

    @property
    def num_dims(self) -> int:
        """Number of pixels (and colours) of one observation."""
        return math.prod(self.shape)

    @abstractmethod
    def likelihood(self, params: "Tensor") -> "TorchDistribution":
        """The default p(x | ·).

        Args:
            params: unconstrained numbers, shape (..., num_params, *shape).

        Returns:
            A distribution with batch shape (...) and event shape `shape`.
        """

    @abstractmethod
    def marginal_params(self, obs: "Tensor") -> "Tensor":
        """Parameters of `likelihood` that describe each pixel of `obs` (n, *shape) on its own; (num_params, *shape)."""

    @abstractmethod
    def to_unit(self, obs: "Tensor") -> "Tensor":
        """The observation as a network or a picture sees it: [0, 1] where the space is bounded."""

    @abstractmethod
    def _outside(self, obs: "Tensor") -> "Tensor":
        """True where a finite value does not belong to the space."""

    @abstractmethod
    def _values(self) -> str:
        """The values of the space, in words."""

    def bits_per_dim(self, mean_log_prob: float) -> float | None:
        """-log p / (D log 2) for grey levels and bits; None where the number has no meaning."""
        return -mean_log_prob / (self.num_dims * math.log(2))

    def check(self, obs: "Tensor", what: str = "obs") -> None:
        """Raise a ValueError that names `what`, unless `obs` (n, *shape) lies in this space."""
        if obs.ndim != len(self.shape) + 1 or tuple(obs.shape[1:]) != self.shape:
            dims = ", ".join(str(size) for size in self.shape)
            raise ValueError(f"{what} must have shape (batch, {dims}), got {tuple(obs.shape)}")
        if len(obs) == 0:
            raise ValueError(f"{what} must hold at least one observation, got an empty array")
        if not obs.is_floating_point():
            raise ValueError(f"{what} must be a floating point tensor, got {obs.dtype}")
        for start, block in blocks(obs):
            self._check_values(block, start, what)

    def _check_values(self, obs: "Tensor", first: int, what: str) -> None:
        """The same for a part of the data, whose first datum has the index `first`."""
        low, high = obs.aminmax()  # NaN if there is one
        if not bool(low.isfinite() & high.isfinite()):
            finite = obs.isfinite()
            index = int((~finite).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"{what} must be finite, but datum {first + index} holds NaN or an infinity")
        outside = self._outside(obs)
        if bool(outside.any()):
            index = int(outside.flatten(1).any(1).nonzero()[0])
            value = float(obs[index][outside[index]].flatten()[0])
            raise ValueError(f"{what} must hold {self._values()} for {self}, but datum {first + index} holds {value:g}")


@dataclass(frozen=True)
class Binary(Space):
    """Black and white pixels {0, 1}; log p is a mass. Default p(x | ·): independent Bernoulli pixels by logits."""

    num_params = 1
    is_discrete = True

    def likelihood(self, params: "Tensor") -> "TorchDistribution":
        """Bernoulli pixels; `params` (..., 1, *shape) are logits."""
        from pyro_vae.independent import bernoulli_pixels

        return bernoulli_pixels(params.squeeze(-1 - len(self.shape)), len(self.shape))

    def marginal_params(self, obs: "Tensor") -> "Tensor":
        """Logit of each pixel's mean, one half added to either count so that it stays finite."""
        mean = (obs.sum(0) + 0.5) / (len(obs) + 1)
        return mean.logit().unsqueeze(0)

    def to_unit(self, obs: "Tensor") -> "Tensor":
        """The bits themselves."""
        return obs

    def _outside(self, obs: "Tensor") -> "Tensor":
        return (obs != 0) & (obs != 1)

    def _values(self) -> str:
        return "0 and 1 only"

    def __str__(self) -> str:
        return "Binary"


@dataclass(frozen=True)
class Quantized(Space):
    """Grey levels 0..levels-1; log p is a mass. Default p(x | ·): independent discretised logistic pixels.

    Args:
        shape: event shape of one observation.
        levels: number of grey levels, 256 for bytes.
    """

    levels: int = 256
    num_params = 2
    is_discrete = True

    def likelihood(self, params: "Tensor") -> "TorchDistribution":
        """Discretised logistic pixels; `params` (..., 2, *shape) are location and log scale in half ranges."""
        from pyro_vae.distributions import DiscretizedLogistic

        half = (self.levels - 1) / 2
        loc, log_scale = params.unbind(-1 - len(self.shape))
        scale = half * (log_scale.exp() + MIN_SCALE)
        law = DiscretizedLogistic(half * (1 + loc), scale, self.levels, validate_args=False)
        return law.to_event(len(self.shape))

    def marginal_params(self, obs: "Tensor") -> "Tensor":
        """Mean and spread of each pixel, the spread no smaller than half a level."""
        import torch

        half = (self.levels - 1) / 2
        spread = obs.std(0, correction=0).clamp(min=0.5)
        scale = spread * math.sqrt(3) / math.pi  # a logistic law with scale s has standard deviation s π / √3
        return torch.stack([obs.mean(0) / half - 1, (scale / half).log()])

    def to_unit(self, obs: "Tensor") -> "Tensor":
        """Grey levels divided by the brightest."""
        return obs / (self.levels - 1)

    def _outside(self, obs: "Tensor") -> "Tensor":
        return (obs < 0) | (obs > self.levels - 1) | (obs != obs.round())

    def _values(self) -> str:
        return f"whole numbers from 0 to {self.levels - 1}"

    def __str__(self) -> str:
        return f"Quantized({self.levels})"


@dataclass(frozen=True)
class Real(Space):
    """Real numbers; log p is a density. Default p(x | ·): independent normal pixels with learned variance.

    Grey levels x in 0..L-1 enter as y = (x + u)/L with u uniform on [0, 1). Then E_u log p(y) - D log L is a lower
    bound on log P(x), and `bits_per_dim` of it is an upper bound on the bits that the grey levels need.

    Args:
        shape: event shape of one observation.
        levels: L if the data were dequantised from L grey levels, None for data that were real to begin with.

    Source: Theis, van den Oord, Bethge, "A note on the evaluation of generative models", 2016, arXiv:1511.01844.
    """

    levels: int | None = None
    num_params = 2
    is_discrete = False

    def likelihood(self, params: "Tensor") -> "TorchDistribution":
        """Normal pixels; `params` (..., 2, *shape) are mean and log standard deviation."""
        import pyro.distributions as dist

        loc, log_scale = params.unbind(-1 - len(self.shape))
        scale = log_scale.exp() + MIN_SCALE
        return dist.Normal(loc, scale, validate_args=False).to_event(len(self.shape))

    def marginal_params(self, obs: "Tensor") -> "Tensor":
        """Mean and log standard deviation of each pixel."""
        import torch

        return torch.stack([obs.mean(0), obs.std(0, correction=0).clamp(min=MIN_SCALE).log()])

    def to_unit(self, obs: "Tensor") -> "Tensor":
        """The numbers themselves; dequantised grey levels lie in [0, 1) already."""
        return obs

    def bits_per_dim(self, mean_log_prob: float) -> float | None:
        """Bits/dim of the grey levels behind the data (an upper bound); None if there were none."""
        if self.levels is None:
            return None
        return -mean_log_prob / (self.num_dims * math.log(2)) + math.log2(self.levels)

    def _outside(self, obs: "Tensor") -> "Tensor":
        return obs[:0] != obs[:0]  # no finite value

    def _values(self) -> str:
        return "real numbers"

    def __str__(self) -> str:
        return "Real" if self.levels is None else f"Real(from {self.levels} levels)"


MIN_SCALE = 1e-3  # keeps a density finite on pixels that never vary; in units of the (half) range


@dataclass(frozen=True)
class Labels:
    """Context that is a class label, given as one-hot rows (n, num_classes).

    Args:
        log_prob: log p(c) of each class, nats; from the training labels, one added to each count.
    """

    log_prob: tuple[float, ...]

    @property
    def num_dims(self) -> int:
        """Number of classes."""
        return len(self.log_prob)

    def __str__(self) -> str:
        return "label"


@dataclass(frozen=True)
class Quadrants(GivenPixels):
    """Context that is the given part of an image, as a row of pixels (n, num_dims) in [0, 1].

    Args:
        given: number of quadrants given, 1 (bottom left), 2 (left half) or 3 (all but the bottom right).
        image_shape: shape of the whole image, (height, width) or (channels, height, width).

    Source: Sohn, Lee, Yan, "Learning Structured Output Representation using Deep Conditional Generative Models",
    2015 (NeurIPS).
    """

    given: int
    image_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.given not in (1, 2, 3):
            raise ValueError(f"given must be 1, 2 or 3 quadrants, got {self.given}")

    def mask(self) -> "Tensor":
        """True where a pixel is given; shape `image_shape`."""
        import torch

        height, width = self.image_shape[-2:]
        mask = torch.zeros(self.image_shape, dtype=torch.bool)
        mask[..., height // 2 :, : width // 2] = True
        if self.given >= 2:
            mask[..., :, : width // 2] = True
        if self.given == 3:
            mask[..., : height // 2, :] = True
        return mask

    def __str__(self) -> str:
        return f"quadrants({self.given})"
