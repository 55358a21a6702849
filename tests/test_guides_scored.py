"""Every family under every estimator: log p(x) of a model with two latents, by quadrature."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import quadrature_log_prob
from posterior_targets import tiny_options

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.estimators.sandwich import SIMULATION, _simulate
from pyro_vae.guides import family
from pyro_vae.randomness import derived_seed, own_randomness

SPACE = pv.Binary((3, 3))
ESTIMATORS = {
    "importance sampling": pv.importance_sampling(300),
    "few particles, defensive": pv.importance_sampling(8, proposal=pv.defensive()),  # fewer than data in a block
    "defensive": pv.importance_sampling(300, proposal=pv.defensive()),
    "multilevel, refined": pv.multilevel(100, proposal=pv.refined()),
    "annealing from the prior": pv.annealed_importance_sampling(10, 8, 4, "prior"),
}
NEEDS_DENSITY = ("few particles, defensive", "defensive")


@pytest.mark.parametrize("name", family.listing())
def test_every_estimator_is_right_with_it(name):
    """Mean of p-hat/p over 40 data, which is 1 but for noise: within 4 of its standard errors over the data."""
    with own_randomness(0):
        vae = pv.models.VAE(
            SPACE, latent_dim=2, hidden_dims=(8,), guide=name, guide_options=tiny_options(name)
        ).double()
    for parameter in vae.posterior.parameters():
        parameter.data.mul_(0.3)  # weights with a variance, of which 4 standard errors are an interval
    bits = torch.randint(2, (40, 3, 3), generator=torch.Generator().manual_seed(1)).double()
    batch, truth = pv.Batch(bits, space=SPACE), quadrature_log_prob(vae, bits).numpy()
    for how, estimator in ESTIMATORS.items():
        if how in NEEDS_DENSITY and not family.has_density(vae.posterior):
            with pytest.raises(ValueError, match="needs log q"):
                pv.log_likelihood(vae, batch, estimator=estimator)
            continue
        found = pv.log_likelihood(vae, batch, estimator=estimator, seed=0)
        ratio = np.exp(found.log_prob - truth)
        error = ratio.std(ddof=1) / np.sqrt(len(ratio))
        assert abs(ratio.mean() - 1) < 4 * error + 1e-6, (how, ratio.mean(), error)  # where q is nearly the posterior


def test_simulated_auxiliary_latents_follow_the_data_that_were_simulated():
    """The upper bound of a certificate needs a draw of r(a | z, x) at the simulated x, not at the real datum."""
    with own_randomness(0):
        vae = pv.models.VAE(SPACE, latent_dim=2, hidden_dims=(8,), guide="hierarchical")
    bits = torch.randint(2, (20, 3, 3), generator=torch.Generator().manual_seed(1)).float()
    pair, seed = traces.as_pair(vae), derived_seed(0, SIMULATION)
    with own_randomness(0):
        simulated, drawn = _simulate(pair, (bits,), 0)
    with own_randomness(seed):
        at_simulated = traces.simulate(pair, simulated)
    with own_randomness(seed):
        at_real = traces.simulate(pair, (bits,))
    assert torch.equal(simulated[0], at_real["obs"])
    assert torch.equal(drawn["z"], at_real["z"])
    assert torch.equal(drawn["z_auxiliary"], at_simulated["z_auxiliary"])
    assert not torch.equal(drawn["z_auxiliary"], at_real["z_auxiliary"])


def test_data_whose_law_depends_on_the_data_cannot_be_simulated():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z + obs.mean(), 1.0), obs=obs)

    with pytest.raises(ValueError, match="depends on the data themselves"):
        _simulate(traces.as_pair(model), (torch.ones(3),), 0)
