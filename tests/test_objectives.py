"""Training objectives: gradients against closed forms and quadrature, their noise, their order, what they refuse."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import FEW_EPOCHS, SMALL_NET, call
from helpers import parameters, random_data, random_obs, same
from oracles import LinearGaussian
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.transforms import Planar
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyro_vae as pv
from pyro_vae import checkpoint, runs, schedules, svi, traces
from pyro_vae.objectives import OBJECTIVES, elbo, make_objective, particles_as_needed, renyi
from pyro_vae.particles import Particles
from pyro_vae.spaces import Binary
from pyro_vae.svi import Settings

SPACE = Binary((3, 3))
OBS = torch.tensor([[1.5, -0.5], [0.2, 1.0], [-1.0, 0.3]], dtype=torch.float64)


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Line(nn.Module):
    """z ~ N(0, 1), x_d | z ~ N(w_d z, σ²), and a guide N(a'x + b, c²) that may be any, or the posterior."""

    def __init__(self, exact=False):
        super().__init__()
        self.loadings, self.log_noise = parameter(1.0, -0.5), parameter(-0.3)
        self.slopes, self.shift, self.log_scale = parameter(0.3, 0.1), parameter(0.2), parameter(-0.6)
        if exact:
            precision = 1 + (self.loadings**2).sum() / self.log_noise.exp() ** 2
            for own, value in (
                (self.slopes, self.loadings / self.log_noise.exp() ** 2 / precision),
                (self.shift, torch.zeros(1)),
                (self.log_scale, -precision.log() / 2),
            ):
                own.data.copy_(value.detach())

    def posterior(self, obs):
        return dist.Normal(obs @ self.slopes[:, None] + self.shift, self.log_scale.exp())  # (n, 1)

    def likelihood(self, z):
        return dist.Normal(z * self.loadings, self.log_noise.exp())

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loadings.new_zeros(1), 1).to_event(1))
            pyro.sample("obs", self.likelihood(z).to_event(1), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.posterior(obs).to_event(1))

    def exact_elbo(self, obs, weight):
        """E_q log p(x | z) - c KL(q, p), mean over the data, in closed form."""
        law = self.posterior(obs)
        expected = (
            self.likelihood(law.mean).log_prob(obs) - (law.stddev * self.loadings / self.log_noise.exp()) ** 2 / 2
        )
        return (expected.sum(-1) - weight * kl_divergence(law, Normal(0.0, 1.0)).sum(-1)).mean()

    def exact_bound(self, obs, weight, alpha):
        """The bound of two particles, mean over the data, by Gauss-Hermite quadrature over the noise of both."""
        nodes, masses = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(60))
        law = self.posterior(obs)
        z = law.mean + law.stddev * nodes  # (n, 60)
        log_q = Normal(law.mean, law.stddev).log_prob(z)
        log_likelihood = self.likelihood(z[..., None]).log_prob(obs[:, None, :]).sum(-1)
        log_w = log_likelihood + weight * (Normal(0.0, 1.0).log_prob(z) - log_q)
        pairs = torch.stack(torch.broadcast_tensors(log_w[:, :, None], log_w[:, None, :]))  # (2, n, 60, 60)
        joint = torch.outer(masses, masses) / masses.sum() ** 2
        return (renyi(pairs, alpha) * joint).sum((-2, -1)).mean()


class Ladder(nn.Module):
    """z2 ~ N(0, 1), z1 | z2 ~ N(a z2, s²), x | z1 ~ N(z1, σ²); the guide draws z1 first, and z2 given z1."""

    def __init__(self):
        super().__init__()
        self.slope, self.log_scales = parameter(0.8), parameter(-0.2, -0.4)
        self.up, self.log_widths = parameter(0.5, 1.2, 0.3), parameter(-0.5, -0.3)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            top = pyro.sample("top", dist.Normal(self.slope.new_zeros(1), 1).to_event(1))
            below = pyro.sample("below", dist.Normal(self.slope * top, self.log_scales[:1].exp()).to_event(1))
            pyro.sample("obs", dist.Normal(below, self.log_scales[1:].exp()).expand_by([1]).to_event(1), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            below = pyro.sample("below", dist.Normal(self.up[0] * obs, self.log_widths[:1].exp()).to_event(1))
            loc = self.up[1] * below + self.up[2] * obs
            pyro.sample("top", dist.Normal(loc, self.log_widths[1:].exp()).to_event(1))


def made(name, model, num_particles=1, obs=OBS, **options):
    options = {"alpha": 0.5, "free_bits": 0.25, **options}
    return make_objective(name, traces.as_pair(model), (obs,), num_particles=num_particles, **options)


def gradients(objective, model, obs, weight=1.0, num=1, names=None):
    """Gradients of minus the loss at `num` draws, (num, number of parameters)."""
    chosen = [value for name, value in model.named_parameters() if names is None or name in names]
    rows = []
    for _ in range(num):
        loss = objective.loss(traces.as_pair(model), (obs,), weight)
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(-loss, chosen)]))
    return torch.stack(rows)


