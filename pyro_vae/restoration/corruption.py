"""What was seen of an image (some pixels, or all of them with noise), and the law of the image given what was seen."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae.distributions import (
    BernoulliComponents,
    CorrelatedComponents,
    DiscretizedLogistic,
    DiscretizedNormal,
    LevelComponents,
    Levels,
    NormalComponents,
)
from pyro_vae.independent import bernoulli_pixels
from pyro_vae.masks import GivenPixels
from pyro_vae.traces import innermost

DISCRETIZED = (DiscretizedLogistic, DiscretizedNormal)


class Corruption(ABC):
    """How images x became what was seen, y; every pixel on its own, so that p(y | z) keeps the form of p(x | z)."""

    @abstractmethod
    def seen_in(self, images: Tensor) -> Tensor:
        """What is seen, rows (n, S), in images (n, *shape) that are corrupted: under a mask they may hold anything."""

    @abstractmethod
    def seen(self, pixels: Any) -> Any:
        """Law of y from that of the pixels x, batch shapes (..., D) and (..., S)."""

    @abstractmethod
    def restored(self, pixels: Any, seen: Tensor) -> Any:
        """Law of what is to be restored given y (..., S) and the law of the pixels (..., D), pixel by pixel."""

    @abstractmethod
    def hidden_in(self, images: Tensor) -> Tensor:
        """Of clean images (n, *shape), what is to be restored, rows (n, H)."""

    @abstractmethod
    def gaussian(self, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of x ~ N(μ, Σ): which pixels are seen and which restored (indices), cov(y, y) and cov(hidden x, y)."""


