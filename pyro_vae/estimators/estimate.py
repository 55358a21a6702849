"""What an estimator is, and the per-datum figures that it gives: errors, direction, diagnostics, flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.traces import Pair

Direction = Literal["exact", "lower", "upper", "unbiased"]
DIRECTIONS = ("exact", "lower", "upper", "unbiased")
ARRAYS = ("log_prob", "variance", "ess", "khat", "elbo", "spread", "bad")
POOLED_SHARE = 0.25  # of flagged data, from which none of the others is trusted either
MIN_CHAINS = 16  # of fewer the weights do not tell their own variance
CHAINS_SHARE = 1 / 3  # of the chains that must be effective
CHAINS = ("annealed_importance_sampling", "sequential_monte_carlo")  # whose particles are chains


@dataclass(frozen=True)
class Certificate:
    """What annealing from both sides says of an estimator, on data that were simulated from the model.

    Attributes:
        granted: whether the error of the mean may be taken to be at most `gap`.
        reason: why it is granted or withheld, as a sentence.
        gap: mean upper bound minus mean estimate on the simulated data, nats per datum.
        gap_se: standard error of `gap` over the simulated data.
        lower: mean estimate on the simulated data, nats.
        upper: mean upper bound on the simulated data, nats.
        real_spread: mean variance of the log weights on the real data, nats².
        simulated_spread: the same on the simulated data.
        num_simulated: number of simulated data.
    """

    granted: bool
    reason: str
    gap: float
    gap_se: float
    lower: float
    upper: float
    real_spread: float
    simulated_spread: float
    num_simulated: int


@dataclass(frozen=True)
class Estimate:
    """Per-datum figures of an estimator, float64 arrays of shape (n,), before they get their labels."""

    log_prob: np.ndarray
    variance: np.ndarray
    direction: Direction
    estimator: str
    num_particles: int
    ess: np.ndarray | None = None
    khat: np.ndarray | None = None
    khat_particles: int | None = None
    elbo: np.ndarray | None = None
    spread: np.ndarray | None = None
    bad: np.ndarray | None = None
    bias_bound: float | None = None
    doubling_bias: float | None = None
    doubling_ratio: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()


class Estimator(Protocol):
    """What scores a pair: its settings, called with the data's arguments."""

    @property
    def num_particles(self) -> int:
        """Particles or chains spent on each datum; 0 for an exact evaluation."""

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        """Per-datum figures; `progress` is called with the number of data that are done."""


def flags(figures: Any, num_se: float = diagnostics.KHAT_SE) -> np.ndarray:
    """Whether the Monte Carlo error of each datum is not to be trusted, booleans (n,).

    Exact values never are flagged. Others are where the estimator said so itself (`bad`), where k-hat plus `num_se` of
    its standard errors is above its limit, for annealing where fewer than a third of the chains are effective or where
    there are fewer than 16, and where there is no diagnostic at all.
    """
    if figures.direction == "exact":
        return np.zeros(len(figures.log_prob), dtype=bool)
    if figures.bad is not None:
        return figures.bad.copy()
    if figures.khat is not None:
        return diagnostics.khat_flags(figures.khat, figures.khat_particles or figures.num_particles, num_se)
    if figures.ess is not None and figures.estimator in CHAINS:
        enough = figures.num_particles >= MIN_CHAINS
        return ~(figures.ess >= CHAINS_SHARE * figures.num_particles) | (not enough)
    return np.ones(len(figures.log_prob), dtype=bool)


def pooled(flagged: np.ndarray) -> np.ndarray:
    """The flags, or all of them where more than a quarter of the data are flagged.

    A datum whose k-hat is low by luck, since no large weight was drawn, has an error bar that is too small by the same
    luck. Where the law of the weights is bad for few data that does not matter; where k-hat is near its limit for most,
    picking out those below it would pick out the intervals that fail: with weights of k = 0.4 and K = 1000, an
    interval covers at .91 on all data and at .71 on the seventh that is not flagged.
    """
    return flagged | (flagged.mean() > POOLED_SHARE)
