"""What single families of guides promise: closed forms, even draws of components, steps up the ELBO."""

import math
from functools import partial
from itertools import pairwise

import pyro
import pytest
import torch
from helpers import random_args
from oracles import LinearGaussian, TwoModes
from posterior_targets import CASES, NUM_DATA, LinearPair, model_with, tiny_family

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.guides.heads import diagonal_normal
from pyro_vae.guides.semi_amortized import signs


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full_covariance", {}),
        ("low_rank", {"rank": 2}),  # with a diagonal, any covariance in three dimensions
        ("householder", {"num_reflections": 3}),
    ],
)
def test_a_correlated_gaussian_posterior_is_met_to_the_digit(name, options):
    target = LinearGaussian(4, 3)
    obs = target.draw(1)
    pair = LinearPair(target, name, **options)
    pair.climb(obs)
    with torch.no_grad():
        gap = target.log_prob(obs) - pair.elbo(obs, pair.posterior(obs))
        log_weights = traces.log_weights(traces.as_pair(pair), (obs,), 5)
    assert float(gap.abs()) < 1e-8  # nats: gradients of 1e-10 at an optimum where the gap is their square
    # Log weights have the variance 2 KL where q is close: 1.4e-4 is their standard deviation at that gap.
    assert torch.allclose(log_weights, target.log_prob(obs).expand(5, -1), atol=5 * 1.4e-4)


def test_the_mean_field_law_stays_at_its_gap():
    target = LinearGaussian(4, 3)
    obs = target.draw(20)  # the best law has one covariance for all, and a mean that is linear in x
    pair = LinearPair(target, "mean_field")
    pair.climb(obs)
    gap = target.log_prob(obs) - pair.elbo(obs, pair.posterior(obs)).detach()
    assert torch.allclose(gap, torch.full_like(gap, target.mean_field_gap()), atol=1e-5)  # as above


def test_more_steps_give_a_higher_elbo_up_to_the_mean_field_optimum():
    target = LinearGaussian(4, 3)
    obs = target.draw(20)
    elbos = []
    for num_steps in (0, 1, 3, 10, 300):
        pair = LinearPair(target, "semi_amortized", num_steps=num_steps, num_samples=8)
        start = pair.posterior.linear(obs).detach()
        law = diagonal_normal(pair.posterior.improve(start, partial(pair.log_joint, obs=obs)))
        elbos.append(pair.elbo(obs, law))
    for fewer, more in pairwise(elbos):
        assert bool((more > fewer).all())
    gap = target.log_prob(obs) - elbos[-1]
    assert torch.allclose(gap, torch.full_like(gap, target.mean_field_gap()), atol=1e-6)  # 300 contractions
    assert torch.allclose(law.variance, 1 / target.precision.diagonal().expand(20, -1), rtol=1e-3)


