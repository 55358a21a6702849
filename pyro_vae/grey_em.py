"""EM steps of normal laws that were rounded to grey levels."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.distributions import LevelComponents, cells
from pyro_vae.em_pass import BLOCK_ROWS, EMPTY, Params, accumulate, given
from pyro_vae.normal_em import to_log_scale

INNER_PASSES = 5  # of EM over the pixels before rounding, in each M step


class GreyRows:
    """Grey levels in one pass, in float64.

    Args:
        components: laws with a table `log_mass` (K, D, L); None for statistics only.
        levels: L.
        pseudo: images added to each component, as histograms (D, L); None for none.
        device: where to compute.
    """

    def __init__(
        self, components: LevelComponents | None, levels: int, pseudo: Tensor | None, device: torch.device
    ) -> None:
        self.components, self.levels, self.pseudo, self.device = components, levels, pseudo, device

    @property
    def log_prior(self) -> Tensor | float:
        """Log mass of the added images under their components, nats."""
        return 0.0 if self.pseudo is None else (self.pseudo * given(self.components).log_mass).sum()

    def features(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows.to(self.device, torch.float64)

    def log_prob(self, features: Tensor) -> Tensor:
        """Log masses (n, K)."""
        return given(self.components).log_prob(features)

    def statistics(self, features: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        """Histograms (K, D, L)."""
        num_dims = features.shape[-1]
        cell = cells(features, self.levels).T.flatten()  # pixel by pixel, each with its few cells of the table
        empty = resp.new_zeros(num_dims * self.levels)
        counts = [empty.scatter_add(0, cell, weight.repeat(num_dims)) for weight in resp.T]
        return (torch.stack(counts).view(-1, num_dims, self.levels),)

    def joined(self, sums: list[Tensor]) -> list[Tensor]:
        """As they are."""
        return sums


class GreyLevels:
    """E and M step of normal laws rounded to levels 0..L-1: a pixel before rounding is latent, as the component is.

    Histograms of the levels, one per component and pixel, are all that the M step needs of the data; to each one
    `pseudo_count` images are added whose pixels follow the histograms of all data.

    Args:
        components: parameters (`loc` and `log_scale`, as for `RealPixels`) to laws with a table `log_mass` (K, D, L).
        moments: E[y - μ] and E[(y - μ)²] of a pixel before rounding, (K, D, L), from μ and σ (K, D).
        rows: data (n, ...), read block by block.
        levels: L.
        min_scale: least σ, in grey levels.
        pseudo_count: images added.
        device: where to compute.
    """

    block_rows = BLOCK_ROWS

    def __init__(
        self,
        components: Callable[[Params], LevelComponents],
        moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        rows: Tensor,
        levels: int,
        min_scale: float,
        pseudo_count: float,
        device: torch.device,
    ) -> None:
        self.components, self.moments, self.levels, self.min_scale = components, moments, levels, min_scale
        self.device = device
        law = GreyRows(None, levels, None, device)

        def step(block: Tensor) -> tuple[Tensor, ...]:
            every = law.features(block)
            return law.statistics(every, every.new_ones(len(every), 1))

        counts = accumulate(step, rows, self.block_rows)[0].squeeze(0)  # (D, L)
        self.pseudo = pseudo_count * (counts + 1 / levels) / (len(rows) + 1)

    def law(self, params: Params | None) -> GreyRows:
        """The laws of one pass."""
        components = None if params is None else self.components(params)
        return GreyRows(components, self.levels, self.pseudo, self.device)

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
