"""EM steps of normal mixtures: the passes and the M step of each covariance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.distributions import Components
from pyro_vae.em_pass import BLOCK_ROWS, EMPTY, Law, Params, given, rows_in_cache


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


class DiagonalRows:
    r"""Independent normal pixels in one pass, as two matrix products: log p_k(x) = η_k · T(x) + b_k.

    T(x) holds y = x - c and y², η_k = (μ_k - c, -½) / σ_k², and b_k is what makes a density of it. The terms cancel to
    a sum of (x - μ_k)²/σ_k², and the digits lost are those of the largest (μ_k - c)²/σ_k². So c is the mean of the μ_k
    with weights π_k/σ_k², which makes the mean of that least: it lies where the narrow components are.

    Args:
        params: `logits`, `loc`, `log_scale` as in `RealPixels`; None for statistics only.
        min_scale: least standard deviation.
        origin: statistics are about it, whatever c is; (D,), float64.
        dtype: precision of the products; block by block they are summed in float64.
    """

    log_prior = 0.0

    def __init__(self, params: Params | None, min_scale: float, origin: Tensor, dtype: torch.dtype) -> None:
        self.origin, self.dtype, self.center = origin, dtype, origin.float().double()
        self.space = torch.empty(0, 2 * len(origin), dtype=dtype)  # of the features of one block after the other
        if params is not None:
            loc, precision = params["loc"], (min_scale + params["log_scale"].exp()).expand_as(params["loc"]) ** -2
            share = params["logits"].softmax(-1).unsqueeze(-1) * precision
            shift = (share * (loc - origin)).sum(0) / share.sum(0)
            self.center = (origin + shift).float().double()  # so that x - c is the same in either precision
            natural = torch.cat([precision * (loc - self.center), -0.5 * precision], -1)
            self.natural = natural.to(dtype)  # (K, 2D)
            linear, square = self.natural.double().chunk(2, -1)  # what is left of them, of which b makes a density
            log_partition = 0.5 * (math.log(2 * math.pi) - (-2 * square).log()) - linear**2 / (4 * square)
            self.bias = -log_partition.sum(-1, keepdim=True).to(dtype)

    def features(self, rows: Tensor) -> Tensor:
        """T(x), (n, 2D), until the next block is asked for: new memory for each would take a tenth of the time."""
        rows, num_dims = rows.to(self.center.device), rows.shape[-1]
        if len(self.space) < len(rows):
            self.space = torch.empty(len(rows), 2 * num_dims, dtype=self.dtype, device=rows.device)
        both = self.space[: len(rows)]
        center = self.center.to(torch.promote_types(self.dtype, rows.dtype))
        y = torch.sub(rows, center, out=both[:, :num_dims])
        torch.mul(y, y, out=both[:, num_dims:])
        return both

    def log_prob(self, features: Tensor) -> Tensor:
        """Log densities (n, K), by columns: a narrow product is fastest with its short side first."""
        return torch.addmm(self.bias, self.natural, features.T).T

    def statistics(self, features: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """First and second moments about c, (K, 2D)."""
        return (resp.T.to(features.dtype) @ features,)

    def joined(self, sums: list[Tensor]) -> list[Tensor]:
        """First and second moments about the origin, both (K, D)."""
        counts, (first, second) = sums[0], sums[1].chunk(2, -1)
        shift = self.center - self.origin
        moved = counts.unsqueeze(-1) * shift
        return [counts, first + moved, second + shift * (2 * first + moved)]


class CorrelatedRows:
    """Correlated normal pixels in one pass, in float64.

    Args:
        components: the laws; None for statistics only.
        origin: statistics are about it; (D,), float64.
    """

    log_prior = 0.0

    def __init__(self, components: Components | None, origin: Tensor) -> None:
        self.components, self.origin = components, origin

    def features(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows.to(self.origin)

    def log_prob(self, features: Tensor) -> Tensor:
        """Log densities (n, K)."""
        return given(self.components).log_prob(features)

    def statistics(self, features: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """First and second moments about the origin: (K, D) and (K, D, D)."""
        x = features - self.origin
        return resp.T @ x, torch.stack([(x * weight.unsqueeze(-1)).T @ x for weight in resp.T])

    def joined(self, sums: list[Tensor]) -> list[Tensor]:
        """As they are."""
        return sums


class RealPixels:
    """E and M step of normal laws with mean `loc` (K, D) and the covariance of the name.

    Parameters besides `logits` of the weights and `loc`: `log_scale`, the log of what standard deviations exceed
    `min_scale` by, (K, D) if "diagonal", (K, 1) if "spherical"; if "full", of the diagonal of the Cholesky factor,
    whose other entries are `lower` (K, D, D); if "low_rank", of the noise (K, 1), beside `loadings` (K, D, rank).

    Args:
        components: parameters to laws.
        origin: a point amid the data (D,), float64; second moments about it lose no digits.
        covariance: "diagonal", "spherical", "full" or "low_rank".
        rank: columns of the loadings.
        min_scale: least standard deviation in any direction.
        dtype: precision of the passes; correlated pixels have float64 only.
    """

    def __init__(
        self,
        components: Callable[[Params], Components],
        origin: Tensor,
        covariance: str,
        rank: int,
        min_scale: float,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.components, self.covariance, self.rank, self.min_scale = components, covariance, rank, min_scale
        self.origin, self.dtype = origin, dtype
        self.is_diagonal = covariance in ("diagonal", "spherical")
        self.block_rows = rows_in_cache(len(origin), origin.device) if self.is_diagonal else BLOCK_ROWS

    def law(self, params: Params | None) -> Law:
        """The laws of one pass."""
        if self.is_diagonal:
            return DiagonalRows(params, self.min_scale, self.origin, self.dtype)
        return CorrelatedRows(None if params is None else self.components(params), self.origin)

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        """Weighted mean and covariance, the latter constrained as its name says."""
        total = counts.clamp(min=EMPTY).unsqueeze(-1)
        mean = sums[0] / total
        if self.is_diagonal:
            spread = self._uncorrelated(sums[1] / total - mean**2)
        else:
            spread = self._correlated(sums[1] / total.unsqueeze(-1) - mean.unsqueeze(-1) * mean.unsqueeze(-2))
        return {"loc": mean + self.origin, **spread}

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
