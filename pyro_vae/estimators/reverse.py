"""The lower side of an energy model: RAISE, annealing backwards from each image, and the bracket of both sides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import distributed, traces
from pyro_vae.annealing import State, anneal
from pyro_vae.checks import check_count
from pyro_vae.energy import Energy
from pyro_vae.estimators.ais import bias_of_chains, check_chains
from pyro_vae.estimators.estimate import Bracket, Estimate, Estimator
from pyro_vae.estimators.exact import Exact
from pyro_vae.estimators.sandwich import Sandwich
from pyro_vae.log_partition import Path
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.traces import Pair

REVERSE, SUBSET = 31, 32  # streams of the seed
BLOCK_ROWS = 1024  # chains of all data of a block


@dataclass(frozen=True)
class ReverseAnnealing:
    """See `reverse_annealing`."""

    num_steps: int
    num_chains: int

    @property
    def num_particles(self) -> int:
        """Chains of each datum."""
        return self.num_chains

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        law = energy_law(pair, args)
        if law is None:
            raise ValueError("reverse annealing is for energy models, whose law at 'obs' is an Energy: use ais here")
        path: Path = law.model.path(self.num_steps)
        size, parts = max(1, BLOCK_ROWS // self.num_chains), {}
        for index, start in enumerate(range(0, len(args[0]), size)):
            block = args[0][start : start + size]
            if distributed.takes(index):
                reseed(derived_seed(seed, REVERSE, start), block.device)
                parts[start] = self._figures(path, block, start)
            progress(len(block))
        figures = distributed.joined(parts, len(args[0]), "cpu")
        spread = figures["log_weights"].T.contiguous().var(0) if self.num_chains > 1 else None
        return Estimate(
            log_prob=figures["log_mean"].numpy(),
            variance=figures["variance"].numpy(),
            direction="lower",
            estimator="reverse_annealing",
            num_particles=self.num_chains,
            ess=figures["ess"].numpy(),
            spread=None if spread is None else spread.numpy(),
            bias_bound=None if spread is None else bias_of_chains(figures["variance"], spread, self.num_chains),
            notes=(f"{self.num_steps} steps back from each image, {self.num_chains} chains",),
        )

    def _figures(self, path: Path, obs: Tensor, start: int) -> dict[str, Tensor]:
        chains = obs.expand(self.num_chains, *obs.shape).flatten(0, 1)  # (C n, *shape)
        state = path.at(chains)
        whole = path.log_density(state, path.num_steps).view(self.num_chains, -1)  # (C, n), f(x)
        back = anneal(_Grouped(path, self.num_chains), path.move(state, path.num_steps), reverse=True)
        log_weights = back.log_weights + whole
        check_chains(log_weights, start)
        log_mean = back.log_mean + whole[0]
        return {"log_mean": log_mean, "variance": back.variance, "ess": back.ess, "log_weights": log_weights.T}


@dataclass(frozen=True)
class _Grouped:
    """A path whose states hold the chains of several data one after the other: log densities as (chains, data)."""

    path: Path
    num_chains: int

    @property
    def num_steps(self) -> int:
        return self.path.num_steps

    def log_density(self, state: State, step: int) -> Tensor:
        return self.path.log_density(state, step).view(self.num_chains, -1)

    def move(self, state: State, step: int) -> State:
        return self.path.move(state, step)

    def take(self, state: State, chains: Tensor) -> State:
        raise NotImplementedError("chains that go backwards are not resampled")


def reverse_annealing(num_steps: int = 1000, num_chains: int = 16) -> ReverseAnnealing:
    r"""RAISE: a lower bound on log p(x) of an energy model, that needs no log Z.

    The model is taken as its annealing sampler: x_0 ~ p_0, then one move at each of f_1, ..., f_T, whose law of x_T = x
    is p_T(x). Chains go backwards from x, one move at each of f_T, ..., f_1 to x_0, and

        w = f_T(x) Π_t f_{t-1}(x_{t-1}) / f_t(x_{t-1}),   E w = p_T(x),   f_0 = p_0 normalised,

    so that E log mean w <= log p_T(x). p_T comes near to p as T grows. For data from the model its mean log-likelihood
    is below that of p by KL(p, p_T); for other data that is not promised, but a law that annealing does not reach is,
    as a rule, a worse one, and the bound is conservative. Kernels must be reversible.

    Args:
        num_steps: T; more of them tighten the bound most.
        num_chains: chains of each datum.

    Returns:
        An estimator for `log_likelihood`.

    Raises:
        ValueError: a count below 1. A model without latents that is no energy is scored exactly instead.

    Source: Burda, Grosse, Salakhutdinov, "Accurate and conservative estimates of MRF log-likelihood using reverse
    annealing", 2015 (AISTATS), arXiv:1412.8566.
    """
    for name, value in (("num_steps", num_steps), ("num_chains", num_chains)):
        check_count(name, value)
    return ReverseAnnealing(num_steps, num_chains)


@dataclass(frozen=True)
class Bracketed:
    """See `bracket`."""

    lower: ReverseAnnealing
    num_data: int

    @property
    def num_particles(self) -> int:
        """0, as the upper side is f(x) less log Z."""
        return 0

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        if energy_law(pair, args) is None:
            raise ValueError("bracket is for energy models, whose law at 'obs' is an Energy; others have `sandwich`")
        upper = Exact()(pair, args, seed, lambda num: None)
        generator = torch.Generator().manual_seed(derived_seed(seed, SUBSET))
        rows = torch.randperm(len(args[0]), generator=generator)[: self.num_data].sort().values
        lower = self.lower(pair, tuple(arg[rows.to(arg.device)] for arg in args), seed, progress)
        gaps = upper.log_prob[rows.numpy()] - lower.log_prob
        found = Bracket(
            lower=float(upper.log_prob.mean() - gaps.mean()),
            gap=float(gaps.mean()),
            gap_se=float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None,
            num_data=len(rows),
            num_steps=self.lower.num_steps,
            num_chains=self.lower.num_chains,
        )
        bound = max(0.0, found.gap + 2 * (found.gap_se or 0.0), upper.bias_bound or 0.0)
        bound = 0.0 if upper.direction == "exact" else bound
        return replace(upper, bracket=found, bias_bound=bound, notes=(*upper.notes, *lower.notes))


def bracket(num_steps: int = 1000, num_chains: int = 16, num_data: int = 100) -> Bracketed:
    """Both sides of an energy model: f(x) less log Z from above for all data, RAISE from below for a part of them.

    The mean gap of the part, paired image by image, is taken for that of all.

    Args:
        num_steps: T of `reverse_annealing`.
        num_chains: its chains for each datum.
        num_data: how many data, drawn at random; all if there are no more.

    Returns:
        An estimator for `log_likelihood`, whose result has the direction "upper", its `bracket`, and the gap as
        bound on the bias.
    """
    check_count("num_data", num_data)
    return Bracketed(reverse_annealing(num_steps, num_chains), num_data)


def energy_law(pair: Pair, args: tuple[Tensor, ...]) -> Energy | None:
    """The law of an energy model at the site "obs", or None where there is another, or latents."""
    law: Any = traces.observation(pair, tuple(arg[:2] for arg in args))
    return law if isinstance(law, Energy) else None


def without_latents(estimator: Estimator | None, pair: Pair, args: tuple[Tensor, ...]) -> Estimator:
    """What scores a pair that has no latent sites: exact, but for an energy model what looks at its lower side."""
    if energy_law(pair, args) is None:
        return Exact()
    if isinstance(estimator, Sandwich):  # "check it from both sides"
        chains, num_data = estimator.annealing.num_chains, estimator.num_simulated
        return bracket(estimator.annealing.num_steps, chains, num_data)
    return estimator if isinstance(estimator, ReverseAnnealing | Bracketed) else Exact()