def flat_gradient(value, model):
    return torch.cat([each.flatten() for each in torch.autograd.grad(value, list(model.parameters()))])


def mean_and_error(rows):
    return rows.mean(0), rows.std(0) / math.sqrt(len(rows))


# Gradients


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("name", ["elbo", "mean_field", "sticking_the_landing", "free_bits"])
def test_gradients_of_the_elbo_have_the_mean_of_the_closed_form(name, weight):
    model = Line()
    torch.manual_seed(1)
    objective = made(name, model, num_particles=2, free_bits=1e-6)  # a floor below every divergence
    found, error = mean_and_error(gradients(objective, model, OBS.repeat(100, 1), weight, num=60))
    assert bool((error < 0.03).all())  # of gradients of about 1
    assert bool(((found - flat_gradient(model.exact_elbo(OBS, weight), model)).abs() < 4 * error + 1e-12).all())


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize(("name", "alpha"), [("iwae", 0.0), ("renyi", 0.5), ("renyi", -1.0), ("dreg", 0.0)])
def test_gradients_of_the_bounds_have_the_mean_that_quadrature_gives(name, alpha, weight, tiled):
    model = Line()
    torch.manual_seed(2)
    objective = replace(made(name, model, num_particles=2, alpha=alpha), particles=Particles(2, tiled))
    found, error = mean_and_error(gradients(objective, model, OBS.repeat(100, 1), weight, num=60))
    truth = flat_gradient(model.exact_bound(OBS, weight, alpha), model)
    assert bool((error < 0.03).all())  # of gradients of about 1
    assert bool(((found - truth).abs() < 4 * error).all())


def vamp():
    """A VAE whose prior is made of its own posterior: parameters that are both the model's and the guide's."""
    torch.manual_seed(4)
    options = {"prior": "vamp", "prior_options": {"num_components": 3}}
    return pv.models.VAE(SPACE, latent_dim=2, hidden_dims=(3,), **options).double()


@pytest.mark.parametrize(
    ("model", "obs"),
    [(Ladder(), OBS[:, :1]), (vamp(), random_obs(SPACE, 3).double())],
    ids=["two sites that depend on each other", "shared parameters"],
)
@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize(("name", "plain"), [("dreg", "iwae"), ("sticking_the_landing", "elbo")])
def test_gradients_through_the_draws_have_the_mean_of_the_plain_ones(name, plain, weight, model, obs):
    torch.manual_seed(3)
    rows = [
        gradients(made(each, model, 3, obs), model, obs.repeat(100, *[1] * (obs.ndim - 1)), weight, num=50)
        for each in (name, plain)
    ]
    (found, error), (expected, other) = (mean_and_error(each) for each in rows)
    assert bool(((found - expected).abs() < 4 * (error**2 + other**2).sqrt() + 1e-12).all())


GUIDE = ("slopes", "shift", "log_scale")


@pytest.mark.parametrize("num_particles", [2, 7])
def test_at_the_posterior_gradients_through_the_draws_are_zero_at_every_draw(num_particles):
    model = Line(exact=True)
    torch.manual_seed(5)
    for name, largest in (("dreg", 1e-9), ("sticking_the_landing", 1e-9)):  # rounding of float64
        rows = gradients(made(name, model, num_particles), model, OBS, num=20, names=GUIDE)
        assert float(rows.abs().max()) < largest, name
    for name in ("elbo", "iwae"):
        rows = gradients(made(name, model, num_particles), model, OBS, num=20, names=GUIDE)
        assert float(rows.abs().max(1).values.min()) > 1e-3, name


