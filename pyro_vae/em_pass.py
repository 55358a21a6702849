"""One pass of EM over the data of a mixture: the E step in blocks and in two precisions, the M step, the start."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from pyro_vae.k_means import k_means, one_hot

Params = dict[str, Tensor]
Progress = Callable[[int, float], None]
Given = TypeVar("Given")

START_SHARE = 0.05  # of each datum that starts spread evenly over all components: no start is a spike on one datum
BLOCK_ROWS = 4096
BLOCK_SIZE = {"cpu": 2**18}  # numbers of a block whose matrix products should stay in the cache
DEVICE_BLOCK_SIZE = 2**25  # elsewhere: fewer, larger kernels
EMPTY = 1e-10  # data per component; below it a component keeps its parameters
NEGLIGIBLE = -60.0  # log responsibilities below it change no digit, and processors are slow at numbers near underflow
AGREEMENT = 1e-3  # nats per datum that a log p in float32 may differ by from float64
PROBE_ROWS = 256  # on which both are compared in each pass
MANY_ROWS = 8 * PROBE_ROWS  # fewer data are fitted in float64 alone


class Law(Protocol):
    """K component laws at fixed parameters, as one pass over the data uses them."""

    @property
    def log_prior(self) -> Tensor | float:
        """Log prior density of the parameters up to a constant, nats; 0 for maximum likelihood."""

    def features(self, rows: Tensor) -> Tensor:
        """What both steps see of rows (n, D), in the precision and on the device of the law; its first axis is n."""

    def log_prob(self, features: Tensor) -> Tensor:
        """Log p_k of each row, shape (n, K), nats; the caller's to overwrite."""

    def statistics(self, features: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """Sums over a block of rows that the M step needs, given responsibilities (n, K)."""

    def joined(self, sums: list[Tensor]) -> list[Tensor]:
        """Data per component (K,) and the statistics of all blocks, float64, as the M step takes them."""


class Family(Protocol):
    """What one kind of mixture brings to `expectation_maximization`; parameters are named tensors (K, ...), float64."""

    block_rows: int  # of one block of a pass

    def law(self, params: Params | None) -> Law:
        """The component laws; at None, before the first parameters, they are asked for statistics only."""

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        """The M step: parameters from the data per component (K,) and the sums; `params` are the present ones."""


def double(mixture: nn.Module) -> Params:
    """The parameters that a mixture has, in float64."""
    return {name: value.detach().double() for name, value in mixture.named_parameters()}


def given(components: Given | None) -> Given:
    """The laws at parameters; a ValueError where there are none yet."""
    if components is None:
        raise ValueError("a mixture without parameters has statistics only")
    return components


def rows_in_cache(num_dims: int, device: torch.device) -> int:
    """Rows of a block, for passes that are matrix products."""
    return max(64, BLOCK_SIZE.get(device.type, DEVICE_BLOCK_SIZE) // num_dims)


def spread_rows(rows: Tensor, num: int) -> Tensor:
    """About `num` rows at equal distances, flat; few enough to be held in memory wherever the data lie."""
    return rows[:: max(1, len(rows) // num)].flatten(1)


def accumulate(
    step: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor, block_rows: int = BLOCK_ROWS
) -> list[Tensor]:
    """Sums in float64 of what `step` gives for each block of flat rows; data mapped from disk are read in turn."""
    totals: list[Tensor] = []
    for block in rows.split(block_rows):
        parts = step(block.flatten(1))
        if not totals:
            totals = [part.double() for part in parts]
        else:
            for total, part in zip(totals, parts, strict=True):
                total += part
    return totals


@dataclass(frozen=True)
class Expectation:
    """What an E step gives.

    Args:
        total: sum of log p(x) over the data, nats.
        log_prior: of the parameters, nats.
        sums: data per component (K,), and the sums that the M step needs.
    """

    total: Tensor
    log_prior: Tensor | float
    sums: list[Tensor]

    def objective(self, num_rows: int) -> float:
        """Mean log p(x) + log prior / n, nats per datum; the only wait for a device in a pass."""
        return float(self.total + self.log_prior) / num_rows


def e_step(family: Family, rows: Tensor, params: Params, *, only_total: bool = False) -> Expectation:
    """One pass over data (n, ...) in blocks at fixed parameters; `only_total` leaves out what the M step needs.

    Sums are accumulated in float64, where the data are computed with, and nothing is waited for.
    """
    law, log_weights = family.law(params), params["logits"].log_softmax(-1)

    def step(block: Tensor) -> tuple[Tensor, ...]:
        features = law.features(block)
        joint = law.log_prob(features)
        joint += log_weights
        top = joint.amax(-1, keepdim=True)
        resp = joint.sub_(top).clamp_(min=NEGLIGIBLE).exp_()  # times their sum, which log p(x) needs too
        mass = resp.sum(-1, keepdim=True)
        total = (top + mass.log()).sum(dtype=torch.float64)
        if only_total:
            return (total,)
        resp /= mass
        return total, resp.sum(0, dtype=torch.float64), *law.statistics(features, resp)

    total, *sums = accumulate(step, rows, family.block_rows)
    return Expectation(total, law.log_prior, law.joined(sums) if sums else [])


def maximized(family: Family, sums: list[Tensor], params: Params) -> Params:
    """The M step, from data per component and sums; a component that no datum belongs to keeps its parameters."""
    counts, *sums = sums
    updated = family.maximize(counts, sums, params)
    occupied = counts > EMPTY
    for name, value in updated.items():
        mask = occupied.view(-1, *[1] * (value.ndim - 1))
        updated[name] = torch.where(mask, value, params[name])
    return {"logits": _log_weights(counts), **updated}


def _log_weights(counts: Tensor) -> Tensor:
    """Log of the share of each component; an empty one gets a share of e^-690, which changes no other."""
    return (counts / counts.sum()).clamp(min=1e-300).log()


def start(family: Family, rows: Tensor, num_components: int, generator: torch.Generator) -> tuple[Params, list[Tensor]]:
    """Parameters of a k-means partition, softened; the data per component and the sums that they come from."""
    centers, law = k_means(rows, num_components, generator), family.law(None)

    def step(block: Tensor) -> tuple[Tensor, ...]:
        features = law.features(block)
        nearest = one_hot(block.to(features.device), centers.to(features.device))
        resp = (1 - START_SHARE) * nearest + START_SHARE / num_components
        return resp.sum(0), *law.statistics(features, resp)

    counts, *sums = law.joined(accumulate(step, rows, family.block_rows))
    return {"logits": _log_weights(counts), **family.maximize(counts, sums, None)}, [counts, *sums]


@dataclass(frozen=True)
class Task:
    """A mixture to be fitted.

    Args:
        exact: the family in float64.
        fast: the same family in float32, or None.
        rows: data (n, ...); few of them are looked at at a time.
        tolerance: least gain of a pass that is worth another one, nats per datum.
    """

    exact: Family
    fast: Family | None
    rows: Tensor
    tolerance: float

    def agree(self, params: Params) -> bool:
        """Whether log p of some rows is the same in float32 as in float64, to `AGREEMENT` nats on average.

        An error of the moments behind the M step is of the same size, relative to a variance, as the error that a
        pixel adds to log p, and near a maximum the likelihood sees no more than its square.
        """
        if self.fast is None:
            return False
        probe = spread_rows(self.rows, PROBE_ROWS)
        exact, fast = (log_prob(family, probe, params).double() for family in (self.exact, self.fast))
        return bool((exact - fast).abs().mean() <= AGREEMENT)  # False if one of them is NaN


def log_prob(family: Family, rows: Tensor, params: Params) -> Tensor:
    """Log p(x) of rows (n, D) taken at once, shape (n,), nats."""
    law = family.law(params)
    joint = law.log_prob(law.features(rows))
    return (joint + params["logits"].log_softmax(-1).to(joint.dtype)).logsumexp(-1)


class Trace:
    """The objective of each pass, nats per datum.

    Args:
        progress: called with (iteration, objective) after each pass.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.values: list[float] = []
        self.progress = progress

    def add(self, objective: float) -> None:
        """Take the next one; a FloatingPointError says at which iteration it went bad."""
        if not math.isfinite(objective):
            raise FloatingPointError(f"the objective of EM is {objective} at iteration {len(self.values)}")
        self.values.append(objective)
        if self.progress is not None:
            self.progress(len(self.values) - 1, objective)

    @property
    def gain(self) -> float:
        """Of the last pass; infinite after the first."""
        return self.values[-1] - self.values[-2] if len(self.values) > 1 else math.inf
