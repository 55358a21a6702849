"""Bidirectional Monte Carlo: how far an estimator is off on data whose posterior draws are known, and a certificate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyro_vae import distributed, traces
from pyro_vae.checks import check_count
from pyro_vae.estimators.ais import AnnealedImportanceSampling, Annealer, annealed_importance_sampling, check_chains
from pyro_vae.estimators.estimate import Certificate, Estimate, Estimator
from pyro_vae.estimators.proposals import Proposal
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.traces import Pair

SIMULATION, ON_SIMULATED, BACKWARD, CHOSEN, CHECKED, CHECKED_SIMULATED = range(31, 37)  # streams of the seed
SIGNIFICANT = 2.0  # standard errors
INCONSISTENT = 3.0  # standard errors by which a lower bound must not pass an upper one, nor annealing the estimate
NEGLIGIBLE = 0.01  # nats by which it may in any case


@dataclass(frozen=True)
class Sandwich:
    """See `sandwich`."""

    estimator: Estimator
    annealing: AnnealedImportanceSampling
    num_simulated: int
    tolerance: float

    @property
    def num_particles(self) -> int:
        """Particles or chains that the estimator spends on each datum."""
        return self.estimator.num_particles

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        real = self.estimator(pair, args, seed, progress)
        if real.direction == "exact":
            raise ValueError("an exact log-likelihood needs no certificate")
        chosen = self.choose(len(args[0]), seed).to(args[0].device)
        simulated, drawn = _simulate(pair, tuple(arg[chosen] for arg in args), seed)
        lower = self.estimator(pair, simulated, derived_seed(seed, ON_SIMULATED), lambda num: None)
        upper = self._upper(pair, simulated, drawn, seed)
        rows = np.unique(chosen.cpu().numpy())  # of the real data, annealed too
        part = tuple(arg[torch.from_numpy(rows).to(arg.device)] for arg in args)
        annealed = self.annealing(pair, part, derived_seed(seed, CHECKED), lambda num: None)
        on_simulated = self.annealing(pair, simulated, derived_seed(seed, CHECKED_SIMULATED), lambda num: None)
        certificate = certify(real.log_prob[rows], lower.log_prob, upper, annealed, on_simulated, self.tolerance)
        if not certificate.granted:
            return replace(real, certificate=certificate, bias_bound=None)
        limit = certificate.gap + SIGNIFICANT * certificate.gap_se
        return replace(real, certificate=certificate, bias_bound=max(real.bias_bound or 0.0, limit, 0.0))

    def choose(self, num_data: int, seed: int) -> Tensor:
        """Indexes (num_simulated,) of the data that lend their context: a seeded draw, in turn where there are few."""
        generator = torch.Generator().manual_seed(derived_seed(seed, CHOSEN))
        return torch.randperm(num_data, generator=generator)[torch.arange(self.num_simulated) % num_data]

    def _upper(self, pair: Pair, simulated: tuple[Tensor, ...], drawn: traces.Values, seed: int) -> np.ndarray:
        """Upper bounds on log p of the simulated data, from their own latents; shape (num_simulated,), nats."""
        annealer = Annealer(self.annealing, pair, simulated, derived_seed(seed, BACKWARD))
        posterior = annealer.latents.pack_one(drawn, len(simulated[0]))
        parts = {}
        for index, (start, stop) in enumerate(annealer.blocks()):
            if distributed.takes(index):
                reseed(derived_seed(seed, BACKWARD, 0, start), simulated[0].device)
                weights = annealer.backward(start, stop, posterior[start:stop])
                check_chains(weights.log_weights, start)
                parts[start] = {"upper": -weights.log_mean}
        return distributed.joined(parts, len(simulated[0]), "cpu")["upper"].numpy()


def sandwich(
    estimator: Estimator | None = None,
    *,
    num_steps: int = 1000,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    start: str = "guide",
    proposal: Proposal | None = None,
    num_simulated: int = 100,
    tolerance: float = 0.5,
) -> Sandwich:
    r"""Score data with an estimator and certify it from both sides (bidirectional Monte Carlo).

    Of data (z*, x) drawn from the model itself, z* is an exact posterior draw, so that annealing in reverse from z*
    bounds log p(x) from above while the estimator bounds it from below. The mean gap between the two bounds the
    estimator's mean error on simulated data. It says something of real data only if these are no harder, so that the
    certificate is withheld if their log weights vary more.

    A subset of the real data, as many as are simulated, is annealed forwards too. The certificate is granted if gap +
    2 SE <= tolerance, the gap is not negative beyond 3 SE, the annealed real data do not lie above the estimate beyond
    3 SE (that would be a mode it misses), and their log weights do not vary more than on simulated data, beyond 2 SE.
    `bias_bound` is then at least gap + 2 SE.

    Args:
        estimator: what is certified; annealed importance sampling with the settings below by default.
        num_steps: T of the annealing that gives the upper bound (and of the default estimator).
        num_chains: its chains.
        num_leapfrog: its leapfrog steps.
        start: where it starts from, "guide" or "prior".
        proposal: what stands in for the guide there, such as `refined()`.
        num_simulated: data drawn from the model; a model given a context takes those of the data in turn.
        tolerance: largest gap for which the certificate is granted, nats.

    Returns:
        An estimator for `log_likelihood`, whose result carries a `Certificate`.

    Raises:
        TypeError: an estimator that is none.
        ValueError: fewer than 2 simulated data or chains, a tolerance that is not positive; at use, an exact estimate.

    Source: Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015,
    arXiv:1511.02543.
    """
    check_count("num_simulated", num_simulated, least=2)
    if estimator is not None and not callable(estimator):
        raise TypeError(f"estimator must be an estimator such as pv.importance_sampling(...), got {estimator!r}")
    if num_chains < 2:
        raise ValueError(f"num_chains must be at least 2, whose weights can be compared, got {num_chains}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    annealing = annealed_importance_sampling(num_steps, num_chains, num_leapfrog, start, proposal=proposal)
    return Sandwich(estimator or annealing, annealing, num_simulated, tolerance)


def _simulate(pair: Pair, args: tuple[Tensor, ...], seed: int) -> tuple[tuple[Tensor, ...], traces.Values]:
    """Exact draws of p(x, z): the arguments with x in the place of the data, and z.

    The model runs twice with the same random numbers, the second time at the x of the first: a site whose law depends
    on x, as an auxiliary latent's does, is to see the x that was drawn.
    """
    for again in (False, True):
        reseed(derived_seed(seed, SIMULATION), args[0].device)
        drawn = traces.simulate(pair, args)
        obs = drawn.pop("obs").to(args[0].dtype)
        if again and not torch.equal(obs, args[0]):
            raise ValueError("no data can be simulated: the law of the site 'obs' depends on the data themselves")
        args = (obs, *args[1:])
    return args, drawn


def certify(
    estimated: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    real: Estimate,
    simulated: Estimate,
    tolerance: float,
) -> Certificate:
    """The certificate that the bounds allow.

    Args:
        estimated: what is certified, for some of the real data, (m,), nats.
        lower: the same estimator on the simulated data, (s,), nats.
        upper: bounds from above on the simulated data, (s,), nats.
        real: annealing of those real data.
        simulated: annealing of the simulated data.
        tolerance: largest gap for which the certificate is granted, nats.
    """
    gap, gap_se = _mean_and_se(upper - lower)
    above, above_se = _mean_and_se(real.log_prob - estimated)
    real_spread, simulated_spread, excess = _compare_spreads(real, simulated)
    granted = False
    if gap + SIGNIFICANT * gap_se > tolerance:
        reason = (
            f"on simulated data the estimate may be low by {gap:.2f} nats (SE {gap_se:.2f}), tolerance {tolerance:g}"
        )
    elif gap < -INCONSISTENT * gap_se:
        reason = f"on simulated data the estimate lies {-gap:.2f} nats above an upper bound (SE {gap_se:.2f})"
    elif above > INCONSISTENT * above_se + NEGLIGIBLE:
        reason = f"annealing puts the real data {above:.2f} nats above the estimate (SE {above_se:.2f})"
    elif not excess <= SIGNIFICANT:
        spreads = f"{real_spread:.2f} against {simulated_spread:.2f} nats²"
        reason = f"real data are harder than simulated ones: their annealed log weights have variance {spreads}"
    else:
        reason = f"a gap of {gap:.3f} nats (SE {gap_se:.3f}) on simulated data, and real data are no harder"
        granted = True
    means = float(lower.mean()), float(upper.mean())
    return Certificate(granted, reason, gap, gap_se, *means, real_spread, simulated_spread, len(upper))


def _mean_and_se(values: np.ndarray) -> tuple[float, float]:
    se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), se


def _compare_spreads(real: Estimate, simulated: Estimate) -> tuple[float, float, float]:
    """Mean variances of the log weights and how many standard errors the first lies above the second."""
    if real.spread is None or simulated.spread is None:
        return math.nan, math.nan, math.inf
    a, b = real.spread, simulated.spread
    se = math.sqrt(sum(x.var(ddof=1) / len(x) for x in (a, b) if len(x) > 1))
    difference = float(a.mean() - b.mean())
    excess = difference / se if se > 0 else (math.inf if difference > 0 else 0.0)
    return float(a.mean()), float(b.mean()), excess
