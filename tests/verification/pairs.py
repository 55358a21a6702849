"""Promise 5: paired intervals cover the known difference, and equal models are not told apart more often than said."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from oracles import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from verification import Row, binomial_band

ITEM = "5 paired comparison"


class Rotated:
    """A linear Gaussian pair whose pixels are shifted round: on isotropic data it is as good as the pair itself."""

    def __init__(self, pair: LinearGaussian, shift: int) -> None:
        self.pair, self.shift = pair, shift

    def log_prob(self, obs: Tensor) -> Tensor:
        return self.pair.log_prob(obs.roll(self.shift, -1))

    def score(self, obs: Tensor, seed: int) -> pv.LogLikelihood:
        estimator = pv.importance_sampling(200)
        batch = pv.Batch(obs.roll(self.shift, -1))
        found = pv.log_likelihood(self.pair.model, batch, guide=self.pair.guide, estimator=estimator, seed=seed)
        return replace(found, digest=pv.Batch(obs).digest)  # the same data, read in another order


def parts(result: pv.LogLikelihood, size: int) -> list[pv.LogLikelihood]:
    """A long result cut into independent short ones, as if each test set had been scored on its own."""
    cut = []
    for start in range(0, len(result) - size + 1, size):
        here = slice(start, start + size)
        arrays = {
            name: getattr(result, name)[here]
            for name in ("log_prob", "variance", "ess", "khat", "elbo", "spread")
            if getattr(result, name) is not None
        }
        bias = float(arrays["variance"].mean()) / 2
        cut.append(replace(result, **arrays, bias_bound=bias, doubling_bias=None, doubling_ratio=None))
    return cut


def coverage(repeats: int, num_data: int) -> Row:
    """Two PPCAs, data from the first: the true mean difference is the divergence of one from the other."""
    good = LinearGaussian(12, 4, seed=0, widen=1.2)
    other = LinearGaussian(12, 4, seed=0, widen=1.2)
    other.loadings = good.loadings + 0.1 * torch.randn(good.loadings.shape, generator=torch.Generator().manual_seed(1))
    other.precision = torch.eye(4, dtype=torch.float64) + other.loadings.T @ other.loadings / other.noise**2
    laws = [
        torch.distributions.MultivariateNormal(p.loc, p.loadings @ p.loadings.T + p.noise**2 * torch.eye(12).double())
        for p in (good, other)
    ]
    truth = float(torch.distributions.kl_divergence(*laws))
    obs = good.draw(repeats * num_data, seed=3)
    scored = [Rotated(pair, 0).score(obs, seed) for seed, pair in enumerate((good, other))]
    covered, claims = [], []
    for left, right in zip(*(parts(each, num_data) for each in scored), strict=True):
        found = pv.compare({"good": left, "other": right}).pairs[0]
        sign = 1 if found.a == "good" else -1
        low, high = sorted((sign * found.low, sign * found.high))
        covered.append(low <= truth <= high)
        claims.append(found.low > 0 or found.high < 0)
    low, high = binomial_band(repeats)
    seen = f"{np.mean(covered):.3f} of {repeats}; told apart in {np.mean(claims):.0%}; true difference {truth:.3f} nats"
    case = f"two PPCAs, IS-200, {num_data} data"
    return Row(ITEM, case, seen, f"[{low:.3f}, {high:.3f}]", low <= np.mean(covered) <= high)


def false_claims(shifts: Sequence[int], repeats: int, num_data: int) -> Row:
    """Equal models: how often any two of them are told apart."""
    pair = LinearGaussian(12, 4, seed=0, widen=1.2)
    obs = torch.randn(repeats * num_data, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.0
    pair.loc = torch.zeros(12, dtype=torch.float64)
    scored = {f"shift {s}": parts(Rotated(pair, s).score(obs, s), num_data) for s in shifts}
    wrong = []
    for index in range(repeats):
        found = pv.compare({name: results[index] for name, results in scored.items()})
        wrong.append(any(each.low > 0 or each.high < 0 for each in found.pairs))
    high = binomial_band(repeats, 0.05)[1]
    seen = f"{np.mean(wrong):.3f} of {repeats}"
    case = f"{len(shifts)} equal models, {num_data} data: false 'can be told apart'"
    return Row(ITEM, case, seen, f"<= 0.05 (at most {high:.3f} by chance)", bool(np.mean(wrong) <= high))


PARTS = {
    "coverage": coverage,
    "two": partial(false_claims, (0, 5)),
    "six": partial(false_claims, range(0, 12, 2)),
}


REPEATS = {"coverage": 400, "two": 2000, "six": 400}  # 2000 know a rate of 0.05 to within 0.005


def rows(small: bool, name: str) -> Iterator[Row]:
    yield PARTS[name](*((25, 50) if small else (REPEATS[name], 200)))
