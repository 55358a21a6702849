"""The hierarchical VAE is the VAE with one layer, and has the evidence of quadrature with two."""

import math

import pyro.distributions as dist
import pytest
import torch
from helpers import random_obs
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.data import Batch
from pyro_vae.models import VAE, LadderVAE
from pyro_vae.models.ladder_vae import product
from pyro_vae.spaces import Binary, Real

both = pytest.mark.parametrize("inference", ["bottom_up", "top_down"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@both
@torch.no_grad()
def test_one_layer_with_the_weights_of_a_vae_is_that_vae(inference):
    space = Binary((3, 3))
    vae = VAE(space, latent_dim=2, hidden_dims=(8, 5))
    ladder = LadderVAE(space, latent_dims=(2,), hidden_dims=(8, 5), inference=inference)
    names = {"encoder": "encoders.0", "posterior": "posteriors.0", "decoder": "decoder"}
    state = {f"{names[key.split('.')[0]]}.{key.split('.', 1)[1]}": value for key, value in vae.state_dict().items()}
    ladder.load_state_dict(state)
    obs, z = random_obs(space, 4), torch.randn(3, 4, 2)
    log_joint = traces.log_joint(traces.as_pair(ladder), (obs,), {"z1": z}, 3, tiled=False)
    torch.testing.assert_close(log_joint, vae.log_joint(z, obs).double())  # float32 sums in another order
    log_q = traces.log_density(ladder.guide, (obs,), {"z1": z}, 3, tiled=False)
    torch.testing.assert_close(log_q, vae.posterior(vae.hidden(obs)).log_prob(z).double())


def linear_sizes(module):
    return [(each.in_features, each.out_features) for each in module.modules() if isinstance(each, torch.nn.Linear)]


def test_the_default_is_the_two_layer_model_of_the_iwae_paper():
    model = LadderVAE(Binary((28, 28)), latent_dims=(100, 50), hidden_dims=((200, 200), (100, 100)))
    assert linear_sizes(model.encoders[0]) == [(784, 200), (200, 200)]
    assert linear_sizes(model.encoders[1]) == [(100, 100), (100, 100)]
    assert linear_sizes(model.posteriors) == [(200, 2 * 100), (100, 2 * 50)]  # mean and log scale
    assert linear_sizes(model.priors[0]) == [(50, 100), (100, 100), (100, 2 * 100)]
    assert linear_sizes(model.decoder) == [(100, 200), (200, 200), (200, 784)]
    assert linear_sizes(LadderVAE(Binary((28, 28)))) == linear_sizes(model)


def two_layer_quadrature(model, obs, num=161):
    """log ∫∫ p(x | z1) p(z1 | z2) p(z2) dz1 dz2, one latent each, over a square grid; (n,), nats."""
    axis = torch.linspace(-8, 8, num, dtype=torch.float64)
    column = axis[:, None]
    log_top = dist.Normal(0.0, 1.0).log_prob(axis)
    log_middle = model.prior(1, column[:, None]).log_prob(column)  # (z2, z1)
    log_likelihood = torch.stack([model.likelihood(column).log_prob(x) for x in obs])  # (n, z1)
    log_joint = log_top[:, None] + log_middle + log_likelihood[:, None]
    return log_joint.flatten(1).logsumexp(1) + 2 * math.log(float(axis[1] - axis[0]))


@both
@torch.no_grad()
def test_two_layers_have_the_evidence_of_quadrature(inference):
    space = Real((1, 3))
    model = LadderVAE(space, latent_dims=(1, 1), hidden_dims=((6,), (5,)), inference=inference).double()
    obs = random_obs(space, 4).double()
    truth = two_layer_quadrature(model, obs)
    for estimator in (
        pv.importance_sampling(num_particles=5000, proposal=pv.defensive()),
        pv.importance_sampling(num_particles=500, proposal=pv.refined(num_steps=50)),
        pv.annealed_importance_sampling(num_steps=20, num_chains=50, num_leapfrog=3, start="prior"),
    ):
        result = pv.log_likelihood(model, Batch(obs), estimator=estimator, seed=0, device="cpu")
        error = (torch.as_tensor(result.log_prob) - truth).abs()
        assert (error < 4 * torch.as_tensor(result.variance).sqrt()).all(), result.estimator  # 4 standard errors


def test_a_product_of_gaussians_is_their_product_up_to_a_constant():
    first, second = (dist.Normal(torch.randn(4, 2), torch.rand(4, 2) + 0.1).to_event(1) for _ in range(2))
    z = torch.randn(50, 4, 2)
    ratio = product(first, second).log_prob(z) - first.log_prob(z) - second.log_prob(z)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-3)  # float32, terms up to 1e3


@torch.no_grad()
def test_the_top_down_posterior_weighs_evidence_and_prior_by_precision():
    model = LadderVAE(Real((5,)), latent_dims=(3, 2), hidden_dims=(8,), inference="top_down").double()
    obs = torch.randn(4, 5, dtype=torch.float64)
    nodes = poutine.trace(model.guide).get_trace(obs).nodes
    features = model.encoders[0](obs)
    top = model.posteriors[1](model.encoders[1](features))
    torch.testing.assert_close(nodes["z2"]["fn"].mean, top.mean)
    bottom, prior = model.posteriors[0](features), model.prior(1, nodes["z2"]["value"])
    precision = bottom.stddev**-2 + prior.stddev**-2
    mean = (bottom.mean * bottom.stddev**-2 + prior.mean * prior.stddev**-2) / precision
    law = nodes["z1"]["fn"]
    torch.testing.assert_close(law.mean, mean)  # float64 rounding
    torch.testing.assert_close(law.stddev**-2, precision)


@both
def test_five_layers_learn_and_take_particles(inference):
    space = Binary((4, 4))
    options = {"latent_dims": (6, 5, 4, 3, 2), "hidden_dims": ((8, 7), (7,), (6, 6), (5,), (4,))}
    model, obs = LadderVAE(space, inference=inference, **options), random_obs(space, 5)
    Trace_ELBO().differentiable_loss(model.model, model.guide, obs).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert bool(value.grad.isfinite().all()), name
        assert bool(value.grad.any()), name
    pair = traces.as_pair(model)
    with torch.no_grad():
        assert traces.matching_sites(pair, (obs,)) == ["z1", "z2", "z3", "z4", "z5"]
        assert traces.broadcasts(pair, (obs,))
        shapes = {name: tuple(value.shape) for name, value in traces.draw_latents(pair, (obs,), 3, False)[0].items()}
    assert shapes == {f"z{layer}": (3, 5, 7 - layer) for layer in range(1, 6)}


@torch.no_grad()
def test_training_starts_at_the_mean_image():
    space = Binary((4, 4))
    model, obs = LadderVAE(space, latent_dims=(3, 2), hidden_dims=(8,)), random_obs(space, 20)
    model.decoder.layers[-1].weight.zero_()  # what is left is the bias
    model.initialize(obs)
    expected = (obs.sum(0) + 0.5) / 21  # of bits, one half added to either count
    torch.testing.assert_close(model.likelihood(torch.randn(3)).mean, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference": "sideways"}, "inference must be 'bottom_up' or 'top_down', got 'sideways'"),
        ({"latent_dims": ()}, r"latent_dims must hold the positive whole size of at least one layer, got \(\)"),
        ({"latent_dims": 3}, "latent_dims must hold the positive whole size of at least one layer, got 3"),
        ({"latent_dims": (3, 2, 1)}, "hidden_dims must hold widths for each of the 3 layers"),
        ({"hidden_dims": ((8,), ())}, "hidden_dims must hold widths for each of the 2 layers"),
        ({"latent_dims": (3, 0)}, r"latent_dims must hold the positive whole size of .* got \(3, 0\)"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        LadderVAE(Binary((4, 4)), **{"latent_dims": (3, 2), "hidden_dims": ((8,), (8,)), **options})
