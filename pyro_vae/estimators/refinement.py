"""A Gaussian posterior refined for each datum by natural gradients of its own ELBO, as a proposal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_vae import distributed, traces
from pyro_vae.checks import check_count
from pyro_vae.estimators.drawn import Draw, guide_of
from pyro_vae.estimators.streaming import GRADIENT_ROWS
from pyro_vae.latents import Latents
from pyro_vae.randomness import derived_seed, reseed, systematic
from pyro_vae.traces import Pair, Program, Values

TAILS = ((0.7, 1.1), (0.25, 1.4), (0.05, 2.0))  # shares, and what they multiply the variance by
GUIDE_DRAWS = 64  # of which the start takes mean and scale
POINT_SCALE = 0.1  # start where all draws of the guide are one
MAX_ENTRIES = 2**27  # of the scale matrices of the data that are refined together
WARM_UP = 0.2  # of the steps: only scales and mean, far faster than the correlations if the start is far off
WARM_UP_CLIP = 0.3  # largest step of the logarithm of a scale in the warm-up
CLIP = 0.4  # largest Frobenius norm of a relative step of the scale matrix
LAST_STEP_SIZE = 0.1  # as a share of the first

Gradient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Refined:
    """See `refined`."""

    num_steps: int
    num_samples: int
    covariance: str
    tails: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return f"refined({self.num_steps} steps of {self.num_samples} samples, {self.covariance} covariance)"

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int) -> tuple[Pair, tuple[Tensor, ...]]:
        ways = {tiled: Latents(pair, args, tiled) for tiled in (False, True)}
        latents = ways[not traces.broadcasts(pair, args)]
        _check_continuous(latents)
        parts = {}
        for index, (start, stop) in enumerate(self._chunks(len(args[0]), latents.dim, args[0].device.type)):
            if distributed.takes(index):
                reseed(derived_seed(seed, start), args[0].device)
                loc, scale = self._fit(latents, tuple(arg[start:stop] for arg in args))
                parts[start] = {"loc": loc, "scale": scale}
        fitted = distributed.joined(parts, len(args[0]), args[0].device)
        guide = guide_of(partial(_draw, ways, self.tails))
        return Pair(_first_arguments(pair.model, len(args)), guide), (*args, fitted["loc"], fitted["scale"])

    def _chunks(self, num_data: int, dim: int, device: str) -> list[tuple[int, int]]:
        """Ranges of data that are refined together, of a size that does not depend on their number."""
        rows = GRADIENT_ROWS.get(device, GRADIENT_ROWS["cpu"]) // self.num_samples
        size = max(1, min(rows, MAX_ENTRIES // dim**2 if self.covariance == "full" else rows))
        return [(start, min(start + size, num_data)) for start in range(0, num_data, size)]

    def _fit(self, latents: Latents, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Mean (n, dim), and scale (n, dim) or its Cholesky factor (n, dim, dim), of the Gaussian of each datum."""
        draws = latents.draw_guide(args, GUIDE_DRAWS)
        loc, scale = draws.mean(0), draws.std(0)
        scale = torch.where(scale > 0, scale, POINT_SCALE)
        gradient = partial(_gradient, latents, args)
        if self.covariance == "diagonal":
            return climb_scales(gradient, loc, scale, self.num_steps, self.num_samples, LAST_STEP_SIZE)
        warm_up = round(WARM_UP * self.num_steps)
        loc, scale = climb_scales(gradient, loc, scale, warm_up, self.num_samples)
        return climb_factors(gradient, loc, torch.diag_embed(scale), self.num_steps - warm_up, self.num_samples)


