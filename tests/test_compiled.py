"""A pair as one graph: what Trace_ELBO gives, to the digit; what cannot be a graph runs as it is, and says why."""

import random
import shutil
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import build, case_id, cases, parameters, random_args, random_data, same
from posterior_targets import CASES, NUM_DATA, model_with
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import svi, traces
from pyro_vae.compiled import Gradients
from pyro_vae.graphs import are_equal
from pyro_vae.guides import family
from pyro_vae.objectives import OBJECTIVES, make_objective

SPACE = pv.Binary((3, 3))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with pyro.validation_enabled(False):  # as in the loop of a fit
        yield
    pyro.clear_param_store()


def gradients_of(model, args, objective="elbo", compile=None, guide=None):
    """What a fit would step by, with a graph from the first step on unless `compile` is False."""
    pair = traces.as_pair(model, guide)
    several = {"num_particles": 3 if objective in ("iwae", "renyi", "dreg") else 1}
    how = make_objective(objective, pair, args, **several, alpha=0.5, free_bits=0.25)
    made = Gradients(how, pair, nn.ModuleList(pair.modules).train(), compile, num_steps=1000)
    made.on_trial = False
    return made


def taken(gradients, args, weight=1.0, seed=0):
    """Loss and gradients of one step from a seed, and the noise that comes after it."""
    torch.manual_seed(seed)
    loss = gradients(args, weight)
    return [loss, *(p.grad.clone() for p in gradients.parameters if p.grad is not None), torch.rand(3)]


def assert_same(left, right):
    assert len(left) == len(right)
    for mine, its in zip(left, right, strict=True):
        assert torch.equal(mine, its)


def assert_a_graph_has_the_digits(objective, guide):
    """Made on one batch and one noise, held to another, and to weights that it was not made with."""
    model, args = model_with(guide, "VAE"), random_args(CASES["VAE"], NUM_DATA)
    graph, plain = gradients_of(model, args, objective), gradients_of(model, args, objective, compile=False)
    taken(graph, args, 0.5)
    others = tuple(arg.flip(0) for arg in args)
    for weight in (0.5, 0.25):
        assert_same(taken(graph, others, weight, seed=1), taken(plain, others, weight, seed=1))
    assert (graph.way, graph.reason) == ("graph", "")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_digits_of_the_pair(name):
    assert_a_graph_has_the_digits(name, "mean_field")


@pytest.mark.parametrize("name", [name for name in family.listing() if name != "mean_field"])
def test_every_guide_has_the_digits_of_the_pair(name):
    assert_a_graph_has_the_digits("elbo", name)


@pytest.mark.parametrize("guide", ["mixture", "hierarchical"])
def test_objectives_that_ask_for_a_density_have_the_digits_of_the_pair(guide):
    assert_a_graph_has_the_digits("dreg", guide)


@pytest.mark.parametrize("case", cases((2, 2)), ids=case_id)
def test_every_model_has_the_digits_of_the_pair(case):
    model, args = build(case), random_args(case, 6)
    graph, plain = gradients_of(model, args), gradients_of(model, args, compile=False)
    taken(graph, args)
    assert_same(taken(graph, args, seed=1), taken(plain, args, seed=1))
    assert (graph.way, graph.reason) == ("graph", "")


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", list(family.listing()))
def test_the_elbo_has_the_gradients_of_trace_elbo_to_the_digit(name, kind):
    model, args = model_with(name, kind), random_args(CASES[kind], NUM_DATA)
    mine = taken(gradients_of(model, args, compile=False), args)
    torch.manual_seed(0)
    model.zero_grad()
    loss = Trace_ELBO().differentiable_loss(model.model, model.guide, *args) / NUM_DATA
    loss.backward()
    pyros = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)]
    assert_same(mine[1:], pyros[1:])
    torch.testing.assert_close(mine[0], pyros[0])  # Pyro adds the loss itself up in Python's floats


