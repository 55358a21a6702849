"""Settings of a proposal chosen on validation data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.proposals import overdispersed
from pyro_vae.traces import Program

if TYPE_CHECKING:
    from pyro_vae.data import Batch


def tune_overdispersion(
    model: nn.Module | Program,
    batch: "Batch",
    *,
    guide: Program | None = None,
    factors: Sequence[float] = (1.0, 1.2, 1.5, 2.0, 3.0),
    num_particles: int = 500,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> float:
    """The factor on the guide's variance with the highest mean log p-hat, for `overdispersed(factor)`.

    log p-hat lies below log p by about half its variance, whatever the proposal, so that the highest mean is the least
    biased one. An effective sample size would not do: of a guide that is too narrow it sees only the weights that
    were drawn, and they look alike. All factors share their random numbers. Use validation data: the choice fits the
    data that it is made on.

    Args:
        model: as for `log_likelihood`.
        batch: validation data.
        guide: the guide of a Pyro model that is not one of ours.
        factors: to choose from.
        num_particles: K; few tell the factors apart better than many.
        seed: of the draws.
        device: as for `log_likelihood`.
    """
    if not len(factors):
        raise ValueError("factors must hold at least one factor, got none")
    means = []
    for factor in factors:
        estimator = importance_sampling(num_particles, proposal=overdispersed(factor))
        means.append(log_likelihood(model, batch, guide=guide, estimator=estimator, seed=seed, device=device).mean)
    return float(factors[int(np.argmax(means))])
