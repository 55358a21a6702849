"""Every check of the contract fails for a pair that was built to fail it, and for nothing else."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import build, cases, parameters, random_data, same
from torch import nn

import pyro_vae as pv
from pyro_vae.testing import CHECKS, PairError, check_pair

BATCH = pv.Batch(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
SHIPPED = [case for case in cases((4, 4)) if case[0] in ("VAE", "CVAE", "LadderVAE", "GaussianMixture")]


class Toy(nn.Module):
    """A linear Gaussian model and its guide, right in all things; the pairs below break one each."""

    def __init__(self, dim=1):
        super().__init__()
        self.dim, self.loc, self.decoder = dim, nn.Linear(3, dim), nn.Linear(dim, 3)
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def law(self, obs):
        return dist.Normal(self.loc(obs), self.log_scale.exp()).to_event(1)

    def likelihood(self, z):
        return dist.Normal(self.decoder(z), 1.0).to_event(1)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
            pyro.sample("obs", self.likelihood(z), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.law(obs))


class Raises(Toy):
    def law(self, obs):
        raise RuntimeError("out of luck")


class TwoSites(Toy):
    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.law(obs))
            pyro.sample("extra", dist.Normal(self.log_scale[0], 1.0))


class NoPlate(Toy):
    def guide(self, obs):
        pyro.sample("z", self.law(obs).to_event(1))


class OtherPlate(Toy):
    def guide(self, obs):
        with pyro.plate("images", len(obs), dim=-1):
            pyro.sample("z", self.law(obs))


class Scaled(Toy):
    def model(self, obs):
        with pyro.poutine.scale(scale=2.0):
            super().model(obs)


class DetachedNormal(dist.Normal):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).detach()


class Detached(Toy):
    def law(self, obs):
        return DetachedNormal(self.loc(obs), self.log_scale.exp()).to_event(1)


class Unused(Toy):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(3, 1)


class Infinite(Toy):
    def law(self, obs):  # √0 has the value 0 and the slope infinity
        return dist.Normal(self.loc(obs) + (self.log_scale - self.log_scale).abs().sqrt(), 1.0).to_event(1)


class Dropped(Toy):
    def law(self, obs):
        return dist.Normal(self.loc(nn.functional.dropout(obs, 0.5, self.training)), self.log_scale.exp()).to_event(1)


class Normed(Toy):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def law(self, obs):
        return dist.Normal(self.norm(self.loc(obs)), self.log_scale.exp()).to_event(1)


class Centred(Toy):
    def law(self, obs):
        return super().law(obs - obs.mean(0))


class Flat(Toy):
    """Runs on tiled data only."""

    def likelihood(self, z):
        return super().likelihood(z.view(-1, self.dim))


class NoTiles(Toy):
    """Holds rows for at most nine data, and takes no outer plate."""

    def law(self, obs):
        return dist.Normal(self.loc(obs) + torch.zeros(9, 1)[: len(obs)], self.log_scale.exp()).to_event(1)

    def likelihood(self, z):
        if z.ndim > 2:
            raise RuntimeError("no outer plates here")
        return super().likelihood(z)


class HalfNormalised(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + math.log(2)  # as a folded normal would have it


class Folded(Toy):
    def law(self, obs):
        return HalfNormalised(self.loc(obs), self.log_scale.exp()).to_event(1)


class HalfForgotten(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) - math.log(2)


class Thinned(Toy):
    def law(self, obs):
        return HalfForgotten(self.loc(obs), self.log_scale.exp()).to_event(1)


class WideDraws(dist.Normal):
    def rsample(self, sample_shape=()):
        return self.loc + 2 * (super().rsample(sample_shape) - self.loc)


class Mismatched(Toy):
    """A density, and draws from another one."""

    def law(self, obs):
        return WideDraws(self.loc(obs), self.log_scale.exp()).to_event(1)


GENERATOR = torch.Generator().manual_seed(0)


class PrivateNormal(dist.Normal):
    def rsample(self, sample_shape=()):
        return self.loc + self.scale * torch.randn(self._extended_shape(sample_shape), generator=GENERATOR)


class Private(Toy):
    def law(self, obs):
        return PrivateNormal(self.loc(obs), self.log_scale.exp()).to_event(1)


class Reseeding(Toy):
    def law(self, obs):
        torch.manual_seed(0)
        return super().law(obs)


class Numpy(Toy):
    def law(self, obs):
        np.random.rand()  # noqa: NPY002 (the global state is the point)
        return super().law(obs)


class Counting(Toy):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def law(self, obs):
        self.calls += 1
        return super().law(obs)


class Stored(Toy):
    def law(self, obs):
        return dist.Normal(self.loc(obs), self.log_scale.exp() * pyro.param("scale", torch.ones(()))).to_event(1)


class WholeNumber(Toy):
    """A discrete latent of two states."""

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("obs", self.likelihood(z[..., None]), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.loc(obs)[..., 0] + self.log_scale))


class Positive(Toy):
    """A latent on the half line: the grid needs the Jacobian of its bijection."""

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Gamma(torch.ones(self.dim), 1.0).to_event(1))
            pyro.sample("obs", self.likelihood(z), obs=obs)

    def law(self, obs):
        return dist.Gamma(2 + self.loc(obs).exp(), self.log_scale.exp()).to_event(1)


class Correlated(Toy):
    def law(self, obs):
        tril = torch.tensor([[1.0, 0.0], [3.0, 0.1]])  # correlation 0.999
        return dist.MultivariateNormal(self.loc(obs), scale_tril=tril * self.log_scale.exp())


class OwnDrawsOnly(dist.Normal):
    drawn = None

    def log_prob(self, value):
        if value is not self.drawn:
            raise NotImplementedError("no inverse")
        return super().log_prob(value)

    def rsample(self, sample_shape=()):
        self.drawn = super().rsample(sample_shape)
        return self.drawn


class NoDensity(Toy):
    def law(self, obs):
        return OwnDrawsOnly(self.loc(obs), self.log_scale.exp()).to_event(1)


BROKEN = [
    ("runs", Raises, {}, "RuntimeError: out of luck"),
    ("latent sites", TwoSites, {}, r"guide: \['extra', 'z'\]"),
    ("per datum", NoPlate, {}, "'z' of the guide .* in no plate"),
    ("per datum", OtherPlate, {}, "the plate 'images'"),
    ("unscaled", Scaled, {}, "'obs' of the model has scale 2"),
    ("reparameterised", Detached, {}, "no gradient"),
    ("gradients", Unused, {}, "no gradient for Unused.forgotten.weight, Unused.forgotten.bias"),
    ("gradients", Infinite, {}, "not finite for Infinite.log_scale"),
    ("alone", Dropped, {}, r"log q\(z \| x\) in training mode"),
    ("alone", Normed, {}, "training mode of one datum: Expected more than 1 value"),
    ("alone", Centred, {}, "evaluation mode"),
    ("particles", NoTiles, {}, "RuntimeError"),
    ("normalised", Folded, {"dim": 1}, r"2\.0000 ± 0\.0010 on a grid"),
    ("normalised", Folded, {"dim": 2}, r"4\.0000 ± 0\.0010 on a grid"),
    ("normalised", Folded, {"dim": 4}, "by sampling"),
    ("normalised", Folded, {"dim": 16}, r"2\.0000 .* by sampling"),  # q/m = 2 everywhere, its largest value
    ("normalised", Thinned, {"dim": 16}, r"0\.0000 .* by sampling"),
    ("normalised", Mismatched, {"dim": 1}, r"1\.0000 ± 0\.0010 on a grid .*, 0\.8.* by sampling"),
    ("same seed", Private, {}, "'z' differ"),
    ("random state", Reseeding, {}, "torch, which was given a seed"),
    ("random state", Numpy, {}, "numpy"),
    ("state", Counting, {}, "Counting.calls"),
    ("state", Stored, {}, "'scale' entered Pyro's global store"),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize(("name", "toy", "options", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_a_pair_that_was_built_to_fail_one_check_fails_it_alone(name, toy, options, message):
    with pytest.raises(PairError, match=message) as caught:
        check_pair(toy(**options), data=BATCH)
    assert [check.name for check in caught.value.report.failed] == [name]


def test_every_check_has_a_pair_that_fails_it():
    assert {name for name, *_ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize("toy", [Toy, Flat, WholeNumber, Positive, NoDensity, Correlated])
def test_right_pairs_pass(toy):
    report = check_pair(toy(2) if toy is Correlated else toy(), data=BATCH)
    assert not report.failed
    assert str(report).endswith(f"{len(report.passed)} passed, 0 failed, {len(report.skipped)} skipped")


@pytest.mark.parametrize("case", SHIPPED, ids=lambda case: "-".join(map(str, case)))
def test_shipped_models_pass_and_only_latents_that_are_not_there_are_skipped(case):
    report = check_pair(build(case), data=random_data(case))
    assert {check.name: check.detail for check in report.skipped} == (
        dict.fromkeys(("reparameterised", "normalised"), "no latent sites") if case[0] == "GaussianMixture" else {}
    )


def test_what_cannot_be_checked_says_why():
    def detail(toy, name):
        return next(check.detail for check in check_pair(toy(), data=BATCH).checks if check.name == name)

    assert "no rsample at 'z' (Bernoulli)" in detail(WholeNumber, "reparameterised")
    assert "sum over 2 states" in detail(WholeNumber, "normalised")
    assert "NotImplementedError: no inverse" in detail(NoDensity, "normalised")
    assert "log q(z | x) has no value at given z" in detail(NoDensity, "alone")
    assert "on tiled data" in detail(Flat, "particles")
    assert "under an outer plate" in detail(Toy, "particles")


def test_all_failures_are_listed_or_reported():
    class Both(Scaled, Counting):
        pass

    with pytest.raises(PairError, match=r"(?s)2 of 12 checks.*- unscaled: .*- state: ") as caught:
        check_pair(Both(), data=BATCH)
    report = check_pair(Both(), data=BATCH, raise_on_failure=False)
    assert str(report) == str(caught.value.report)


def test_a_guide_in_place_of_the_models_own_excuses_what_it_replaced_and_nothing_else():
    model, other = Toy(), Toy()
    report = check_pair(model, other.guide, data=BATCH, raise_on_failure=False)
    found = next(check for check in report.checks if check.name == "gradients")
    assert (found.outcome, "Toy.decoder" in found.detail) == ("failed", True)  # the other's decoder decodes nothing
    assert "Toy.loc" not in found.detail  # of `model`, whose guide was replaced


@pytest.mark.parametrize("toy", [Counting, Normed, Stored, Reseeding])
def test_the_pair_and_the_random_state_are_left_as_they_were(toy):
    pair = toy().train()
    before, buffers, state = parameters(pair), dict(pair.named_buffers()), torch.get_rng_state()
    held = {name: value.clone() for name, value in buffers.items()}
    check_pair(pair, data=BATCH, raise_on_failure=False)
    assert same(parameters(pair), before)
    assert same(dict(pair.named_buffers()), held)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in pair.modules())
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert len(pyro.get_param_store()) == 0


def test_one_datum_cannot_be_told_from_its_batch():
    with pytest.raises(ValueError, match="at least 2 data"):
        check_pair(Toy(), data=pv.Batch(torch.zeros(1, 3)))
