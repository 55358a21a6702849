"""The contract that every file in models/ keeps; a new file is picked up from the folder listing."""

import itertools

import pyro
import pytest
import torch
from helpers import (
    arguments,
    build,
    case_id,
    cases,
    has_argument,
    parameters,
    random_args,
    random_data,
    random_obs,
    same,
    spaces_of,
)
from pyro.infer import SVI, Trace_ELBO

from pyro_vae import models, traces
from pyro_vae.energy import EnergyBased
from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.fitting import fit, own_method
from pyro_vae.randomness import NOISE, SHUFFLE, derived_seed
from pyro_vae.spaces import Binary, Quadrants, Quantized, Real

SHAPE, TINY = (4, 4), (2, 2)
every_model = pytest.mark.parametrize("case", cases(SHAPE), ids=case_id)
BY_ELBO = [
    case for case in cases(SHAPE) if own_method(getattr(models, case[0])) != "own"
]  # to the others it says little
by_elbo = pytest.mark.parametrize("case", BY_ELBO, ids=case_id)
CONV = [case for case in cases((7, 5)) + cases((3, 8, 8)) if has_argument(getattr(models, case[0]), "network")]
CONV = [case for case in CONV if not isinstance(case[2], Quadrants)]  # missing pixels are no image


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def draw(pair, args, num_particles=2):
    """Latents of each datum and their log weights, (K, n)."""
    values, log_q = traces.draw_latents(pair, args, num_particles, tiled=False)
    return values, traces.log_joint(pair, args, values, num_particles, tiled=False) - log_q


def log_weights_at(pair, args, values, num_particles=2, tiled=False):
    """Log weights (K, n) at given latents."""
    own = traces.Pair(pair.guide, pair.guide)
    log_p, log_q = (traces.log_joint(each, args, values, num_particles, tiled) for each in (pair, own))
    return log_p - log_q


def elbo_gradients(model, args):
    Trace_ELBO().differentiable_loss(model.model, model.guide, *args).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@every_model
@torch.no_grad()
def test_sites_and_log_weights_are_per_datum(case):
    model, args = build(case), random_args(case)
    pair = traces.as_pair(model)
    in_model, in_guide = traces.latent_sites(pair, args)
    assert in_model == in_guide
    assert "obs" in traces.simulate(pair, args)
    log_weights = traces.log_weights(pair, args, 3)
    assert log_weights.shape == (3, 5)
    assert bool(log_weights.isfinite().all())


@every_model
@torch.no_grad()
def test_weights_under_the_particle_plate_are_those_of_tiled_data(case):
    model, args = build(case), random_args(case)
    pair = traces.as_pair(model)
    assert traces.broadcasts(pair, args)
    values, together = draw(pair, args)
    tiled = {name: value.flatten(0, 1) for name, value in values.items()}
    # the same sums in another order of float32 operations
    torch.testing.assert_close(log_weights_at(pair, args, tiled, tiled=True), together, rtol=1e-4, atol=1e-4)


@every_model
@torch.no_grad()
def test_a_datum_has_the_same_weights_whatever_shares_its_batch(case):
    model, args = build(case), random_args(case)
    pair = traces.as_pair(model)
    values, together = draw(pair, args)
    for index in ([2], [4, 0, 3, 1, 2]):
        few = tuple(arg[index] for arg in args)
        apart = log_weights_at(pair, few, {name: value[:, index] for name, value in values.items()})
        # float32 rounding of matrix products of another size
        torch.testing.assert_close(apart, together[:, index], rtol=1e-4, atol=1e-4)


@every_model
def test_simulated_observations_lie_in_the_space(case):
    model, args = build(case), random_args(case, 50)
    drawn = traces.simulate(traces.as_pair(model), args)
    model.space.check(drawn["obs"])
    assert len(drawn["obs"].unique(dim=0)) > 1  # draws, not one picture


@pytest.mark.parametrize("case", cases(TINY, (Binary, Quantized)), ids=case_id)
@torch.no_grad()
def test_masses_of_all_images_sum_to_one(case):
    model, args = build(case), random_args(case, 2)
    space = model.space
    levels = space.levels if isinstance(space, Quantized) else 2
    images = torch.tensor(list(itertools.product(range(levels), repeat=space.num_dims)), dtype=torch.float32)
    law = traces.observation(traces.as_pair(model), args)  # p(x | z) at one z for each datum
    mass = law.log_prob(images.view(-1, 1, *space.shape)).exp().sum(0)
    # at most 81 float32 masses, each with a relative error near 1e-6
    torch.testing.assert_close(mass, torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", [each for each in cases((1, 2), Real) if not isinstance(each[2], Quadrants)], ids=case_id
)
@torch.no_grad()
def test_density_of_all_images_integrates_to_one(case):
    options = {"latent_dim": 1} if has_argument(getattr(models, case[0]), "latent_dim") else {}
    model, args, step = build(case, **options).double(), random_args(case, 2), 0.1
    line = torch.arange(-15, 15, step, dtype=torch.float64)
    images = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    law = traces.observation(traces.as_pair(model), tuple(arg.double() for arg in args))
    # a sum over a grid much finer than the scales (about 1) is exact but for the tails beyond 10 scales
    torch.testing.assert_close((law.log_prob(images).exp().sum(0) * step**2), torch.ones(2).double(), rtol=0, atol=1e-8)


