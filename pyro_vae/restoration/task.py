"""What is to be restored: images, what was seen of them, and what comes back."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.checks import check_number
from pyro_vae.data import Batch
from pyro_vae.estimators.estimate import Estimate, Estimator
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.masks import GivenPixels, Pixels
from pyro_vae.restoration.corruption import Corruption, Missing, Noise
from pyro_vae.spaces import Labels, Quadrants, Space
from pyro_vae.traces import Program


@dataclass(frozen=True, eq=False, repr=False)
class Restoration:
    """Images restored from what was seen of them.

    Attributes:
        draws: of whole images, what was seen in its place, shape (num_draws, n, *shape).
        mean: E[x | y], shape (n, *shape).
        missing: which pixels were not seen, (*shape), or None for noise.
        how: what the draws come from, in words.
        log_prob: log p(missing | given) of the pixels that the images have there, or None.
        ess: effective number of particles behind the draws of each image, shape (n,); None where they are exact.
        khat: Pareto shape of their weights, or None.
    """

    draws: Tensor
    mean: Tensor
    missing: Tensor | None
    how: str
    log_prob: LogLikelihood | None = None
    ess: np.ndarray | None = None
    khat: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"Restoration({self.draws.shape[1]} images, {len(self.draws)} draws of each, {self.how})"


@dataclass(frozen=True)
class Task:
    """What is to be restored, and how often."""

    model: nn.Module | Program
    batch: Batch
    corruption: Corruption
    guide: Program | None
    num_draws: int
    estimator: Estimator
    score: bool
    seed: int
    device: torch.device
    progress: bool

    @property
    def given(self) -> GivenPixels:
        """Which pixels are given, where some are missing."""
        if not isinstance(self.corruption, Missing):
            raise ValueError("no pixels are missing: all were seen with noise")
        return self.corruption.given

    @property
    def missing(self) -> Tensor | None:
        """True where a pixel is missing, (*shape), or None for noise."""
        return ~self.given.mask() if isinstance(self.corruption, Missing) else None

    def whole(self, hidden: Tensor) -> Tensor:
        """Restored rows (..., n, H) as whole images (..., n, *shape) on the CPU, what was seen in its place."""
        hidden = hidden.cpu()
        if isinstance(self.corruption, Missing):
            return self.corruption.given.join(self.corruption.seen_in(self.batch.obs), hidden).to(self.batch.obs.dtype)
        return hidden.unflatten(-1, self.batch.obs.shape[1:]).to(self.batch.obs.dtype)

    def restoration(self, draws: Tensor, mean: Tensor, how: str, **rest: Any) -> Restoration:
        return Restoration(self.whole(draws), self.whole(mean), self.missing, how, **rest)

    def log_likelihood(self, estimate: Estimate, started: float) -> LogLikelihood:
        """An estimate of log p(missing | given), with the data that it is about."""
        given, hidden = self.given, hidden_batch(self.batch, self.given)
        labels = getattr(self.model, "context", None)
        return LogLikelihood(
            **vars(estimate),
            space=replace(space_of(self.batch), shape=tuple(hidden.obs.shape[1:])),
            digest=hidden.digest,
            seed=self.seed,
            seconds=time.perf_counter() - started,
            given=f"{labels}, {given}" if isinstance(labels, Labels) else str(given),
        )


def hidden_batch(batch: Batch, given: GivenPixels) -> Batch:
    """The missing pixels as rows, given the others in the unit range (and what was given before): what is scored."""
    space, (seen, hidden) = space_of(batch), given.split(batch.obs)
    context = space.to_unit(seen)
    context = context if batch.context is None else torch.cat([context, batch.context.to(context)], 1)
    return Batch(hidden, context, batch.labels, replace(space, shape=(hidden.shape[1],)))


def space_of(batch: Batch) -> Space:
    """The space of images, which must be known."""
    if batch.space is None:
        raise ValueError("the space of the images must be known: pass pv.Batch(obs, space=...)")
    return batch.space


def corruption_of(batch: Batch, missing: Tensor | GivenPixels | None, noise: float | None) -> Corruption:
    """What was seen of the images; a mask that is one of `Quadrants` becomes that, so that models given it compare."""
    if (missing is None) == (noise is None):
        raise ValueError("restore needs one of `missing`, a mask, and `noise`, its level")
    if noise is not None:
        check_number("noise", noise, above=0)
        return Noise(float(noise))
    given = missing if isinstance(missing, GivenPixels) else None
    if given is None:
        if not isinstance(missing, Tensor) or missing.dtype != torch.bool:
            raise ValueError(f"missing must be a tensor of booleans, got {getattr(missing, 'dtype', type(missing))}")
        given = next(
            (q for q in _quadrants(missing) if torch.equal(q.mask(), ~missing.cpu())), Pixels.of(missing.cpu())
        )
    shape = tuple(batch.obs.shape[1:])
    if tuple(given.image_shape) != shape:
        raise ValueError(f"missing must have the shape of an image, {shape}, got {tuple(given.image_shape)}")
    if not 0 < given.num_dims < given.mask().numel():
        raise ValueError(f"some pixels must be missing and some given, got {given.num_dims} given ones")
    return Missing(given)


def _quadrants(missing: Tensor) -> list[Quadrants]:
    """The masks that have a name of their own, so that a CVAE given quadrants answers the same question."""
    return [Quadrants(num, tuple(missing.shape)) for num in (1, 2, 3)] if missing.ndim >= 2 else []
