"""Priors are the laws they claim to be, train with the rest of a model, and reach log p(x) in every estimator."""

import math

import pyro.distributions as dist
import pytest
import torch
from oracles import quadrature_log_prob
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import biject_to
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.data import Batch, Data
from pyro_vae.guides import family
from pyro_vae.guides.mean_field import MeanField
from pyro_vae.models import VAE
from pyro_vae.priors import (
    PRIORS,
    Flow,
    LearnedConditional,
    Mixture,
    StandardNormal,
    VampPrior,
    make_prior,
    mixture,
)
from pyro_vae.spaces import Binary, Real

SMALL = {
    "standard": {},
    "mixture": {"num_components": 3},
    "vamp": {"num_components": 4},
    "flow": {"num_flows": 2, "hidden_dim": 8},
}
WITHOUT_DENSITY = {
    "hierarchical": "Hierarchical draws z without giving its law",
    "planar": "Planar has a density at its own draws only",
    "semi_amortized": "SemiAmortized draws z without giving its law",
}
every_prior = pytest.mark.parametrize("name", PRIORS)


class FullRank(nn.Module):
    """A family whose laws are no independent normals."""

    def __init__(self, in_dim, latent_dim):
        super().__init__()
        self.loc = nn.Linear(in_dim, latent_dim)
        self.tril = nn.Parameter(torch.eye(latent_dim) + 0.3 * torch.ones(latent_dim, latent_dim).tril(-1))

    def forward(self, features):
        return dist.MultivariateNormal(self.loc(features), scale_tril=self.tril.tril())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small_vae(name, space=None, **options):
    return VAE(space or Real((1, 3)), latent_dim=2, hidden_dims=(8,), prior=name, prior_options=SMALL[name], **options)


def laws():
    """{name: law of two latents} of every kind, at parameters away from the start, in float64."""
    shaken = [StandardNormal(2), Mixture(2, num_components=3), Flow(2, num_flows=2, hidden_dim=8)]
    vamp, conditional = VampPrior(2, (3,), num_components=4), LearnedConditional(3, 5, 2)
    families = [MeanField(3, 2), FullRank(3, 2)]
    with torch.no_grad():
        for parameter in nn.ModuleList([*shaken, vamp, conditional, *families]).double().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    found = {type(prior).__name__: prior() for prior in shaken}
    found |= {f"VampPrior of {type(each).__name__}": vamp(each) for each in families}
    return found | {"LearnedConditional": conditional(torch.ones(3, dtype=torch.float64))}


@torch.no_grad()
def test_every_density_integrates_to_one_and_its_draws_have_its_moments():
    axis = torch.arange(-30, 30, 0.2, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for name, law in laws().items():
        mass = law.log_prob(grid).exp() * 0.2**2
        # scales lie between 0.3 and 5: a sum over such a grid is exact but for tails beyond 6 scales, about 1e-8
        torch.testing.assert_close(mass.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6, msg=name)
        draws = law.sample((4000,))
        for power in (1, 2):
            error = (draws**power).mean(0) - mass @ grid**power
            assert (error.abs() < 4 * (draws**power).std(0) / math.sqrt(4000)).all(), name  # 4 standard errors


@torch.no_grad()
def test_a_mixture_is_the_sum_over_its_components():
    prior = Mixture(2, num_components=3).double()
    prior.log_scale.normal_()
    prior.logits.normal_()
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    weights, scale = prior.logits.softmax(0), prior.log_scale.exp()
    parts = zip(weights, prior.loc, scale, strict=True)
    density = sum(w * dist.Normal(m, s).log_prob(z).sum(-1).exp() for w, m, s in parts)
    torch.testing.assert_close(prior().log_prob(z), density.log(), rtol=0, atol=1e-10)  # float64 rounding


@pytest.mark.parametrize("guide", [FullRank, *(each for each in family.listing() if each not in WITHOUT_DENSITY)])
@torch.no_grad()
def test_a_vamp_prior_is_the_mean_of_the_posteriors_at_its_pseudo_inputs(guide):
    vae, z = small_vae("vamp", guide=guide).double(), torch.randn(3, 5, 2, dtype=torch.float64)
    inputs = vae.code_prior.pseudo_inputs  # of a space of real numbers, which an encoder reads as they are
    each = torch.stack([vae.posterior(vae.hidden(one)).log_prob(z).exp() for one in inputs])
    torch.testing.assert_close(vae.prior().log_prob(z), each.mean(0).log(), rtol=0, atol=1e-10)  # float64 rounding


def test_the_density_of_a_flow_is_that_of_a_change_of_variables():
    flow = Flow(3, num_flows=2, hidden_dim=8).double()
    z = flow().sample((5,))
    for one, log_prob in zip(z, flow().log_prob(z), strict=True):
        to_base = flow.flow.transform()
        log_det = torch.autograd.functional.jacobian(to_base, one).slogdet().logabsdet
        expected = dist.Normal(0.0, 1.0).log_prob(to_base(one)).sum() + log_det
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-10)  # float64 rounding


