"""Expectation-maximisation for mixtures: k-means++ starts, E passes in blocks, the loop, M steps of normal laws."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
Statistics = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

SHORT_ITERATIONS = 10  # of each restart before the best one goes on
START_SHARE = 0.05  # of each datum that starts spread evenly over all components: no start is a spike on one datum
ROWS_PER_COMPONENT = 20  # random rows per component that k-means looks at
K_MEANS_PASSES = 5
BLOCK_ROWS = 4096
INNER_PASSES = 5  # of EM over the pixels before rounding, in each M step
EMPTY = 1e-10  # data per component; below it a component keeps its parameters


class LogProb(Protocol):
    """Laws of K components: anything whose `log_prob` of rows (n, D) has shape (n, K)."""

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log p_k of each row, nats."""


class Family(Protocol):
    """What one kind of mixture brings to `expectation_maximization`; parameters are named tensors (K, ...)."""

    def components(self, params: Params) -> LogProb:
        """The component laws."""

    def statistics(self, rows: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """Sums over the rows (n, D) that the M step needs, given responsibilities (n, K)."""

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        """The M step: parameters from the data per component (K,) and the sums; `params` are the present ones."""

    def log_prior(self, components: Any) -> Tensor | float:
        """Log prior density of the parameters up to a constant, nats; 0 for maximum likelihood."""


def k_means_plus_plus(obs: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Centres that are spread out: each next one is drawn in proportion to its squared distance from those before.

    Args:
        obs: data (n, D).
        num: number of centres.
        generator: source of randomness, on the CPU.

    Returns:
        `num` distinct rows of `obs`, shape (num, D).

    Raises:
        ValueError: fewer than `num` rows are distinct.

    Source: Arthur, Vassilvitskii, "k-means++: the advantages of careful seeding", 2007 (SODA).
    """
    chosen = [int(torch.randint(len(obs), (), generator=generator))]
    distance = _squared_distance(obs, chosen[0])
    while len(chosen) < num:
        cumulative = distance.cumsum(0)
        if cumulative[-1] == 0:
            raise ValueError(f"{num} components need {num} distinct observations, got {len(chosen)}")
        point = cumulative[-1] * float(torch.rand((), generator=generator))
        chosen.append(int(torch.searchsorted(cumulative, point, right=True)))
        distance = torch.minimum(distance, _squared_distance(obs, chosen[-1]))
    return obs[chosen]


def _squared_distance(obs: Tensor, index: int) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"  # so that equal rows are at distance 0
    return torch.cdist(obs, obs[index : index + 1], compute_mode=exact).squeeze(1).double() ** 2


def k_means(obs: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Centres (num, D) after a few of Lloyd's passes from k-means++, on a random subset of rows; for starts only."""
    order = torch.randperm(len(obs), generator=generator).to(obs.device)
    rows = obs[order[: ROWS_PER_COMPONENT * max(num, 100)]]
    try:
        centers = k_means_plus_plus(rows, num, generator)
    except ValueError:  # too few distinct rows among these
        rows = obs
        centers = k_means_plus_plus(rows, num, generator)
    for _ in range(K_MEANS_PASSES):
        member = _one_hot(rows, centers)  # (n, K)
        counts = member.sum(0).unsqueeze(-1)
        centers = torch.where(counts > 0, member.T @ rows / counts.clamp(min=1), centers)
    return centers


def _one_hot(rows: Tensor, centers: Tensor) -> Tensor:
    """The nearest centre of each row (n, D) as one-hot rows (n, K)."""
    nearest = (0.5 * centers.square().sum(-1) - rows @ centers.T).argmin(-1)
    return torch.nn.functional.one_hot(nearest, len(centers)).to(rows.dtype)


def expect(
    log_joint: Callable[[Tensor], Tensor], statistics: Statistics, rows: Tensor
) -> tuple[float, Tensor, list[Tensor]]:
    """The E step: one pass over the data in blocks, sums accumulated in float64.

    Args:
        log_joint: log π_k + log p_k of rows (n, D), shape (n, K), nats.
        statistics: sums over a block of rows that the M step needs, given responsibilities (n, K).
        rows: data (n, D).

    Returns:
        Mean log p(x) in nats per datum, data per component (K,), and the sums.
    """
    total = 0.0
    sums: list[Tensor] = []
    for block in rows.split(BLOCK_ROWS):
        joint = log_joint(block)
        log_prob = joint.logsumexp(-1, keepdim=True)
        resp = (joint - log_prob).exp_()
        parts = [part.double() for part in (resp.sum(0, dtype=torch.float64), *statistics(block, resp))]
        total += float(log_prob.sum(dtype=torch.float64))
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    return total / len(rows), sums[0], sums[1:]


@torch.no_grad()
def expectation_maximization(
    family: Family,
    rows: Tensor,
    num_components: int,
    *,
    seed: int = 0,
    num_iterations: int = 100,
    num_restarts: int = 1,
    tolerance: float = 1e-4,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Params, list[float]]:
    """Maximise mean log p(x) + log prior / n over the parameters of a mixture.

    With several restarts, each runs for a few iterations and the best one goes on. The objective never falls, up to
    rounding. A component that no datum belongs to keeps its parameters and loses its weight.

    Args:
        family: the kind of mixture.
        rows: data (n, D).
        num_components: K.
        seed: of the starts; the global random state is neither read nor changed.
        num_iterations: passes over the data of the best restart, at most.
        num_restarts: number of starts.
        tolerance: stop when the objective gains less than this, nats per datum.
        progress: called with (iteration, objective) after each pass.

    Returns:
        The parameters, "logits" of the weights among them, and the objective of each pass, nats per datum; its last
        entry belongs to the parameters returned.

    Raises:
        ValueError: a count is not positive, or fewer data are distinct than there are components.
        FloatingPointError: the objective is not finite.

    Source: Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977 (JRSS B);
    restarts: Biernacki, Celeux, Govaert, "Choosing starting values for the EM algorithm", 2003 (CSDA).
    """
    for name, count in (("num_iterations", num_iterations), ("num_restarts", num_restarts)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    generator = torch.Generator().manual_seed(seed)
    if num_restarts == 1:
        return _climb(
            family, rows, _start(family, rows, num_components, generator), num_iterations, tolerance, progress
        )
    short = min(SHORT_ITERATIONS, num_iterations)
    runs = [
        _climb(family, rows, _start(family, rows, num_components, generator), short, tolerance, None)
        for _ in range(num_restarts)
    ]
    params, first = max(runs, key=lambda run: run[1][-1])
    offset = len(first) - 1  # the first pass of what follows repeats the last one of the short run
    shifted = None if progress is None else lambda iteration, value: progress(offset + iteration, value)
    params, trace = _climb(family, rows, params, num_iterations - offset, tolerance, shifted)
    return params, first[:-1] + trace


def _climb(
    family: Family,
    rows: Tensor,
    params: Params,
    num_iterations: int,
    tolerance: float,
    progress: Callable[[int, float], None] | None,
) -> tuple[Params, list[float]]:
    """EM from `params`: the parameters of the last pass, and the objective of each."""
    trace: list[float] = []
    while True:
        updated, objective = _pass(family, rows, params)
        if not math.isfinite(objective):
            raise FloatingPointError(f"the objective of EM is {objective} at iteration {len(trace)}")
        trace.append(objective)
        if progress is not None:
            progress(len(trace) - 1, objective)
        if len(trace) == num_iterations or (len(trace) > 1 and trace[-1] - trace[-2] < tolerance):
            return params, trace
        params = updated


def _start(family: Family, rows: Tensor, num_components: int, generator: torch.Generator) -> Params:
    """Parameters of a k-means partition, softened."""
    centers = k_means(rows, num_components, generator)

    def log_joint(block: Tensor) -> Tensor:
        return ((1 - START_SHARE) * _one_hot(block, centers) + START_SHARE / num_components).log()

    _, counts, sums = expect(log_joint, family.statistics, rows)
    return {"logits": _log_weights(counts), **family.maximize(counts, sums, None)}


def _pass(family: Family, rows: Tensor, params: Params) -> tuple[Params, float]:
    """One E and one M step: the next parameters, and the objective of these."""
    components = family.components(params)
    log_weights = params["logits"].log_softmax(-1).to(rows.dtype)
    mean, counts, sums = expect(lambda block: log_weights + components.log_prob(block), family.statistics, rows)
    objective = mean + float(family.log_prior(components)) / len(rows)
    updated = family.maximize(counts, sums, params)
    occupied = counts > EMPTY
    for name, value in updated.items():
        mask = occupied.view(-1, *[1] * (value.ndim - 1))
        updated[name] = torch.where(mask, value, params[name])
    return {"logits": _log_weights(counts), **updated}, objective


def _log_weights(counts: Tensor) -> Tensor:
    """Log of the share of each component; an empty one gets a share of e^-690, which changes no other."""
    return (counts / counts.sum()).clamp(min=1e-300).log()


def floored_covariance(covariance: Tensor, min_scale: float) -> Tensor:
    """The Cholesky factor of a covariance (..., D, D) whose eigenvalues are raised to min_scale² where they are less.

    This is the most likely covariance among those with no direction narrower than `min_scale`.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=min_scale**2).sqrt().unsqueeze(-2)  # Σ = root root' = R' R
    upper = torch.linalg.qr(root.mT).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT


def principal_components(covariance: Tensor, rank: int, min_scale: float) -> tuple[Tensor, Tensor]:
    r"""Most likely W W' + σ² I for a sample covariance: W = U_q (Λ_q - σ² I)^½, σ² the mean of the other eigenvalues.

    Args:
        covariance: sample covariances (..., D, D).
        rank: q < D, the number of columns of W.
        min_scale: least σ.

    Returns:
        W (..., D, q), largest component first, and σ (...).

    Source: Tipping, Bishop, "Probabilistic principal component analysis", 1999 (JRSS B).
    """
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    variance = values[..., :-rank].mean(-1).clamp(min=min_scale**2)
    excess = (values[..., -rank:] - variance.unsqueeze(-1)).clamp(min=0)
    loadings = vectors[..., -rank:] * excess.sqrt().unsqueeze(-2)
    return loadings.flip(-1), variance.sqrt()


def to_log_scale(scale: Tensor, min_scale: float) -> Tensor:
    """log(scale - min_scale), finite at the floor."""
    return (scale - min_scale).clamp(min=1e-12 * min_scale).log()


class RealPixels:
    """E and M step of normal laws with mean `loc` (K, D) and the covariance of the name.

    Parameters besides `loc`: `log_scale`, the log of what standard deviations exceed `min_scale` by, (K, D) if
    "diagonal", (K, 1) if "spherical"; if "full", of the diagonal of the Cholesky factor, whose other entries are
    `lower` (K, D, D); if "low_rank", of the noise (K, 1), beside `loadings` (K, D, rank).

    Args:
        components: parameters to laws.
        rows: data (n, D), float64.
        covariance: "diagonal", "spherical", "full" or "low_rank".
        rank: columns of the loadings.
        min_scale: least standard deviation in any direction.
    """

    def __init__(
        self,
        components: Callable[[Params], LogProb],
        rows: Tensor,
        covariance: str,
        rank: int,
        min_scale: float,
    ) -> None:
        self.components, self.covariance, self.rank, self.min_scale = components, covariance, rank, min_scale
        self.center = rows.mean(0)  # second moments about it lose no digits

    def statistics(self, rows: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """First and second moments about the centre: (K, D), and (K, D) or (K, D, D)."""
        x = rows - self.center
        if self.covariance in ("diagonal", "spherical"):
            return resp.T @ x, resp.T @ x**2
        return resp.T @ x, torch.stack([(x * weight.unsqueeze(-1)).T @ x for weight in resp.T])

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        """Weighted mean and covariance, the latter constrained as its name says."""
        total = counts.clamp(min=EMPTY).unsqueeze(-1)
        mean = sums[0] / total
        if self.covariance in ("diagonal", "spherical"):
            spread = self._uncorrelated(sums[1] / total - mean**2)
        else:
            spread = self._correlated(sums[1] / total.unsqueeze(-1) - mean.unsqueeze(-1) * mean.unsqueeze(-2))
        return {"loc": mean + self.center, **spread}

    def _uncorrelated(self, variance: Tensor) -> Params:
        if self.covariance == "spherical":
            variance = variance.mean(-1, keepdim=True)
        return {"log_scale": to_log_scale(variance.clamp(min=0).sqrt(), self.min_scale)}

    def _correlated(self, covariance: Tensor) -> Params:
        if self.covariance == "full":
            tril = floored_covariance(covariance, self.min_scale)
            diagonal = tril.diagonal(dim1=-2, dim2=-1)
            return {"log_scale": to_log_scale(diagonal, self.min_scale), "lower": tril.tril(-1)}
        loadings, scale = principal_components(covariance, self.rank, self.min_scale)
        return {"log_scale": to_log_scale(scale.unsqueeze(-1), self.min_scale), "loadings": loadings}

    def log_prior(self, components: LogProb) -> float:
        """None: maximum likelihood."""
        return 0.0


class GreyLevels:
    """E and M step of normal laws rounded to levels 0..L-1: a pixel before rounding is latent, as the component is.

    Histograms of the levels, one per component and pixel, are all that the M step needs of the data; to each one
    `pseudo_count` images are added whose pixels follow the histograms of all data.

    Args:
        components: parameters (`loc` and `log_scale`, as for `RealPixels`) to laws with a table `log_mass` (K, D, L).
        moments: E[y - μ] and E[(y - μ)²] of a pixel before rounding, (K, D, L), from μ and σ (K, D).
        rows: data (n, D), float64.
        levels: L.
        min_scale: least σ, in grey levels.
        pseudo_count: images added.
    """

    def __init__(
        self,
        components: Callable[[Params], LogProb],
        moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        rows: Tensor,
        levels: int,
        min_scale: float,
        pseudo_count: float,
    ) -> None:
        self.components, self.moments, self.levels, self.min_scale = components, moments, levels, min_scale
        counts = self.statistics(rows, rows.new_ones(len(rows), 1))[0].squeeze(0)  # (D, L)
        self.pseudo = pseudo_count * (counts + 1 / levels) / (len(rows) + 1)

    def statistics(self, rows: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """Histograms (K, D, L)."""
        num_dims = rows.shape[-1]
        cell = (rows.long() + self.levels * torch.arange(num_dims, device=rows.device)).flatten()
        size = num_dims * self.levels
        counts = [cell.bincount(weight.repeat_interleave(num_dims), size) for weight in resp.T]
        return (torch.stack(counts).view(-1, num_dims, self.levels),)

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        """A few EM passes over the pixels before rounding, at fixed responsibilities."""
        histogram = sums[0] + self.pseudo
        total = histogram.sum(-1).clamp(min=EMPTY)
        if params is None:
            loc, scale = self._unrounded(histogram, total)
        else:
            loc, scale = params["loc"], self.min_scale + params["log_scale"].exp()
        for _ in range(INNER_PASSES):
            first, second = self.moments(loc, scale)
            shift = (histogram * first).sum(-1) / total
            variance = (histogram * second).sum(-1) / total - shift**2
            loc, scale = loc + shift, variance.clamp(min=self.min_scale**2).sqrt()
        return {"loc": loc, "log_scale": to_log_scale(scale, self.min_scale)}

    def _unrounded(self, histogram: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the levels, with the 1/12 that rounding adds to a variance."""
        level = torch.arange(self.levels, dtype=total.dtype, device=total.device)
        loc = histogram @ level / total
        variance = (histogram @ level**2 / total - loc**2).clamp(min=0) + 1 / 12
        return loc, variance.sqrt().clamp(min=self.min_scale)

    def log_prior(self, components: Any) -> Tensor:
        """Log mass of the added images under their components, nats."""
        return (self.pseudo * components.log_mass).sum()