def test_with_many_particles_the_doubly_reparameterised_gradient_stands_out_of_its_noise():
    model = Line()
    torch.manual_seed(6)

    def signal_to_noise(name):
        rows = gradients(made(name, model, 64), model, OBS, num=150, names=GUIDE)
        return rows.mean(0).abs() / rows.std(0)

    # Rainforth et al. 2018: with K the plain one falls as 1/sqrt(K), and this one rises as sqrt(K)
    assert bool((signal_to_noise("dreg") > 3 * signal_to_noise("iwae")).all())


# Bounds


def test_bounds_are_in_order_below_log_p():
    oracle = LinearGaussian(6, 4, guide="mean_field", widen=2.5)
    obs = oracle.draw(10).repeat(400, 1)
    pair = traces.Pair(oracle.model, oracle.guide)
    torch.manual_seed(7)
    weights = Particles(50, tiled=False).log_weights(pair, (obs,))
    rows = [elbo(weights), renyi(weights[:5], 0.5), renyi(weights[:5]), renyi(weights), oracle.log_prob(obs)]
    for low, high in itertools.pairwise(rows):
        step, error = (high - low).mean(), (high - low).std() / math.sqrt(len(obs))
        assert step > 4 * error
    assert bool((renyi(weights, 2.0) <= elbo(weights)).all())  # means of a lower order
    gap = oracle.log_prob(obs) - elbo(weights)
    assert float(gap.mean()) > oracle.mean_field_gap()  # and a wider guide than the best has a larger gap than that


@pytest.mark.parametrize("tiled", [False, True])
def test_renyi_of_order_zero_is_iwae_to_the_digit_and_near_order_one_the_elbo(tiled):
    model = Line()
    pair, losses = traces.as_pair(model), []
    for name, alpha in (("iwae", 0.5), ("renyi", 0.0), ("dreg", 0.5)):
        objective = replace(made(name, model, 5, alpha=alpha), particles=Particles(5, tiled))
        torch.manual_seed(8)
        losses.append(float(objective.loss(pair, (OBS,), 1.0).detach()))
        torch.manual_seed(8)
        assert objective.bound(pair, (OBS,)) == pytest.approx(-3 * losses[-1], rel=1e-12)  # a sum, and a mean
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-12)  # the same draws: rounding
    weights = 3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(renyi(weights, 1 - 1e-7), elbo(weights), rtol=0, atol=1e-5)  # (1 - α) variance / 2


def test_a_bound_of_negative_order_is_judged_by_the_importance_weighted_one():
    model = Line()
    found = []
    for objective in (made("renyi", model, 4, alpha=-2.0), made("iwae", model, 4)):
        torch.manual_seed(9)
        found.append(objective.bound(traces.as_pair(model), (OBS,)))
    assert found[0] == found[1]
    assert [made("renyi", model, 4, alpha=alpha).is_bound for alpha in (-2.0, 0.5, 3.0)] == [False, True, True]


# Free bits


class Deaf(nn.Module):
    """x does not depend on z: what is left is the divergence of a guide with one dimension near the prior."""

    def __init__(self, law):
        super().__init__()
        self.loc, self.law, self.scale = parameter(0.1, 1.5), law, torch.ones(2, dtype=torch.float64)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(0 * self.scale, self.scale).to_event(1))
            pyro.sample("obs", dist.Normal(0 * self.scale, self.scale).to_event(1), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.law(self.loc, self.scale))


def normals(loc, scale):
    return dist.Normal(loc, scale).to_event(1)


def multivariate(loc, scale):
    return dist.MultivariateNormal(loc, scale.diag())


@pytest.mark.parametrize("tiled", [False, True])
def test_free_bits_leave_a_dimension_below_the_floor_alone_and_no_other(tiled):
    model = Deaf(normals)
    objective = replace(made("free_bits", model, 2), particles=Particles(2, tiled))
    (found,) = gradients(objective, model, OBS, weight=0.5)
    assert found.tolist() == [0.0, pytest.approx(-0.5 * 1.5)]  # KL = μ²/2: 0.005 and 1.125 nats, floor 0.25
    log_p = float(Normal(0.0, 1.0).log_prob(OBS).sum(-1).mean())
    loss = objective.loss(traces.as_pair(model), (OBS,), 0.5)
    assert float(loss.detach()) == pytest.approx(0.5 * (0.25 + 1.125) - log_p)


