"""Training a generator against a discriminator that learns to tell its draws from data."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

Rows = list[dict[str, float | None]]
BETAS = (0.5, 0.999)  # of Adam
PENALTY_EVERY = 4  # steps of the discriminator; the penalty then counts as many times
AVERAGE = 0.999  # of the generator's parameters over steps, which circle around a balance


def train(
    generator: nn.Module,
    discriminator: nn.Module,
    draw: Callable[[int], Tensor],
    obs: Tensor,
    *,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    penalty: float,
    progress: Callable[[dict[str, float | None]], None],
) -> Rows:
    r"""Alternate steps of Adam on the losses of two players, whose balance is where the draws have the law of the data.

    The discriminator's logit D(x) is to be high for data and low for draws x̃; it minimises
    E softplus(-D(x)) + E softplus(D(x̃)) + γ/2 E |∇D(x)|², which is log 4 where it can tell nothing. The generator
    minimises E softplus(-D(x̃)) (the non-saturating loss, log 2 there). The penalty on the gradient at the data lets the
    two settle at the balance; it is 0 there, and does not move it. At the end the generator's parameters are an
    exponential average over the steps. Random numbers are torch's own: seed before.

    Args:
        generator: whose parameters are trained, in place.
        discriminator: from observations (n, *shape) to logits (n, 1) or (n,).
        draw: a count to that many draws x̃ (n, *shape) of the generator, with gradients.
        obs: data (n, *shape); rows move to the discriminator's device batch by batch.
        num_epochs: passes over the data.
        batch_size: of data and of draws.
        learning_rate: of both players.
        penalty: γ.
        progress: called with each epoch's row.

    Returns:
        A row for each epoch: mean losses of the players, nats, and how many data and draws the discriminator tells
        apart (`discriminator_accuracy`, 0.5 where it can tell nothing).

    Source: Goodfellow et al., "Generative adversarial nets", 2014, arXiv:1406.2661; Mescheder, Geiger, Nowozin, "Which
    training methods for GANs do actually converge?", 2018, arXiv:1801.04406.
    """
    device = next(discriminator.parameters()).device
    players = [torch.optim.Adam(each.parameters(), learning_rate, BETAS) for each in (generator, discriminator)]
    average = copy.deepcopy(generator)
    rows: Rows = []
    num_steps = 0
    for epoch in range(1, num_epochs + 1):
        totals = torch.zeros(3, device=device)
        for index in torch.randperm(len(obs)).split(batch_size):
            real = obs[index].to(device)
            weight = penalty * PENALTY_EVERY if num_steps % PENALTY_EVERY == 0 else 0.0
            loss, accuracy = _step_of_discriminator(discriminator, players[1], real, draw(len(real)).detach(), weight)
            other = _step_of_generator(discriminator, players[0], draw(len(real)))
            num_steps += 1
            _follow(average, generator, min(AVERAGE, num_steps / (num_steps + 10)))
            totals += torch.stack([loss, other, accuracy]) * len(real)
        names = ("discriminator_loss", "generator_loss", "discriminator_accuracy")
        rows.append({"epoch": epoch, **dict(zip(names, (totals / len(obs)).tolist(), strict=True))})
        progress(rows[-1])
    generator.load_state_dict(average.state_dict())
    return rows


def _step_of_discriminator(
    discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, drawn: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """One step; its loss without the penalty, and the share of data and draws that it tells apart."""
    real.requires_grad_(penalty > 0)
    of_real, of_drawn = discriminator(torch.cat([real, drawn])).flatten().chunk(2)
    loss = softplus(-of_real).mean() + softplus(of_drawn).mean()
    whole = loss
    if penalty > 0:
        slope = torch.autograd.grad(of_real.sum(), real, create_graph=True)[0]
        whole = loss + penalty / 2 * slope.flatten(1).square().sum(1).mean()
    optimizer.zero_grad()
    whole.backward()
    optimizer.step()
    right = torch.cat([of_real > 0, of_drawn < 0]).float().mean()
    return loss.detach(), right


def _step_of_generator(discriminator: nn.Module, optimizer: torch.optim.Optimizer, drawn: Tensor) -> Tensor:
    """One step; its loss."""
    discriminator.requires_grad_(False)  # no gradient of parameters that do not move
    loss = softplus(-discriminator(drawn)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    discriminator.requires_grad_(True)
    return loss.detach()


@torch.no_grad()
def _follow(average: nn.Module, generator: nn.Module, decay: float) -> None:
    for kept, now in zip(average.parameters(), generator.parameters(), strict=True):
        kept.lerp_(now, 1 - decay)
