"""`fit` by SVI: the loss, the schedule, what is kept, what ends it early, and that a resumed run is the same run."""

import copy
import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import parameters, random_data, random_obs, same
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from pyro_vae import checkpoint, svi, traces
from pyro_vae.data import Batch, Data
from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.exact import exact
from pyro_vae.fitting import fit
from pyro_vae.models import VAE, IndependentPixel
from pyro_vae.objectives import make_objective
from pyro_vae.randomness import VALIDATION, derived_seed
from pyro_vae.settings import SCHEDULES
from pyro_vae.spaces import Binary, Real

SPACE = Binary((3, 3))


@pytest.fixture
def data():
    """Dynamic bits; 10 data in batches of 4 leave a ragged last batch of 2."""
    plain = random_data(("VAE", SPACE, None), sizes=(10, 6, 3))
    return replace(plain, intensity=torch.rand(10, 3, 3, generator=torch.Generator().manual_seed(3)))


def vae(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return VAE(SPACE, latent_dim=2, hidden_dims=(5,))


def run_fit(model, data, **settings):
    defaults = {"num_epochs": 5, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu"}
    return fit(model, data, **{**defaults, **settings})


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def validation_elbo(model, data, seed=0):
    """The validation ELBO at the noise that `fit` takes for it."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(derived_seed(seed, VALIDATION))
        return -Trace_ELBO().loss(model.model, model.guide, data.valid.obs) / len(data.valid)


class Recorder(nn.Module):
    """x ~ N(μ, σ²) at each pixel, a model without latents that notes the training batches it sees.

    From the training step `bad_step` on σ is NaN, and without gradients if `bad_valid`. The first two batches that
    it notes are the checks that `fit` makes before the loop.
    """

    def __init__(self, event_dim=1, bad_step=math.inf, bad_valid=False):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.batches, self.event_dim, self.bad_step, self.bad_valid = [], event_dim, bad_step, bad_valid

    def forward(self, obs):
        training = torch.is_grad_enabled()
        self.batches += [obs.clone()] if training else []
        is_bad = len(self.batches) > self.bad_step + 1 or (self.bad_valid and not training)
        scale = self.log_scale.exp() * (math.nan if is_bad else 1.0)
        law = dist.Normal(self.loc, scale, validate_args=False).expand(obs.shape[1:]).to_event(self.event_dim)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", law, obs=obs)


class LinearModel(nn.Module):
    """z ~ N(0, 1), x_d | z ~ N(w_d z, σ²)."""

    def __init__(self):
        super().__init__()
        self.loadings, self.log_scale = nn.Parameter(torch.tensor([1.0, -0.5])), nn.Parameter(torch.tensor(-0.3))

    def forward(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loadings.new_zeros(1), 1).to_event(1))
            pyro.sample("obs", dist.Normal(z * self.loadings, self.log_scale.exp()).to_event(1), obs=obs)


class LinearGuide(nn.Module):
    """z | x ~ N(a'x, c²)."""

    def __init__(self):
        super().__init__()
        self.linear, self.log_scale = nn.Linear(2, 1), nn.Parameter(torch.tensor(-0.5))
        nn.init.constant_(self.linear.weight, 0.3)

    def forward(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(self.linear(obs), self.log_scale.exp()).to_event(1))


@torch.no_grad()
def analytic_elbo(model, guide, obs):
    """Mean over the data of E_q log p(x | z) - KL(q, p) in closed form."""
    loc, spread = guide.linear(obs), guide.log_scale.exp()
    expected = Normal(loc * model.loadings, model.log_scale.exp()).log_prob(obs)
    expected = expected - 0.5 * (spread * model.loadings / model.log_scale.exp()) ** 2
    return float((expected.sum(-1) - kl_divergence(Normal(loc, spread), Normal(0.0, 1.0)).sum(-1)).mean())


def made(objective, pair, obs, num_particles=1):
    return make_objective(objective, pair, (obs,), num_particles=num_particles, alpha=0.5, free_bits=0.25)


def linear_data(num=20):
    z = torch.randn(num + 10, 1, generator=torch.Generator().manual_seed(1))
    obs = z * torch.tensor([2.0, 1.0]) + 0.5 * random_obs(Real((2,)), num + 10)
    return Data("linear", Real((2,)), Batch(obs[:num]), Batch(obs[num : num + 6]), Batch(obs[num + 6 :]))


def indexed_data(num):
    """Data whose one pixel is their index; validation and test data lie elsewhere."""
    batches = (Batch(torch.arange(size).float().view(-1, 1)) for size in (num, 3, 3))
    return Data("indexed", Real((1,)), *batches)


# The loss


@pytest.mark.parametrize("beta", [0.25, 1.0])
@pytest.mark.parametrize("objective", ["elbo", "mean_field"])
def test_the_kl_weight_multiplies_the_latent_terms_and_nothing_else(objective, beta):
    model, obs = vae(), random_obs(SPACE, 4)
    torch.manual_seed(5)
    loss = made(objective, traces.as_pair(model), obs).loss(traces.as_pair(model), (obs,), beta)
    torch.manual_seed(5)
    loc, log_scale = model.posterior.linear(model.encoder(obs)).chunk(2, -1)
    posterior, prior = Normal(loc, log_scale.exp()), Normal(0.0, 1.0)
    z = posterior.rsample()
    log_obs = Bernoulli(logits=model.decoder(z).squeeze(-3)).log_prob(obs).sum()
    latent = prior.log_prob(z) - posterior.log_prob(z) if objective == "elbo" else -kl_divergence(posterior, prior)
    torch.testing.assert_close(loss, -(log_obs + beta * latent.sum()) / len(obs))  # float32 rounding


def test_the_kl_weight_rises_in_a_straight_line_over_the_warmup_epochs(data, monkeypatch):
    used, elbo = [], traces.elbo

    def spy(pair, args, num_particles, together, weight, closed_form):
        used.append(weight)
        return elbo(pair, args, num_particles, together, weight, closed_form)

    monkeypatch.setattr(traces, "elbo", spy)
    history = run_fit(vae(), data, kl_warmup=2, num_epochs=4)  # 3 steps per epoch
    assert used == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, *[1] * 7])
    assert [row["kl_weight"] for row in history.rows] == [0.5, 1, 1, 1]
    assert [row["train_elbo"] is None for row in history.rows] == [True, True, False, False]


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("objective", ["elbo", "mean_field"])
def test_the_elbo_has_the_expectation_of_its_closed_form(objective, num_particles):
    model, guide, data = LinearModel(), LinearGuide(), linear_data()
    pair, many = traces.as_pair(model, guide), data.train.obs.repeat(50, 1)
    torch.manual_seed(0)
    bound = made(objective, pair, many, num_particles).bound
    draws = [bound(pair, (many,)) / len(many) for _ in range(30)]
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert 1e-4 < error < 0.05  # Monte Carlo noise it is, and not much of it
    assert abs(np.mean(draws) - analytic_elbo(model, guide, data.train.obs)) < 4 * error


@pytest.mark.parametrize("settings", [{"num_particles": 3}, {"objective": "mean_field"}, {"kl_warmup": 2}])
def test_a_pair_of_modules_climbs_under_every_objective(settings):
    model, guide, data = LinearModel(), LinearGuide(), linear_data()
    before, start = {**parameters(model), **parameters(guide)}, analytic_elbo(model, guide, data.valid.obs)
    history = run_fit(model, data, guide=guide, num_epochs=30, **settings)
    assert analytic_elbo(model, guide, data.valid.obs) > start + 0.1  # of a gain of about a nat
    after = {**parameters(model), **parameters(guide)}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert len(history.rows) == 30


# The loop


def test_fit_raises_the_validation_elbo_and_keeps_its_best_parameters(data):
    model = vae()
    model.initialize(data.train.obs)
    start = validation_elbo(model, data)
    history = run_fit(model, data, num_epochs=12)
    elbos = [row["valid_elbo"] for row in history.rows]
    assert history.best_valid_elbo == max(elbos) > start
    assert history.best_epoch == 1 + int(np.argmax(elbos))
    assert validation_elbo(model, data) == history.best_valid_elbo  # the same noise: the same digits
    assert history.status == "finished"
    assert [row["epoch"] for row in history.rows] == list(range(1, 13))
    assert set(history.rows[0]) == {"epoch", "train_elbo", "valid_elbo", "kl_weight", "learning_rate", "seconds"}
    assert 0 < history.rows[0]["seconds"] < history.rows[-1]["seconds"] == history.seconds
    assert not model.training


def test_early_stopping_leaves_the_best_epoch_behind(data):
    model = vae()
    history = run_fit(model, data, num_epochs=200, patience=3, learning_rate=0.3, schedule="constant")
    assert history.status == "early stop"
    assert len(history.rows) == history.best_epoch + 3 < 200
    assert validation_elbo(model, data) == history.best_valid_elbo


def test_early_stopping_waits_for_a_validation(data):
    model = vae()
    rows = run_fit(model, data, num_epochs=7, patience=1, validate_every=3).rows
    assert len(rows) >= 3  # no epoch before the third has been compared with anything
    assert [row["epoch"] for row in rows if row["valid_elbo"] is not None] == [3, 6, 7][
        : len(rows) // 3 + len(rows) // 7
    ]


@pytest.mark.parametrize("batch_size", [3, 7, 100])
def test_every_datum_is_used_once_in_each_epoch(batch_size):
    model = Recorder()
    run_fit(model, indexed_data(7), num_epochs=2, batch_size=batch_size)
    batches = [batch.flatten().tolist() for batch in model.batches[2:]]
    half = len(batches) // 2
    epochs = [[index for batch in part for index in batch] for part in (batches[:half], batches[half:])]
    assert [len(batch) for batch in batches[:half]] == [3, 3, 1] if batch_size == 3 else [7]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]  # another permutation


