"""Restoring by the chain rule: pixel after pixel, each missing one drawn and each given one a factor of the weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.chain_rule import ChainRule


@dataclass(frozen=True)
class Walk:
    """Images whose missing pixels were drawn in the order of the chain rule.

    Attributes:
        images: shape (num, n, D).
        log_weights: Σ over given pixels of log p(x_d | pixels before d), shape (num, n), nats: the mean of the weights
            is an unbiased estimate of p(given pixels).
        is_exact: whether the given pixels come before all missing ones: then all weights of a datum are p(given pixels)
            itself, and the images are draws of p(missing | given).
    """

    images: Tensor
    log_weights: Tensor
    is_exact: bool


@torch.no_grad()
def walk(law: ChainRule, rows: Tensor, missing: Tensor, num: int) -> Walk:
    """Draw the missing pixels (D,) of the rows (n, D) `num` times.

    Source: Fung, Chang, "Weighing and integrating evidence for stochastic simulation in Bayesian networks", 1990
    (likelihood weighting).
    """
    order = law.places()
    hidden = missing.tolist()
    truth = rows.repeat(num, 1)
    images, log_weights = torch.zeros_like(truth), torch.zeros(len(truth), dtype=torch.float64, device=rows.device)
    step = law.stepper()
    for index in order:
        pixel = law.pixel(step(images, index))
        if hidden[index]:
            images[:, index] = pixel.sample()
        else:
            images[:, index] = truth[:, index]
            log_weights += pixel.log_prob(truth[:, index]).double()
    places = [hidden[index] for index in order]
    return Walk(images.unflatten(0, (num, -1)), log_weights.unflatten(0, (num, -1)), places == sorted(places))