@pytest.mark.parametrize("name", ["mean_field", "full_covariance"])  # with a closed form, and without
def test_the_closed_form_has_the_gradients_of_trace_mean_field_elbo(name):
    model, args = model_with(name, "VAE"), random_args(CASES["VAE"], NUM_DATA)
    mine = taken(gradients_of(model, args, "mean_field", compile=False), args)
    torch.manual_seed(0)
    model.zero_grad()
    (TraceMeanField_ELBO().differentiable_loss(model.model, model.guide, *args) / NUM_DATA).backward()
    assert_same(mine[1:-1], [p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("settings", [{}, {"objective": "iwae", "num_particles": 3}, {"kl_warmup": 2}])
def test_a_fit_by_graph_is_the_fit_by_the_pair_bit_for_bit(settings, monkeypatch):
    """Ten data in batches of four: a ragged last batch, which has a graph of its own."""
    plain = random_data(("VAE", SPACE, None), sizes=(10, 6, 3))
    data = replace(plain, intensity=torch.rand(10, 3, 3))
    monkeypatch.setattr(Gradients, "_pays", lambda self: True)
    found = []
    for compile in (False, None):
        model = build(("VAE", SPACE, None))
        history = pv.fit(model, data, num_epochs=4, batch_size=4, device="cpu", compile=compile, **settings)
        found.append((parameters(model), history))
    assert same(found[0][0], found[1][0])
    assert [history.ran_as for _, history in found] == ["eager", "graph"]
    mine, its = ([row["valid_elbo"] for row in history.rows] for _, history in found)
    assert mine == its


def test_batch_normalisation_keeps_its_running_means():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

        def forward(self, obs):
            with pyro.plate("data", len(obs), dim=-1):
                pyro.sample("obs", dist.Normal(self.net(torch.ones_like(obs) + obs), 1).to_event(1), obs=obs)

    found = []
    for compile in (False, None):
        torch.manual_seed(0)
        model, obs = Model(), torch.randn(6, 2)
        step = gradients_of(model, (obs,), compile=compile)
        found.append([*taken(step, (obs,)), *taken(step, (obs + 1,)), *model.buffers()])
    assert_same(*found)


class Sure(nn.Module):
    """x ~ N(μ, 1), with something that no graph can know."""

    def __init__(self, quirk):
        super().__init__()
        self.loc, self.quirk, self.count = nn.Parameter(torch.zeros(2)), quirk, 0

    def forward(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", dist.Normal(self.loc * self.quirk(self, obs), 1).to_event(1), obs=obs)


def looks(model, obs):
    return 2.0 if obs.sum() > 0 else 1.0


def counts(model, obs):
    model.count += 1
    return 1.0 if model.count < 1000 else 2.0


def draws_in_python(model, obs):
    return random.random()


def knows_the_batch(model, obs):
    return torch.tensor(float(obs.numpy()[0, 0]))


@pytest.mark.parametrize(
    ("quirk", "reason"),
    [
        (looks, "takes numbers out of tensors"),
        (counts, "the pair changes Sure.count as it runs"),
        (draws_in_python, "do not issue the same operations"),
        (knows_the_batch, "does not give what the pair gives on other data"),
    ],
)
@pytest.mark.parametrize("compile", [None, True])
def test_what_no_graph_can_know_runs_as_it_is_and_says_so(quirk, reason, compile):
    obs = torch.randn(4, 2)
    found = []
    for way in (compile, False):
        random.seed(0)
        step = gradients_of(Sure(quirk), (obs,), compile=way)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            step((obs,), 1.0)
        if way is not False:
            assert step.way == "eager"
            assert reason in step.reason
            assert [str(each.message) for each in heard] == (
                [f"compile=True has no effect, the pair runs as Pyro does: {step.reason}"] if compile else []
            )
        random.seed(1)
        found.append(taken(step, (obs - 1,)))
    assert_same(*found)


def test_a_site_with_a_score_runs_as_it_is():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(torch.zeros(()))

        def forward(self, obs):
            with pyro.plate("data", len(obs), dim=-1):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
                pyro.sample("obs", dist.Normal(z * self.logit, 1), obs=obs)

        def guide(self, obs):
            with pyro.plate("data", len(obs), dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=self.logit + obs))

    model, obs = Model(), torch.randn(4)
    step = gradients_of(model, (obs,), guide=model.guide)
    taken(step, (obs,))
    assert "takes numbers out of tensors" in step.reason


def test_a_graph_is_made_only_where_the_steps_that_are_left_pay_for_it():
    obs = torch.randn(4, 2)
    for num_steps, expected in ((100, False), (10**9, True)):
        step = gradients_of(Sure(lambda model, obs: 1.0), (obs,))
        step.on_trial, step.num_steps = True, num_steps
        for _ in range(20):
            step((obs,), 1.0)
        assert bool(step.graphs) is expected


def test_a_guide_whose_density_needs_an_index_of_the_data_runs_as_it_is():
    """Pyro's inverse of an autoregressive flow indexes by the numbers of a permutation."""
    model, args = model_with("inverse_autoregressive", "VAE"), random_args(CASES["VAE"], NUM_DATA)
    step = gradients_of(model, args, "dreg")
    taken(step, args)
    assert "takes numbers out of tensors" in step.reason


def test_nothing_of_the_process_is_changed():
    before = torch.distributions.Distribution._validate_args, pyro.settings.get()
    model, args = model_with("mean_field", "VAE"), random_args(CASES["VAE"], NUM_DATA)
    taken(gradients_of(model, args), args)
    assert (torch.distributions.Distribution._validate_args, pyro.settings.get()) == before


def test_graphs_of_other_numbers_are_not_the_same():
    from torch.fx.experimental.proxy_tensor import make_fx

    shift = [torch.ones(2), torch.zeros(2)]
    graphs = [make_fx(each.add)(torch.ones(2)) for each in (shift[0], shift[0], shift[1])]
    assert are_equal(graphs[0], graphs[1])
    assert not are_equal(graphs[0], graphs[2])


def test_a_bad_loss_is_named_by_going_over_the_epoch_again(tmp_path):
    """As on a device that is not asked for every loss: the sum goes bad, and then the step is looked for."""
    data = random_data(("VAE", SPACE, None), sizes=(10, 6, 3))
    heard = []
    for checks in (True, False):
        model = build(("VAE", SPACE, None))
        run = svi.Run(traces.as_pair(model), data, svi.Settings(num_epochs=3, batch_size=4), torch.device("cpu"), None)
        run.checks_every_loss = checks

        def spoil(*args, run=run):
            if run.step == 5:
                run.parameters[0].data.fill_(float("nan"))

        run.optimizer.register_step_post_hook(spoil)
        with pytest.raises(svi.NonFiniteLoss) as error:
            run.go(resume=False, progress=False)
        heard.append(str(error.value))
    assert heard[0] == heard[1]
    assert "step 6 (epoch 2)" in heard[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_numbers_of_the_pair_up_to_rounding():
    """The same noise: both draw as torch does."""
    before = torch.distributions.Distribution._validate_args
    model, args = model_with("mean_field", "VAE"), random_args(CASES["VAE"], NUM_DATA)
    fused, plain = gradients_of(model, args, compile=True), gradients_of(model, args, compile=False)
    taken(fused, args)
    assert (fused.way, fused.reason) == ("inductor", "")
    others = tuple(arg.flip(0) for arg in args)
    found = taken(fused, others, seed=1), taken(plain, others, seed=1)
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)  # sums in another order, float32
    assert torch.equal(found[0][-1], found[1][-1])
    ragged = tuple(arg[:3] for arg in args)  # has a graph of its own, which is not fused
    assert_same(taken(fused, ragged, seed=1), taken(plain, ragged, seed=1))
    assert torch.distributions.Distribution._validate_args == before
