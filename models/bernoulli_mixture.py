"""Mixture of Bernoulli images: each component is a grey template whose pixels are independent coins."""

from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn

from ..binary_em import BinaryPixels, mean_image
from ..distributions import BernoulliComponents, Mixture
from ..em import expectation_maximization
from ..em_pass import double
from ..spaces import Binary, Space
from ..traces import announce


class BernoulliMixture(nn.Module):
    r"""p(x) = Σ_k π_k Π_d θ_kd^x_d (1 - θ_kd)^(1 - x_d), by logits of θ.

    Args:
        space: `Binary`.
        num_components: K.
        pseudo_count: images that each component is shown on top of the data, with pixels at the training mean: a Beta
            prior on θ with that many counts (2 was best on held-out MNIST). 0 for maximum likelihood, with θ kept 1e-6
            away from 0 and 1.

    Source: Bishop, "Pattern Recognition and Machine Learning", 2006, section 9.3.3.
    """

    spaces = (Binary,)

    def __init__(self, space: Space, *, num_components: int = 100, pseudo_count: float = 2.0) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            raise ValueError(f"a Bernoulli mixture lives on Binary, got {space}")
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}")
        if pseudo_count < 0:
            raise ValueError(f"pseudo_count must not be negative, got {pseudo_count}")
        self.space, self.num_components, self.pseudo_count = space, num_components, pseudo_count
        self.logits = nn.Parameter(torch.zeros(num_components))  # of π
        self.pixel_logits = nn.Parameter(torch.randn(num_components, space.num_dims))  # of θ

    def distribution(self) -> Mixture:
        """p(x)."""
        return Mixture(self.logits, BernoulliComponents(self.pixel_logits), self.space.shape)

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", self.distribution(), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """No latent sites: the component is summed out."""

    def features(self, obs: Tensor, context: None = None) -> Tensor:
        """Responsibilities p(k | x), shape (batch, num_components)."""
        return self.distribution().responsibilities(obs)

    def initialize(self, obs: Tensor) -> None:
        """Start at a k-means partition of the training data."""
        self.maximum_likelihood(obs, num_iterations=1, num_restarts=1)

    def maximum_likelihood(
        self,
        obs: Tensor,
        *,
        seed: int = 0,
        num_iterations: int = 100,
        num_restarts: int = 1,
        tolerance: float = 0.02,
        batch_size: int | None = None,
        decay: float = 0.7,
        warm_start: bool = False,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Fit by EM, or by stepwise EM with an update after each `batch_size` data.

        Passes are in float32 and the last one is in float64: see `em.expectation_maximization`, which this calls.

        Args:
            obs: data (n, *shape), which may be mapped from disk: one block of them, or one batch, is read at a time.
            seed: of the starts and of the order of the data.
            num_iterations: passes over the data, at most.
            num_restarts: number of starts.
            tolerance: least gain of a pass, nats per datum.
            batch_size: data per update, or None for one update per pass.
            decay: κ of the step sizes (t + 2)^-κ of stepwise EM, above ½ and at most 1.
            warm_start: go on from the present parameters instead of k-means.
            progress: called with (iteration, objective).

        Returns:
            Mean log p(x) + log prior / n of each pass, nats per datum; the last is exact for the parameters found.
        """
        self.space.check(obs)
        rows = obs if batch_size else obs.to(self.logits.device)
        mean = mean_image(rows, self.logits.device)
        params, trace = expectation_maximization(
            BinaryPixels(mean, self.pseudo_count),
            rows,
            self.num_components,
            fast=BinaryPixels(mean, self.pseudo_count, torch.float32),
            params=double(self) if warm_start else None,
            seed=seed,
            num_iterations=num_iterations,
            num_restarts=1 if warm_start else num_restarts,
            tolerance=tolerance,
            batch_size=batch_size,
            decay=decay,
            progress=progress,
        )
        self.load_state_dict(params)
        return trace