def test_dynamic_bits_are_drawn_anew_in_each_epoch():
    plain = random_data(("VAE", SPACE, None), sizes=(30, 3, 3))
    intensity = torch.full((30, 3, 3), 0.5)
    intensity[:, 0, 0], intensity[:, 0, 1] = 0, 1
    model = Recorder(event_dim=2)
    run_fit(model, replace(plain, intensity=intensity), num_epochs=3, batch_size=30)
    epochs = model.batches[2:]
    for bits in epochs:
        assert bool((bits[:, 0, 0] == 0).all() and (bits[:, 0, 1] == 1).all())
        assert set(bits.unique().tolist()) == {0, 1}
    sums = [bits.sum(0) for bits in epochs]  # which no permutation changes
    assert not any(torch.equal(*pair) for pair in itertools.combinations(sums, 2))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_epochs", [1, 2, 9, 25])
def test_every_schedule_takes_any_number_of_steps(schedule, num_epochs):
    model = IndependentPixel(SPACE)
    data = random_data(("IndependentPixel", SPACE, None))
    history = run_fit(model, data, method="svi", schedule=schedule, num_epochs=num_epochs, batch_size=100)
    rates = [row["learning_rate"] for row in history.rows]
    assert max(rates) <= 1e-2
    if schedule != "constant" and num_epochs > 1:
        assert rates[-1] < 1e-4  # at the end almost nothing of the 1e-2 asked for