def refined(
    num_steps: int = 100,
    num_samples: int = 8,
    covariance: str = "full",
    *,
    overdispersion: float | None = None,
) -> Refined:
    r"""A Gaussian fitted to the posterior of each datum, from where the guide puts it, and sampled afresh.

    In the unconstrained coordinates u of the latents, q_n(u) = N(u; m_n, C_n C_n') climbs its own ELBO by natural
    gradients: with u = m + C ε and r = C' ∇ log p(x, u) + ε, a step is m += ρ C E[r] and C <- C (I + ρ tril(E[r ε'])),
    the diagonal halved. E is over antithetic draws; r vanishes where q is the posterior, and so does the noise. The
    steps know no scale of the latents and shrink from ρ = min(1/2, 2 S/(S + dim)) to a tenth of it. The guide enters
    only as the start: any pair with continuous latents can be refined, and model and guide stay as they are.

    The samples are drawn from q_n with its variance times 1.1 (70%), 1.4 (25%) or 2 (5%), shared out systematically,
    since the ELBO makes Gaussians narrower than the posterior: on a VAE of MNIST digits with 50 latents these
    take k-hat below 0.7 for nearly all images, where the amortised guide has it above for 9 in 10.

    A full covariance needs dim² numbers per datum (10 kB for 50 latents, 10 MB for 1600) and S dim² + dim³ operations
    per step; with more than 100 latents or so also more steps or samples. "diagonal" needs 2 dim numbers.

    Args:
        num_steps: steps for each datum; an estimate spends num_steps x num_samples gradients of log p(x, z) per datum.
        num_samples: S, draws of each step, an even number.
        covariance: "full" or "diagonal".
        overdispersion: one factor for the variance in place of the three; 1 is the fitted Gaussian itself.

    Returns:
        A proposal for `importance_sampling` and `multilevel`.

    Raises:
        ValueError: for such a number or word; at use, for a pair with discrete latents.

    Source: Cremer, Li, Duvenaud, "Inference suboptimality in variational autoencoders", 2018, arXiv:1801.03558; Roeder,
    Wu, Duvenaud, "Sticking the landing", 2017, arXiv:1703.09194; Tan, "Analytic natural gradient updates for Cholesky
    factor in Gaussian variational approximation", 2021, arXiv:2109.00375.
    """
    check_count("num_steps", num_steps)
    if not isinstance(num_samples, int) or num_samples < 2 or num_samples % 2:
        raise ValueError(f"num_samples must be an even number of at least 2, got {num_samples!r}")
    if covariance not in ("full", "diagonal"):
        raise ValueError(f"covariance must be 'full' or 'diagonal', got {covariance!r}")
    if overdispersion is not None and not 0 < overdispersion < math.inf:
        raise ValueError(f"overdispersion must be a positive number, got {overdispersion!r}")
    tails = TAILS if overdispersion is None else ((1.0, float(overdispersion)),)
    return Refined(num_steps, num_samples, covariance, tails)


def _check_continuous(latents: Latents) -> None:
    if latents.num_states > 1 or not latents.sites:
        found = f"discrete ones with {latents.num_states} joint states" if latents.num_states > 1 else "none"
        raise ValueError(f"refined() needs continuous latents, this pair has {found}; use plain importance sampling")


def _first_arguments(program: Program, count: int) -> Program:
    def first(*args: Tensor) -> object:
        return program(*args[:count])

    return first


def _gradient(latents: Latents, args: tuple[Tensor, ...], u: Tensor) -> Tensor:
    """Gradient of log p(x, u) at u (S, n, dim); the parameters get none."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        return torch.autograd.grad(latents.log_joint(args, u).sum(), u)[0]


def _antithetic(loc: Tensor, num_samples: int) -> Tensor:
    half = torch.randn(num_samples // 2, *loc.shape, dtype=loc.dtype, device=loc.device)
    return torch.cat([half, -half])


def _residual(whitened: Tensor, noise: Tensor) -> Tensor:
    """Gradient of log p - log q along the draws, in units of q; where it is not finite it says nothing."""
    return (whitened + noise).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def step_sizes(first: float, last: float, num_steps: int) -> list[float]:
    """Half a cosine from `first` to first x last."""
    turns = (math.pi * step / num_steps for step in range(1, num_steps + 1))
    return [first * (last + (1 - last) * (1 + math.cos(turn)) / 2) for turn in turns]


def climb_scales(
    gradient: Gradient, loc: Tensor, scale: Tensor, num_steps: int, num_samples: int, last: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Natural gradient steps of independent normals; loc and scale have shape (n, dim)."""
    for size in step_sizes(0.5, last, num_steps):
        noise = _antithetic(loc, num_samples)
        residual = _residual(scale * gradient(loc + scale * noise), noise)
        move = (size * residual.mean(0)).clamp(-2 * WARM_UP_CLIP, 2 * WARM_UP_CLIP)
        loc = loc + scale * move
        scale = scale * (size * (residual * noise).mean(0) / 2).clamp(-WARM_UP_CLIP, WARM_UP_CLIP).exp()
    return loc, scale


