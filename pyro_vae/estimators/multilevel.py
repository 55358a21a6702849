"""Randomised multilevel importance sampling: log p(x) with the bias of very many particles at the cost of a few."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import diagnostics, traces
from pyro_vae.checks import check_choice, check_count
from pyro_vae.estimators.estimate import ARRAYS, Estimate
from pyro_vae.estimators.importance import stream, with_precision_error
from pyro_vae.estimators.names import PRECISIONS
from pyro_vae.estimators.proposals import Proposal, with_proposal
from pyro_vae.estimators.streaming import Blocks
from pyro_vae.randomness import derived_seed, own_randomness, systematic
from pyro_vae.traces import Pair

LEVELS, FINE = 2, 3  # streams of the seed; the first K0 particles are those of plain importance sampling
DECAY = 2**-1.5  # of P(l) from one level to the next
MAX_RATIO = 2**-0.75  # of D_l from level to level: above it D_l²/P(l) grows with l
MAX_RATIO_SE = 0.1  # up to which the ratio is reported
SIGNIFICANT = 2.0  # standard errors
MAX_LEVEL = 16


@dataclass(frozen=True)
class Multilevel:
    """See `multilevel`."""

    num_particles: int
    proposal: Proposal | None = None
    max_level: int = 9
    precision: str = "float32"

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        tiled = not traces.broadcasts(pair, args)
        pair, args, notes = with_proposal(self.proposal, pair, args, seed)
        levels = draw_levels(len(args[0]), self.max_level, derived_seed(seed, LEVELS))
        rows = np.repeat(np.arange(len(levels)), np.where(levels > 0, 2**levels, 0))
        tick = _in_step(progress, len(levels), len(levels) + len(rows))
        coarse = Blocks(pair, args, self.num_particles, seed, tiled, precision=self.precision)
        base = _figures(coarse, tick)
        log_means = np.empty(0)
        if len(rows):
            chosen = torch.from_numpy(rows).to(args[0].device)
            fine = replace(coarse, seed=derived_seed(seed, FINE), rows=chosen)
            log_means = _figures(fine, tick)["log_prob"]
        self._check(np.concatenate([base["log_prob"], log_means]), np.concatenate([np.arange(len(levels)), rows]))
        tiling = ("the programs ran on tiled data, one row per particle and datum",) if tiled else ()
        notes += (self._cost(levels, len(rows)), *tiling)
        return with_precision_error(self._estimate(base, level_gains(log_means, levels, self.max_level), notes), coarse)

    def _estimate(self, base: dict[str, np.ndarray], gains: np.ndarray, notes: tuple[str, ...]) -> Estimate:
        correction = np.nansum(gains / reach_probabilities(self.max_level)[1:], axis=1)
        ratio, se = level_ratio(gains)
        settles = not ratio - SIGNIFICANT * se > MAX_RATIO
        known = se <= MAX_RATIO_SE
        warning = f"the level differences fall by {ratio:.2f} per level, too slowly for their variance to be trusted"
        arrays: dict[str, Any] = {name: values for name, values in base.items() if name in ARRAYS}
        arrays["log_prob"] = base["log_prob"] + correction
        arrays["variance"] = base["variance"] + correction**2
        first = max(float(base["variance"].mean()) / 4, _mean(gains[:, 0]))  # s²/4 where the weights are tame
        return Estimate(
            **arrays,
            direction="unbiased",
            estimator="multilevel",
            num_particles=self.num_particles,
            khat_particles=self.num_particles,
            bad=None if settles else np.ones(len(correction), dtype=bool),
            bias_bound=_left(first, np.nanmax([ratio, MAX_RATIO]), self.max_level) if settles else None,
            doubling_bias=_left(first, ratio, self.max_level) if known else None,
            doubling_ratio=ratio if known else None,
            notes=notes if settles else (*notes, warning),
        )

    def _cost(self, levels: np.ndarray, num_rows: int) -> str:
        spent = self.num_particles * (len(levels) + num_rows)
        each = f"{self.num_particles} and levels up to {levels.max()}"
        return f"{spent:,} particles in all, {spent / len(levels):,.1f} per datum ({each} of {self.max_level})"

    def _check(self, log_means: np.ndarray, data: np.ndarray) -> None:
        """A mean weight of zero has no logarithm to correct."""
        bad = np.flatnonzero(log_means == -math.inf)
        if len(bad):
            raise ValueError(
                f"all of {self.num_particles} particles of datum {data[bad[0]]} have weight zero, and the multilevel "
                "estimate does not exist; use more particles, a better proposal or importance_sampling(...)"
            )


def multilevel(
    num_particles: int = 500,
    *,
    proposal: Proposal | None = None,
    max_level: int = 9,
    precision: str = "float32",
) -> Multilevel:
    r"""Log p(x) by randomised multilevel Monte Carlo: nearly unbiased at about 2.5 K0 particles per datum.

    Y_n = L_{K0} + Σ_{j <= l} D_j / P(l >= j), with the level l of a datum drawn with P(l) ∝ 2^(-3l/2) on 0..max_level.
    D_j is what doubling from K0 2^(j-1) to K0 2^j particles adds, the logarithm of all less the mean of those of the
    two halves, averaged over all such pairs among K0 2^l fresh particles. The sum telescopes: E Y_n = E L_K with K =
    K0 2^max_level, 256,000 for the defaults, whose bias is that of plain importance sampling with so many.

    The levels of the data are met in the shares that they should have, so that the sum over data varies less.
    `variance` is that of L_{K0} by the delta method plus the square of the correction: its SUM over many data is an
    honest estimate of the variance of the sum, while a single entry says only what was added to its datum. It is not to
    be trusted where k-hat is high, nor where the D_j fall by less than 2^(-3/4) per level: then every datum is flagged
    and a note says so. `ess`, `khat`, `elbo` and `spread` are of the first K0 particles, which are those of
    `importance_sampling(K0)`; a note gives the number of particles spent in all.

    Args:
        num_particles: K0, particles of the lowest level; at least 2, and 25 for a k-hat.
        proposal: `refined()`, `defensive()` or `overdispersed(factor)` in place of the guide.
        max_level: the last level.
        precision: how the model's linear layers multiply, see `importance_sampling`.

    Returns:
        An estimator for `log_likelihood`; direction "unbiased", `bias_bound` for what the last level leaves.

    Raises:
        ValueError: fewer than 2 particles, a last level outside 1..16, or an unknown precision.

    Source: Goda, Ishikawa, "Multilevel Monte Carlo estimation of log marginal likelihood", 2019, arXiv:1912.10636;
    Rhee, Glynn, "Unbiased estimation with square root convergence for SDE models", 2015 (the coupled sum); Vihola,
    "Unbiased estimators and multilevel Monte Carlo", 2018, arXiv:1512.01022 (the stratified levels).
    """
    check_count("num_particles", num_particles, least=2)
    if not isinstance(max_level, int) or not 1 <= max_level <= MAX_LEVEL:
        raise ValueError(f"max_level must be a whole number from 1 to {MAX_LEVEL}, got {max_level!r}")
    check_choice("precision", precision, PRECISIONS)
    return Multilevel(int(num_particles), proposal, max_level, precision)


def level_probabilities(max_level: int) -> np.ndarray:
    """P(l) for l = 0..max_level."""
    weights = DECAY ** np.arange(max_level + 1)
    return weights / weights.sum()


def reach_probabilities(max_level: int) -> np.ndarray:
    """P(l >= j) for j = 0..max_level."""
    return level_probabilities(max_level)[::-1].cumsum()[::-1]


def draw_levels(num_data: int, max_level: int, seed: int) -> np.ndarray:
    """A level for each datum, shape (n,): each has the law P(l), and their counts are n P(l) but for rounding."""
    with own_randomness(seed):
        return systematic(torch.from_numpy(level_probabilities(max_level)), num_data, 1)[:, 0].numpy()


def level_gains(log_means: np.ndarray, levels: np.ndarray, max_level: int) -> np.ndarray:
    """What each doubling adds to each datum's logarithm, from its 2^l log means of K0 particles.

    With a and b the log means of the halves, log((e^a + e^b)/2) - (a + b)/2 = log cosh((a - b)/2).

    Args:
        log_means: those of the first datum with a level above 0, then those of the next, shape (Σ 2^l,), nats.
        levels: shape (n,).
        max_level: the last level.

    Returns:
        D_j in column j - 1, averaged over the pairs of the datum, shape (n, max_level); NaN above its level.
    """
    gains = np.full((len(levels), max_level), np.nan)
    starts = np.cumsum(np.where(levels > 0, 2**levels, 0)) - 2**levels
    for level in range(1, max_level + 1):
        data = np.flatnonzero(levels == level)
        means = log_means[starts[data, None] + np.arange(2**level)]  # (data, 2^level)
        for lower in range(level):
            left, right = means[:, 0::2], means[:, 1::2]
            gap = np.abs(left - right) / 2
            gains[data, lower] = (gap + np.log1p(np.exp(-2 * gap)) - math.log(2)).mean(1)
            means = np.logaddexp(left, right) - math.log(2)
    return gains


def level_ratio(gains: np.ndarray) -> tuple[float, float]:
    """The factor by which D_j falls from level to level, and its standard error.

    Σ D_{j+1} / Σ D_j over all data and levels where both are known, which spares the differences between data. (NaN,
    inf) where fewer than two data go beyond the first level.
    """
    both = ~np.isnan(gains[:, 1:])
    chosen = both.any(1)
    if chosen.sum() < 2:
        return math.nan, math.inf
    upper = np.where(both, gains[:, 1:], 0.0).sum(1)[chosen]
    lower = np.where(both, gains[:, :-1], 0.0).sum(1)[chosen]
    if not lower.sum() > 0:  # all weights are equal
        return math.nan, math.inf
    ratio = upper.sum() / lower.sum()
    scatter = np.square(upper - ratio * lower).sum() * len(upper) / (len(upper) - 1)
    return float(ratio), float(np.sqrt(scatter) / lower.sum())


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


def _left(first: float, ratio: float, max_level: int) -> float | None:
    """What the levels beyond the last would add, Σ_{j > max_level} D_1 r^(j-1), nats; None if that does not settle."""
    return float(first * ratio**max_level / (1 - ratio)) if ratio <= diagnostics.RATIO_LIMIT else None


def _figures(blocks: Blocks, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in stream(blocks, progress).items()}


def _in_step(progress: Callable[[int], object], num_data: int, num_rows: int) -> Callable[[int], None]:
    """Progress over all rows, told as if they were the data."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        progress(done * num_data // num_rows - before * num_data // num_rows)

    return tick
