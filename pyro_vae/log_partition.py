"""Log Z by annealing, more than once: over seeds, and with a schedule twice as long, which must not move it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from pyro_vae.annealing import LogPartition, Sequence, State, log_partition
from pyro_vae.checks import check_count
from pyro_vae.randomness import derived_seed

LIMIT = 0.1  # nats, by which estimates of log Z may differ


class Path(Sequence, Protocol):
    """A sequence from a law that can be drawn from, and is normalised, to exp f, on images x."""

    def start(self, num_chains: int) -> State:
        """Exact draws of f_0."""

    def at(self, values: Tensor) -> State:
        """The state of chains at x (num_chains, *shape)."""

    def values(self, state: State) -> Tensor:
        """X of each chain, (num_chains, *shape)."""


@dataclass(frozen=True)
class Repeated:
    """Log Z from several seeds and a doubled schedule, nats; low in expectation.

    Attributes:
        log_z: log of the mean of the seeds' estimates of Z, each of them unbiased.
        se: its standard error: by the delta method or from the scatter of the seeds, whichever is larger; a scatter is
            widened by the ratio of Student's t to the normal quantile, as it rests on few seeds and a normal interval
            is built on it.
        repeats: the estimate of each seed.
        doubled: the estimate with twice the steps, or None if it was not asked for.
    """

    log_z: float
    se: float
    repeats: tuple[LogPartition, ...]
    doubled: LogPartition | None

    @property
    def drift(self) -> float:
        """Largest difference between any two of the estimates, the doubled one included; NaN if there is only one."""
        found = [each.log_z for each in (*self.repeats, self.doubled) if each is not None]
        return max(found) - min(found) if len(found) > 1 else math.nan

    @property
    def is_stable(self) -> bool:
        """Whether there are several estimates, and no two of them differ by more than 0.1 nats."""
        return self.drift <= LIMIT


@dataclass(frozen=True)
class Constant:
    """Log Z as an energy model keeps it: nats, with what an estimate rests on.

    Attributes:
        log_z: log Z.
        se: its standard error, the same in every log p(x); 0 where it was summed.
        drift: the largest difference between estimates from several seeds and a doubled schedule; NaN for a single one.
        num_steps: T of annealing; 0 where log Z was summed.
        num_chains: chains of each estimate.
        num_repeats: estimates that were averaged.
        fingerprint: of the parameters that it belongs to.
    """

    log_z: float
    se: float
    drift: float
    num_steps: float
    num_chains: float
    num_repeats: float
    fingerprint: float

    @property
    def is_exact(self) -> bool:
        """Whether all images were summed."""
        return self.num_steps == 0

    @property
    def is_stable(self) -> bool:
        """Whether estimates from other seeds, or with other steps, were made and differ by no more than 0.1 nats."""
        return self.warning is None

    @property
    def warning(self) -> str | None:
        """Why log Z is not to be trusted, or None."""
        if self.is_exact or self.drift <= LIMIT:
            return None
        if math.isnan(self.drift):
            return "log Z was estimated once, so that nothing tells how stable it is"
        return f"log Z moves by up to {self.drift:.2f} nats with seeds and a doubled schedule: more annealing"


def repeated_log_partition(
    path: Callable[[int], Path],
    *,
    num_steps: int,
    num_chains: int,
    num_repeats: int = 4,
    doubled: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick: Callable[[int], object] = lambda num: None,
) -> Repeated:
    """Estimate log Z with several seeds, and once with twice the steps.

    Args:
        path: from a number of steps to the sequence of densities.
        num_steps: T.
        num_chains: chains of each estimate.
        num_repeats: estimates, from seeds of their own.
        doubled: whether to estimate it with 2 T steps too, as a check that enters no figure but `drift`.
        seed: of everything random.
        device: whose random numbers are seeded.
        tick: called with 1 after every step of annealing, (num_repeats + 2) T in all with the doubled schedule.
    """
    for name, value in {"num_steps": num_steps, "num_chains": num_chains, "num_repeats": num_repeats}.items():
        check_count(name, value)

    def estimate(steps: int, index: int) -> LogPartition:
        sequence = path(steps)
        own = derived_seed(seed, index)
        return log_partition(sequence, lambda: sequence.start(num_chains), seed=own, device=device, tick=tick)

    repeats = tuple(estimate(num_steps, index) for index in range(num_repeats))
    log_z, se = pooled(repeats)
    return Repeated(log_z, se, repeats, estimate(2 * num_steps, num_repeats) if doubled else None)


def pooled(repeats: tuple[LogPartition, ...]) -> tuple[float, float]:
    """Log of the mean of the estimates of Z, and its standard error, nats."""
    found = np.array([each.log_z for each in repeats])
    shares = np.exp(found - found.max())
    log_z = float(found.max() + math.log(shares.mean()))
    shares /= shares.sum()
    delta = math.hypot(*(share * each.se for share, each in zip(shares, repeats, strict=True)))
    scatter = float(found.std(ddof=1)) / math.sqrt(len(found)) * _widened(len(found)) if len(found) > 1 else 0.0
    return log_z, max(delta, scatter)


def _widened(count: int, level: float = 0.95) -> float:
    """How much wider Student's interval from `count` numbers is than a normal one."""
    share = (1 + level) / 2
    return float(stdtrit(count - 1, share) / ndtri(share))
