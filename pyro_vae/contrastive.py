"""Persistent contrastive divergence: the likelihood's gradient of an energy model, from Markov chains that go on."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_vae.checks import check_count, check_number
from pyro_vae.data import Data
from pyro_vae.randomness import NOISE, SHUFFLE, derived_seed, own_randomness

Row = dict[str, float | None]


class HasChains(Protocol):
    """A model with log p(x) = log_unnormalized(x) - log Z and a Markov kernel that leaves it invariant."""

    def log_unnormalized(self, obs: Tensor) -> Tensor:
        """Log of the unnormalised mass, (n, *shape) to (n,)."""

    def start_chains(self, num_chains: int) -> Tensor:
        """Where the chains begin, (num_chains, *shape)."""

    def move_chains(self, obs: Tensor, num_moves: int) -> Tensor:
        """Chains after so many moves of the kernel."""


def persistent_contrastive_divergence(
    model: Any,
    data: Data,
    *,
    seed: int,
    progress: Callable[[Row], None],
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    num_chains: int,
    num_moves: int,
    averaging: float,
) -> list[Row]:
    r"""Fit in place by ∇ log p(x) = ∇ f(x) - E_p ∇ f, the expectation from chains that are kept between steps.

    Adam without momentum of the first moment, whose steps a learning rate brings from `learning_rate` to 0 along half a
    cosine; the parameters at the end are the running average of those on the way.

    Args:
        model: see `HasChains`.
        data: its training data; each epoch draws dynamic bits anew.
        seed: of everything random.
        progress: called with each epoch's row.
        num_epochs: passes over the training data.
        batch_size: data per step.
        learning_rate: of Adam at its highest, after the first 100 steps.
        num_chains: persistent chains.
        num_moves: moves of each chain per step.
        averaging: share of the average that a step leaves, below 1; 0 for the last parameters.

    Returns:
        Rows with `epoch`, `gap` (mean f of the training data less that of the chains, nats, near 0 when they are
        alike) and `overfit` (mean f of the training data less that of the validation data, nats).

    Source: Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient", 2008
    (ICML).
    """
    _check(num_epochs, batch_size, learning_rate, num_chains, num_moves, averaging)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    steps = num_epochs * -(-len(data.train) // batch_size)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100) * _cosine(i / steps))
    average = [p.detach().clone() for p in parameters]
    order = torch.Generator().manual_seed(derived_seed(seed, SHUFFLE))
    rows, step = [], 0
    with own_randomness(derived_seed(seed, NOISE), device):
        chains = model.start_chains(num_chains)
        for epoch in range(1, num_epochs + 1):
            gaps = []
            for obs in _batches(data, batch_size, order):
                chains = model.move_chains(chains, num_moves)
                gap = _gap(model, obs.to(device), chains)
                optimizer.zero_grad()
                (-gap).backward()
                optimizer.step()
                schedule.step()
                gaps.append(gap.detach())
                _average(average, parameters, min(averaging, (1 + step) / (10 + step)))
                step += 1
            rows.append({"epoch": epoch, "gap": float(torch.stack(gaps).mean()), **_overfit(model, data, device)})
            progress(rows[-1])
    with torch.no_grad():
        for own, averaged in zip(parameters, average, strict=True):
            own.copy_(averaged)
    return rows


def _check(
    num_epochs: int, batch_size: int, learning_rate: float, num_chains: int, num_moves: int, averaging: float
) -> None:
    counts = {"num_epochs": num_epochs, "batch_size": batch_size, "num_chains": num_chains, "num_moves": num_moves}
    for name, value in counts.items():
        check_count(name, value)
    check_number("learning_rate", learning_rate, above=0)
    check_number("averaging", averaging)
    if not 0 <= averaging < 1:
        raise ValueError(f"averaging must be at least 0 and below 1, got {averaging}")


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _batches(data: Data, batch_size: int, order: torch.Generator) -> tuple[Tensor, ...]:
    """All training data in a new order, and dynamic bits drawn anew."""
    train = data.epoch(order).obs
    return train[torch.randperm(len(train), generator=order).to(train.device)].split(batch_size)


def _gap(model: Any, obs: Tensor, chains: Tensor) -> Tensor:
    """Mean f(x) of the data less that of the chains, one pass for both."""
    values = model.log_unnormalized(torch.cat([obs, chains]))
    return values[: len(obs)].mean() - values[len(obs) :].mean()


@torch.no_grad()
def _average(average: list[Tensor], parameters: list[nn.Parameter], keep: float) -> None:
    for averaged, own in zip(average, parameters, strict=True):
        averaged.lerp_(own, 1 - keep)


@torch.no_grad()
def _overfit(model: Any, data: Data, device: torch.device, num: int = 1000) -> Row:
    """Mean f(x) of training data less that of as many validation data."""
    means = [float(model.log_unnormalized(part.obs[:num].to(device)).mean()) for part in (data.train, data.valid)]
    return {"overfit": means[0] - means[1]}
