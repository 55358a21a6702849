"""The router: cheap importance sampling for all data, a refined proposal for the hard ones, annealing for the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.estimators.ais import AnnealedImportanceSampling, annealed_importance_sampling
from pyro_vae.estimators.estimate import Estimate, Estimator, flags, pooled
from pyro_vae.estimators.importance import ImportanceSampling, importance_sampling
from pyro_vae.estimators.proposals import Proposal, refined
from pyro_vae.randomness import derived_seed
from pyro_vae.traces import Pair

MIN_ESS = 100.0
MIN_PARTICLES = 25  # fewer give no k-hat
STAGES = ("importance sampling", "refined", "annealed")
ARRAYS = ("log_prob", "variance", "ess", "spread")


@dataclass(frozen=True)
class Router:
    """See `router`."""

    first: ImportanceSampling
    second: ImportanceSampling
    third: AnnealedImportanceSampling

    @property
    def num_particles(self) -> int:
        """Particles of the first stage."""
        return self.first.num_particles

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        num_data = len(args[0])
        stage = np.zeros(num_data, dtype=int)
        estimates = [self.first(pair, args, seed, lambda num: None)]
        figures: dict[str, Any] = {name: getattr(estimates[0], name).copy() for name in ARRAYS}
        open_ = np.flatnonzero(is_hard(estimates[0]))
        progress(num_data - len(open_))
        stages: tuple[Estimator, ...] = (self.second, self.third)
        for index, estimator in enumerate(stages, start=1):
            if len(open_) == 0:
                break
            chosen = torch.from_numpy(open_).to(args[0].device)
            estimate = estimator(pair, tuple(arg[chosen] for arg in args), derived_seed(seed, index), lambda num: None)
            estimates.append(estimate)
            for name in ARRAYS:
                figures[name][open_] = getattr(estimate, name)
            stage[open_] = index
            left = open_[is_hard(estimate)] if index == 1 else open_[:0]
            progress(len(open_) - len(left))
            open_ = left
        return self._estimate(estimates, figures, stage)

    def _estimate(self, estimates: list[Estimate], figures: dict[str, Any], stage: np.ndarray) -> Estimate:
        shares = {name: float(np.mean(stage == index)) for index, name in enumerate(STAGES)}
        spent = [f"{name}: {note}" for name, e in zip(STAGES, estimates, strict=False) for note in e.notes]
        return Estimate(
            **figures,
            direction="lower",
            estimator="router",
            num_particles=self.num_particles,
            bad=_bad(estimates, stage),
            bias_bound=float(np.mean(figures["variance"])) / 2,
            shares=shares,
            notes=(f"K = {self.first.num_particles}, {self.second.num_particles} refined", *spent),
        )


def is_hard(estimate: Estimate) -> np.ndarray:
    """Whether each datum goes on to the next stage: k-hat above 0.7 or fewer than 100 effective particles."""
    if estimate.khat is None or estimate.ess is None:
        raise ValueError(f"{estimate.num_particles} particles are too few for a k-hat to route the data by")
    return ~(estimate.khat <= diagnostics.KHAT_LIMIT) | ~(estimate.ess >= MIN_ESS)


def _bad(estimates: list[Estimate], stage: np.ndarray) -> np.ndarray:
    """Whether the last estimate of each datum is not to be trusted, by the diagnostic of its own stage."""
    bad = pooled(flags(estimates[0]))
    for index, estimate in enumerate(estimates[1:], start=1):
        reached = stage >= index
        bad[reached] = pooled(flags(estimate))
    return bad


def router(
    num_particles: int = 1000,
    *,
    refined_particles: int = 1000,
    annealing: AnnealedImportanceSampling | None = None,
    proposal: Proposal | None = None,
) -> Router:
    """Spend the effort where it is needed: every datum goes as far as its diagnostics send it.

    Importance sampling with the guide on all data; where k-hat > 0.7 or ESS < 100, a proposal refined per datum, with
    fresh samples; where that is still so, annealed importance sampling. Every stage bounds log p(x) from below in
    expectation. `shares` of the result says which part of the data each stage answered for.

    Args:
        num_particles: K of the first stage.
        refined_particles: K of the second.
        annealing: the third stage; 30 steps from the refined proposal by default.
        proposal: of the second stage; `refined()` by default.

    Returns:
        An estimator for `log_likelihood`.

    Raises:
        ValueError: fewer than 25 particles, which give no k-hat to route by.
    """
    for name, value in (("num_particles", num_particles), ("refined_particles", refined_particles)):
        if not isinstance(value, int) or value < MIN_PARTICLES:
            raise ValueError(f"{name} must be a whole number of at least {MIN_PARTICLES}, got {value!r}")
    return Router(
        importance_sampling(num_particles),
        importance_sampling(refined_particles, proposal=proposal or refined()),
        annealing or annealed_importance_sampling(num_steps=30, proposal=proposal or refined()),
    )
