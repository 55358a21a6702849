"""Hamiltonian Monte Carlo along an annealing path: one accept per chain and datum, step sizes from a pilot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

TARGET_ACCEPTANCE = 0.65
JITTER = 0.2  # of the step size, either way, so that no trajectory closes on itself
ADAPTATION = 0.7  # log step size per unit of acceptance off its target
PILOT_STAGES = 50
PILOT_MOVES = 2  # at each stage
PRIOR_CHAINS = 8  # by which the scale of the start counts beside the chains' own spread
WARM_UP = 10  # moves at the first stage, from a first guess that may be far off

Densities = Callable[[Tensor], tuple[Tensor, Tensor]]
Evaluation = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Position:
    """Where the chains are, u (num_chains, n, dim), with log r, log f (num_chains, n) and their gradients there."""

    u: Tensor
    log_base: Tensor
    log_target: Tensor
    grad_base: Tensor
    grad_target: Tensor

    def log_density(self, beta: float) -> Tensor:
        """Log of r^(1-β) f^β, shape (num_chains, n)."""
        if beta == 0:
            return self.log_base  # 0 times log 0 is none of its business
        return (1 - beta) * self.log_base + beta * self.log_target if beta < 1 else self.log_target

    def gradient(self, beta: float) -> Tensor:
        return torch.lerp(self.grad_base, self.grad_target, beta)


@dataclass(frozen=True)
class Tuning:
    """Step sizes and length scales at some of the densities, carried linearly (in logarithms) to those between.

    Attributes:
        steps: the densities, ascending from 0 to T, shape (S,).
        log_sizes: log step size of each datum, in units of the scales, (S, n).
        log_scales: log length scale of each coordinate, the square root of the inverse mass, (S, n, dim).
    """

    steps: Tensor
    log_sizes: Tensor
    log_scales: Tensor

    def kick(self, step: int) -> Tensor:
        """Step size times scale at a density, (n, dim)."""
        right = int(torch.searchsorted(self.steps, step).clamp(1, len(self.steps) - 1))
        left = right - 1
        share = float((step - self.steps[left]) / (self.steps[right] - self.steps[left]))
        sizes = torch.lerp(self.log_sizes[left], self.log_sizes[right], share)
        return (sizes.unsqueeze(-1) + torch.lerp(self.log_scales[left], self.log_scales[right], share)).exp()


@dataclass
class GeometricPath:
    r"""f_t = r^(1-β_t) f^β_t over u in R^dim, for n data at once, with HMC kernels.

    Args:
        densities: log r and log f (num_chains, n) at u (num_chains, n, dim), nats, differentiable.
        betas: β_0 = 0 to β_T = 1, shape (T + 1,), on the CPU, so that a GPU is never asked for one.
        num_leapfrog: leapfrog steps of one move.
        tuning: step sizes and scales; from `pilot`.
        evaluate: log r, log f and their gradients at u; by autograd unless something faster takes its place.

    Source: Neal, "MCMC using Hamiltonian dynamics", 2011, arXiv:1206.1901.
    """

    densities: Densities
    betas: Tensor
    num_leapfrog: int
    tuning: Tuning | None = None
    acceptance: list[Tensor] = field(default_factory=list)  # (n,) of each move
    evaluate: Evaluation = field(init=False)

    def __post_init__(self) -> None:
        self.evaluate = self._by_autograd

    @property
    def num_steps(self) -> int:
        return len(self.betas) - 1

    def at(self, u: Tensor) -> Position:
        """The position with its densities and gradients."""
        return Position(u.detach(), *self.evaluate(u))

    def _by_autograd(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_base, log_target = self.densities(u)
            grad_base = torch.autograd.grad(log_base.sum(), u, retain_graph=True)[0]
            grad_target = torch.autograd.grad(log_target.sum(), u)[0]
        return log_base.detach(), log_target.detach(), grad_base, grad_target

    def log_density(self, state: Position, step: int) -> Tensor:
        return state.log_density(float(self.betas[step]))

    def take(self, state: Position, chains: Tensor) -> Position:
        wide = chains.unsqueeze(-1).expand_as(state.u)
        return Position(*(values.gather(0, chains if values.ndim == 2 else wide) for values in vars(state).values()))

    def move(self, state: Position, step: int) -> Position:
        if self.tuning is None:
            raise RuntimeError("the path has no step sizes: run the pilot first")
        moved, probability = self.propose(state, float(self.betas[step]), self.tuning.kick(step))
        self.acceptance.append(probability.mean(0))
        return moved

    def propose(self, start: Position, beta: float, kick: Tensor) -> tuple[Position, Tensor]:
        """One trajectory with steps `kick` (n, dim) and its Metropolis test.

        Returns:
            The new position and the acceptance probabilities (num_chains, n).
        """
        momentum = torch.randn_like(start.u)
        jitter = 1 + JITTER * (2 * torch.rand_like(start.u[..., :1]) - 1)
        kick = kick * jitter  # (num_chains, n, dim)
        energy = start.log_density(beta) - kinetic(momentum)
        here, momentum = start, momentum + kick / 2 * start.gradient(beta)
        for leap in range(self.num_leapfrog):
            here = self.at(here.u + kick * momentum)
            last = leap == self.num_leapfrog - 1
            momentum = momentum + kick * (0.5 if last else 1.0) * here.gradient(beta)
        # A trajectory that ran off to infinity or NaN is refused.
        change = (here.log_density(beta) - kinetic(momentum) - energy).nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        probability = change.clamp(max=0).exp()
        accepted = torch.rand_like(probability) < probability
        return _choose(accepted, here, start), probability


def kinetic(momentum: Tensor) -> Tensor:
    """Half the squared momentum of every chain and datum, float64."""
    return momentum.double().square().sum(-1) / 2


def _choose(accepted: Tensor, there: Position, here: Position) -> Position:
    chosen = []
    for new, old in zip(vars(there).values(), vars(here).values(), strict=True):
        chosen.append(torch.where(accepted if new.ndim == 2 else accepted.unsqueeze(-1), new, old))
    return Position(*chosen)


def pilot(path: GeometricPath, u: Tensor, scale: Tensor) -> Tuning:
    """Step sizes and scales of each datum along the path, from one run that is thrown away.

    The run visits up to 50 of the densities. There it moves the logarithm of each datum's step size by 0.7 times
    (acceptance - 0.65), acceptance being the mean over the chains, and reads each coordinate's scale off the spread of
    the chains, held to that of the start as by 8 chains more. What comes out is smoothed and frozen: adapting inside
    the run whose weights count would break their unbiasedness.

    Args:
        path: what to tune.
        u: draws of the base (num_chains, n, dim), which the counting run must not use.
        scale: length scales of the base (n, dim).
    """
    stages = torch.linspace(0, path.num_steps, min(PILOT_STAGES, path.num_steps) + 1).round().long().unique()
    log_size = torch.full(u.shape[1:2], -0.25 * math.log(u.shape[-1]), device=u.device, dtype=u.dtype)
    state, sizes, scales, here = path.at(u), [], [], scale
    for index, stage in enumerate(stages):
        visited = []
        for _ in range(WARM_UP if index == 0 else PILOT_MOVES):
            kick = log_size.exp().unsqueeze(-1) * here
            state, probability = path.propose(state, float(path.betas[stage]), kick)
            log_size = log_size + ADAPTATION * (probability.mean(0).to(log_size) - TARGET_ACCEPTANCE)
            visited.append(log_size)
        sizes.append(torch.stack(visited[-PILOT_MOVES:]).mean(0))
        scales.append(here.log())
        here = _spread(state.u, scale)
    return Tuning(stages, _smoothed(torch.stack(sizes)), _smoothed(torch.stack(scales)))


def _spread(u: Tensor, scale: Tensor) -> Tensor:
    """Standard deviation over the chains of each coordinate, held to `scale` by 8 prior chains."""
    freedom = len(u) - 1
    squares = (u - u.mean(0)).square().sum(0)
    return ((squares + PRIOR_CHAINS * scale**2) / (freedom + PRIOR_CHAINS)).sqrt()


def _smoothed(values: Tensor) -> Tensor:
    """Running mean over five stages (S, ...), with the end values repeated."""
    padded = torch.cat([values[:1], values[:1], values, values[-1:], values[-1:]])
    return torch.stack([padded[i : i + len(values)] for i in range(5)]).mean(0)
