"""Importance sampling: log mean of p(x, z)/q(z | x) over draws of the guide or of a better proposal."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import diagnostics, distributed, traces
from pyro_vae.checks import check_choice, check_count
from pyro_vae.estimators.estimate import ARRAYS, Estimate, PrecisionError
from pyro_vae.estimators.names import PRECISIONS
from pyro_vae.estimators.precision import REDUCED
from pyro_vae.estimators.proposals import Proposal, with_proposal
from pyro_vae.estimators.streaming import Accumulator, Blocks
from pyro_vae.randomness import derived_seed, own_randomness
from pyro_vae.traces import Pair

PRECISION = 4  # stream of the seed; `multilevel` has 2 and 3
CHECKED_DATA, CHECKED_PARTICLES = 32, 500  # on which shorter numbers are held against float64


@dataclass(frozen=True)
class ImportanceSampling:
    """See `importance_sampling`."""

    num_particles: int
    jackknife: bool = False
    proposal: Proposal | None = None
    precision: str = "float32"

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        tiled = not traces.broadcasts(pair, args)
        pair, args, notes = with_proposal(self.proposal, pair, args, seed)
        fixed_law = not tiled and traces.has_fixed_law(pair, args, seed)
        blocks = Blocks(pair, args, self.num_particles, seed, tiled, precision=self.precision, fixed_law=fixed_law)
        estimate = self.estimate(stream(blocks, progress, self.jackknife), notes + blocks.notes())
        return with_precision_error(estimate, blocks)

    def estimate(self, figures: dict[str, Tensor], notes: tuple[str, ...]) -> Estimate:
        """Of the streamed figures of every datum."""
        bias, ratio = None, None
        if "quarter" in figures and not self.jackknife:
            bias, ratio = diagnostics.doubling_check(figures["quarter"], figures["half"], figures["log_prob"])
        arrays: dict[str, Any] = {name: figures[name].numpy() for name in ARRAYS if name in figures}
        return Estimate(
            **arrays,
            direction="unbiased" if self.jackknife else "lower",
            estimator="importance_sampling_jackknife" if self.jackknife else "importance_sampling",
            num_particles=self.num_particles,
            bias_bound=0.0 if self.jackknife else _leading_bias(arrays["variance"], bias),
            doubling_bias=bias,
            doubling_ratio=ratio,
            notes=notes,
        )


def stream(blocks: Blocks, progress: Callable[[int], object], jackknife: bool = False) -> dict[str, Tensor]:
    """The figures of every datum (n,), on the CPU, from all particles of all blocks."""
    parts = {}
    for index, (start, stop) in enumerate(blocks.data_ranges()):
        if distributed.takes(index):
            accumulator = Accumulator(blocks.num_particles, stop - start, blocks.args[0].device, jackknife)
            for log_weights in blocks.particles(start, stop):
                accumulator.update(log_weights)
            parts[start] = accumulator.finish()
        progress(stop - start)
    return distributed.joined(parts, blocks.num_rows, "cpu")


def with_precision_error(estimate: Estimate, blocks: Blocks) -> Estimate:
    """The estimate, with what shorter numbers cost as a field and as a note where there were any."""
    if blocks.precision not in REDUCED:
        return estimate
    error = precision_error(blocks)
    spread = "" if error.se is None else f" (SE {error.se:.1g})"
    note = f"{error.precision}: {error.mean:+.2g}{spread} nats against float64, on {error.num_data} of the data"
    return replace(estimate, precision_error=error, notes=(*estimate.notes, note))


def precision_error(blocks: Blocks) -> PrecisionError:
    """Of the blocks' precision: a random part of the data scored in it and in float64, with the same noise."""
    seed = derived_seed(blocks.seed, PRECISION)
    with own_randomness(seed):
        rows = torch.randperm(len(blocks.args[0]))[:CHECKED_DATA].to(blocks.args[0].device)
    few = replace(blocks, rows=rows, num_particles=min(CHECKED_PARTICLES, blocks.num_particles), seed=seed)
    here, truth = (stream(each, lambda num: None)["log_prob"] for each in (few, replace(few, precision="float64")))
    gap, count = here - truth, len(rows)
    return PrecisionError(
        blocks.precision,
        mean=float(gap.mean()),
        largest=float(gap.abs().max()),
        num_data=count,
        num_particles=few.num_particles,
        se=float(gap.std()) / math.sqrt(count) if count > 1 else None,
    )


def _leading_bias(variance: np.ndarray, doubling_bias: float | None) -> float | None:
    """Mean of s²/2, the leading term of what log p is understated by, or what doubling finds if that is more."""
    leading = float(np.mean(variance)) / 2
    return max(leading, doubling_bias or 0.0) if math.isfinite(leading) else None


def importance_sampling(
    num_particles: int = 5000,
    *,
    jackknife: bool = False,
    proposal: Proposal | None = None,
    precision: str = "float32",
) -> ImportanceSampling:
    r"""Importance sampling with the guide, or a proposal made of it.

    L_n = log (1/K) Σ_k p(x_n, z_k)/q(z_k | x_n), z_k ~ q(z | x_n), for each datum on its own. E[L_n] <= log p(x_n): a
    lower bound in expectation, low by about half the Monte Carlo variance where the weights are tame, and by more
    where k-hat is above 0.7.

    Args:
        num_particles: K, exactly the number used for every datum.
        jackknife: remove the leading bias, L_J = K L - (K-1) mean_k L_{-k}. What is left is of order 1/K² and of
            either sign, so the result promises no side ("unbiased").
        proposal: `refined()`, `defensive()` or `overdispersed(factor)` in place of the guide; a note of the result
            names it.
        precision: how the model's linear layers multiply. "float32" leaves them in the precision of the parameters;
            "tf32" and "float16" round inputs and weights to a mantissa of 10 bits, sum in float32 and keep biases in
            float32, and what that changes is measured against float64 on a random part of the data and stands in the
            result as `precision_error`. They are for GPUs: a CPU carries out the same rounding, and takes longer.
            "float64" scores the whole model so. The guide stays in the precision of its parameters, and its draws the
            same.

    Returns:
        An estimator for `log_likelihood`.

    Raises:
        ValueError: if `num_particles` is below 1, or below 2 with the jackknife, or the precision is none of these.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519; Nowozin,
    "Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife Variational Inference", 2018.
    """
    check_count("num_particles", num_particles, least=2 if jackknife else 1)
    check_choice("precision", precision, PRECISIONS)
    return ImportanceSampling(int(num_particles), jackknife, proposal, precision)
