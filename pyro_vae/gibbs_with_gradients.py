"""Gibbs with gradients: Metropolis-adjusted flips of bits, proposed by the gradient of the log density."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae.checks import check_count


@dataclass(frozen=True)
class Bits:
    """Chains at x (chains, *shape), with g(x) (chains,) in nats and its gradient ∇g(x) (chains, *shape)."""

    values: Tensor
    gain: Tensor
    slope: Tensor


class GibbsWithGradients:
    r"""A kernel that leaves f_β(x) ∝ p_0(x) exp(β g(x)) on bits invariant; p_0 are independent bits by logits.

    f_0 is p_0 and f_1 the whole model, so that f_β = p_0^(1-β) f_1^β is the geometric path between them. From x,
    L flips i_1, ..., i_L are drawn independently from

        q(i | x) = softmax_i(d_i(x) / 2),   d_i(x) = (1 - 2 x_i) ∂_i log f_β(x),

    where d_i is the first-order change of log f_β by a flip of bit i; they lead to x', and the same flips lead back.
    x' is accepted with probability min(1, f_β(x') Π_l q(i_l | x') / (f_β(x) Π_l q(i_l | x))), so that x and x' are in
    detailed balance flips by flips. L is drawn uniformly from 1, ..., 2 num_flips - 1: with even L alone the parity of
    the number of ones would never change. num_flips = 1 is Gibbs with gradients as published; more flips share the cost
    of a gradient, which is one evaluation of ∇g per move whatever L, as that at x is kept.

    Args:
        gain: g, from bits (n, *shape) to (n,), differentiable, a row's value depending on that row only.
        logits: of p_0, shape `shape`.
        num_flips: mean of L.

    Source: Grathwohl, Swersky, Hashemi, Duvenaud, Maddison, "Oops I took a gradient: scalable sampling for discrete
    distributions", 2021, arXiv:2102.04509; several flips by one gradient: Sun, Dai, Xia, Ramamurthy, "Path auxiliary
    proposal for MCMC in discrete space", 2022 (ICLR), there without repeated flips.
    """

    def __init__(self, gain: Callable[[Tensor], Tensor], logits: Tensor, *, num_flips: int = 1) -> None:
        check_count("num_flips", num_flips)
        self.gain, self.logits, self.num_flips = gain, logits.detach(), num_flips

    def at(self, values: Tensor) -> Bits:
        """Chains at x (chains, *shape), g evaluated there."""
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            gain = self.gain(leaf)
            (slope,) = torch.autograd.grad(gain.sum(), leaf)
        return Bits(values, gain.detach(), slope)

    def start(self, num_chains: int) -> Bits:
        """Exact draws of f_0."""
        return self.at(torch.bernoulli(self.logits.sigmoid().expand(num_chains, *self.logits.shape)))

    def log_density(self, bits: Bits, beta: float | Tensor = 1.0) -> Tensor:
        """Log p_0(x) + β g(x), shape (chains,), nats; in float64, as annealing adds up many small differences."""
        base = logsigmoid((2 * bits.values - 1) * self.logits)
        return base.flatten(1).sum(1, dtype=torch.float64) + beta * bits.gain.double()

    @torch.no_grad()
    def move(self, bits: Bits, beta: float | Tensor = 1.0) -> Bits:
        """One Metropolis-adjusted proposal for each chain at f_β."""
        most = 2 * self.num_flips - 1
        index = torch.multinomial(self._log_shares(bits, beta).exp(), most, replacement=True)  # (chains, most)
        num = torch.randint(1, most + 1, (len(index), 1), device=index.device)
        proposed, log_ratio = self.propose(bits, index, num, beta)
        return self._where(torch.rand_like(log_ratio).log() < log_ratio, proposed, bits)

    def propose(self, bits: Bits, index: Tensor, num: Tensor, beta: float | Tensor = 1.0) -> tuple[Bits, Tensor]:
        """Chains with the first `num` (chains, 1) of the pixels `index` (chains, most) flipped, one after the other.

        Returns:
            x', and log of f_β(x') Π_l q(i_l | x') / (f_β(x) Π_l q(i_l | x)), shape (chains,).
        """
        shares = self._log_shares(bits, beta)
        used = (torch.arange(index.shape[1], device=index.device) < num).to(shares.dtype)
        flips = torch.zeros_like(shares).scatter_add_(1, index, used).remainder(2).view_as(bits.values)
        proposed = self.at((bits.values - flips).abs())
        gained = ((self._log_shares(proposed, beta) - shares).gather(1, index) * used).sum(1)
        return proposed, self.log_density(proposed, beta) - self.log_density(bits, beta) + gained

    def _log_shares(self, bits: Bits, beta: float | Tensor) -> Tensor:
        """Log q(i | x), (chains, D)."""
        change = (1 - 2 * bits.values) * (self.logits + beta * bits.slope)
        return torch.log_softmax(change.flatten(1) / 2, 1)

    @staticmethod
    def _where(condition: Tensor, new: Bits, old: Bits) -> Bits:
        image = condition.view(-1, *[1] * (new.values.ndim - 1))
        return Bits(
            torch.where(image, new.values, old.values),
            torch.where(condition, new.gain, old.gain),
            torch.where(image, new.slope, old.slope),
        )


@dataclass(frozen=True)
class Tempered:
    """The path from p_0 to the whole model at `betas`, T + 1 numbers from 0 to 1, see `log_partition.Path`."""

    kernel: GibbsWithGradients
    betas: list[float]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas) - 1

    def start(self, num_chains: int) -> Bits:
        """Exact draws of p_0."""
        return self.kernel.start(num_chains)

    def at(self, values: Tensor) -> Bits:
        """Chains at x (num_chains, *shape)."""
        return self.kernel.at(values)

    def values(self, state: Bits) -> Tensor:
        """X of each chain, (num_chains, *shape)."""
        return state.values

    def log_density(self, state: Bits, step: int) -> Tensor:
        """Log f_β, (chains,), nats; f_0 = p_0 is normalised."""
        return self.kernel.log_density(state, self.betas[step])

    def move(self, state: Bits, step: int) -> Bits:
        """One move of the kernel at f_β."""
        return self.kernel.move(state, self.betas[step])

    def take(self, state: Bits, chains: Tensor) -> Bits:
        """The states of `chains` (num_chains,)."""
        return Bits(state.values[chains], state.gain[chains], state.slope[chains])
