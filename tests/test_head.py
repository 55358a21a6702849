"""Layers that wait for what is done with them give what layers give, whatever is done with them."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae.estimators import head
from pyro_vae.estimators.head import Deferred, LinearLayers
from pyro_vae.independent import bernoulli_pixels, log_mass

LAYER = nn.Linear(3, 12, dtype=torch.float64)
HIDDEN = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BITS = torch.bernoulli(torch.full((4, 12), 0.3, dtype=torch.float64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def every_layer_waits(monkeypatch):
    monkeypatch.setattr(head, "SMALLEST", 0)
    with torch.no_grad():
        yield


def waiting(layer=LAYER, hidden=HIDDEN):
    with LinearLayers():
        logits = layer(hidden)
    assert type(logits) is Deferred
    return logits


@pytest.mark.parametrize("part", [1, 48, 100, 10**9])
@pytest.mark.parametrize("event_shape", [(12,), (3, 4), (1, 2, 6)])
def test_pixels_of_a_waiting_layer_are_those_of_its_numbers(part, event_shape, monkeypatch):
    monkeypatch.setattr(head, "PART", part)
    bits = BITS.unflatten(-1, event_shape)
    logits = waiting()
    law = bernoulli_pixels(logits.unflatten(-1, event_shape), len(event_shape)).expand((5, 4))
    truth = bernoulli_pixels(LAYER(HIDDEN).unflatten(-1, event_shape), len(event_shape))
    torch.testing.assert_close(law.log_prob(bits), truth.log_prob(bits))
    assert logits.product.known is None  # nothing was multiplied out


@pytest.mark.parametrize("lead", [(), (1,), (4,), (1, 4), (2, 5, 4)])
def test_any_leading_shape(lead):
    hidden = torch.randn(*lead, 3, dtype=torch.float64)
    bits = BITS[: lead[-1]] if lead else BITS[0]
    with LinearLayers():
        found = log_mass(LAYER(hidden), bits)
    assert found.shape == torch.Size(lead)
    torch.testing.assert_close(found, log_mass(LAYER(hidden), bits))


USES = {
    "arithmetic": lambda logits: 2 * logits + 1,
    "in place": lambda logits: logits.mul_(2),
    "a method": lambda logits: logits.exp(),
    "a function": torch.sin,
    "an activation": lambda logits: torch.sigmoid(logits) + 1,
    "an activation in place": lambda logits: functional.elu(logits, 1.0, True),
    "its own gate": lambda logits: logits * torch.sigmoid(logits),
    "a named argument": lambda logits: torch.sum(input=logits, dim=-1),
    "two of them": lambda logits: torch.cat([logits, logits], -1),
    "an index": lambda logits: logits[1:3, :, 0],
    "numbers": lambda logits: torch.tensor(logits.tolist(), dtype=torch.float64),
    "another order": lambda logits: logits.transpose(0, 1).flatten(),
    "copies": lambda logits: logits.unsqueeze(0).expand(2, 5, 4, 12),
    "a view, then a sum": lambda logits: logits.flatten(0, 1).view(5, 4, 3, 4).sum(-1),
    "another layer": lambda logits: functional.linear(logits, torch.ones(2, 12, dtype=torch.float64)),
    "a law of another kind": lambda logits: dist.Categorical(logits=logits).log_prob(torch.tensor(3)),
    "pixels in other rows": lambda logits: log_mass(logits.reshape(10, 24), torch.ones(24, dtype=torch.float64)),
    "pixels with more data": lambda logits: log_mass(logits, torch.ones(2, 1, 1, 12, dtype=torch.float64)),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_else_is_done_is_done_with_the_numbers(use):
    found = USES[use](waiting())
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, USES[use](LAYER(HIDDEN)))


CHANGES = {  # of logits, or of what they are made of, before they are scored
    "in place": lambda logits, hidden: logits.mul_(2),
    "an entry": lambda logits, hidden: logits.__setitem__((..., slice(3)), -4.0),
    "an entry of a view": lambda logits, hidden: logits.unflatten(-1, (3, 4)).__setitem__((..., 0), -4.0),
    "bounds": lambda logits, hidden: logits.clamp_(-1, 1),
    "the input": lambda logits, hidden: hidden.relu_(),
    "the input, by a function": lambda logits, hidden: functional.relu(hidden, inplace=True),
    "the input, by a flag": lambda logits, hidden: functional.relu(hidden, True),
    "the input, as an output": lambda logits, hidden: torch.mul(hidden, 2, out=hidden),
    "the input, by an operator": lambda logits, hidden: hidden.__imul__(2),
    "the input, by data": lambda logits, hidden: hidden.copy_(torch.zeros_like(hidden)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_place_is_scored_as_changed(change):
    found = []
    for smallest in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "SMALLEST", smallest)
            hidden = HIDDEN.clone()
            with LinearLayers():
                logits = LAYER(hidden)
                CHANGES[change](logits, hidden)
                found.append(bernoulli_pixels(logits, 1).log_prob(BITS))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "one row of weights", "two types"])
def test_layers_of_other_types_do_not_wait(how):
    hidden, layer = HIDDEN.float(), copy.deepcopy(LAYER).float()
    with LinearLayers(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        if how == "one row of weights":
            logits = functional.linear(hidden, layer.weight[0])
            assert logits.shape == hidden.shape[:-1]
        elif how == "two types":
            with pytest.raises(RuntimeError, match="dtype"):  # torch's own
                functional.linear(hidden.double(), layer.weight)
            return
        else:
            logits = layer.bfloat16()(hidden.bfloat16()) if how == "bfloat16" else layer(hidden)
    assert type(logits) is torch.Tensor


def test_facts_are_known_without_multiplying():
    logits = waiting()
    assert (logits.shape, logits.ndim, logits.numel(), logits.dtype) == ((5, 4, 12), 3, 240, torch.float64)
    assert logits.size(-1) == 12
    assert logits.device.type == "cpu"
    assert not logits.requires_grad
    assert logits.product.known is None


def test_nothing_waits_where_gradients_are_recorded():
    with torch.enable_grad(), LinearLayers():
        assert LAYER(HIDDEN).requires_grad


def test_a_pair_of_the_users_own_gives_the_same_digits(monkeypatch):
    """Categorical pixels and a decoder that calls `linear` itself, with a layer behind a layer."""
    weights = [torch.randn(size, generator=torch.Generator().manual_seed(size[0])) for size in ((4, 2), (12, 4))]
    obs = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(0)).float()

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = functional.linear(functional.linear(z, weights[0]), weight=weights[1]).unflatten(-1, (4, 3))
            pyro.sample("obs", dist.Categorical(logits=logits).to_event(1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs[:, :2] - 1, 1.0).to_event(1))

    batch = pv.Batch(obs, space=pv.Quantized((4,), levels=3))
    results = []
    for smallest in (0, 10**9):
        monkeypatch.setattr(head, "SMALLEST", smallest)
        results.append(pv.log_likelihood(model, batch, guide=guide, estimator=pv.importance_sampling(300)))
    assert (results[0].log_prob == results[1].log_prob).all()


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_vae_is_scored_as_before(network, monkeypatch):
    model = pv.models.VAE(pv.Binary((8, 8)), latent_dim=3, hidden_dims=(16,), network=network)
    obs = torch.bernoulli(torch.full((5, 8, 8), 0.3), generator=torch.Generator().manual_seed(0))
    results = []
    for smallest in (0, 10**9):
        monkeypatch.setattr(head, "SMALLEST", smallest)
        results.append(pv.log_likelihood(model, pv.Batch(obs), estimator=pv.importance_sampling(300), device="cpu"))
    # float32 sums of 64 pixels
    torch.testing.assert_close(*(torch.from_numpy(each.log_prob) for each in results), rtol=0, atol=1e-5)


def test_an_input_that_is_changed_later_is_an_error():
    hidden = HIDDEN.clone()
    logits = waiting(hidden=hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after it; change a copy instead"):
        log_mass(logits, BITS)
