"""Latents as unconstrained vectors: there and back, Jacobians against autograd, sums over discrete states."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, TwoModes

from pyro_vae import traces
from pyro_vae.latents import Latents

LAWS = {
    "real": dist.Normal(torch.zeros(3).double(), 1.0).to_event(1),
    "positive": dist.Gamma(torch.full((), 2.0).double(), 1.0),
    "interval": dist.Beta(torch.full((2,), 2.0).double(), 3.0).to_event(1),
    "simplex": dist.Dirichlet(torch.ones(4).double()),
    "matrix": dist.Normal(torch.zeros(2, 3).double(), 1.0).to_event(2),
}


def program(law):
    def run(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", law)
            pyro.sample("obs", dist.Normal(torch.zeros(()).double(), 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", law)

    return traces.Pair(run, guide)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", LAWS)
def test_there_and_back_and_the_jacobian_by_autograd(name, tiled):
    args = (torch.zeros(4, dtype=torch.float64),)
    torch.manual_seed(0)
    latents = Latents(program(LAWS[name]), args, tiled)
    u = latents.draw_guide(args, 3)
    assert u.shape == (3, 4, latents.dim)
    values, log_det = latents.unpack(u)
    assert torch.allclose(latents.pack(values, 3, 4), u, atol=1e-9)
    transform = latents.sites[0].transform

    def free(row):  # without the last of a simplex, which the others fix
        value = transform(row.reshape(latents.sites[0].free))
        return value[:-1] if name == "simplex" else value.reshape(-1)

    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(free, u[k, 1])
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_det[k, 1]), abs=1e-9)


@pytest.mark.parametrize("tiled", [False, True])
def test_densities_are_those_of_the_programs(tiled):
    """With the exact posterior as guide, log joint - log guide is log p(x) at any draw."""
    pair = LinearGaussian(5, 2)
    args = (pair.draw(4),)
    torch.manual_seed(0)
    latents = Latents(traces.Pair(pair.model, pair.guide), args, tiled)
    for u in (latents.draw_guide(args, 3), latents.draw_prior(args, 3)):
        gap = latents.log_joint(args, u) - latents.log_guide(args, u)
        assert torch.allclose(gap, pair.log_prob(args[0]).expand(3, 4), atol=1e-9)
        prior, joint = latents.log_prior_and_joint(args, u)
        assert torch.allclose(joint, latents.log_joint(args, u), atol=1e-12)
        standard = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        assert torch.allclose(prior, standard.log_prob(u), atol=1e-9)


def test_draws_of_the_prior_and_posterior_pack_alike():
    pair = LinearGaussian(5, 2)
    args = (pair.draw(4),)
    latents = Latents(traces.Pair(pair.model, pair.guide), args, tiled=False)
    torch.manual_seed(0)
    values = traces.simulate(traces.Pair(pair.model, pair.guide), args)
    assert torch.equal(latents.pack_one(values, 4), values["z"])


def test_a_mixture_prior_lives_where_its_components_do():
    pair = TwoModes()
    latents = Latents(traces.Pair(pair.model, pair.guide), (pair.draw(3),), tiled=False)
    assert latents.dim == 2


def discrete(law):
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("k", law)
            pyro.sample("obs", dist.Normal(torch.zeros(()), 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("k", law)

    return traces.Pair(model, guide)


@pytest.mark.parametrize(
    ("law", "states"),
    [
        (dist.Categorical(torch.ones(5)), 5),
        (dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), 8),
        (dist.OneHotCategorical(torch.ones(4)), 4),
        (dist.Binomial(6, torch.tensor(0.5)), 7),
    ],
    ids=["categorical", "bits", "one-hot", "binomial"],
)
def test_the_masses_of_all_states_sum_to_one(law, states):
    """log p(x) = log N(x; 0, 1), since x does not depend on the state."""
    args = (torch.tensor([0.0, 1.0, 2.0]),)
    latents = Latents(discrete(law), args, tiled=True)
    assert latents.num_states == states
    truth = -args[0].square() / 2 - math.log(2 * math.pi) / 2
    assert torch.allclose(latents.log_evidence(args), truth.double(), atol=1e-6)


def test_what_cannot_be_summed_out_is_refused():
    args = (torch.zeros(3),)
    with pytest.raises(ValueError, match=r"has 2\^20 states, too many"):
        Latents(discrete(dist.Bernoulli(torch.full((20,), 0.5)).to_event(1)), args, tiled=True)
    with pytest.raises(ValueError, match="law Poisson has no finite support"):
        Latents(discrete(dist.Poisson(torch.tensor(2.0))), args, tiled=True)
    pair = LinearGaussian(3, 2)
    latents = Latents(traces.Pair(pair.model, pair.guide), (pair.draw(3),), tiled=True)
    with pytest.raises(ValueError, match=r"latents \['z'\] are continuous and cannot be enumerated"):
        latents.log_evidence((pair.draw(3),))