def test_free_bits_of_a_law_that_does_not_factorise_are_those_of_its_site():
    model = Deaf(multivariate)
    torch.manual_seed(10)
    pair, log_p = traces.as_pair(model), float(Normal(0.0, 1.0).log_prob(OBS).sum(-1).mean())
    floored, plain = made("free_bits", model, 2, free_bits=3.0), made("free_bits", model, 2, free_bits=0.01)
    loss = floored.loss(pair, (OBS,), 1.0)
    assert float(loss.detach()) == pytest.approx(2 * 3.0 - log_p)  # of two dimensions; the KL is about 1.13
    assert gradients(floored, model, OBS).tolist() == [[0.0, 0.0]]
    found, error = mean_and_error(gradients(plain, model, OBS.repeat(10, 1), num=100))
    assert bool(((found + model.loc.detach()).abs() < 4 * error).all())  # the gradient of -μ²/2


def test_free_bits_take_no_closed_form_where_guide_and_model_draw_in_another_order():
    model = Ladder()
    torch.manual_seed(11)
    pair, obs = traces.as_pair(model), OBS[:, :1].repeat(200, 1)
    objective = made("free_bits", model, 2, OBS[:, :1], free_bits=1e-9)
    losses = torch.stack([-objective.loss(pair, (obs,), 1.0).detach() for _ in range(50)])
    bounds = torch.tensor([objective.bound(pair, (obs,)) / len(obs) for _ in range(50)])
    error = (losses.var() / 50 + bounds.var() / 50).sqrt()
    assert abs(losses.mean() - bounds.mean()) < 4 * error  # with nothing floored, the ELBO


# Weights of the latent terms


def test_the_weight_is_beta_times_a_line_or_cycles_of_lines():
    line = Settings(num_epochs=4, kl_warmup=2, beta=3.0)
    assert [schedules.kl_weight(line, t, 3) for t in (1, 3, 6, 7)] == pytest.approx([0.5, 1.5, 3, 3])
    cycles = Settings(num_epochs=4, kl_schedule="cyclical", num_cycles=2)
    found = [schedules.kl_weight(cycles, t, 3) for t in range(1, 13)]
    assert found == pytest.approx(2 * [0, 1 / 3, 2 / 3, 1, 1, 1])
    ragged = replace(cycles, num_epochs=10, num_cycles=4, beta=2.0)  # T/M = 2.5: cycles of 3 steps
    found = [schedules.kl_weight(ragged, t, 1) for t in range(1, 8)]
    assert found == pytest.approx([0, 2 * 0.8, 2, 0, 2 * 0.8, 2, 0])


def test_a_fit_follows_the_cycles_and_gives_no_elbo_for_weighted_epochs():
    data = random_data(("VAE", SPACE, None))  # one batch
    settings = {"kl_schedule": "cyclical", "num_cycles": 2, "objective": "beta", "num_epochs": 8, "device": "cpu"}
    rows = pv.fit(pv.models.VAE(SPACE, latent_dim=2, hidden_dims=(5,)), data, **settings).rows
    assert [row["kl_weight"] for row in rows] == 2 * [0, 0.5, 1, 1]
    assert [row["train_elbo"] is None for row in rows] == 2 * [True, True, False, False]


# Fits


