"""The convolutional energy against enumeration of 3x4 bits: log Z, mass, gradient, and a fit to a known law."""

import itertools
import math

import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import Batch, Data
from pyro_vae.models import ConvolutionalEnergy
from pyro_vae.randomness import own_randomness
from pyro_vae.spaces import Binary

SHAPE = (3, 4)


@pytest.fixture(scope="module")
def images():
    """All 4096 images."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)), dtype=torch.float64)
    return every.view(-1, *SHAPE)


def tiny(images, seed=0):
    """A network whose values differ by 3 nats (standard deviation over all images), at base rates other than ½."""
    with own_randomness(seed):
        model = ConvolutionalEnergy(Binary(SHAPE), num_channels=4, hidden_dim=8, num_flips=2).double()
        model.base_logits.normal_()
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.mul_(5)  # so that the activations bend
        model.head.weight.mul_(3 / model.network(images).std())
    return model


def log_p(model, images):
    """By enumeration, nats."""
    with torch.no_grad():
        values = model.log_unnormalized(images)
    return values - values.logsumexp(0)


def test_the_network_matters(images):
    """It is no law of independent pixels: log p differs from that of its own pixel means by more than 0.1 nats."""
    masses = log_p(tiny(images), images).exp()
    means = (masses[:, None, None] * images).sum(0)
    independent = torch.distributions.Bernoulli(means).log_prob(images).sum((1, 2))
    assert float((masses * (masses.log() - independent)).sum()) > 0.1


def test_annealed_log_z_is_that_of_the_enumeration(images):
    model = tiny(images)
    with torch.no_grad():
        truth = float(model.log_unnormalized(images).logsumexp(0))
    assert model.sum_log_partition() == pytest.approx(truth, abs=1e-9)
    found = model.estimate_log_partition(200, num_chains=500, seed=0)
    assert abs(found.log_z - truth) < min(0.02, 4 * found.se)


def test_the_masses_of_all_images_sum_to_one(images):
    model = tiny(images)
    model.sum_log_partition()
    with torch.no_grad():
        mass = model.distribution().log_prob(images).exp().sum()
    assert float(mass) == pytest.approx(1, abs=1e-12)  # float64


def test_the_gradient_of_contrastive_divergence_is_that_of_the_likelihood(images):
    """Chains that started far off, against Σ_x p(x) ∇f(x) by enumeration: every entry within 5 standard errors."""
    model = tiny(images)
    data = images[torch.arange(0, 4096, 100)]
    exact = log_p(model, images).exp()
    parameters = list(model.parameters())
    negative = (exact * model.log_unnormalized(images)).sum()
    truth = torch.autograd.grad(model.log_unnormalized(data).mean() - negative, parameters)
    with own_randomness(1):
        chains = model.move_chains(torch.ones(2000, *SHAPE, dtype=torch.float64), 100)
    contrasts = [model.log_unnormalized(data).mean() - model.log_unnormalized(part).mean() for part in chains.split(50)]
    parts = [torch.autograd.grad(contrast, parameters) for contrast in contrasts]
    for index, expected in enumerate(truth):
        each = torch.stack([part[index] for part in parts])
        error = each.std(0) / math.sqrt(len(each))
        assert bool(((each.mean(0) - expected).abs() <= 5 * error + 1e-12).all())


def test_a_fit_comes_near_the_law_that_the_data_are_from(images):
    """Bars: rows that are on or off, 10% noise. Σ p log p - Σ p log model is a fifth of that of independent pixels."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    noisy = rows[:, None, :, None].expand(-1, 1, -1, 4) * 0.8 + 0.1  # (8, 1, 3, 4)
    law = torch.distributions.Bernoulli(noisy).log_prob(images).sum((2, 3)).exp().mean(0)
    with own_randomness(0):
        drawn = images[torch.multinomial(law, 2400, replacement=True)].float()
    space = Binary(SHAPE)
    parts = (Batch(part, space=space) for part in drawn.split([2000, 200, 200]))
    model = ConvolutionalEnergy(space, num_channels=8, hidden_dim=16, num_flips=2)
    history = pv.fit(model, Data("bars", space, *parts), num_epochs=15, learning_rate=1e-2, log_z_steps=0, device="cpu")
    assert [row["epoch"] for row in history.rows] == list(range(1, 16))
    independent = 12 * math.log(2)  # every pixel is on with probability one half
    entropy = float(-(law * law.log()).sum())
    short = float((law * (law.log() - log_p(model.double(), images))).sum())
    assert short < 0.2 * (independent - entropy)  # what 2,000 data teach; independent pixels lack 2.5 nats
