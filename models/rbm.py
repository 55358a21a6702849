"""Restricted Boltzmann machine: bits and hidden bits, each independent given the others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partialmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from ..annealing import exponential_schedule
from ..checks import check_count
from ..energy import BLOCK_ROWS, EnergyBased
from ..spaces import Space

MAX_HIDDEN = 20  # hidden bits whose states are summed one by one


class RBM(EnergyBased):
    r"""p(x, h) ∝ exp(bᵀx + cᵀh + hᵀWx), so that f(x) = bᵀx + Σ_j softplus(c_j + W_j x) with the hidden bits summed out.

    Annealing goes through p_β(x, h) ∝ exp((1-β) (b_0ᵀx + c_0ᵀh) + β (bᵀx + cᵀh + hᵀWx)), each a machine of the same
    kind with its own block Gibbs sampling. b_0 and c_0 are the logits of independent bits with the shares that x and h
    have over the training data. The paper of 2008 starts from c_0 = 0, and log Z scatters more: see `complete_base`.

    Args:
        space: where the observations live.
        hidden_dim: number of hidden bits.

    Source: Smolensky, "Information processing in dynamical systems: foundations of harmony theory", 1986;
    Salakhutdinov, Murray, "On the quantitative analysis of deep belief networks", 2008 (ICML).
    """

    hidden_base_logits: Tensor

    def __init__(self, space: Space, *, hidden_dim: int = 500) -> None:
        super().__init__(space)
        check_count("hidden_dim", hidden_dim)
        self.weight = nn.Parameter(0.01 * torch.randn(hidden_dim, space.num_dims))
        self.visible_bias = nn.Parameter(torch.zeros(space.num_dims))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_dim))
        self.register_buffer("hidden_base_logits", torch.zeros(hidden_dim))

    def log_unnormalized(self, obs: Tensor) -> Tensor:
        """F(x) of images (n, *shape), shape (n,), nats."""
        pixels = obs.flatten(1)
        return pixels @ self.visible_bias + softplus(linear(pixels, self.weight, self.hidden_bias)).sum(-1)

    def features(self, obs: Tensor, context: None = None) -> Tensor:
        """p(h_j = 1 | x), (n, hidden_dim)."""
        return linear(obs.flatten(1), self.weight, self.hidden_bias).sigmoid()

    def path(self, num_steps: int, schedule: Callable[[int], Tensor] = exponential_schedule) -> "_Machines":
        """From p_0 to p(x) by block Gibbs sampling, with the β_t of a schedule."""
        return _Machines(self, schedule(num_steps))

    @torch.no_grad()
    def sum_log_partition(self) -> float:
        """Log Z as a sum over all states of at most 20 hidden bits (or of all bits of x), which is kept; nats."""
        hidden_dim = len(self.hidden_bias)
        if hidden_dim > min(MAX_HIDDEN, self.space.num_dims):
            return super().sum_log_partition()
        numbers = torch.arange(2**hidden_dim, device=self.weight.device).unsqueeze(-1)
        states = numbers.bitwise_right_shift(torch.arange(hidden_dim, device=numbers.device)).bitwise_and(1)
        weight, visible, hidden = (each.double() for each in (self.weight, self.visible_bias, self.hidden_bias))
        parts = [
            part @ hidden + softplus(part @ weight + visible).sum(-1)
            for part in states.double().split(MAX_HIDDEN * 512)
        ]
        self._keep(log_z=float(torch.logsumexp(torch.cat(parts), 0)))
        return self.constant().log_z

    def start_from_base(self) -> None:
        """Begin with the shares of each bit in the training data."""
        self.visible_bias.copy_(self.base_logits.flatten())

    @torch.no_grad()
    def complete_base(self, obs: Tensor) -> None:
        """Give the hidden bits of p_0 their shares p(h_j = 1 | x) over images x (n, *shape); one half before a fit.

        For 500 hidden bits fitted to MNIST (T = 2,000, 100 chains, 20 seeds) the standard error that log Z then has is
        0.23 nats on average, and 0.51 if hidden bits start from one half; over the seeds it scatters by 0.62 and 0.67,
        by `sigmoid_schedule` by 0.26 and 0.77. For 100 on 8x8 digits it scatters by 0.011 and 0.045, by
        `sigmoid_schedule` by 0.019 and 0.025 (benchmarks/annealing_paths.py).
        """
        total = torch.stack([self.features(part).sum(0) for part in obs.split(BLOCK_ROWS)]).sum(0)
        shares = (total + 0.5) / (len(obs) + 1)  # not 0 nor 1, as those of the pixels
        self.hidden_base_logits.copy_(shares.logit())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As ever; runs from before there were shares of hidden bits get one half, and keep their log Z."""
        state_dict.setdefault(f"{prefix}hidden_base_logits", torch.zeros_like(self.hidden_base_logits))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # What differs from an energy of any kind: defaults for block Gibbs sampling.
    own_training = partialmethod(EnergyBased.own_training, num_epochs=60, learning_rate=2e-3, log_z_steps=5000)


