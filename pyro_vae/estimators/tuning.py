"""Settings of a proposal chosen on validation data."""

import math
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

SIGNIFICANT = 2.0  # standard errors


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
    """The factor on the guide's variance that suits these data best, for `overdispersed(factor)`.

    Of the factors whose mean log p-hat is not below the highest by more than two standard errors of the paired
    difference, the one whose estimates vary least. log p-hat lies below log p by about half its variance, whatever the
    proposal: a mean that is lower beyond doubt belongs to a worse one. The variance alone would not do, nor an
    effective sample size: of a guide that is too narrow they see only the weights that were drawn, and these look
    alike. All factors share their random numbers. Use validation data: the choice fits the data that it is made on.

    Args:
        model: as for `log_likelihood`.
        batch: validation data.
        guide: the guide of a Pyro model that is not one of ours.
        factors: to choose from.
        num_particles: K; few tell the factors apart better than many.
        seed: of the draws.
        device: as for `log_likelihood`.

    Raises:
        ValueError: without factors, for one that is not positive, or a law that cannot be widened.
    """
    if not len(factors):
        raise ValueError("factors must hold at least one factor, got none")
    results = []
    for factor in factors:
        estimator = importance_sampling(num_particles, proposal=overdispersed(factor))
        results.append(log_likelihood(model, batch, guide=guide, estimator=estimator, seed=seed, device=device))
    best = max(results, key=lambda result: result.mean)
    behind = np.stack([best.log_prob - result.log_prob for result in results])  # (factors, n)
    close = behind.mean(1) <= SIGNIFICANT * behind.std(1) / math.sqrt(len(best))
    variances = [result.variance.mean() if near else math.inf for result, near in zip(results, close, strict=True)]
    return float(factors[int(np.argmin(variances))])
