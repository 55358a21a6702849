"""The estimator against values that are known: closed forms, quadrature, the laws of the weights."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, quadrature_log_prob
from scipy import stats

import pyro_vae as pv
from pyro_vae import traces

NUM_REPEATS = 400
BAND = (0.914, 0.986)  # 99.9% binomial band of 400 repeats at 95%


def score(oracle, obs, num_particles, seed=0, **settings):
    estimator = pv.importance_sampling(num_particles, **settings)
    return pv.log_likelihood(oracle.model, pv.Batch(obs), guide=oracle.guide, estimator=estimator, seed=seed)


def test_exact_guide_makes_all_weights_equal():
    oracle = LinearGaussian(12, 5)
    obs = oracle.draw(7)
    torch.manual_seed(0)
    weights = traces.log_weights(traces.as_pair(oracle.model, oracle.guide), (obs,), 50)
    assert float(weights.std(0).max()) < 1e-9
    np.testing.assert_allclose(weights[0], oracle.log_prob(obs), atol=1e-9)


def test_exact_guide_gives_the_exact_value_and_no_error():
    oracle = LinearGaussian(12, 5)
    obs = oracle.draw(7)
    result = score(oracle, obs, 100)
    np.testing.assert_allclose(result.log_prob, oracle.log_prob(obs), atol=1e-9)
    assert result.mc_se < 1e-9
    np.testing.assert_allclose(result.ess, 100)
    assert np.all(result.khat == -math.inf)


def test_mean_field_gap_is_the_kl_of_the_best_diagonal_guide():
    oracle = LinearGaussian(8, 4, guide="mean_field")
    obs = oracle.draw(3)
    torch.manual_seed(0)
    weights = traces.log_weights(traces.as_pair(oracle.model, oracle.guide), (obs,), 20_000)
    gap = oracle.log_prob(obs) - weights.mean(0)
    error = weights.std(0) / math.sqrt(len(weights))
    assert oracle.mean_field_gap() > 0.3  # a gap worth the name
    assert torch.all((gap - oracle.mean_field_gap()).abs() < 4 * error)


@pytest.mark.parametrize("widen", [1.3, 2.0])
def test_variance_of_weights_gaussian_against_gaussian(widen):
    oracle = LinearGaussian(8, 4, widen=widen)
    obs = oracle.draw(200)
    num_particles = 2000
    result = score(oracle, obs, num_particles)
    truth = (oracle.relative_second_moment() - 1) / num_particles
    error = result.variance.std() / math.sqrt(len(obs))
    # the delta method's own bias is of relative order 1/K
    assert abs(result.variance.mean() - truth) < 4 * error + truth * 10 / num_particles


@pytest.mark.parametrize("widen", [0.25, 0.4, 0.6])
def test_khat_against_the_tail_index(widen):
    oracle = LinearGaussian(6, 2, widen=widen)
    result = score(oracle, oracle.draw(30), 10_000)
    # METHODS: within 0.2 at K = 10^4; the prior of the fit pulls to 0.5
    assert abs(np.median(result.khat) - oracle.tail_index()) < 0.2


def test_khat_of_a_guide_that_is_too_wide_is_low():
    oracle = LinearGaussian(6, 2, widen=2.0)
    assert np.max(score(oracle, oracle.draw(30), 10_000).khat) < 0.7


def test_estimate_of_p_is_unbiased():
    oracle = LinearGaussian(6, 2, guide="mean_field", widen=1.5)
    obs = oracle.draw(1).expand(2000, -1).contiguous()  # one datum, 2000 repeats
    result = score(oracle, obs, 20)
    ratio = np.exp(result.log_prob - float(oracle.log_prob(obs[0])))
    assert abs(stats.ttest_1samp(ratio, 1).statistic) < 4


def test_log_estimate_is_low_by_half_its_variance_and_the_jackknife_mends_it():
    oracle = LinearGaussian(6, 2, guide="mean_field", widen=2.5)
    obs = oracle.draw(1).expand(4000, -1).contiguous()
    truth = float(oracle.log_prob(obs[0]))
    plain, mended = score(oracle, obs, 20), score(oracle, obs, 20, jackknife=True)
    error = plain.log_prob.std() / math.sqrt(len(obs))
    assert plain.direction == "lower"
    assert truth - plain.mean > 4 * error  # low, beyond doubt
    # the leading term; the next ones are of relative order s²
    assert abs(truth - plain.mean - plain.log_prob.var() / 2) < 4 * error + plain.log_prob.var() ** 2
    assert mended.direction == "unbiased"
    assert abs(truth - mended.mean) < 4 * mended.log_prob.std() / math.sqrt(len(obs))


def test_coverage_of_the_delta_interval_where_khat_is_low():
    oracle = LinearGaussian(6, 2, guide="mean_field", widen=1.5)
    obs = oracle.draw(NUM_REPEATS, seed=3)
    result = score(oracle, obs, 500)
    error = np.abs(result.log_prob - oracle.log_prob(obs).numpy())
    coverage = np.mean(error < 1.96 * np.sqrt(result.variance))
    assert oracle.tail_index() < 0.3
    assert BAND[0] <= coverage <= BAND[1]


def test_vae_with_two_latents_against_quadrature():
    torch.manual_seed(1)
    space = pv.Binary((3, 3))
    vae = pv.models.VAE(space, latent_dim=2, hidden_dims=(16, 16)).double()
    for parameter in vae.decoder.parameters():
        parameter.data *= 1.5  # far enough from linear that the posterior is no Gaussian
    obs = torch.bernoulli(torch.full((20, 3, 3), 0.5, dtype=torch.float64))
    truth = quadrature_log_prob(vae, obs)
    assert torch.all((truth - quadrature_log_prob(vae, obs, num=321)).abs() < 1e-6)
    result = pv.log_likelihood(vae, pv.Batch(obs), estimator=pv.importance_sampling(20_000))
    error = np.sqrt(result.variance)
    assert np.all(np.abs(result.log_prob - truth.numpy()) < 4.5 * error + result.variance)  # 20 data at once


def test_linear_gaussian_cvae():
    torch.manual_seed(0)
    num_dims, context_dim, latent_dim = 5, 3, 2
    a, w = torch.randn(num_dims, context_dim), torch.randn(num_dims, latent_dim)
    noise = 0.5

    def model(obs, context):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z @ w.T + context @ a.T, noise).to_event(1), obs=obs)

    def guide(obs, context):
        precision = torch.eye(latent_dim) + w.T @ w / noise**2
        mean = (obs - context @ a.T) @ w @ torch.linalg.inv(precision) / noise**2
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision / 1.4))

    context, obs = torch.randn(40, context_dim), torch.randn(40, num_dims)
    law = torch.distributions.MultivariateNormal(context @ a.T, w @ w.T + noise**2 * torch.eye(num_dims))
    result = pv.log_likelihood(model, pv.Batch(obs, context), guide=guide, estimator=pv.importance_sampling(4000))
    error = np.abs(result.log_prob - law.log_prob(obs).numpy())
    assert np.all(error < 4.5 * np.sqrt(result.variance) + 1e-4)  # 40 data at once; float32
    assert result.quantity == "log p(x | context)"


def test_a_mode_that_the_guide_never_visits_is_lost_without_a_sign():
    """The silent failure: low by log 2, k-hat fine. The result says lower, and no more can be seen from inside."""

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 5.0))
            pyro.sample("obs", dist.Normal(z.abs(), 0.1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs, 0.12))

    obs = torch.full((50,), 4.0)
    truth = math.log(2) + stats.norm(0, math.hypot(5.0, 0.1)).logpdf(4.0)  # both modes; overlap below 1e-300
    result = pv.log_likelihood(model, pv.Batch(obs), guide=guide, estimator=pv.importance_sampling(5000))
    assert result.direction == "lower"
    assert truth - result.mean == pytest.approx(math.log(2), abs=0.01)  # MC error of the mean is below 0.001
    assert np.mean(result.khat < 0.7) == 1.0
