"""Exact evaluation: the log-probability of a model that has no latent sites, one pass over the data."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pyro_vae import traces
from pyro_vae.estimators.importance import Estimate, ImportanceSampling
from pyro_vae.traces import Pair


@dataclass(frozen=True)
class Exact:
    """See `exact`."""

    num_particles: int = 0

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        few = tuple(arg[:2] for arg in args)
        latent = traces.check_pair(pair, few)
        if latent:
            raise ValueError(
                f"exact() needs a model without latent sites, this one has {latent}; use "
                "importance_sampling(num_particles=...)"
            )
        once = ImportanceSampling(1)(pair, args, seed, progress)
        return replace(
            once,
            variance=np.zeros_like(once.log_prob),
            direction="exact",
            estimator="exact",
            num_particles=0,
            ess=None,
            khat=None,
            elbo=None,
            bias_bound=0.0,
        )


def exact() -> Exact:
    """Exact log p(x_n) of a model with a tractable marginal (mixture, independent pixel, PPCA), in nats.

    It is importance sampling with no latents: the single weight is p(x) itself.

    Returns:
        An estimator for `log_likelihood`; it raises a ValueError for a model that has latent sites.
    """
    return Exact()