# What ends it


@pytest.mark.parametrize("bad_step", [1, 5])
def test_a_loss_that_is_nan_names_step_and_site(bad_step, tmp_path):
    data = indexed_data(7)  # 3 steps per epoch
    model = Recorder(bad_step=bad_step)
    with pytest.raises(svi.NonFiniteLoss, match=rf"nan at step {bad_step} .*site 'obs' of the model"):
        run_fit(model, data, batch_size=3, out=tmp_path)
    epochs = [row["epoch"] for row in checkpoint.load(tmp_path / "checkpoint.pt")["rows"]]
    assert epochs == ([] if bad_step == 1 else [1])
    assert all(bool(value.isfinite().all()) for value in parameters(model).values())


def test_a_latent_that_is_nan_is_named():
    model, guide, data = LinearModel(), LinearGuide(), linear_data()
    calls = itertools.count(1)  # four before the loop
    guide.linear.register_forward_hook(lambda module, args, out: out * math.nan if next(calls) > 4 else out)
    with pytest.raises(svi.NonFiniteLoss, match=r"nan at step 1 \(epoch 1\).*site 'z' of the guide"):
        run_fit(model, data, guide=guide)


def test_a_validation_elbo_that_is_nan_is_never_the_best():
    with pytest.raises(svi.NonFiniteLoss, match=r"validation ELBO is nan after step 2 \(epoch 1\).*site 'obs'"):
        run_fit(Recorder(bad_valid=True), indexed_data(7))


