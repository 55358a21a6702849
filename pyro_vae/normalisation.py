"""Whether q(z | x) is a density: its integral over z, by a sum over states, on a grid, or by sampling."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae.latents import Latents

NUM_DRAWS = 2000  # that a normal is fitted to, and again as many for the estimate
ROUNDING = 1e-3  # of float32 log-densities near 100 nats, whose error is near 1e-5, with room for their sums
GRIDS = {1: (4.0, 501), 2: (4.0, 151)}  # dimensions: t to which sinh(t) = 27 standard deviations, points on an axis
COARSE = 5e-3  # difference to a grid half as fine, from which a grid does not resolve the density
APART = 0.05  # overlap of q and the normal, below which sampling would see a wrong integral too late
CHUNK = 4096  # points of a grid at once


@dataclass(frozen=True)
class Integral:
    """∫ q(z | x) dz of each datum, with what it may be off by and how it was found."""

    values: Tensor
    error: Tensor
    way: str

    @property
    def is_one(self) -> bool:
        """Whether each value is 1 within its error."""
        return bool(((self.values - 1).abs() <= self.error).all())

    def __str__(self) -> str:
        worst = int((self.values - 1).abs().nan_to_num(math.inf).argmax())
        return f"{self.values[worst]:.4f} ± {self.error[worst]:.4f} {self.way}"


def one_by_sum(latents: Latents, args: tuple[Tensor, ...]) -> Integral:
    """Σ_z q(z | x) over all joint states, for discrete latents."""
    total = latents.log_guide(args, args[0].new_empty(1, len(args[0]), 0)).exp()[0]
    return Integral(total, torch.full_like(total, ROUNDING), f"as a sum over {latents.num_states} states")


def one_by_grid(latents: Latents, args: tuple[Tensor, ...]) -> Integral | None:
    """The trapezium rule in t with u = m + L sinh(t), m and LLᵀ mean and covariance of draws.

    sinh makes it fine in the middle and lets it reach far out; the difference to every second point is its error.
    None in more than 2 dimensions, or where the grid does not resolve the density.
    """
    if latents.dim not in GRIDS:
        return None
    reach, num = GRIDS[latents.dim]
    t = torch.linspace(-reach, reach, num, dtype=torch.float64, device=args[0].device)
    points = torch.cartesian_prod(*[t.sinh()] * latents.dim).view(-1, latents.dim)  # (G, dim)
    weight = torch.cartesian_prod(*[t.cosh() * (t[1] - t[0])] * latents.dim).view(-1, latents.dim).prod(-1)
    loc, tril = _moments(latents.draw_guide(args, NUM_DRAWS))
    u = (loc + torch.einsum("nij,gj->gni", tril, points)).to(args[0].dtype)  # (G, n, dim)
    log_q = torch.cat([latents.log_guide(args, part) for part in u.split(CHUNK)])  # (G, n)
    terms = (log_q.exp() * weight[:, None]).view(*[num] * latents.dim, -1) * tril.diagonal(dim1=-2, dim2=-1).prod(-1)
    axes = tuple(range(latents.dim))
    fine, coarse = terms.sum(axes), terms[(slice(None, None, 2),) * latents.dim].sum(axes) * 2**latents.dim
    if bool(((fine - coarse).abs() > COARSE).any()):
        return None
    return Integral(fine, (fine - coarse).abs() + ROUNDING, f"on a grid of {len(points):,} points")


def one_by_sampling(latents: Latents, args: tuple[Tensor, ...]) -> Integral | None:
    r"""∫ q = E_m[q/m] with m = (q + r)/2, half of the draws from q and half from r, a normal fitted to other draws.

    q/m is never above 2, so that four standard errors are what they say however heavy the tails of q; and draws of q
    that do not follow its density are seen too. None where q and r hardly overlap, so that q/m is 2 at the draws of q
    and 0 at those of r whatever the integral. A mean other than 1 is no integral, only a sign that something is wrong.
    """
    num = max(NUM_DRAWS, 20 * latents.dim)
    loc, tril = _moments(latents.draw_guide(args, num))
    r = MultivariateNormal(loc, scale_tril=tril)
    draws = latents.draw_guide(args, num), r.sample(torch.Size([num])).to(args[0].dtype)
    shares = torch.stack(  # q/m, (2, num, n)
        [2 * torch.sigmoid(latents.log_guide(args, u) - r.log_prob(u.double())) for u in draws]
    )
    mean = shares.mean((0, 1))
    error = (shares.var(1).sum(0) / num).sqrt() / 2
    found = Integral(mean, 4 * error + ROUNDING, f"by sampling, 4 standard errors of {2 * num:,} draws")
    overlap = (1 - (shares - 1).abs()).mean((0, 1))  # ∫ min(q, r), for a density q
    return None if found.is_one and bool((overlap < APART).any()) else found


def _moments(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n, dim) and the lower triangle of the covariance (n, dim, dim) of draws (num, n, dim), in float64."""
    u = u.double()
    centred = (u - u.mean(0)).movedim(0, -1)  # (n, dim, num)
    covariance = centred @ centred.mT / (len(u) - 1)
    return u.mean(0), torch.linalg.cholesky(covariance)