def spread_parts(dtype):
    """Components with centres 20 apart and scales from 0.02 to 7, and points near and between them."""
    loc, scale = 10 * torch.randn(6, 4), torch.randn(6, 4).mul(1.5).exp()
    z = torch.cat([loc + scale * torch.randn(3, 6, 4), 10 * torch.randn(1, 6, 4)])
    parts = dist.Normal(loc.to(dtype), scale.to(dtype)).to_event(1)
    return torch.randn(6).to(dtype), parts, z.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 0, 1e-10), (torch.float32, 1e-6, 1e-5)],  # products are in float64, only their sum is rounded
)
def test_matrix_products_lose_no_digits_where_components_lie_far_apart(dtype, rtol, atol):
    logits, parts, z = spread_parts(dtype)
    exact = dist.Normal(parts.base_dist.loc.double(), parts.base_dist.scale.double()).to_event(1)
    truth = dist.MixtureSameFamily(dist.Categorical(logits=logits.double()), exact).log_prob(z.double())
    torch.testing.assert_close(mixture(logits, parts).log_prob(z).double(), truth, rtol=rtol, atol=atol)


class LargestTensor(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_contiguous():  # an expanded one takes no memory
            self.entries = max(self.entries, made.numel())
        return made


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_no_tensor_over_particles_data_components_and_latents_is_made(name):
    vae = VAE(Binary((2, 2)), latent_dim=7, hidden_dims=(8,), prior=name, prior_options={"num_components": 30})
    with LargestTensor() as largest:
        vae.prior().log_prob(torch.randn(11, 5, 7))
    assert largest.entries == 11 * 5 * 30


def random_data(space, num=40):
    obs = space.likelihood(torch.zeros(space.num_params, *space.shape)).sample((num,))
    return Data("random", space, *(Batch(obs[part::4], space=space) for part in range(3)))


@pytest.mark.parametrize(("name", "guide"), [*((name, "mean_field") for name in PRIORS), ("vamp", FullRank)])
def test_a_fitted_model_has_the_log_likelihood_of_quadrature(name, guide):
    data = random_data(Real((1, 3)))
    vae = small_vae(name, guide=guide)
    pv.fit(vae, data, num_epochs=2, batch_size=5, seed=0, device="cpu")
    vae.double()
    test = Batch(data.test.obs[:4].double())
    truth = quadrature_log_prob(vae, test.obs)
    for estimator in (
        pv.importance_sampling(num_particles=500, proposal=pv.refined(num_steps=50)),
        pv.importance_sampling(num_particles=500, proposal=pv.defensive()),
        pv.multilevel(num_particles=500),
        pv.annealed_importance_sampling(num_steps=20, num_chains=50, num_leapfrog=3, start="prior"),
    ):
        result = pv.log_likelihood(vae, test, estimator=estimator, seed=0, device="cpu")
        error = (torch.as_tensor(result.log_prob) - truth).abs()
        # 4 standard errors; below 1e-5 the grid and the rounding of simulated posteriors are what is seen
        assert (error < 4 * torch.as_tensor(result.variance).sqrt() + 1e-5).all(), result.estimator


@every_prior
def test_gradients_reach_every_parameter_and_particles_are_independent(name):
    vae = small_vae(name)
    obs = torch.randn(5, 1, 3)
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, obs).backward()
    for parameter, value in vae.named_parameters():
        assert value.grad is not None, parameter
        assert bool(value.grad.isfinite().all()), parameter
        assert bool(value.grad.any()), parameter
    pair = traces.as_pair(vae)
    with torch.no_grad():
        assert traces.broadcasts(pair, (obs,))
        assert len(traces.simulate(pair, (obs,))["z"].unique(dim=0)) == 5


@every_prior
@torch.no_grad()
def test_a_code_may_lie_anywhere(name):
    law = small_vae(name).prior().expand((5,))
    assert law.batch_shape == (5,)
    u = torch.randn(5, 2)
    assert torch.equal(biject_to(law.support)(u), u)  # samplers move in the code itself


def test_a_vamp_prior_starts_at_training_images():
    space = Binary((3, 3))
    images = torch.arange(2.0**5)[:, None].div(2.0 ** torch.arange(9)).floor().remainder(2).view(-1, 3, 3)
    for num_components, different in ((8, 8), (40, 32)):
        vae = VAE(space, hidden_dims=(8,), prior="vamp", prior_options={"num_components": num_components})
        vae.initialize(images)
        found = vae.code_prior.pseudo_inputs.detach().unique(dim=0)
        assert len(found) == different
        assert all((image == images).flatten(1).all(1).any() for image in found)


@pytest.mark.parametrize(("guide", "reason"), WITHOUT_DENSITY.items())
def test_a_mean_of_posteriors_without_a_density_is_refused(guide, reason):
    with pytest.raises(ValueError, match=f"prior vamp .* needs the density of .* the guide {reason}"):
        small_vae("vamp", guide=guide)
    small_vae("mixture", guide=guide)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uniform", {}, "prior must be one of standard, mixture, vamp, flow, got 'uniform'"),
        ("standard", {"scale": 2}, "prior standard has no option scale; it has none"),
        ("vamp", {"shape": 2}, "prior vamp has no option shape; it has num_components"),
        ("mixture", {"num_components": 0}, "num_components must be a whole number of at least 1, got 0"),
        ("vamp", {"num_components": 2.5}, "num_components must be a whole number of at least 1, got 2.5"),
        ("flow", {"num_flows": 0}, "num_flows must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_prior(name, 2, (3,), MeanField(3, 2), options)


def test_the_names_of_a_conditional_priors_parameters_are_those_of_saved_runs():
    cvae = pv.models.CVAE(pv.Binary((3, 3)), pv.Labels((-0.7, -0.7)), latent_dim=2, hidden_dims=(8,))
    found = {name for name in cvae.state_dict() if name.startswith("prior_net")}
    assert found == {f"prior_net.{part}.{end}" for part in ("0.layers.0", "1.linear") for end in ("weight", "bias")}
