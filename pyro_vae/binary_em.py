"""EM steps of mixtures of independent bits."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae.em_pass import EMPTY, Params, accumulate, rows_in_cache

MIN_PROB = 1e-6  # least θ and 1 - θ


class BinaryRows:
    """Independent bits in one pass: log p_k(x) = η_k · x - Σ softplus(η_k), η the logits.

    Args:
        logits: η (K, D), float64; None for statistics only.
        prior: mean (D,) of the images added to each component, and their number.
        dtype: precision of the products.
        device: where to compute.
    """

    log_prior: Tensor | float = 0.0

    def __init__(
        self, logits: Tensor | None, prior: tuple[Tensor, float], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        if logits is not None:
            mean, pseudo_count = prior
            self.log_prior = pseudo_count * (mean * logits - softplus(logits)).sum()
            self.natural, self.bias = logits.to(dtype), -softplus(logits).sum(-1, keepdim=True).to(dtype)

    def features(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows.to(self.device, self.dtype)

    def log_prob(self, features: Tensor) -> Tensor:
        """Log masses (n, K), by columns: a narrow product is fastest with its short side first."""
        return torch.addmm(self.bias, self.natural, features.T).T

    def statistics(self, features: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """Ones of each pixel, (K, D)."""
        return (resp.T.to(features.dtype) @ features,)

    def joined(self, sums: list[Tensor]) -> list[Tensor]:
        """As they are."""
        return sums


class BinaryPixels:
    """E and M step of independent bits, by `pixel_logits` (K, D), the logits of θ.

    Args:
        mean: of the images that are added to each component, (D,), float64.
        pseudo_count: how many are added.
        dtype: precision of the passes.
    """

    def __init__(self, mean: Tensor, pseudo_count: float, dtype: torch.dtype = torch.float64) -> None:
        self.mean, self.pseudo_count, self.dtype = mean, pseudo_count, dtype
        self.block_rows = rows_in_cache(len(mean), mean.device)

    def law(self, params: Params | None) -> BinaryRows:
        """The laws of one pass."""
        logits = None if params is None else params["pixel_logits"]
        return BinaryRows(logits, (self.mean, self.pseudo_count), self.dtype, self.mean.device)

    def maximize(self, counts: Tensor, sums: list[Tensor], params: Params | None) -> Params:
        """The share of ones, images added."""
        total = (counts + self.pseudo_count).clamp(min=EMPTY).unsqueeze(-1)
        prob = (sums[0] + self.pseudo_count * self.mean) / total
        return {"pixel_logits": prob.clamp(MIN_PROB, 1 - MIN_PROB).logit()}


def mean_image(rows: Tensor, device: torch.device) -> Tensor:
    """The mean of binary data (n, ...) with one half added to either count, (D,), float64; read block by block."""
    (ones,) = accumulate(lambda block: (block.to(device).sum(0, dtype=torch.float64),), rows)
    return (ones + 0.5) / (len(rows) + 1)
