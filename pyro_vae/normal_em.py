"""EM steps of normal mixtures: the M step of each covariance, and of normal laws that were rounded to grey levels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.em import EMPTY, LogProb, Params

INNER_PASSES = 5  # of EM over the pixels before rounding, in each M step


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