@every_model
def test_gradients_reach_every_parameter(case):
    model = build(case)
    for name, grad in elbo_gradients(model, random_args(case)).items():
        assert grad is not None, name
        assert bool(grad.isfinite().all()), name
        assert bool(grad.any()), name


@pytest.mark.parametrize(
    ("name", "space"),
    [
        pytest.param(name, space, id=f"{name}-{space}")
        for name in models.listing().values()
        for space in spaces_of(SHAPE)
        if not isinstance(space, getattr(models, name).spaces)
    ],
)
def test_a_space_that_the_model_cannot_live_in_is_refused_by_name(name, space):
    with pytest.raises(ValueError, match=type(space).__name__):
        build((name, space, None))


@every_model
@torch.no_grad()
def test_a_state_dict_carries_the_whole_model(case):
    model, other, args = build(case), build(case, seed=1), random_args(case)
    values, _ = draw(traces.as_pair(model), args)
    weights = [log_weights_at(traces.as_pair(each), args, values) for each in (model, other)]
    assert not torch.equal(*weights) or has_no_random_start(case)
    other.load_state_dict(model.state_dict())
    assert torch.equal(log_weights_at(traces.as_pair(other), args, values), weights[0])


def has_no_random_start(case):
    return same(parameters(build(case)), parameters(build(case, seed=1)))


@every_model
@torch.no_grad()
def test_float64_works_and_agrees_with_float32(case):
    model, args = build(case), random_args(case)
    values, single = draw(traces.as_pair(model), args)
    double_args = tuple(arg.double() for arg in args)
    pair = traces.as_pair(model.double())
    double = log_weights_at(pair, double_args, {name: value.double() for name, value in values.items()})
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-4)  # rounding of float32
    assert {value.dtype for value in traces.simulate(pair, double_args).values()} == {torch.float64}


@every_model
def test_the_global_parameter_store_stays_empty(case):
    model, data = build(case), random_data(case)
    how = {} if own_method(type(model)) == "own" else {"method": "svi"}
    few = {"log_z_steps": 3, "log_z_chains": 2} if isinstance(model, EnergyBased) else {}
    fit(model, data, **how, **few, num_epochs=1, device="cpu")
    log_likelihood(model, data.test, estimator=importance_sampling(num_particles=8), device="cpu")
    assert len(pyro.get_param_store()) == 0


@by_elbo
def test_two_instances_share_no_parameters(case):
    first, second, args = build(case), build(case, seed=1), random_args(case)
    optimizer = {"lr": 1e-2}
    for model in (first, second):
        before, others = parameters(model), parameters(first)
        svi = SVI(model.model, model.guide, pyro.optim.Adam(optimizer), Trace_ELBO())
        for _ in range(2):
            svi.step(*args)
        after = parameters(model)
        assert not any(torch.equal(before[name], after[name]) for name in before)
        if model is second:
            assert same(parameters(first), others)


@by_elbo
def test_plain_svi_gives_the_parameters_of_fit(case):
    data, ours, plain = random_data(case, dtype=torch.float64), build(case).double(), build(case).double()
    num, steps, rate, eps = len(data.train), 3, 1e-2, 1e-4
    settings = {"learning_rate": rate, "adam_eps": eps, "schedule": "constant", "validate_every": steps}
    fit(ours, data, method="svi", num_epochs=steps, batch_size=num, seed=7, device="cpu", **settings)
    torch.manual_seed(derived_seed(7, NOISE))  # from here on, the draws of `fit` in its order
    plain.initialize(data.train.obs)
    few = tuple(arg[:2] for arg in arguments(data.valid))
    traces.matching_sites(traces.as_pair(plain), few)
    Trace_ELBO().loss(plain.model, plain.guide, *few)
    generator = torch.Generator().manual_seed(derived_seed(7, SHUFFLE))
    # `fit` divides the loss by the batch size, plain SVI does not; Adam sees the difference in eps only
    svi = SVI(plain.model, plain.guide, pyro.optim.Adam({"lr": rate, "eps": eps * num}), Trace_ELBO())
    for _ in range(steps):
        order = torch.randperm(num, generator=generator)
        svi.step(*(arg[order] for arg in arguments(data.train)))
    expected = parameters(plain)
    for name, value in parameters(ours).items():
        # in float64: rounding of the gradients (1e-14), over eps (1e-4), times the rate (1e-2): 1e-12
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("network", ["conv", "resnet"])
@pytest.mark.parametrize("case", CONV, ids=case_id)
def test_convolutions_take_images_of_odd_size_and_colour(case, network):
    model, args = build(case, network=network), random_args(case, 3)
    assert all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in elbo_gradients(model, args).values())
    pair = traces.as_pair(model)
    with torch.no_grad():
        assert traces.broadcasts(pair, args)
        assert traces.log_weights(pair, args, 2).shape == (2, 3)


def test_the_folder_listing_is_what_the_package_offers():
    assert set(models.listing().values()) == set(dir(models)) - {"listing"}
    with pytest.raises(AttributeError, match="VAE"):
        models.Nothing  # noqa: B018


def test_random_observations_of_the_suite_lie_in_their_spaces():
    for space in (*spaces_of(SHAPE), *spaces_of(TINY)):
        space.check(random_obs(space, 9))
