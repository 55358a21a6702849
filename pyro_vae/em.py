"""Expectation-maximisation for mixtures: k-means++ starts, E passes in blocks, the loop with restarts."""

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