def climb_factors(
    gradient: Gradient, loc: Tensor, factor: Tensor, num_steps: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Natural gradient steps of Gaussians with mean (n, dim) and lower triangular scale (n, dim, dim)."""
    dim = loc.shape[-1]
    for size in step_sizes(min(0.5, 2 * num_samples / (num_samples + dim)), LAST_STEP_SIZE, num_steps):
        noise = _antithetic(loc, num_samples)
        at = gradient(loc + _times(factor, noise))
        residual = _residual(torch.einsum("nij,sni->snj", factor, at), noise)
        move = _clipped(size * residual.mean(0), 2 * CLIP * math.sqrt(dim), (-1,))
        turn = torch.einsum("sni,snj->nij", residual, noise) * (size / num_samples)
        turn = _clipped(turn.tril(-1) + torch.diag_embed(_diagonal(turn) / 2), CLIP, (-2, -1))
        loc = loc + _times(factor, move[None])[0]
        factor = factor @ (turn.tril(-1) + torch.diag_embed(_diagonal(turn).exp()))
    return loc, factor


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _clipped(step: Tensor, largest: float, dims: tuple[int, ...]) -> Tensor:
    norm = torch.linalg.vector_norm(step, dim=dims, keepdim=True)
    return step * (largest / norm.clamp(min=largest))


def _times(scale: Tensor, noise: Tensor) -> Tensor:
    """The scale (n, dim) or factor (n, dim, dim) of each datum times noise (s, n, dim)."""
    return scale * noise if scale.ndim == 2 else torch.einsum("nij,snj->sni", scale, noise)


def _draw(
    ways: dict[bool, Latents],
    tails: tuple[tuple[float, float], ...],
    args: tuple[Tensor, ...],
    num_particles: int,
    tiled: bool,
) -> Draw:
    """Draws of the refined Gaussians, which are the last two of the arguments, with the variance of the tails."""
    latents = ways[tiled]
    *_, loc, scale = args
    shares, factors = torch.tensor(tails, dtype=torch.float64, device=loc.device).unbind(1)
    chosen = factors[systematic(shares, num_particles, len(loc))].sqrt().to(loc.dtype)  # (num_particles, n)
    noise = chosen.unsqueeze(-1) * torch.randn(num_particles, *loc.shape, dtype=loc.dtype, device=loc.device)
    values, log_det = latents.unpack(loc + _times(scale, noise))

    def log_density(at: Values) -> Tensor:
        if all(at[name] is value for name, value in values.items()):
            return _log_gaussians(noise, scale, shares, factors) - log_det
        u = latents.pack(at, num_particles, len(loc))
        return _log_gaussians(_whitened(u - loc, scale), scale, shares, factors) - latents.unpack(u)[1]

    return Draw(values, log_density, latents.event_dims)


def _whitened(offset: Tensor, scale: Tensor) -> Tensor:
    if scale.ndim == 2:
        return offset / scale
    return torch.linalg.solve_triangular(scale, offset.permute(1, 2, 0), upper=False).permute(2, 0, 1)


def _log_gaussians(noise: Tensor, scale: Tensor, shares: Tensor, factors: Tensor) -> Tensor:
    """Log-density of the mixture over `factors` of the variance, at noise (s, n, dim) in units of the scale."""
    dim = noise.shape[-1]
    log_scale = (scale if scale.ndim == 2 else _diagonal(scale)).double().log().sum(-1)  # (n,)
    squared = noise.double().square().sum(-1)  # (s, n)
    parts = [
        math.log(share) - squared / (2 * factor) - dim / 2 * math.log(2 * math.pi * factor)
        for share, factor in zip(shares.tolist(), factors.tolist(), strict=True)
    ]
    return torch.stack(parts).logsumexp(0) - log_scale