def vae(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return pv.models.VAE(SPACE, latent_dim=2, hidden_dims=(5,))


EXTRA = {"beta": {"beta": 4.0}, **{name: {"num_particles": 5} for name in ("iwae", "renyi", "dreg")}}


@pytest.fixture(scope="module")
def digits():
    return pv.load_data("digits", space="binary")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_fits_digits(digits, name):
    torch.manual_seed(12)
    model = pv.models.VAE(digits.space, latent_dim=4, hidden_dims=(20,))
    settings = {"num_epochs": 2, "learning_rate": 1e-2, "batch_size": 32, "device": "cpu", **EXTRA.get(name, {})}
    first, last = pv.fit(model, digits, objective=name, **settings).rows
    assert last["valid_elbo"] > first["valid_elbo"]  # at the same noise
    assert (last["train_elbo"] is None) == (name in ("beta", "free_bits"))
    if last["train_elbo"] is not None:
        # on one scale: the mean over the second epoch lies between where it began and where it ended
        assert first["valid_elbo"] < last["train_elbo"] < last["valid_elbo"]


@pytest.mark.parametrize("name", ["iwae", "dreg", "sticking_the_landing", "free_bits"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name, tmp_path, monkeypatch):
    data, step, count = random_data(("VAE", SPACE, None)), svi.Run._train_step, iter(range(100))
    settings = {"objective": name, "num_epochs": 4, "batch_size": 3, "kl_warmup": 2, "num_particles": 2}
    settings = {**settings, "device": "cpu", "learning_rate": 1e-2, "out": tmp_path}
    whole, resumed = vae(), vae(seed=9)
    expected = pv.fit(whole, data, **{**settings, "out": None})

    def interrupted(run, args):
        if next(count) == 7:  # in the third epoch of three steps each
            raise KeyboardInterrupt
        return step(run, args)

    with monkeypatch.context() as patch:
        patch.setattr(svi.Run, "_train_step", interrupted)
        assert pv.fit(vae(), data, **settings).status == "interrupted"
    torch.randn(3)
    history = pv.fit(resumed, data, resume=True, **settings)
    assert same(parameters(resumed), parameters(whole))
    assert [row["valid_elbo"] for row in history.rows] == [row["valid_elbo"] for row in expected.rows]


def test_a_run_saved_before_there_were_other_objectives_goes_on(tmp_path):
    data, whole, resumed = random_data(("VAE", SPACE, None)), vae(), vae(seed=9)
    settings = {"num_epochs": 2, "device": "cpu", "schedule": "constant"}
    pv.fit(whole, data, objective="trace", out=tmp_path, **settings)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    new = ("alpha", "beta", "kl_schedule", "num_cycles", "free_bits")
    old = {key: value for key, value in state["settings"].items() if key not in new}
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "settings": {**old, "objective": "trace"}})
    pv.fit(resumed, data, out=tmp_path, resume=True, **settings)
    assert same(parameters(resumed), parameters(whole))
    with pytest.raises(ValueError, match="objective was elbo, now iwae"):
        pv.fit(resumed, data, objective="iwae", num_particles=2, out=tmp_path, resume=True, **settings)


def test_objectives_are_named_on_the_command_line(tiny, tmp_path):
    chosen = ("--fit", "objective=iwae", "--fit", "num_particles=5")
    said = call(
        "train", "--model", "vae", "--data", tiny, "--out", tmp_path, *SMALL_NET, *FEW_EPOCHS, "--quiet", *chosen
    )
    assert "finished after 2 epochs" in said
    assert "validation importance weighted bound of 5 particles" in said
    opened = runs.open_run(tmp_path)
    found = opened.config.fit
    assert (found["objective"], found["num_particles"]) == ("iwae", 5)
    refused = ("--fit", "objective=renyi", "--fit", "num_particles=5", "--fit", "alpha=1")
    said = call("train", "--model", "vae", "--data", tiny, "--out", tmp_path / "new", *refused, code=1)
    assert "alpha must be a number other than 1" in said


# Refusals