def test_the_steps_leave_no_gradient_on_the_decoder_and_the_encoder_learns_where_they_end():
    model, (obs,) = model_with("semi_amortized"), random_args(CASES["VAE"], NUM_DATA)
    log_joint = partial(model.log_joint, obs=obs)
    torch.manual_seed(0)
    values, _ = traces.draw_latents(traces.as_pair(model), (obs,), 1, tiled=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    log_joint(values["z"]).sum().backward()
    start = model.posterior.linear(model.hidden(obs)).detach()
    end = model.posterior.improve(start, log_joint).requires_grad_()
    assert bool((end != start).any(-1).all())  # every datum has moved
    torch.manual_seed(0)
    log_joint(diagonal_normal(end).rsample()).sum().backward()
    assert torch.allclose(model.posterior.linear.bias.grad, end.grad.sum(0), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize(("num_samples", "latent_dim"), [(8, 4), (2, 1), (16, 5), (4, 50)])
def test_fixed_draws_have_the_moments_of_normals(num_samples, latent_dim):
    rows = signs(3, num_samples, latent_dim)
    assert rows.shape == (3, num_samples, latent_dim)
    assert bool((rows.mean(1) == 0).all())
    covariance = rows.mT @ rows / num_samples
    assert torch.equal(covariance.diagonal(dim1=1, dim2=2), torch.ones(3, latent_dim))
    if latent_dim <= num_samples // 2:
        assert torch.equal(covariance, torch.eye(latent_dim).expand(3, -1, -1))


def test_components_are_drawn_evenly_and_each_particle_has_the_law():
    law = tiny_family("mixture", 1, 1, num_components=3)
    with torch.no_grad():
        for parameter in law.parameters():
            parameter.zero_()
        law.loc.bias.copy_(torch.tensor([0.0, 10.0, 20.0]))
        law.log_scale.bias.fill_(-3.0)  # the component can be read off the draw
    probs = torch.tensor([0.55, 0.05, 0.4], dtype=torch.float64)
    law.logits = probs.log()
    num_columns, size = 20_000, 5
    with torch.no_grad():
        draws = law.train()(torch.zeros(size, num_columns, 1, dtype=torch.float64)).rsample()
    index = (draws[..., 0] / 10).round().long()
    counts = torch.nn.functional.one_hot(index, 3).sum(0)  # (num_columns, 3)
    assert bool((counts >= (size * probs).floor()).all())
    assert bool((counts <= (size * probs).ceil()).all())
    shares = torch.nn.functional.one_hot(index, 3).double().mean(1)  # of each particle, (size, 3)
    error = (probs * (1 - probs) / num_columns).sqrt()
    assert bool(((shares - probs).abs() < 4 * error).all())  # 4 standard errors
    same_pair = (index[0] == index[1]).double().mean()  # evenly drawn, two particles meet less often than Σ π²
    assert float(same_pair) < float((probs**2).sum())


def test_even_components_take_the_variance_between_modes_out_of_importance_sampling():
    target = TwoModes()
    target.loadings[:, 0] = 0  # the posterior: modes of weight 1/2 each, and with diagonal covariances
    obs = target.draw(1).expand(4000, -1)  # one datum; every column is a repeat
    mixture = two_modes_guide(target, obs[:1], probs=(0.25, 0.75))

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", mixture(torch.zeros(len(obs), 1, dtype=torch.float64)))

    def ratio(tiled, training):
        mixture.train(training)
        pair = traces.Pair(target.model, guide)
        return (traces.log_weights(pair, (obs,), 8, tiled) - target.log_prob(obs)).exp().mean(0)

    even = ratio(tiled=False, training=True)
    assert torch.allclose(even, torch.ones_like(even), atol=1e-6)  # (2 * 2 + 6 * 2/3)/8; the modes do not overlap
    variance = (0.25 * (2 - 1) ** 2 + 0.75 * (2 / 3 - 1) ** 2) / 8  # of a mean of 8 independent weights 2 and 2/3
    # tiled data are rows of a single batch, without a dimension of particles; estimators evaluate
    for independent in (ratio(tiled=True, training=True), ratio(tiled=False, training=False)):
        fourth = (independent - 1).pow(4).mean()
        error = float((fourth - variance**2) / len(independent)) ** 0.5
        assert float((independent - 1).pow(2).mean()) == pytest.approx(variance, abs=4 * error)  # 4 standard errors


def two_modes_guide(target, obs, probs):
    """The two modes of the posterior of one datum, with weights `probs`, whatever the features are."""
    precision = 1 + target.loadings.pow(2).sum(0) / target.noise**2
    centers = torch.stack([target.center, -target.center])
    mixture = tiny_family("mixture", 1, 2, num_components=2)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
        mixture.loc.bias.copy_(((obs @ target.loadings / target.noise**2 + centers) / precision).flatten())
        mixture.log_scale.bias.copy_((-precision.log() / 2).repeat(2))
    mixture.logits = torch.tensor(probs, dtype=torch.float64).log()
    return mixture.requires_grad_(False)


def test_mixtures_have_finite_gradients_in_a_thousand_dimensions():
    mixture = tiny_family("mixture", 1, 1000).float()
    with torch.no_grad():
        mixture.log_scale.bias.fill_(math.log(0.01))  # densities of e^3700, far beyond any floating-point number
    mixture(torch.ones(6, 1)).rsample().pow(2).sum().backward()
    for parameter in mixture.parameters():
        assert bool(parameter.grad.isfinite().all())


def test_the_model_of_a_hierarchical_guide_has_the_marginal_of_the_model():
    model, (obs,) = model_with("hierarchical"), random_args(CASES["VAE"], 1)
    plain = model_with("mean_field")
    plain.load_state_dict({**plain.state_dict(), **{k: v for k, v in model.state_dict().items() if "decoder" in k}})
    batch = pv.Batch(obs, space=CASES["VAE"][1])
    left, right = (pv.log_likelihood(m, batch, estimator=pv.importance_sampling(20_000)) for m in (model, plain))
    error = float(left.variance[0] + right.variance[0]) ** 0.5
    assert float(left.log_prob[0]) == pytest.approx(float(right.log_prob[0]), abs=4 * error)  # 4 standard errors
