"""Mixture of Bernoulli images: each component is a grey template whose pixels are independent coins."""

from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..distributions import BernoulliComponents, Mixture
from ..em import EMPTY, Params, expectation_maximization
from ..spaces import Binary, Space
from ..traces import announce

MIN_PROB = 1e-6  # least θ and 1 - θ


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
        progress: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Fit by EM; arguments as in `em.expectation_maximization`, which this calls.

        Args:
            obs: data (n, *shape).
            seed: of the starts.
            num_iterations: passes over the data, at most.
            num_restarts: number of starts.
            tolerance: least gain of a pass, nats per datum.
            progress: called with (iteration, objective).

        Returns:
            Mean log p(x) + log prior / n of each pass, nats per datum.
        """
        self.space.check(obs)
        rows = obs.flatten(1).to(self.pixel_logits)
        params, trace = expectation_maximization(
            _BinaryPixels(rows, self.pseudo_count),
            rows,
            self.num_components,
            seed=seed,
            num_iterations=num_iterations,
            num_restarts=num_restarts,
            tolerance=tolerance,
            progress=progress,
        )
        self.load_state_dict(params)
        return trace


class _BinaryPixels:
    """E and M step of Bernoulli pixels."""

    def __init__(self, rows: Tensor, pseudo_count: float) -> None:
        self.dtype, self.pseudo_count = rows.dtype, pseudo_count
        self.mean = (rows.sum(0, dtype=torch.float64) + 0.5) / (len(rows) + 1)

    def components(self, params: Params) -> BernoulliComponents:
        return BernoulliComponents(params["pixel_logits"].to(self.dtype))

    def statistics(self, rows: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        return (resp.T @ rows,)

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        total = (counts + self.pseudo_count).clamp(min=EMPTY).unsqueeze(-1)
        prob = (sums[0] + self.pseudo_count * self.mean) / total
        return {"pixel_logits": prob.clamp(MIN_PROB, 1 - MIN_PROB).logit()}

    def log_prior(self, components: BernoulliComponents) -> Tensor:
        logits = components.logits.double()
        return self.pseudo_count * (self.mean * logits - softplus(logits)).sum()
