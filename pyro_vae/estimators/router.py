"""The router: cheap importance sampling for all data, a refined proposal for the hard ones, annealing for the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import diagnostics
from pyro_vae.checks import check_count
from pyro_vae.estimators.ais import AnnealedImportanceSampling, annealed_importance_sampling
from pyro_vae.estimators.estimate import Estimate, Estimator, flags
from pyro_vae.estimators.importance import ImportanceSampling, importance_sampling
from pyro_vae.estimators.proposals import Proposal, refined
from pyro_vae.mapped import Mapped
from pyro_vae.randomness import derived_seed
from pyro_vae.traces import Pair

MIN_ESS = 100.0
MIN_PARTICLES = 25  # fewer give no k-hat
STAGES = ("importance sampling", "refined", "annealed")
ARRAYS = ("log_prob", "variance", "ess", "khat", "spread")
PILOT, FRESH = 41, 42  # streams of the seed


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
        figures: dict[str, Any] = {name: np.full(num_data, np.nan) for name in ARRAYS}
        notes = [f"K = {self.first.num_particles}, {self.second.num_particles} refined"]
        left = np.arange(num_data)
        stages: tuple[Estimator, ...] = (self.first, self.second, self.third)
        for index, estimator in enumerate(stages):
            last = index == len(stages) - 1
            here = left
            if not last:
                pilot = estimator(pair, _rows(args, left), derived_seed(seed, PILOT, index), lambda num: None)
                hard = is_hard(pilot)
                here, left = left[~hard], left[hard]
            if len(here):
                fresh = estimator(pair, _rows(args, here), derived_seed(seed, FRESH, index), lambda num: None)
                for name in ARRAYS:
                    figures[name][here] = _khat(fresh) if name == "khat" else getattr(fresh, name)
                stage[here] = index
                notes += [f"{STAGES[index]}: {note}" for note in fresh.notes]
            progress(len(here))
            if last or len(left) == 0:
                break
        return self._estimate(figures, stage, tuple(notes))

    def _estimate(self, figures: dict[str, Any], stage: np.ndarray, notes: tuple[str, ...]) -> Estimate:
        return Estimate(
            **figures,
            direction="lower",
            estimator="router",
            num_particles=self.num_particles,
            khat_particles=min(self.first.num_particles, self.second.num_particles),
            bias_bound=float(np.mean(figures["variance"])) / 2,
            shares={name: float(np.mean(stage == index)) for index, name in enumerate(STAGES)},
            notes=notes,
        )


def _rows(args: tuple[Tensor, ...], rows: np.ndarray) -> tuple[Tensor, ...]:
    index = torch.from_numpy(rows)
    return tuple(arg.take(index) if isinstance(arg, Mapped) else arg[index.to(arg.device)] for arg in args)


def is_hard(estimate: Estimate) -> np.ndarray:
    """Whether each datum goes on to the next stage: k-hat above its limit (at most 0.7), or ESS below 100."""
    if estimate.khat is None or estimate.ess is None:
        raise ValueError(f"{estimate.num_particles} particles are too few for a k-hat to route the data by")
    return ~(estimate.khat <= diagnostics.khat_limit(estimate.num_particles)) | ~(estimate.ess >= MIN_ESS)


def _khat(estimate: Estimate) -> np.ndarray:
    """k-hat; of annealed data, which have none, what its flag amounts to."""
    return np.where(flags(estimate), np.inf, -np.inf) if estimate.khat is None else estimate.khat


def router(
    num_particles: int = 1000,
    *,
    refined_particles: int = 1000,
    annealing: AnnealedImportanceSampling | None = None,
    proposal: Proposal | None = None,
) -> Router:
    """Spend the effort where it is needed: every datum goes as far as its diagnostics send it.

    Importance sampling with the guide on all data; where k-hat is above its limit (0.7 at most) or ESS < 100, a
    proposal refined per datum; where that is still so, annealed importance sampling. A pilot decides how far a datum
    goes and fresh samples of that stage give its figure: to keep the samples that looked good would choose the
    figures, too. Every stage bounds log p(x) from below in expectation. `shares` of the result says which part of the
    data each stage answered for; where annealing did, k-hat stands for its flag (-inf: trusted, inf: not).

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
        check_count(name, value, least=MIN_PARTICLES)
    return Router(
        importance_sampling(num_particles),
        importance_sampling(refined_particles, proposal=proposal or refined()),
        annealing or annealed_importance_sampling(num_steps=30, proposal=proposal or refined()),
    )