class Other(Line):
    """A guide of another law."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.law(self.posterior(obs)))


@pytest.mark.parametrize("name", ["mean_field", "iwae", "renyi", "dreg", "sticking_the_landing", "free_bits"])
def test_a_guide_that_is_not_reparameterised_is_refused(name):
    model = Other(lambda law: NonreparameterizedNormal(law.loc, law.scale).to_event(1))
    with pytest.raises(
        ValueError,
        match=f"objective '{name}' needs a guide whose draws are differentiable.*site 'z'.*NonreparameterizedNormal",
    ):
        made(name, model, 2)
    assert bool(made("elbo", model).loss(traces.as_pair(model), (OBS,), 1.0).isfinite())


@pytest.mark.parametrize("name", ["dreg", "sticking_the_landing"])
def test_a_guide_without_a_density_is_refused_where_one_is_needed(name):
    flow = Planar(1).double()
    model = Other(lambda law: dist.TransformedDistribution(law.to_event(1), [flow]))
    with pytest.raises(ValueError, match=rf"objective '{name}' needs log q\(z \| x\) at any z"):
        made(name, model, 2)
    assert bool(made("iwae", model, 2).loss(traces.as_pair(model), (OBS,), 1.0).isfinite())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "iwae"}, "objective 'iwae' needs num_particles of at least 2, got 1"),
        ({"objective": "beta"}, "objective 'beta' needs a beta other than 1"),
        ({"objective": "renyi", "num_particles": 2, "alpha": 1.0}, "alpha must be a number other than 1"),
        ({"objective": "renyi", "num_particles": 2, "alpha": math.nan}, "alpha must be a finite number, got nan"),
        ({"kl_warmup": math.nan}, "kl_warmup must be a whole number of at least 0, got nan"),
        ({"patience": 1.5}, "patience must be a whole number of at least 1, got 1.5"),
        ({"num_particles": True}, "num_particles must be a whole number of at least 1, got True"),
        ({"num_epochs": "3"}, "num_epochs must be a whole number of at least 1, got '3'"),
        ({"objective": 3}, "objective must be one of elbo, .*, got 3"),
        ({"alpha": 0.2}, "alpha is for objective 'renyi', got objective 'elbo'"),
        ({"free_bits": 1.0}, "free_bits is for objective 'free_bits', got objective 'elbo'"),
        ({"objective": "free_bits", "free_bits": 0.0}, "free_bits must be greater than 0, got 0.0"),
        ({"beta": -1.0}, "beta must be greater than 0, got -1.0"),
        ({"num_cycles": 3}, "num_cycles is for kl_schedule 'cyclical', got kl_schedule 'linear'"),
        ({"kl_schedule": "cyclical", "kl_warmup": 3}, "kl_warmup is for kl_schedule 'linear'"),
        ({"kl_schedule": "cyclic"}, "kl_schedule must be one of linear, cyclical, got 'cyclic'"),
        ({"kl_schedule": "cyclical", "num_epochs": 5}, "num_cycles must be at most 2, a cycle for every two steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    model = vae()
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        pv.fit(model, random_data(("VAE", SPACE, None)), device="cpu", **settings)
    assert same(parameters(model), before)


def small_vae(**options):
    torch.manual_seed(0)
    return pv.models.VAE(pv.Binary((3, 3)), latent_dim=2, hidden_dims=(8,), **options)


def objective_of(model, name, num_particles):
    pair, args = traces.as_pair(model), (torch.zeros(2, 3, 3),)
    return make_objective(name, pair, args, num_particles=num_particles, alpha=0.5, free_bits=0.25)


def test_closed_form_divergences_are_refused_where_the_orders_of_drawing_differ():
    """The guide draws a and then z, the model z and then a: KL(q(a) || r(a | z)) at one z bounds nothing."""
    objective_of(small_vae(), "mean_field", 1)
    with pytest.raises(ValueError, match="in different orders"):
        objective_of(small_vae(guide="hierarchical"), "mean_field", 1)


@pytest.mark.parametrize(("name", "stratified"), [("elbo", True), ("iwae", False), ("dreg", False), ("renyi", False)])
def test_objectives_that_couple_particles_draw_them_independently(name, stratified):
    vae = small_vae(guide="mixture")
    vae.decoder.stratified = "by site"  # a user's own attribute of that name
    with particles_as_needed(name, traces.as_pair(vae)):
        assert vae.posterior.stratified is stratified
        assert vae.decoder.stratified == "by site"
    assert vae.posterior.stratified is True


class Scalar(Line):
    """The same with a scalar z, which the model takes for one of each datum: it has no place for particles."""

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loadings.new_zeros(()), 1))
            pyro.sample("obs", self.likelihood(z.unsqueeze(1)).to_event(1), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            law = self.posterior(obs)
            pyro.sample("z", dist.Normal(law.loc[:, 0], law.scale[0]))


@pytest.mark.parametrize("name", ["elbo", "mean_field", "sticking_the_landing", "free_bits"])
def test_a_pair_that_takes_no_outer_plate_has_the_elbo_of_the_closed_form_with_many_particles(name):
    model = Scalar()
    assert not traces.broadcasts(traces.as_pair(model), (OBS,))
    objective = made(name, model, num_particles=20, free_bits=1e-6)
    with torch.no_grad():
        bounds = torch.tensor([objective.bound(traces.as_pair(model), (OBS,)) for _ in range(40)]) / len(OBS)
    error = float(bounds.std()) / math.sqrt(len(bounds))
    assert float(bounds.mean()) == pytest.approx(
        float(model.exact_elbo(OBS, 1.0).detach()), abs=4 * error
    )  # standard errors
