"""A VAE and its `Reduced` pair, of notebooks/latent_dimension.py: one p(x), and one law of u = Q'z given x."""

import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

import pyro_vae as pv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
from fewer_latents import Reduced


@pytest.fixture
def vae():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = pv.models.VAE(pv.Binary((3, 3)), latent_dim=12, hidden_dims=(4, 4)).double()
        for parameter in made.decoder.parameters():
            parameter.data *= 1.5  # latents that matter
    return made.requires_grad_(False)


def test_the_decoder_sees_no_more_of_z_than_u(vae):
    reduced = Reduced(vae)
    z = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = reduced.rest(z @ reduced.q @ reduced.r + reduced.bias).unflatten(-1, vae.decoder.out_shape)
    torch.testing.assert_close(params, vae.decoder(z))
    torch.testing.assert_close(reduced.q.T @ reduced.q, torch.eye(4, dtype=torch.float64))  # so that u is N(0, I)


def test_both_have_one_log_likelihood(vae):
    obs = torch.bernoulli(torch.full((20, 3, 3), 0.5, dtype=torch.float64), generator=torch.Generator().manual_seed(1))
    estimator, reduced = pv.importance_sampling(20_000), Reduced(vae)
    whole = pv.log_likelihood(vae, pv.Batch(obs), estimator=estimator, seed=0)
    fewer = pv.log_likelihood(reduced.model, pv.Batch(obs), guide=reduced.guide, estimator=estimator, seed=1)
    error = np.sqrt(whole.variance + fewer.variance)
    assert np.all(error < 0.05)
    assert np.all(np.abs(whole.log_prob - fewer.log_prob) < 4.5 * error)  # 20 data at once


def test_guide_is_the_law_of_u_under_the_guide_of_z(vae):
    obs = torch.ones(1, 3, 3, dtype=torch.float64)
    reduced = Reduced(vae)
    law = vae.posterior(vae.hidden(obs))
    z = law.sample((50_000,))[:, 0] @ reduced.q
    found = pyro.poutine.trace(reduced.guide).get_trace(obs).nodes["u"]["fn"]
    spread = found.covariance_matrix[0].diagonal().sqrt()
    assert torch.all((z.mean(0) - found.mean[0]).abs() < 4.5 * spread / len(z) ** 0.5)
    torch.testing.assert_close(
        z.T.cov(), found.covariance_matrix[0], atol=0.03, rtol=0
    )  # 4 √2/√50,000 of a variance of 1