@pytest.mark.parametrize("part", ["train", "valid"])
def test_data_outside_their_space_are_refused(data, part):
    with pytest.raises(ValueError, match=f"{part} obs must be finite"):
        run_fit(vae(), replace(data, **{part: Batch(torch.full((4, 3, 3), math.nan))}))


def interrupt_at(model, call):
    """Let Ctrl-C come at a call of the model's program, counted from 1."""
    program, count = model.model, itertools.count(1)

    def interrupted(*args):
        if next(count) == call:
            raise KeyboardInterrupt
        program(*args)

    model.model = interrupted
    return model


CALL_IN_EPOCH_3 = 3 + 2 * (3 + 1) + 2  # three before the loop; an epoch is three steps and a validation


def test_ctrl_c_keeps_the_best_parameters_and_a_checkpoint(data, tmp_path):
    model = interrupt_at(vae(), CALL_IN_EPOCH_3)
    history = run_fit(model, data, out=tmp_path)
    assert history.status == "interrupted"
    assert [row["epoch"] for row in history.rows] == [1, 2]
    assert validation_elbo(model, data) == history.best_valid_elbo
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert same(state["model"], model.state_dict())
    with open(tmp_path / "history.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(row["valid_elbo"]) for row in written] == [row["valid_elbo"] for row in history.rows]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "one_cycle", "kl_warmup": 4},
        {"schedule": "cosine", "objective": "mean_field"},
        {"num_particles": 2},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(data, tmp_path, settings):
    whole = vae()
    expected = run_fit(whole, data, out=tmp_path / "whole", **settings)
    run_fit(interrupt_at(vae(), CALL_IN_EPOCH_3), data, out=tmp_path / "parts", **settings)
    torch.randn(3)  # a resumed run does not depend on where the global noise stands
    resumed = vae(seed=9)
    history = run_fit(resumed, data, out=tmp_path / "parts", resume=True, **settings)
    assert same(parameters(resumed), parameters(whole))
    assert without_seconds(history.rows) == without_seconds(expected.rows)
    assert (history.best_epoch, history.status) == (expected.best_epoch, "finished")
    states = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")]
    assert same(states[0]["last"], states[1]["last"])  # the last epoch's parameters too, not only the best ones


def test_ctrl_c_between_two_epochs_repeats_no_row(data, tmp_path, monkeypatch):
    snapshot, count = svi.Run._snapshot, itertools.count()

    def interrupted(run):
        if next(count) == 2:
            raise KeyboardInterrupt
        return snapshot(run)

    with monkeypatch.context() as patch:
        patch.setattr(svi.Run, "_snapshot", interrupted)
        run_fit(vae(), data, out=tmp_path)
    whole, resumed = vae(), vae()
    expected = run_fit(whole, data)
    history = run_fit(resumed, data, out=tmp_path, resume=True)
    assert without_seconds(history.rows) == without_seconds(expected.rows)
    assert same(parameters(resumed), parameters(whole))


def test_resuming_what_has_ended_changes_nothing(data, tmp_path):
    settings = {"num_epochs": 200, "patience": 3, "learning_rate": 0.3, "schedule": "constant", "out": tmp_path}
    first, again = vae(), vae(seed=9)
    stopped = run_fit(first, data, **settings)
    history = run_fit(again, data, resume=True, **settings)
    assert history == stopped
    assert same(parameters(first), parameters(again))


def test_a_model_of_another_space_is_not_fitted(data):
    other = IndependentPixel(Real((3, 3)))
    with pytest.raises(ValueError, match=r"IndependentPixel for Real of shape .* cannot be fitted to data in Binary"):
        fit(other, data)


def test_a_run_resumes_only_under_its_own_settings(data, tmp_path):
    run_fit(vae(), data, out=tmp_path, num_epochs=1)
    with pytest.raises(ValueError, match="batch_size was 4, now 5; seed was 0, now 1"):
        run_fit(vae(), data, out=tmp_path, num_epochs=1, batch_size=5, seed=1, resume=True)
    other = replace(data, train=replace(data.train, obs=1 - data.train.obs))
    with pytest.raises(ValueError, match=r"train data was [0-9a-f]{12}, now"):
        run_fit(vae(), other, out=tmp_path, num_epochs=1, resume=True)
    with pytest.raises(ValueError, match="resume needs the directory"):
        run_fit(vae(), data, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run_fit(vae(), data, resume=True, out=tmp_path / "nowhere")


# What it depends on, and what it leaves alone


def test_the_seed_decides_every_digit(data):
    models = [vae(), vae(), vae()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run_fit(model, data, seed=seed, num_epochs=2)
        torch.randn(7)
    assert same(parameters(models[0]), parameters(models[1]))
    assert not same(parameters(models[0]), parameters(models[2]))


@pytest.mark.parametrize("validate", [True, False])
def test_global_noise_and_pyros_checks_are_left_alone(data, validate):
    def state():
        flags = (pyro.infer.is_validation_enabled(), pyro.distributions.is_validation_enabled())
        return flags, torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002

    with pyro.validation_enabled(validate):
        before = state()
        run_fit(vae(), data, num_epochs=1)
        assert state() == before
        with pytest.raises(svi.NonFiniteLoss):
            run_fit(Recorder(bad_step=1), indexed_data(4))
        assert state() == before


def test_the_test_data_are_never_looked_at(data):
    models = [vae(), vae()]
    hidden = replace(data, test=Batch(torch.full((3, 3, 3), math.nan)))
    histories = [run_fit(model, each, num_epochs=2) for model, each in zip(models, (data, hidden), strict=True)]
    assert same(parameters(models[0]), parameters(models[1]))
    assert without_seconds(histories[0].rows) == without_seconds(histories[1].rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, one_cycle, got 'linear'"),
        ({"objective": "vimco"}, "objective must be one of elbo, beta, mean_field, iwae, .*, got 'vimco'"),
        ({"method": "em"}, "method must be one of svi, own, maximum_likelihood, got 'em'"),
        ({"method": "maximum_likelihood"}, "VAE has no method maximum_likelihood"),
        ({"num_epochs": 0}, "num_epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"num_particles": 0}, "num_particles must be a whole number of at least 1"),
        ({"validate_every": 0}, "validate_every must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number"),
        ({"patience": 0}, "patience must be a whole number of at least 1"),
        ({"kl_warmup": -1}, "kl_warmup must be a whole number of at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, settings, message):
    model = vae()
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        run_fit(model, data, **settings)
    assert same(parameters(model), before)


def test_a_pair_that_cannot_be_fitted_is_refused(data):
    with pytest.raises(ValueError, match="no parameters to fit"):
        run_fit(lambda obs: None, data, guide=lambda obs: None)
    with pytest.raises(ValueError, match=r"same latent sites; model: \['z'\], guide: \[\]"):
        run_fit(LinearModel(), linear_data())
    with pytest.raises(ValueError, match="fit has no setting num_epoch; it has num_epochs"):
        run_fit(vae(), data, num_epoch=3)


# A second fit, and parameters that nobody moves


def one_epoch(model, **how):
    return run_fit(model, random_data(("VAE", SPACE, None)), num_epochs=1, learning_rate=1e-12, **how)


def test_a_second_fit_goes_on_from_the_parameters_of_the_first():
    model = VAE(SPACE, latent_dim=2, hidden_dims=(5,), prior="vamp", prior_options={"num_components": 3})
    one_epoch(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # as if it had learned something
    learned = parameters(model)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        one_epoch(each)
        for name, value in parameters(each).items():
            assert torch.allclose(value, learned[name], atol=1e-6), name  # the step of a learning rate of 1e-12
    one_epoch(model, initialize=True)
    assert not torch.allclose(model.code_prior.pseudo_inputs, learned["code_prior.pseudo_inputs"], atol=1e-3)


class Hidden(nn.Module):
    """A VAE's guide whose mean is a parameter that lies elsewhere."""

    def __init__(self, mean):
        super().__init__()
        self.mean, self.log_scale = mean, nn.Parameter(torch.zeros(2))

    def forward(self, obs, context=None):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(self.mean(), self.log_scale.exp()).expand([len(obs), 2]).to_event(1))


ELSEWHERE = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("mean", "found"),
    [
        (lambda: ELSEWHERE, r"a parameter of shape \(2,\)"),
        (lambda: pyro.param("mean", torch.zeros(2)), "pyro.param 'mean'"),
    ],
)
def test_parameters_that_no_module_of_the_pair_holds_are_refused(mean, found):
    with pytest.raises(ValueError, match=f"depends on parameters that its modules did not hold.*{found}"):
        one_epoch(vae(), guide=Hidden(mean))


class Scaled(PyroModule):
    """x ~ N(0, σ²), with σ a parameter of Pyro's, which goes by its name in Pyro's store."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(3.0), dist.constraints.positive)

    def forward(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", dist.Normal(0.0, self.scale).expand([len(obs), 1]).to_event(1), obs=obs)


def test_parameters_of_pyro_modules_with_one_name_do_not_meet():
    data = indexed_data(4)
    first, second = Scaled(), Scaled()
    run_fit(first, data)
    run_fit(second, data)  # and not the first one's
    assert float(first.scale.detach()) == float(second.scale.detach()) != 3.0
    untouched = Scaled()
    scores = [float(log_likelihood(each, data.test, estimator=exact()).log_prob[0]) for each in (first, untouched)]
    for score, module in zip(scores, (first, untouched), strict=True):
        truth = Normal(0.0, module.scale.detach()).log_prob(data.test.obs[0])
        assert score == pytest.approx(float(truth), abs=1e-6)


def test_a_mixture_that_goes_bad_in_the_middle_is_named_and_saved(tmp_path):
    model = VAE(SPACE, latent_dim=2, hidden_dims=(5,), guide="mixture")
    calls = itertools.count(1)
    model.encoder.register_forward_hook(lambda module, args, out: out * math.nan if next(calls) > 9 else out)
    with pytest.raises(svi.NonFiniteLoss, match=r"not finite: site 'z' of the guide"):
        run_fit(model, random_data(("VAE", SPACE, None)), out=tmp_path)
    assert (tmp_path / "checkpoint.pt").is_file()


def test_a_fit_that_was_interrupted_counts(data):
    model = interrupt_at(vae(), CALL_IN_EPOCH_3)
    run_fit(model, data, validate_every=100)
    assert svi.was_fitted(model)
    assert svi.was_fitted(copy.deepcopy(model))


@pytest.mark.parametrize("how", [{"resume": True}, {"method": "maximum_likelihood"}])
def test_a_start_is_refused_where_there_is_none(data, how):
    with pytest.raises(ValueError, match="initialize is for a new fit by SVI"):
        run_fit(vae(), data, initialize=True, **how)


def test_numbers_of_numpy_are_numbers(data):
    settings = {"num_epochs": np.int64(2), "batch_size": np.int64(600), "learning_rate": np.float32(1e-3)}
    assert len(run_fit(vae(), data, **settings).rows) == 2