@dataclass(frozen=True)
class _Chains:
    """Chains at x (chains, D), with W x (chains, hidden_dim)."""

    pixels: Tensor
    inputs: Tensor


class _Machines:
    """The machines between p_0 and p(x), see `log_partition.Path`; h is drawn anew by each move."""

    def __init__(self, machine: RBM, betas: Tensor) -> None:
        self.shape = machine.space.shape
        self.visible_base, self.hidden_base = machine.base_logits.flatten(), machine.hidden_base_logits
        self.weight, self.visible, self.hidden = (
            each.detach() for each in (machine.weight, machine.visible_bias, machine.hidden_bias)
        )
        self.betas = betas.tolist()

    @cached_property
    def log_z_start(self) -> float:
        """Log Z_0, nats; not asked for by a fit, which would wait for a GPU."""
        return sum(float(softplus(logits.double()).sum()) for logits in (self.visible_base, self.hidden_base))

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas) - 1

    def log_density(self, state: _Chains, step: int) -> Tensor:
        """Log f_β(x), h summed out, (chains,), nats; log f_0 is normalised."""
        beta = self.betas[step]
        visible = state.pixels @ torch.lerp(self.visible_base, self.visible, beta)
        hidden = softplus(self._hidden_logits(state, beta)).double().sum(-1)
        return visible.double() + hidden - (1 - beta) * self.log_z_start

    def move(self, state: _Chains, step: int) -> _Chains:
        """H given x, then x given h, at f_β: both exact, so that no test is needed."""
        beta = self.betas[step]
        hidden = _bits(self._hidden_logits(state, beta).sigmoid())
        logits = torch.lerp(self.visible_base, self.visible, beta) + beta * (hidden @ self.weight)
        return self._at(_bits(logits.sigmoid()))

    def take(self, state: _Chains, chains: Tensor) -> _Chains:
        """The states of `chains` (num_chains,)."""
        return _Chains(state.pixels[chains], state.inputs[chains])

    def start(self, num_chains: int) -> _Chains:
        """Exact draws of p_0."""
        return self._at(torch.bernoulli(self.visible_base.sigmoid().expand(num_chains, -1)))

    def at(self, values: Tensor) -> _Chains:
        """Chains at x (num_chains, *shape)."""
        return self._at(values.flatten(1))

    def values(self, state: _Chains) -> Tensor:
        """X of each chain, (num_chains, *shape)."""
        return state.pixels.unflatten(-1, self.shape)

    def _hidden_logits(self, state: _Chains, beta: float) -> Tensor:
        return torch.lerp(self.hidden_base, self.hidden, beta) + beta * state.inputs

    def _at(self, pixels: Tensor) -> _Chains:
        return _Chains(pixels, linear(pixels, self.weight))


def _bits(shares: Tensor) -> Tensor:
    """Bits that are 1 with the given probabilities; `torch.bernoulli` draws them several times slower on a CPU."""
    return (torch.rand_like(shares) < shares).to(shares.dtype)
