"""What an estimator is, and the per-datum figures that it gives: errors, direction, diagnostics, flags."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.log_partition import Constant
from pyro_vae.traces import Pair

Direction = Literal["exact", "lower", "upper", "unbiased"]
DIRECTIONS = ("exact", "lower", "upper", "unbiased")
ARRAYS = ("log_prob", "variance", "ess", "khat", "elbo", "spread", "bad")
POOLED_SHARE = 0.25  # of flagged data, from which none of the others is trusted either
MIN_CHAINS = 16  # of fewer the weights do not tell their own variance
CHAINS_SHARE = 1 / 3  # of the chains that must be effective
RAISE = "reverse_annealing"  # the estimator, which bounds a law that is not quite the model's
CHAINS = ("annealed_importance_sampling", "sequential_monte_carlo", RAISE)  # whose particles are chains


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
class PrecisionError:
    """What linear layers in shorter numbers cost, against float64 with the same noise, on a part of the data.

    Attributes:
        precision: "tf32" or "float16".
        mean: mean over these data of log p in this precision less that in float64, nats.
        se: standard error of that mean over the data, nats; None for a single datum.
        largest: the largest difference of a datum, without its sign, nats.
        num_data: on how many data it was measured.
        num_particles: particles of each of them.
    """

    precision: str
    mean: float
    largest: float
    num_data: int
    num_particles: int
    se: float | None = None


@dataclass(frozen=True)
class Bracket:
    """Both sides of the mean log p of an energy model: from above by its log Z, from below by reverse annealing.

    Attributes:
        lower: the mean from above less `gap`, nats.
        gap: mean over a part of the data of log p from above less log p from below, nats.
        gap_se: standard error of `gap` over these data; None for a single one.
        num_data: how many data were looked at from below.
        num_steps: T of reverse annealing.
        num_chains: its chains for each datum.
    """

    lower: float
    gap: float
    num_data: int
    num_steps: int
    num_chains: int
    gap_se: float | None = None

    @property
    def is_inverted(self) -> bool:
        """Whether the lower side lies above the upper one by more than 2 standard errors: one of them is wrong."""
        return self.gap + 2 * (self.gap_se or 0.0) < 0


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """Per-datum figures of an estimator, float64 arrays of shape (n,).

    Attributes:
        log_prob: estimate of log p(x_n), shape (n,), nats.
        variance: Monte Carlo variance of each entry of `log_prob`, shape (n,), nats²; zeros where exact.
        direction: "exact"; "lower" or "upper" if the expectation of the estimate bounds log p from there; "unbiased"
            if the leading bias is removed and neither side is promised.
        estimator: name of the estimator.
        num_particles: particles spent on each datum; 0 where exact.
        ess: effective sample size of the importance weights, shape (n,), or None.
        khat: Pareto shape of the largest weights, shape (n,), or None; see `flags`.
        khat_particles: particles of each datum that `khat` rests on; `num_particles` if None.
        elbo: mean log weight, which estimates each datum's ELBO for the proposal used, shape (n,), nats, or None.
        spread: variance of the log weights, shape (n,), nats², or None.
        bad: whether the estimator itself distrusts each datum, booleans (n,), or None: then ESS and k-hat tell.
        bias_bound: how far the truth may lie above the mean (of an upper bound: below) beyond its sampling error,
            nats; None where unknown.
        doubling_bias: estimate of the bias of the mean that is left, from halving the particles, nats, or None.
        doubling_ratio: the ratio that it rests on; about 0.5 is healthy, above 0.8 the estimate is not.
        shares: for an estimator with stages, the share of the data that each stage answered for.
        certificate: what the check from both sides says, or None if it was not asked for.
        precision_error: what the precision of the linear layers costs, or None where they were not shortened.
        shared_variance: of the error that all entries of `log_prob` have in common, nats², such as that of an energy
            model's log Z; part of each entry of `variance`, and not divided by n in the error of the mean.
        constant: log Z of an energy model with what its error rests on, or None.
        bracket: the lower side of an energy model, or None if it was not asked for.
        notes: what a reader must know beside the numbers, for example that a block was halved for want of memory.
    """

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
    precision_error: PrecisionError | None = None
    shared_variance: float = 0.0
    constant: Constant | None = None
    bracket: Bracket | None = None
    notes: tuple[str, ...] = ()


class Estimator(Protocol):
    """What scores a pair: its settings, called with the data's arguments."""

    @property
    def num_particles(self) -> int:
        """Particles or chains spent on each datum; 0 for an exact evaluation."""

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        """Per-datum figures; `progress` is called with the number of data that are done."""


def flags(figures: Estimate, num_se: float = diagnostics.KHAT_SE) -> np.ndarray:
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
