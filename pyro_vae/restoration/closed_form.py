"""Restoring in closed form: independent pixels, mixtures of them, and (mixtures of) correlated normal laws."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_vae.distributions import CorrelatedComponents, Mixture
from pyro_vae.restoration.corruption import Corruption, component_pixels, flat_pixels, of_rows, rebuilt


@dataclass(frozen=True)
class Restored:
    """Law of what is hidden given what is seen, of n data: mixtures with weights of each datum's own.

    Attributes:
        log_weights: log P(k | y), shape (n, K).
        means: E[x | y, k], shape (n, K, H).
        log_parts: of hidden rows (n, H), log p(x | y, k), shape (n, K), nats.
        draw_parts: of components (num, n), a draw of each of them, shape (num, n, H).
    """

    log_weights: Tensor
    means: Tensor
    log_parts: Callable[[Tensor], Tensor]
    draw_parts: Callable[[Tensor], Tensor]

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log p(x | y) of rows (n, H), shape (n,), nats."""
        return (self.log_weights + self.log_parts(hidden)).logsumexp(-1)

    def mean(self) -> Tensor:
        """E[x | y], shape (n, H)."""
        return torch.einsum("nk,nkh->nh", self.log_weights.exp(), self.means)

    def draw(self, num: int) -> Tensor:
        """Draws of x given y, shape (num, n, H)."""
        return self.draw_parts(self.log_weights.exp().multinomial(num, replacement=True).T)


def restored(law: Any, corruption: Corruption, seen: Tensor) -> Restored:
    r"""p(x | y) where p(x) = Σ_k π_k p_k(x) and the components are independent pixels or normal laws.

    P(k | y) ∝ π_k p_k(y) and p(x | y) = Σ_k P(k | y) p_k(x | y). A normal component has, with S the covariance of y and
    C that of x and y, p_k(x | y) = N(μ_x + C S⁻¹ (y - μ_y), Σ_x - C S⁻¹ C').

    Args:
        law: p(x), batch shape (n,): a `Mixture`, or independent pixels; in float64, as normal laws always are.
        corruption: what was seen.
        seen: y, shape (n, S).

    Source: Bishop, "Pattern Recognition and Machine Learning", 2006, equations 2.81 and 2.82.
    """
    if not isinstance(law, Mixture):
        own = rebuilt(flat_pixels(law), lambda values: values.expand(len(seen), values.shape[-1]).unsqueeze(1))
        return _of_pixels(seen.new_zeros(1), own, corruption, seen)
    if isinstance(law.components, CorrelatedComponents):
        return _of_normals(law.log_weights, law.components, corruption, seen)
    return _of_pixels(law.log_weights, component_pixels(law.components), corruption, seen)


def _of_pixels(log_weights: Tensor, pixels: Any, corruption: Corruption, seen: Tensor) -> Restored:
    """Of pixels (K, D) that all data share, or (n, 1, D) of each datum's own."""
    rows = seen.unsqueeze(1)  # (n, 1, S)
    joint = log_weights + of_rows(corruption.seen(pixels)).log_prob(rows)  # (n, K)
    hidden = corruption.restored(pixels, rows)  # (K, H), or (n, K, H)
    hidden = rebuilt(hidden, lambda values: values.expand(*joint.shape, values.shape[-1]))
    places = torch.arange(len(seen), device=seen.device)

    def draw(index: Tensor) -> Tensor:
        return rebuilt(hidden, lambda values: values[places, index]).sample()

    return Restored(joint.log_softmax(-1), hidden.mean, lambda x: of_rows(hidden).log_prob(x.unsqueeze(1)), draw)


def _of_normals(
    log_weights: Tensor, components: CorrelatedComponents, corruption: Corruption, seen: Tensor
) -> Restored:
    joint, means, scales = [], [], []
    seen = seen.double()
    for log_weight, normal in zip(log_weights.double(), components.laws, strict=True):
        covariance = normal.covariance_matrix
        at, hidden, of_seen, across = corruption.gaussian(covariance)
        factor = torch.linalg.cholesky(of_seen)
        gain = torch.cholesky_solve(across.T, factor).T  # C S⁻¹, (H, S)
        means.append(normal.loc[hidden] + (seen - normal.loc[at]) @ gain.T)
        left = covariance[hidden][:, hidden] - gain @ across.T
        scales.append(torch.linalg.cholesky((left + left.T) / 2))
        joint.append(log_weight + MultivariateNormal(normal.loc[at], scale_tril=factor).log_prob(seen))
    how = torch.stack(means, 1), scales  # (n, K, H) and K of (H, H)
    return Restored(
        torch.stack(joint, -1).log_softmax(-1), how[0], partial(_log_normals, *how), partial(_draw_normals, *how)
    )


def _log_normals(means: Tensor, scales: list[Tensor], hidden: Tensor) -> Tensor:
    laws = [MultivariateNormal(means[:, k], scale_tril=scale) for k, scale in enumerate(scales)]
    return torch.stack([law.log_prob(hidden.double()) for law in laws], -1)


def _draw_normals(means: Tensor, scales: list[Tensor], index: Tensor) -> Tensor:
    noise = torch.randn(*index.shape, means.shape[-1], dtype=means.dtype, device=means.device)
    drawn = torch.empty_like(noise)
    for k in index.unique().tolist():
        chosen = index == k
        drawn[chosen] = (noise[chosen] @ scales[k].T) + means[:, k].expand_as(drawn)[chosen]
    return drawn
