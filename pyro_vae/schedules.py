"""How the learning rate and the weight of the latent terms move in the course of a fit by SVI."""

import math
from typing import Any

import torch

from pyro_vae.settings import Settings

RISE = 0.5  # share of a cycle in which the KL weight rises: R of Fu et al.


def learning_rate(optimizer: torch.optim.Optimizer, settings: Settings, num_steps: int) -> Any:
    """The scheduler of torch that moves the learning rate of `optimizer` over `num_steps` steps."""
    schedulers = torch.optim.lr_scheduler
    if settings.schedule == "one_cycle":
        rise = max(0.1, 2 / (num_steps + 1))  # at least one step: torch divides by the length of the rise
        return schedulers.OneCycleLR(optimizer, settings.learning_rate, total_steps=num_steps + 1, pct_start=rise)
    if settings.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=num_steps)
    return schedulers.LambdaLR(optimizer, lambda step: 1.0)


def kl_weight(settings: Settings, step: int, steps_per_epoch: int) -> float:
    r"""Weight of log p(z) - log q(z | x) at a step, β times a schedule that rises to 1.

    "linear": t / W up to 1, over the W steps of `kl_warmup` epochs. "cyclical": M times in a row, over the T steps of
    the fit, from 0 in a straight line to 1 and then level: min(1, 2 τ), τ = ((t - 1) mod ⌈T/M⌉) / (T/M).

    Args:
        settings: of the fit.
        step: t, counted from 1.
        steps_per_epoch: number of batches.

    Source: Bowman et al., "Generating Sentences from a Continuous Space", 2016, arXiv:1511.06349; Higgins et al.,
    "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework", 2017 (ICLR); Fu et al.,
    "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing", 2019, arXiv:1903.10145.
    """
    if settings.kl_schedule == "cyclical":
        length = settings.num_epochs * steps_per_epoch / settings.num_cycles
        return settings.beta * min(1.0, (step - 1) % math.ceil(length) / length / RISE)
    ramp = settings.kl_warmup * steps_per_epoch
    return settings.beta * (min(1.0, step / ramp) if ramp else 1.0)


def check_cycles(settings: Settings, steps_per_epoch: int) -> None:
    """Raise a ValueError unless a cycle of the KL weight has two steps: in one step it would stay at zero."""
    num_steps = settings.num_epochs * steps_per_epoch
    if settings.kl_schedule == "cyclical" and num_steps < 2 * settings.num_cycles:
        raise ValueError(
            f"num_cycles must be at most {num_steps // 2}, a cycle for every two steps, got {settings.num_cycles}"
        )
