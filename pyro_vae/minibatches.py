"""A module fitted to the least mean error per datum: Adam over minibatches, the best epoch on validation data kept."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from pyro_vae.checks import blocks, check_count, check_number
from pyro_vae.data import Data
from pyro_vae.randomness import NOISE, SHUFFLE, VALIDATION, derived_seed, own_randomness

Error = Callable[[Tensor], Tensor]  # of each datum (batch,), from observations (batch, ...)
Row = dict[str, float | None]


def least_error(
    module: nn.Module,
    error: Error,
    data: Data,
    *,
    seed: int,
    progress: Callable[[Row], None],
    start: Callable[[Tensor], None],
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
) -> list[Row]:
    """Fit the parameters of a module to the least mean error, with the one-cycle schedule of `fit`.

    Args:
        module: whose parameters move, on their device.
        error: of each datum; it may draw noise.
        data: training data, drawn anew for each epoch if they are dynamic bits, and validation data.
        seed: of the order, of the noise and of the bits.
        progress: called with each row.
        start: called with the training data before the first epoch.
        num_epochs: passes over the training data.
        batch_size: data per step.
        learning_rate: the largest.

    Returns:
        One row for each epoch: train_error, a mean over its steps; valid_error, always by the same noise; best_epoch,
        whose valid_error is the least so far. At the end the module has the parameters of the last best_epoch.

    Raises:
        FloatingPointError: an error that is not finite; it names the epoch.
    """
    for name, count in (("num_epochs", num_epochs), ("batch_size", batch_size)):
        check_count(name, count)
    check_number("learning_rate", learning_rate, above=0)
    place = next(module.parameters()).device
    data, order = data.to(place), torch.Generator(place).manual_seed(derived_seed(seed, SHUFFLE))
    optimizer, num_steps = Adam(module.parameters(), learning_rate), num_epochs * -(-len(data.train) // batch_size)
    rise = max(0.1, 2 / (num_steps + 1))  # at least one step: torch divides by the length of the rise
    schedule = OneCycleLR(optimizer, learning_rate, num_steps + 1, pct_start=rise)
    rows: list[Row] = []
    least, best_epoch, best = math.inf, 0, module.state_dict()
    with own_randomness(derived_seed(seed, NOISE), place):
        start(data.train.obs[:])
        for epoch in range(1, num_epochs + 1):
            train_error = _epoch(module, error, data.epoch(order).obs, order, batch_size, optimizer, schedule)
            valid_error = mean_error(module, error, data.valid.obs, derived_seed(seed, VALIDATION))
            if not math.isfinite(train_error + valid_error):
                raise FloatingPointError(f"the error is not finite in epoch {epoch}; a smaller learning_rate may help")
            if valid_error < least:
                least, best_epoch, best = valid_error, epoch, copy.deepcopy(module.state_dict())
            errors = {"train_error": train_error, "valid_error": valid_error}
            rows.append({"epoch": epoch, **errors, "best_epoch": best_epoch})
            progress(rows[-1])
    module.load_state_dict(best)
    return rows


def _epoch(
    module: nn.Module,
    error: Error,
    obs: Tensor,
    order: torch.Generator,
    batch_size: int,
    optimizer: Adam,
    schedule: Any,
) -> float:
    """One step for each batch of a random permutation; the mean error."""
    module.train()
    total = 0.0
    for index in torch.randperm(len(obs), generator=order, device=order.device).split(batch_size):
        optimizer.zero_grad()
        loss = error(obs[index]).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach()) * len(index)
    return total / len(obs)


@torch.no_grad()
def mean_error(module: nn.Module, error: Error, obs: Tensor, seed: int) -> float:
    """The mean error per datum of a module that is not trained meanwhile, by the noise of a seed."""
    module.eval()
    with own_randomness(seed, next(module.parameters()).device):
        return sum(float(error(block).sum()) for _, block in blocks(obs)) / len(obs)
