"""The contract that every file in guides/ keeps, a new one too."""

import pyro
import pytest
import torch
from helpers import build, parameters, random_args, random_data, same
from posterior_targets import CASES, NUM_DATA, carry, model_with, stretched_grid, tiny_family, tiny_options
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.guides import family
from pyro_vae.objectives import make_objective

ALL = list(family.listing())
LAWS = [name for name in ALL if "forward" in vars(family.load(name))]
DENSE = [name for name in LAWS if family.load(name).has_density]
TRANSFORMED = ["householder", "inverse_autoregressive", "planar", "spline"]
PLANE_ONLY = ["full_covariance", "inverse_autoregressive"]  # these refuse a single latent
every_family = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def weights(model, args, seed=0, num_particles=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        return traces.log_weights(traces.as_pair(model), args, num_particles)


@every_family
@pytest.mark.parametrize("kind", CASES)
def test_a_model_with_it_is_scored_the_same_twice_and_left_as_it_was(name, kind):
    model, args = model_with(name, kind), random_args(CASES[kind], NUM_DATA)
    before = parameters(model)
    batch = pv.Batch(*args, space=CASES[kind][1])
    found = [pv.log_likelihood(model, batch, estimator=pv.importance_sampling(5), marginal=False) for _ in "ab"]
    assert found[0].log_prob.shape == (NUM_DATA,)
    assert (found[0].log_prob == found[1].log_prob).all()  # the same seed
    assert (found[0].log_prob < 0).all()  # a mass; -inf and NaN are errors of the estimator
    assert same(before, parameters(model))


@every_family
def test_has_density_is_what_check_density_finds(name):
    model, args = model_with(name), random_args(CASES["VAE"], NUM_DATA)
    pair = traces.as_pair(model)
    assert traces.broadcasts(pair, args) == family.has_density(model.posterior)
    if family.has_density(model.posterior):
        traces.check_density(pair, args, "the test")
    else:
        with pytest.raises(ValueError, match="needs log q"):
            traces.check_density(pair, args, "the test")


@every_family
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_gradient_of_the_elbo_reaches_every_parameter(name, num_particles):
    model, args = model_with(name), random_args(CASES["VAE"], NUM_DATA)
    vectorize = {"vectorize_particles": num_particles > 1, "max_plate_nesting": 1}
    elbo = Trace_ELBO(num_particles=num_particles, **vectorize)
    elbo.differentiable_loss(model.model, model.guide, *args).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        assert bool((parameter.grad != 0).any()), parameter_name


@every_family
@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_fit_by_the_elbo_says_nothing_and_takes_all_particles_at_once(name, num_particles):
    model, data = model_with(name), random_data(CASES["VAE"])
    pv.fit(model, data, num_epochs=1, num_particles=num_particles, device="cpu")  # a warning is an error
    particles = {"num_particles": num_particles, "alpha": 0.5, "free_bits": 0.25}
    objective = make_objective("elbo", traces.as_pair(model), data.valid.arguments, **particles)
    assert objective.pyro_elbo.vectorize_particles == (num_particles > 1)


@every_family
def test_float64_and_a_state_dict_give_the_weights_again(name):
    args = tuple(arg.double() for arg in random_args(CASES["VAE"], NUM_DATA))
    model, other = model_with(name).double(), model_with(name, seed=1).double()
    with torch.no_grad():
        values, _ = traces.draw_latents(traces.as_pair(model), args, 2, tiled=False)
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert not torch.equal(weights(model, args), weights(other, args))
    other.load_state_dict(model.state_dict())
    assert torch.equal(weights(model, args), weights(other, args))


@pytest.mark.parametrize("name", [name for name in ALL if family.has_density(family.load(name))])
def test_the_law_of_a_datum_does_not_depend_on_the_others(name):
    model, args = model_with(name).double(), tuple(arg.double() for arg in random_args(CASES["VAE"], NUM_DATA))
    pair = traces.as_pair(model)
    with torch.no_grad():
        values, log_q = traces.draw_latents(pair, args, 2, tiled=False)
        first = {key: value[:, :1] for key, value in values.items()}
        alone = traces.log_density(pair.guide, tuple(arg[:1] for arg in args), first, 2, tiled=False)
    assert torch.allclose(alone, log_q[:, :1], atol=1e-9)  # rounding of matrix products of other sizes


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("batch_shape", [(4,), (2, 4)])
def test_a_law_has_one_row_per_datum(name, batch_shape):
    law = tiny_family(name, 5, 3)(torch.randn(*batch_shape, 5, dtype=torch.float64))
    assert (law.batch_shape, law.event_shape) == (batch_shape, (3,))
    assert law.expand((7, *batch_shape)).rsample().shape == (7, *batch_shape, 3)


@pytest.mark.parametrize("name", DENSE)
def test_the_density_integrates_to_one(name):
    law = tiny_family(name, 5, 2, scatter=0.1)(torch.randn(2, 5, dtype=torch.float64) / 2)
    z, log_area = stretched_grid()
    with torch.no_grad():
        log_mass = law.log_prob(z[:, None]) + log_area[:, None]
    # The kinks of splines cost the square of the step, 1/16, times 0.04 here; what is smooth is exact to 1e-6.
    assert torch.allclose(log_mass.logsumexp(0), torch.zeros(2, dtype=torch.float64), atol=1e-3)


def bent(z):
    """A function of two latents that no polynomial of degree two is: on those a wrong path can be right by chance."""
    return torch.sin(1.3 * z[..., 0] + 0.4) + torch.cos(z[..., 0] - 0.7 * z[..., 1])


@pytest.mark.parametrize("name", DENSE)
def test_gradients_through_the_draws_have_the_mean_of_the_integral(name):
    """∇ E_q f = ∇ ∫ q(z) f(z) dz by quadrature, in random directions of all parameters."""
    posterior = tiny_family(name, 1, 2, scatter=0.1)
    features, parameters = torch.ones(1, 1, dtype=torch.float64), list(posterior.parameters())
    num_draws, num_repeats, num_directions = 5_000, 20, 8
    directions = torch.randn(sum(p.numel() for p in parameters), num_directions, dtype=torch.float64)

    def slopes(value):
        gradient = torch.autograd.grad(value, parameters)
        return torch.cat([each.flatten() for each in gradient]) @ directions

    z, log_area = stretched_grid(num=401)
    truth = slopes((posterior(features).log_prob(z) + log_area).exp() @ bent(z))
    draws = [posterior(features).expand((num_draws, 1)).rsample() for _ in range(num_repeats)]
    found = torch.stack([slopes(bent(each).mean()) for each in draws])  # (num_repeats, num_directions)
    error = found.std(0) / num_repeats**0.5
    # 5 errors, as these come from 20 batches; the kinks of splines cost the quadrature a thousandth, as above
    assert bool(((found.mean(0) - truth).abs() < 5 * error + 1e-3 * directions.norm(dim=0)).all())


@pytest.mark.parametrize("name", TRANSFORMED)
def test_log_q_is_that_of_the_noise_less_the_log_determinant_by_autograd(name):
    posterior, features = tiny_family(name, 5, 3, scatter=0.2), torch.randn(4, 5, dtype=torch.float64)
    law = posterior(features)
    noise = law.base_dist.sample()
    log_q = law.log_prob(carry(law, noise))
    for row in range(4):  # the law of each datum alone, too
        alone = posterior(features[row : row + 1])
        jacobian = torch.autograd.functional.jacobian(lambda each, to=alone: carry(to, each)[0], noise[row : row + 1])
        expected = alone.base_dist.log_prob(noise[row : row + 1])[0] - jacobian[:, 0].slogdet()[1]
        assert torch.allclose(log_q[row], expected, atol=1e-9)  # double precision


@pytest.mark.parametrize("name", ALL)
def test_a_single_latent_works_or_is_refused(name):
    if name in PLANE_ONLY:
        with pytest.raises(ValueError, match="latent_dim of at least 2"):
            tiny_family(name, 5, 1)
    else:
        model = build(CASES["VAE"], guide=name, guide_options=tiny_options(name), latent_dim=1)
        assert bool(weights(model, random_args(CASES["VAE"], NUM_DATA)).isfinite().all())


@pytest.mark.parametrize(
    ("forward", "found"),
    [(lambda h: (h, h), "got tuple"), (lambda h: pyro.distributions.Normal(h, 1.0), r"got event shape \(\)")],
)
def test_what_is_no_law_of_a_code_is_refused_by_name(forward, found):
    class Mine(nn.Module):
        def forward(self, features):
            return forward(features[..., :2])

    model = build(CASES["VAE"], guide=Mine(), latent_dim=2)
    with pytest.raises(ValueError, match=f"forward of guide Mine must return a Pyro distribution .*{found}"):
        model.guide(*random_args(CASES["VAE"], NUM_DATA))


def test_a_family_may_be_any_module_that_gives_a_law():
    """Also one with methods of its own: nn.Sequential has `extend`."""
    head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), family.make_posterior("mean_field", 6, 2))
    model = build(CASES["VAE"], guide=head, hidden_dims=(8,), latent_dim=2)
    assert not pv.testing.check_pair(model, data=pv.Batch(*random_args(CASES["VAE"], NUM_DATA))).failed


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nothing", {}, "guide must be one of .*full_covariance, .*student_t"),
        ("low_rank", {"num_flows": 2}, "guide low_rank has no option num_flows; it has rank"),
        ("low_rank", {"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ("householder", {"num_reflections": 0}, "num_reflections must be a whole number of at least 1, got 0"),
        ("planar", {"num_flows": 0}, "num_flows must be a whole number of at least 1, got 0"),
        ("inverse_autoregressive", {"num_flows": 0}, "num_flows must be a whole number of at least 1, got 0"),
        ("inverse_autoregressive", {"hidden_dim": 2}, "hidden_dim must be at least latent_dim = 3, got 2"),
        ("spline", {"num_bins": 1}, "num_bins must be a whole number of at least 2, got 1"),
        ("mixture", {"num_components": 0}, "num_components must be a whole number of at least 1, got 0"),
        ("hierarchical", {"auxiliary_dim": 0}, "auxiliary_dim must be a whole number of at least 1, got 0"),
        ("semi_amortized", {"num_steps": 1.5}, "num_steps must be a whole number of at least 0, got 1.5"),
        ("mixture", {"num_components": True}, "num_components must be a whole number of at least 1, got True"),
        ("semi_amortized", {"num_samples": 6}, "num_samples must be a power of 2 of at least 2, got 6"),
        ("semi_amortized", {"step_size": 0.0}, "step_size must be greater than 0, got 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        family.make_posterior(name, 5, 3, options)
