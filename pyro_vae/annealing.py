"""Annealing: log weights along a sequence of densities, for any state and any kernel that leaves them invariant."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.randomness import own_randomness

State = Any


class Sequence(Protocol):
    """Densities f_0, ..., f_T, each known up to a constant, with a kernel for each.

    The states are whatever the kernels make of them; the first axis of all they hold is that of the chains.
    """

    @property
    def num_steps(self) -> int:
        """T."""

    def log_density(self, state: State, step: int) -> Tensor:
        """Log f_step, shape (num_chains, ...), nats; further axes are independent problems, such as data."""

    def move(self, state: State, step: int) -> State:
        """One draw of a kernel that leaves f_step invariant; a Metropolis test must end what is not so by itself."""

    def take(self, state: State, chains: Tensor) -> State:
        """The states of the chains `chains` (num_chains, ...), for resampling."""


def sigmoid_schedule(num_steps: int, sharpness: float = 4.0) -> Tensor:
    """β_t = σ(s (2t/T - 1)) rescaled to go from 0 to 1, slow at both ends; shape (num_steps + 1,), float64.

    Source: Wu, Burda, Salakhutdinov, Grosse, "On the quantitative analysis of decoder-based generative models", 2017,
    arXiv:1611.04273.
    """
    betas = torch.sigmoid(sharpness * torch.linspace(-1, 1, num_steps + 1, dtype=torch.float64))
    return (betas - betas[0]) / (betas[-1] - betas[0])


def exponential_schedule(num_steps: int, sharpness: float = 3.0) -> Tensor:
    """β_t = (1 - exp(-s t/T)) / (1 - exp(-s)), slow at its end alone; shape (num_steps + 1,), float64.

    For a path whose first densities are easy. Where hidden bits of an RBM start from their shares, log Z of 100 hidden
    bits on 8x8 digits (T = 2,000, 100 chains) scatters over 20 seeds by 0.011 nats, by `sigmoid_schedule` by 0.019; for
    500 on MNIST by 0.62 and 0.26, where few chains carry each estimate (benchmarks/annealing_paths.py).
    """
    betas = -torch.expm1(-sharpness * torch.linspace(0, 1, num_steps + 1, dtype=torch.float64))
    return betas / betas[-1]


@dataclass(frozen=True)
class Weights:
    """Log weights (num_chains, ...) with log-mean `log_mean` and its relative variance, both of shape (...)."""

    log_weights: Tensor
    log_mean: Tensor
    variance: Tensor
    ess: Tensor


def anneal(
    sequence: Sequence,
    state: State,
    *,
    reverse: bool = False,
    resample: bool = False,
    tick: Callable[[int], object] = lambda num: None,
) -> Weights:
    r"""Carry chains from f_0 to f_T, w = Π_t f_t(x_{t-1}) / f_{t-1}(x_{t-1}), so that E w = Z_T / Z_0.

    By Jensen, E log mean w <= log Z_T/Z_0, and P(log mean w > log Z_T/Z_0 + b) < exp(-b). In reverse, from exact draws
    of f_T to f_0, E w = Z_0 / Z_T, so that -log mean w is an upper bound in expectation.

    Args:
        sequence: the densities and kernels.
        state: draws of f_0, or of f_T in reverse.
        reverse: whether to go from f_T to f_0.
        resample: sequential Monte Carlo: where fewer than half of the chains are effective, draw the chains anew in
            proportion to their weights.
        tick: called with 1 after every step.

    Returns:
        Log weights, the log of their mean, its variance and the effective number of chains that this variance amounts
        to: without resampling (Σ w)²/Σ w², with resampling that of the chains of the start. The variance is
        the delta method's, (1/ESS - 1/C) C/(C-1); with resampling that of Lee and Whiteley, which is the same where no
        resampling happened.

    Source: Neal, "Annealed importance sampling", 2001; Del Moral, Doucet, Jasra, "Sequential Monte Carlo samplers",
    2006; Lee, Whiteley, "Variance estimation in the particle filter", 2018, arXiv:1509.00394.
    """
    steps = list(range(sequence.num_steps + 1))
    steps = steps[::-1] if reverse else steps
    genealogy = None
    log_weights = torch.zeros(())
    for before, after in itertools.pairwise(steps):
        now = sequence.log_density(state, before)
        gain = sequence.log_density(state, after) - now
        log_weights = log_weights + torch.where(now == -math.inf, 0.0, gain)  # a weight of zero stays one
        if genealogy is None:
            genealogy = _Genealogy(log_weights)
        if resample and after != steps[-1]:
            chains = genealogy.resample(log_weights)
            if chains is not None:
                state, log_weights = sequence.take(state, chains), genealogy.reset(log_weights)
        if after != steps[-1]:
            state = sequence.move(state, after)
        tick(1)
    if genealogy is None:
        raise ValueError(f"num_steps must be at least 1, got {sequence.num_steps}")
    return genealogy.finish(log_weights)


class _Genealogy:
    """Which chain of the start each chain goes back to, and how often each problem was resampled."""

    def __init__(self, log_weights: Tensor) -> None:
        self.num_chains = len(log_weights)
        index = torch.arange(self.num_chains, device=log_weights.device)
        self.root = index.view(-1, *[1] * (log_weights.ndim - 1)).expand_as(log_weights).contiguous()
        self.rounds = torch.zeros_like(log_weights[0])
        self.due = torch.zeros_like(log_weights[0], dtype=torch.bool)

    def resample(self, log_weights: Tensor) -> Tensor | None:
        """Chains drawn in proportion to their weights where fewer than half are effective; None if nowhere."""
        self.due = diagnostics.effective_sample_size(log_weights) < self.num_chains / 2
        if self.num_chains < 2 or not bool(self.due.any()):
            return None
        known = torch.where(self.due, log_weights, 0.0)  # where all weights are zero there is nothing to draw by
        flat = torch.softmax(known.reshape(self.num_chains, -1), 0).T  # (problems, num_chains)
        drawn = torch.multinomial(flat, self.num_chains, replacement=True).T.reshape(log_weights.shape)
        stay = torch.arange(self.num_chains, device=drawn.device).view(-1, *[1] * (drawn.ndim - 1))
        chains = torch.where(self.due, drawn, stay)
        self.root = self.root.gather(0, chains)
        self.rounds = self.rounds + self.due
        return chains

    def reset(self, log_weights: Tensor) -> Tensor:
        """Every chain of a resampled problem carries the mean weight."""
        return torch.where(self.due, log_weights.logsumexp(0) - math.log(self.num_chains), log_weights)

    def finish(self, log_weights: Tensor) -> Weights:
        count = self.num_chains
        shares = torch.softmax(log_weights, 0)
        families = torch.zeros_like(shares).scatter_add_(0, self.root, shares)  # of each chain of the start
        same = (families**2).sum(0)
        if count > 1:
            variance = (1 - (count / (count - 1)) ** (self.rounds + 1) * (1 - same)).clamp(min=0)
        else:
            variance = torch.full_like(same, math.inf)
        effective = 1 / (variance * (count - 1) / count + 1 / count) if count > 1 else torch.ones_like(same)
        return Weights(log_weights, log_weights.logsumexp(0) - math.log(count), variance, effective)


@dataclass(frozen=True)
class LogPartition:
    """Estimate of log Z = log ∫ f: a lower bound in expectation, so that log f(x) - log_z overstates log p(x).

    Attributes:
        log_z: log Z_0 + log mean w, nats.
        se: its Monte Carlo standard error, nats; the same error in every log p(x) = log f(x) - log Z.
        ess: effective number of chains.
        spread: variance of the log weights, nats².
        num_chains: chains used.
        num_steps: T, intermediate densities.
        direction: "lower".
    """

    log_z: float
    se: float
    ess: float
    spread: float
    num_chains: int
    num_steps: int
    direction: str = "lower"


def log_partition(
    sequence: Sequence,
    start: Callable[[], State],
    *,
    log_z_start: float = 0.0,
    resample: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick: Callable[[int], object] = lambda num: None,
) -> LogPartition:
    """Log of the normalising constant of f_T, by annealing from f_0, whose constant is known.

    Args:
        sequence: densities f_0 to f_T and their kernels, of the user's own making.
        start: draws the chains from f_0, called once.
        log_z_start: log Z_0, nats.
        resample: see `anneal`.
        seed: of everything random; the global random state is left as it was.
        device: whose random numbers are seeded.
        tick: called with 1 after every step.

    Returns:
        log Z with its error, nats.

    Raises:
        ValueError: if a weight is NaN or infinite, or all are zero.
    """
    with torch.no_grad(), own_randomness(seed, device):
        weights = anneal(sequence, start(), resample=resample, tick=tick)
    log_weights = weights.log_weights
    if log_weights.ndim != 1:
        raise ValueError(f"log_density must have shape (num_chains,) for one constant, got {tuple(log_weights.shape)}")
    if not bool(weights.log_mean.isfinite()):
        raise ValueError(f"log Z is {float(weights.log_mean)}: a weight is NaN or infinite, or all are zero")
    return LogPartition(
        log_z=log_z_start + float(weights.log_mean),
        se=math.sqrt(float(weights.variance)),
        ess=float(weights.ess),
        spread=float(log_weights.var()) if len(log_weights) > 1 else math.nan,
        num_chains=len(log_weights),
        num_steps=sequence.num_steps,
    )
