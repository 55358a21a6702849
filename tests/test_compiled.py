"""A pair as one graph: what Trace_ELBO gives, to the digit; what cannot be a graph runs as it is, and says why."""

import copy
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import build, case_id, cases_of_svi, parameters, random_args, random_data, same
from posterior_targets import CASES, NUM_DATA, model_with
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import graphs, svi, traces
from pyro_vae.compiled import CHECK_EVERY, STEPS_ON_GPU, Gradients
from pyro_vae.data import Batch, Data
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
    made.on_trial = made.checks = False  # no step but the first by the pair
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


@pytest.mark.parametrize("case", cases_of_svi((2, 2)), ids=case_id)
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
        self.loc, self.quirk, self.count, self.box = nn.Parameter(torch.ones(2)), quirk, 0, [0]
        self.register_buffer("seen", torch.zeros(2))
        self.last, self.generator = torch.zeros(2), np.random.default_rng(0)

    def forward(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", dist.Normal(self.loc * self.quirk(self, obs), 1).to_event(1), obs=obs)


def looks(model, obs):
    return 2.0 if obs.sum() > 0 else 1.0


def counts(model, obs):
    model.count += model.training
    return 1.0 + model.count / 100


def counts_in_a_list(model, obs):
    model.box[0] += model.training
    return 1.0 if model.box[0] < 20 else 2.0


COUNTS = {"steps": 0}


def counts_in_its_file(model, obs):
    COUNTS["steps"] += model.training
    return 1.0 if COUNTS["steps"] % 16 < 8 else 2.0


def counter():
    steps = 0

    def counts_in_a_closure(model, obs):
        nonlocal steps
        steps += model.training
        return 1.0 if steps % 16 < 8 else 2.0

    return counts_in_a_closure


def has_a_new_buffer(model, obs):
    """A running maximum, which is most often what it was."""
    if model.training:
        model.seen = torch.maximum(model.seen, obs.amax(0))
    return model.seen


def has_a_new_tensor(model, obs):
    model.last = torch.maximum(model.last, obs.amax(0)) if model.training else model.last
    return model.last


def draws_in_python(model, obs):
    return 1 + random.random()


def draws_in_numpy(model, obs):
    return 1 + np.random.rand()  # noqa: NPY002


def draws_by_itself(model, obs):
    return 1 + model.generator.random()


def knows_the_batch(model, obs):
    return torch.tensor(float(obs.numpy()[0, 0]))


def knows_a_norm(model, obs):
    return float((np.asarray(obs) ** 2).sum())


def knows_a_list(model, obs):
    return max(map(max, obs.tolist()))


def counts_what_is_different(model, obs):
    return obs.round().unique().numel()


def takes_some_by_a_mask(model, obs):
    is_seen = obs > -0.5
    return torch.zeros_like(obs).masked_scatter(is_seen, obs[is_seen])


def copies(model, obs):
    return copy.deepcopy(obs)


NO_GRAPH = [
    (looks, "takes numbers out of tensors"),
    (counts, "the pair changes Sure.count as it runs"),
    (counts_in_a_list, "the pair changes Sure.box as it runs"),
    (counts_in_its_file, "the pair changes COUNTS of counts_in_its_file.steps as it runs"),
    (counter(), "the pair changes steps of counter.<locals>.counts_in_a_closure as it runs"),
    (has_a_new_buffer, "the pair changes Sure.seen as it runs"),
    (has_a_new_tensor, "the pair changes Sure.last as it runs"),
    (draws_in_python, "the pair changes the random state of Python as it runs"),
    (draws_in_numpy, "the pair changes the random state of numpy as it runs"),
    (draws_by_itself, "the pair changes Sure.generator as it runs"),
    (knows_the_batch, "takes numbers out of tensors as it runs (Tensor.numpy)"),
    (knows_a_norm, "takes numbers out of tensors as it runs (Tensor.__array__)"),
    (knows_a_list, "takes numbers out of tensors as it runs (Tensor.tolist)"),
    (counts_what_is_different, "shapes depend on numbers (unique2)"),
    (takes_some_by_a_mask, "shapes depend on numbers (a mask as an index)"),
    (copies, "tracing failed: NotImplementedError"),
]
each_without_a_graph = pytest.mark.parametrize(
    ("quirk", "reason"), NO_GRAPH, ids=[quirk.__name__ for quirk, _ in NO_GRAPH]
)


def start_again(quirk):
    """Random numbers and counts outside of models."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    COUNTS["steps"] = 0
    for cell in quirk.__closure__ or ():
        cell.cell_contents = 0


@each_without_a_graph
@pytest.mark.parametrize("num_data", [1, 4])
@pytest.mark.parametrize("compile", [None, True])
def test_what_no_graph_can_know_runs_as_it_is_and_says_so(quirk, reason, num_data, compile):
    obs = torch.randn(num_data, 2)
    found = []
    for way in (compile, False):
        start_again(quirk)
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
        found.append(taken(step, (obs - 1,)))
    assert_same(*found)


def real_data(sizes=(32, 8, 4), num_dims=2):
    generator = torch.Generator().manual_seed(1)
    parts = [Batch(torch.randn(num, num_dims, generator=generator)) for num in sizes]
    return Data("normal", pv.Real((num_dims,)), *parts)


def fits_with(quirk, monkeypatch):
    """What is left of a fit by the pair, and of one that thinks of a graph at the seventh step."""
    monkeypatch.setattr(Gradients, "_pays", lambda self: self.step > 6)
    for compile in (False, None):
        start_again(quirk)
        model = Sure(quirk)
        how = {"num_epochs": 4, "batch_size": 4, "device": "cpu", "schedule": "constant", "learning_rate": 0.05}
        history = pv.fit(model, real_data(), compile=compile, **how)
        yield [model.loc.detach(), model.seen, model.last, torch.tensor(model.count + model.box[0])], history


@each_without_a_graph
def test_a_fit_that_found_no_graph_is_the_fit_by_the_pair_bit_for_bit(quirk, reason, monkeypatch):
    (plain, _), (found, history) = fits_with(quirk, monkeypatch)
    assert_same(plain, found)
    assert history.ran_as == "eager"
    assert reason in history.reason


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
    with pyro.validation_enabled(True):
        before = torch.distributions.Distribution._validate_args, pyro.settings.get()
        model, args = model_with("mean_field", "VAE"), random_args(CASES["VAE"], NUM_DATA)
        step = gradients_of(model, args)
        taken(step, args)
        assert (torch.distributions.Distribution._validate_args, pyro.settings.get()) == before
        assert before[0] is True
        assert step.reason == ""


def test_the_compiler_leaves_the_checks_of_distributions_on():
    """It switches them off the first time in a process, so that only a new one can tell."""
    code = """
import pyro, torch
from torch.fx.experimental.proxy_tensor import make_fx
from pyro_vae import graphs
pyro.enable_validation(True)
graphs.fused(make_fx(torch.neg)(torch.ones(2)))
print(torch.distributions.Distribution._validate_args)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True"]


@pytest.mark.parametrize("weight", [2.0, 4.0, 1.9, 4 / 3, 0.5, 0.0])
def test_any_weight_has_a_graph(weight):
    model, args = model_with("mean_field", "VAE"), random_args(CASES["VAE"], NUM_DATA)
    graph, plain = gradients_of(model, args), gradients_of(model, args, compile=False)
    taken(graph, args, weight)
    assert (graph.way, graph.reason) == ("graph", "")
    assert_same(taken(graph, args, weight, seed=1), taken(plain, args, weight, seed=1))


def test_an_index_of_integers_has_a_graph():
    step = gradients_of(Sure(lambda model, obs: obs[:, torch.tensor([1, 0])]), (torch.randn(4, 2),))
    taken(step, (torch.randn(4, 2),))
    assert (step.way, step.reason) == ("graph", "")


def test_a_parameter_without_numbers_has_a_graph():
    model = Sure(lambda model, obs: 1 + model.none.sum())
    model.none = nn.Parameter(torch.zeros(2, 0))
    step = gradients_of(model, (torch.randn(4, 2),))
    taken(step, (torch.randn(4, 2),))
    assert (step.way, step.reason) == ("graph", "")


@pytest.mark.parametrize("where", ["forward", "backward", "parameter", "accumulated"])
def test_hooks_are_called_in_every_step(where, monkeypatch):
    monkeypatch.setattr(Gradients, "_pays", lambda self: self.step > 6)
    found, numbers = [], []
    for compile in (False, None):
        model, calls = Sure(lambda model, obs: 1.0), SimpleNamespace(num=0)

        def call(*args, calls=calls):
            calls.num += 1

        model.net = nn.Linear(2, 2)
        model.quirk = lambda model, obs: model.net(obs)
        {
            "forward": model.net.register_forward_hook,
            "backward": model.net.register_full_backward_pre_hook,
            "parameter": model.loc.register_hook,
            "accumulated": model.loc.register_post_accumulate_grad_hook,
        }[where](call)
        history = pv.fit(model, real_data(), num_epochs=3, batch_size=4, device="cpu", compile=compile)
        found.append(calls.num)
        numbers.append(history.reason)
    assert found[0] == found[1] >= 24
    assert numbers[1].startswith("there are hooks on ")


def test_state_that_no_look_finds_is_found_by_a_step_of_the_pair():
    """In an object of a class of its own; that step and all after it are the pair's."""
    factor, obs = SimpleNamespace(value=1.0), torch.randn(4, 2)
    model = Sure(lambda model, obs: factor.value)
    step, plain = gradients_of(model, (obs,)), gradients_of(model, (obs,), compile=False)
    step.checks = True
    for _ in range(5):
        taken(step, (obs,))
    factor.value = 2.0
    for _ in range(2):  # the sixth and seventh
        taken(step, (obs,))
    assert step.way == "graph"
    with pytest.warns(UserWarning, match="at step 8 the pair no longer does what its graph does.*last 3 steps"):
        found = taken(step, (obs,))
    assert step.way == "eager"
    assert_same(found, taken(plain, (obs,)))
    assert_same(taken(step, (obs - 1,)), taken(plain, (obs - 1,)))


def test_steps_by_the_pair_leave_noise_and_buffers_as_the_graph_does():
    """And they have its digits."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.3))

        def forward(self, obs):
            with pyro.plate("data", len(obs), dim=-1):
                pyro.sample("obs", dist.Normal(self.net(obs), 1).to_event(1), obs=obs)

    found, batches = [], torch.randn(40, 6, 2)
    for compile, checks in ((None, True), (None, False), (False, False)):
        torch.manual_seed(0)
        model = Model()
        step = gradients_of(model, (batches[0],), compile=compile)
        step.checks, parts = checks, []
        for i, obs in enumerate(batches):
            parts += taken(step, (obs,), seed=i)
        found.append([*parts, *model.buffers()])
        assert step.reason == ("compile is False" if compile is False else "")
        assert [graph.agreed for graph in step.graphs.values()] == ([] if compile is False else [32 if checks else 1])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize(("name", "factor", "expected"), [("loc", 1.00001, True), ("small", 1.5, False)])
def test_rounding_is_measured_by_the_gradients_of_each_parameter(name, factor, expected):
    """Of which the largest are 10^5 times those of another parameter."""
    model = Sure(lambda model, obs: 1.0)
    model.small = nn.Parameter(torch.ones(2))
    step, sizes = gradients_of(model, (torch.randn(4, 2),)), {"loc": 1.0, "small": 1e-5}
    here, there = (
        [torch.ones(()), *(scale * size * torch.ones(2) for size, scale in zip(sizes.values(), scales, strict=True))]
        for scales in ((1.0, 1.0), [factor if each == name else 1.0 for each in sizes])
    )
    assert step._agree(here, there, exact=False) is expected
    assert step._agree(here, here, exact=True)
    assert not step._agree(here, there, exact=True)


def test_inductor_is_for_batches_of_the_full_size_at_every_weight(monkeypatch):
    """A ragged batch first, and a weight that rises to 1: what has most of the steps is fused."""
    runs = []

    def fused(graph):
        def run(*args):
            runs.append(len(args[2]))
            return graph(*args)

        return run

    monkeypatch.setattr(graphs, "fused", fused)
    model, args = model_with("mean_field", "VAE"), random_args(CASES["VAE"], NUM_DATA)
    step = gradients_of(model, args, compile=True)
    step.batch_size = NUM_DATA
    ragged = tuple(arg[:3] for arg in args)
    for batch, weight, way in (
        (ragged, 0.5, "graph"),
        (args, 0.5, "inductor"),
        (args, 1.0, "inductor"),
        (ragged, 1.0, "graph"),
        (args, 1.0, "inductor"),
    ):
        runs.clear()
        taken(step, batch, weight)
        assert (step.way, step.reason) == (way, "")
        assert runs == [len(batch[0])] * len(runs)
        assert bool(runs) is (way == "inductor")


def test_a_fit_fuses_its_full_batches(monkeypatch):
    made = []
    monkeypatch.setattr(graphs, "fused", lambda graph: made.append(graph) or graph)
    data = random_data(("VAE", SPACE, None), sizes=(10, 6, 3))
    model = build(("VAE", SPACE, None))
    history = pv.fit(model, data, num_epochs=4, batch_size=5, device="cpu", compile=True, kl_warmup=2)
    assert (len(made), history.ran_as) == (2, "inductor")


def test_on_a_gpu_the_number_of_steps_decides_and_no_clock():
    step = gradients_of(Sure(lambda model, obs: 1.0), (torch.randn(4, 2),))
    step.device, step.on_trial = torch.device("cuda"), True
    for num_steps in (STEPS_ON_GPU - 1, STEPS_ON_GPU):
        step.num_steps = num_steps
        assert step._pays() is (num_steps == STEPS_ON_GPU)


def test_few_steps_of_many_are_checked(monkeypatch):
    """The second, fourth, eighth, ..., and one in so many."""
    obs = torch.randn(4, 2)
    monkeypatch.setitem(CHECK_EVERY, "cpu", 24)
    step, checked = gradients_of(Sure(lambda model, obs: 1.0), (obs,)), []
    step.checks, step._checked = True, lambda *args: checked.append(step.step)
    for _ in range(100):
        step((obs,), 1.0)
    assert checked == [2, 4, 8, 16, 24, 32, 48, 64, 72, 96]


def test_graphs_of_other_numbers_are_not_the_same():
    from torch.fx.experimental.proxy_tensor import make_fx

    shift = [torch.ones(2), torch.zeros(2)]
    made = [make_fx(each.add)(torch.ones(2)) for each in (shift[0], shift[0], shift[1])]
    assert are_equal(made[0], made[1])
    assert not are_equal(made[0], made[2])


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
