"""Exact evaluation: one pass over the data for a model without latent sites, a sum over the states of discrete ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pyro_vae import distributed, traces
from pyro_vae.energy import Energy
from pyro_vae.estimators.estimate import Estimate
from pyro_vae.estimators.importance import ImportanceSampling
from pyro_vae.estimators.streaming import BLOCK_ROWS
from pyro_vae.latents import Latents
from pyro_vae.log_partition import Constant
from pyro_vae.traces import Pair


@dataclass(frozen=True)
class Exact:
    """See `exact`."""

    num_particles: int = 0

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        latent = traces.matching_sites(pair, tuple(arg[:2] for arg in args))
        if latent:
            return _enumerated(pair, args, latent, progress)
        law = traces.observation(pair, tuple(arg[:2] for arg in args))
        constant = law.constant if isinstance(law, Energy) else None
        once = ImportanceSampling(1)(pair, args, seed, progress)
        return replace(
            _exact(once.log_prob) if constant is None else _by_constant(once.log_prob, constant),
            notes=once.notes,
        )


def exact() -> Exact:
    """Exact log p(x_n) of a model with a tractable marginal (mixture, independent pixel, PPCA), in nats.

    It is importance sampling with no latents: the single weight is p(x) itself. Discrete latents with at most 4096
    joint states are summed out, log p(x) = logsumexp_z log p(x, z). Log p(x) = f(x) - log Z of an energy model is as
    good as its log Z: exact where that was summed, else from above, with the error of log Z in all data alike.

    Returns:
        An estimator for `log_likelihood`; it raises a ValueError for a model that has continuous latents.
    """
    return Exact()


def _enumerated(pair: Pair, args: tuple[Tensor, ...], latent: list[str], progress: Callable[[int], object]) -> Estimate:
    latents = Latents(pair, args, tiled=True)
    if latents.sites:
        raise ValueError(
            f"exact() needs a model without continuous latents, this one has {latent}; use "
            "importance_sampling(num_particles=...)"
        )
    parts, rows = {}, BLOCK_ROWS["cpu"]
    for index, start in enumerate(range(0, len(args[0]), rows)):
        block = tuple(arg[start : start + rows] for arg in args)
        if distributed.takes(index):
            parts[start] = {"log_prob": latents.log_evidence(block)}
        progress(len(block[0]))
    log_prob = distributed.joined(parts, len(args[0]), "cpu")["log_prob"].numpy()
    note = f"the discrete latents {latent} were summed out over {latents.num_states} joint states"
    return replace(_exact(log_prob), notes=(note,))


def _by_constant(log_prob: np.ndarray, constant: Constant) -> Estimate:
    """f(x) - log Z: an upper bound in expectation, as annealing understates log Z, and all data share its error."""
    exact = _exact(log_prob)
    if constant.is_exact:
        return replace(exact, constant=constant)
    return replace(
        exact,
        variance=np.full_like(log_prob, constant.se**2),
        shared_variance=constant.se**2,
        direction="upper",
        estimator="energy",
        bad=np.full(log_prob.shape, not constant.is_stable),
        bias_bound=None if math.isnan(constant.drift) else constant.se**2 / 2 + constant.drift,
        constant=constant,
    )


def _exact(log_prob: np.ndarray) -> Estimate:
    return Estimate(
        log_prob=log_prob,
        variance=np.zeros_like(log_prob),
        direction="exact",
        estimator="exact",
        num_particles=0,
        bias_bound=0.0,
    )