@dataclass(frozen=True)
class Missing(Corruption):
    """Some pixels were not seen; to be restored are those."""

    given: GivenPixels

    def seen_in(self, images: Tensor) -> Tensor:
        """The given pixels."""
        return self.given.split(images)[0]

    def hidden_in(self, images: Tensor) -> Tensor:
        """The missing pixels."""
        return self.given.split(images)[1]

    def seen(self, pixels: Any) -> Any:
        """The laws of the given pixels."""
        return select(pixels, self.given.mask().flatten())

    def restored(self, pixels: Any, seen: Tensor) -> Any:
        """The laws of the missing pixels."""
        return select(pixels, ~self.given.mask().flatten())

    def gaussian(self, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Blocks of Σ."""
        mask = self.given.mask().flatten().to(covariance.device)
        seen, hidden = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        return seen, hidden, covariance[seen][:, seen], covariance[hidden][:, seen]


@dataclass(frozen=True)
class Noise(Corruption):
    """All pixels were seen with noise: y = x + σ ε (real pixels), or bits flipped with a known probability.

    Args:
        level: σ, in units of the data, or P(flip), below one half.
    """

    level: float

    def applied(self, images: Tensor, bits: bool, generator: torch.Generator) -> Tensor:
        """Images with fresh noise, drawn on the CPU."""
        if bits:
            return (images - (torch.rand(images.shape, generator=generator) < self.level).to(images)).abs()
        return images + self.level * torch.randn(images.shape, generator=generator).to(images)

    def seen_in(self, images: Tensor) -> Tensor:
        """All pixels."""
        return images.flatten(1)

    def hidden_in(self, images: Tensor) -> Tensor:
        """All pixels."""
        return images.flatten(1)

    def seen(self, pixels: Any) -> Any:
        """N(μ, s² + σ²), or P(y = 1) = (1 - f) p + f (1 - p)."""
        if isinstance(pixels, torch.distributions.Normal):
            return dist.Normal(pixels.loc, torch.hypot(pixels.scale, pixels.scale.new_tensor(self.level)))
        stay, flip = self._log_shares(pixels)
        on, off = logsigmoid(pixels.logits), logsigmoid(-pixels.logits)
        return dist.Bernoulli(logits=torch.logaddexp(on + stay, off + flip) - torch.logaddexp(off + stay, on + flip))

    def restored(self, pixels: Any, seen: Tensor) -> Any:
        """By Bayes' rule: precisions add up, and so do log odds."""
        if isinstance(pixels, torch.distributions.Normal):
            gain = pixels.scale**2 / (pixels.scale**2 + self.level**2)
            return dist.Normal(pixels.loc + gain * (seen - pixels.loc), pixels.scale * (1 - gain).sqrt())
        stay, flip = self._log_shares(pixels)
        return dist.Bernoulli(logits=pixels.logits + (2 * seen - 1) * (stay - flip))

    def gaussian(self, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ + σ² I and Σ."""
        everything = torch.arange(len(covariance), device=covariance.device)
        noise = self.level**2 * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return everything, everything, covariance + noise, covariance

    def _log_shares(self, pixels: Any) -> tuple[float, float]:
        """Logarithms of 1 - f and f; a ValueError unless the pixels are bits and f is below one half."""
        if not isinstance(pixels, torch.distributions.Bernoulli):
            raise ValueError(f"noise is for real pixels (a standard deviation) and bits (P(flip)), not {_name(pixels)}")
        if not self.level < 0.5:
            raise ValueError(f"bits must be flipped with a probability below one half, got {self.level}")
        return math.log1p(-self.level), math.log(self.level)


def select(pixels: Any, chosen: Tensor) -> Any:
    """The laws of some pixels, `chosen` (D,) booleans, out of those of all, batch shape (..., D)."""
    index = chosen.nonzero()[:, 0]
    return rebuilt(pixels, lambda values: values.index_select(values.ndim - 1, index.to(values.device)))


def flat_pixels(law: Any) -> Any:
    """The laws of the pixels of an image, batch shape (..., D), from a law of images that are independent pixels.

    Raises:
        ValueError: pixels of another kind; then p(x | z) has no law of a part in closed form that is known here.
    """
    num_dims = law.event_dim
    if num_dims == 0:
        raise ValueError(f"the law at site 'obs' must have whole images as events, got {_name(law)} of single numbers")
    return rebuilt(innermost(law), lambda values: values.flatten(values.ndim - num_dims))


def rebuilt(pixels: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same kind of pixels with all parameters, pixels along their last axis, changed."""
    if isinstance(pixels, torch.distributions.Bernoulli):
        return dist.Bernoulli(logits=change(pixels.logits), validate_args=False)
    if isinstance(pixels, torch.distributions.Normal):
        return dist.Normal(change(pixels.loc), change(pixels.scale), validate_args=False)
    if isinstance(pixels, DISCRETIZED):
        return type(pixels)(change(pixels.loc), change(pixels.scale), pixels.levels, validate_args=False)
    if isinstance(pixels, Levels):
        changed = [change(of_level) for of_level in pixels.logits.unbind(-1)]
        return Levels(logits=torch.stack(changed, -1), validate_args=False)
    raise ValueError(
        "the law at site 'obs' must consist of independent Bernoulli, normal, discretised or categorical pixels to be "
        f"asked for some of them, got {_name(pixels)}"
    )


def of_rows(pixels: Any) -> TorchDistribution:
    """The joint law of independent pixels (..., S), event shape (S,)."""
    if isinstance(pixels, torch.distributions.Bernoulli):
        return bernoulli_pixels(pixels.logits, 1)
    return pixels.to_event(1)


def component_pixels(components: Any) -> Any:
    """The pixels of the components of a mixture, batch shape (K, D); None where they are correlated."""
    if isinstance(components, BernoulliComponents):
        return dist.Bernoulli(logits=components.logits, validate_args=False)
    if isinstance(components, NormalComponents):
        return dist.Normal(components.loc, components.scale, validate_args=False)
    if isinstance(components, LevelComponents):
        return Levels(logits=components.log_mass, validate_args=False)
    if isinstance(components, CorrelatedComponents):
        return None
    raise ValueError(f"a mixture of {_name(components)} has no law of some pixels in closed form that is known here")


def _name(law: object) -> str:
    return type(law).__name__
