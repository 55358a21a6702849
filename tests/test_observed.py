"""Bits that many particles share, and the layers in front of them, against the layers one by one in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyro_vae.estimators import head, observed
from pyro_vae.estimators.head import Deferred, LinearLayers
from pyro_vae.independent import log_mass
from pyro_vae.networks import Tanh


@pytest.fixture(autouse=True)
def every_layer_waits(monkeypatch):
    monkeypatch.setattr(head, "SMALLEST", 0)
    with torch.no_grad():
        yield


def scored(layers, hidden, bits):
    with LinearLayers():
        logits = layers(hidden)
        assert type(logits) is Deferred
        return log_mass(logits, bits)


def particles(num_particles=200, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(3, 50, dtype=dtype)
    hidden = scale * torch.randn(num_particles, 2, 3, generator=generator, dtype=dtype)
    return layer, hidden, torch.bernoulli(torch.full((2, 50), 0.3, dtype=dtype), generator=generator)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", [1, 1000, 10**9])
@pytest.mark.parametrize("scale", [1.0, 1e4])  # the second so improbable that products underflow
def test_a_layer_that_carries_the_signs_of_the_bits(bias, part, scale, monkeypatch):
    monkeypatch.setattr(observed, "PART", part)
    layer, hidden, bits = particles(scale=scale)
    layer.bias = layer.bias if bias else None
    before = hidden.clone(), layer.weight.clone()
    found = scored(layer, hidden, bits)
    torch.testing.assert_close(found, log_mass(layer(hidden), bits))
    assert torch.equal(hidden, before[0])
    assert torch.equal(layer.weight, before[1])


def test_it_is_as_exact_as_float32_can_be():
    layer, hidden, bits = particles(2000, scale=5.0, dtype=torch.float32)
    truth = log_mass(layer.double()(hidden.double()), bits.double())
    found = scored(layer.float(), hidden, bits)
    error = (found.double() - truth).abs() / truth.abs()
    assert float(error.max()) < 1e-5  # logits are off by some 1e-7 of their size


def test_one_particle_of_many_does_not_spoil_the_others():
    layer, hidden, bits = particles()
    hidden[3, 1] = torch.nan
    hidden[5, 0] = 1e6
    found, truth = scored(layer, hidden, bits), log_mass(layer(hidden), bits)
    torch.testing.assert_close(found, truth, equal_nan=True)
    assert int(found.isnan().sum()) == 1


def test_values_that_are_no_bits_are_taken_as_they_are():
    layer, hidden, bits = particles()
    grey = bits * 0.7
    torch.testing.assert_close(scored(layer, hidden, grey), log_mass(layer(hidden), grey))


ACTIVATIONS = {
    "tanh": nn.Tanh(),
    "our tanh": Tanh(),
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "elu": nn.ELU(0.7),
    "silu": nn.SiLU(),
    "gelu": nn.GELU("tanh"),
    "leaky relu": nn.LeakyReLU(0.2),
    "softplus": nn.Softplus(2.0),
    "sigmoid": nn.Sigmoid(),
    "none": nn.Identity(),
    "another": nn.Hardtanh(),
    "two in a row": nn.Sequential(nn.Tanh(), nn.ReLU()),
}


def network(activation, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(3, 20, bias), activation, nn.Linear(20, 30, bias), activation, nn.Linear(30, 50, bias)
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_particles", [10, 200])  # few particles do not share a layer
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_network_gives_what_its_layers_give_one_by_one(activation, num_particles, bias, monkeypatch):
    monkeypatch.setattr(observed, "PART", 1500)
    _, hidden, bits = particles(num_particles)
    layers = network(ACTIVATIONS[activation], bias)
    torch.testing.assert_close(scored(layers, hidden, bits), log_mass(layers(hidden), bits), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [nn.Tanh(), Tanh(), nn.ELU()])
def test_a_network_in_float32_is_off_by_its_rounding_only(activation):
    _, hidden, bits = particles(2000, scale=3.0, dtype=torch.float32)
    layers = network(activation)
    truth = log_mass(layers(hidden.double()), bits.double())
    errors = [
        found.double() - truth for found in (scored(layers.float(), hidden, bits), log_mass(layers(hidden), bits))
    ]
    assert float(errors[0].abs().max()) < 1e-4  # logits of size 1 to 10, off by some 1e-7 of that, 50 of them
    assert float(errors[0].square().mean().sqrt()) < 2 * float(errors[1].square().mean().sqrt())


def test_activations_that_wait_are_not_worked_out():
    _, hidden, bits = particles()
    layers = network(nn.Tanh())
    with LinearLayers():
        first = layers[1](layers[0](hidden.flatten(0, 1)))
        logits = layers[2:](first.unflatten(0, (200, 2)))
    found = log_mass(logits, bits)
    assert type(first) is Deferred
    assert first.product.known is first.product.product.known is None
    torch.testing.assert_close(found, log_mass(layers(hidden), bits))


def test_what_is_changed_later_changes_nothing_that_was_made_of_it():
    """In the order of the program, as torch does it: neither sooner nor later."""
    _, hidden, bits = particles()
    layers = network(nn.Tanh())

    def program():
        before = layers[0](hidden)
        first = torch.tanh(before)
        logits = layers[2:](first)
        before.mul_(2)
        second = torch.tanh(before)
        first.mul_(2)
        return before + 0, first + 0, second + 0, log_mass(logits, bits)

    with LinearLayers():
        found = program()
    for mine, truth in zip(found, program(), strict=True):
        torch.testing.assert_close(mine, truth)


def test_activations_used_twice_are_worked_out_once():
    _, hidden, bits = particles()
    layers, other = network(nn.Tanh()), nn.Linear(30, 4, dtype=torch.float64)
    with LinearLayers():
        first = layers[:4](hidden)
        scale = other(first).exp()
        logits = layers[4](first)
        found = log_mass(logits, bits)
    assert type(scale) is torch.Tensor
    torch.testing.assert_close(found, log_mass(layers(hidden), bits))
    rows, left = logits.product.layers()
    assert rows.data_ptr() == first.product.known.data_ptr()
    assert len(left) == 1


@pytest.mark.parametrize("size", [1e25, 3e38, torch.inf])
def test_weights_that_cannot_be_doubled(size):
    _, hidden, bits = particles(dtype=torch.float32)
    layers = network(nn.Tanh(), dtype=torch.float32)
    layers[2].weight[:, 0] = size
    layers[4].weight[3, 5] = size
    truth = functional.logsigmoid((2 * bits - 1) * layers(hidden)).sum(-1)
    torch.testing.assert_close(scored(layers, hidden, bits), truth, equal_nan=True)
    assert not truth.isnan().all()


def test_a_particle_that_is_nan_or_far_out_behind_hidden_layers():
    _, hidden, bits = particles()
    layers = network(nn.Tanh())
    layers[4].weight.mul_(1e3)  # so unlikely that products underflow
    hidden[3, 1] = torch.nan
    hidden[5, 0] = torch.inf
    hidden[6] = -1e30
    found, truth = scored(layers, hidden, bits), log_mass(layers(hidden), bits)
    torch.testing.assert_close(found, truth, equal_nan=True)
    assert int(found.isnan().sum()) == int(truth.isnan().sum()) >= 1
