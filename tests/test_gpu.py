"""What a GPU gives is what the CPU gives, and nothing waits for it on the way; skipped where there is none."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from helpers import build, case_id, cases, cases_of_svi, parameters, random_args, random_data
from posterior_targets import CASES, NUM_DATA, model_with
from test_compiled import gradients_of, taken
from torch import nn
from torch.distributions import Normal
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import graphs, independent, svi, traces
from pyro_vae.estimators import ais, head, streaming
from pyro_vae.estimators.head import LinearLayers
from pyro_vae.estimators.precision import Rounded, to_tf32
from pyro_vae.guides import family
from pyro_vae.independent import bernoulli_pixels, diagonal_normal
from pyro_vae.objectives import OBJECTIVES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:TensorFloat32 tensor cores"),  # torch's own
]
SPACE = pv.Binary((4, 4))
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(args):
    return tuple(arg.to(GPU) for arg in args)


def assert_replays(model, args, objective="elbo"):
    """A CUDA graph gives loss and gradients of the pair, at other data, another seed and another weight."""
    model, args = model.to(GPU), on_gpu(args)
    with pyro.validation_enabled(False):
        graph, plain = gradients_of(model, args, objective), gradients_of(model, args, objective, compile=False)
        taken(graph, args, 0.5)
        assert (graph.way, graph.reason) == ("cuda graph", "")
        others = tuple(arg.flip(0) for arg in args)
        for weight in (0.5, 0.25):
            found = taken(graph, others, weight, seed=1)[:-1], taken(plain, others, weight, seed=1)[:-1]
            for mine, its in zip(*found, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)  # atomic sums have no fixed order


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_as_a_cuda_graph(name):
    assert_replays(model_with("mean_field", "VAE"), random_args(CASES["VAE"], NUM_DATA), name)


@pytest.mark.parametrize("name", list(family.listing()))
def test_every_guide_as_a_cuda_graph(name):
    assert_replays(model_with(name, "VAE"), random_args(CASES["VAE"], NUM_DATA))


@pytest.mark.parametrize("case", cases_of_svi((2, 2)), ids=case_id)
def test_every_model_as_a_cuda_graph(case):
    assert_replays(build(case), random_args(case, 6))


@pytest.mark.parametrize("compile", [False, None])
def test_no_step_of_a_fit_waits_for_the_gpu(compile):
    data = random_data(("VAE", SPACE, None), sizes=(64, 8, 8))
    settings = svi.Settings(num_epochs=3, batch_size=16, compile=compile, kl_warmup=2)
    run = svi.Run(traces.as_pair(build(("VAE", SPACE, None))), data, settings, GPU, None)
    with pyro.validation_enabled(False):
        run._start(None)
        run.gradients.on_trial = False
        with svi._bar(64, 0, False) as bar:
            run._train_epoch(bar)
            batch = run.data.epoch(run.generator)
            index = torch.arange(16, device=GPU)
            run.module.train()
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                loss = run._train_step(run._rows(batch, index))
            torch.cuda.set_sync_debug_mode("default")
    assert bool(loss.isfinite())
    assert run.gradients.way == ("eager" if compile is False else "cuda graph")


@pytest.mark.filterwarnings("default")  # inductor has warnings of its own
def test_a_fit_on_the_gpu_is_that_by_the_pair(monkeypatch):
    data = random_data(("VAE", SPACE, None), sizes=(42, 8, 8))  # a ragged last batch
    monkeypatch.setattr(svi.Gradients, "_pays", lambda self: True)
    found = []
    for compile in (False, None, True):
        model = build(("VAE", SPACE, None))
        history = pv.fit(model, data, num_epochs=3, batch_size=16, device="cuda", compile=compile)
        found.append((parameters(model), history.ran_as))
        assert history.reason in ("", "compile is False")
    assert [way for _, way in found] == ["eager", "cuda graph", "cuda graph"]
    for values, _ in found[1:]:
        for name, value in values.items():
            torch.testing.assert_close(value, found[0][0][name], rtol=1e-3, atol=1e-4)


def test_the_step_that_went_bad_is_named():
    data = random_data(("VAE", SPACE, None), sizes=(32, 8, 8))
    with pytest.raises(svi.NonFiniteLoss, match=r"loss is \S+ at step \d+ \(epoch \d+\); not finite: "):
        pv.fit(build(("VAE", SPACE, None)), data, num_epochs=50, batch_size=16, learning_rate=1e18, device="cuda")


@pytest.fixture
def kernels():
    """As in an estimate."""
    with torch.no_grad(), independent.by_kernels():
        yield


def layer_of(width, pixels):
    layer = nn.Linear(width, pixels, device=GPU)
    with torch.no_grad():
        layer.weight.mul_(5)
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("sizes", [(130, 3, 200, 784), (128, 2, 50, 30), (200, 1, 16, 64), (300, 5, 250, 100)])
def test_the_last_layer_and_its_pixels(sizes, precision, kernels):
    """Against float64, from the numbers that it was given: its sums are those of float32."""
    num_particles, num_data, width, pixels = sizes
    layer, hidden = layer_of(width, pixels), torch.randn(num_particles, num_data, width, device=GPU).tanh()
    bits = torch.bernoulli(torch.full((num_data, pixels), 0.3, device=GPU))
    linear = functional.linear if precision == "float32" else Rounded(precision)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "SMALLEST", 0)
        patch.setattr(independent, "products", None)  # what runs where no kernel does
        with LinearLayers(linear):
            found = bernoulli_pixels(layer(hidden), 1).log_prob(bits)
        rounded = {"float32": lambda v: v, "tf32": to_tf32, "float16": lambda v: v.half()}[precision]
        logits = rounded(hidden).double() @ rounded(layer.weight).double().T + layer.bias.double()
        truth = (bits * logits - functional.softplus(logits)).sum(-1)
    assert found.dtype == torch.float32
    # The chip may cut inputs to TF32 where they should be rounded: an error of the last of 10 bits in each product.
    atol = 2e-4 if precision != "tf32" else 2e-2 * math.sqrt(pixels / 784)
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("shape", [(130, 3, 50), (7, 50), (1, 5, 3), (4, 1, 200)])
def test_normal_latents_in_one_pass(shape, kernels):
    value = torch.randn(shape, device=GPU)
    loc, scale = torch.randn(shape[1:], device=GPU), torch.rand(shape[1:], device=GPU) + 0.1
    zero = torch.zeros((), device=GPU).expand(shape[-1])
    for mean, deviation in ((loc, scale), (zero, zero + 1), (loc.expand(shape), zero + 2)):
        with torch.no_grad():
            found = diagonal_normal(mean, deviation).expand(shape[:-1]).log_prob(value)
        truth = Normal(mean.double(), deviation.double()).log_prob(value.double()).sum(-1)
        torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=1e-4)


def test_draws_of_normal_latents():
    loc, scale = torch.randn(5, 3, device=GPU), torch.rand(5, 3, device=GPU) + 0.1
    law, found = diagonal_normal(loc, scale).expand((2000, 5)), []
    for how in (independent.by_kernels, nullcontext):
        torch.manual_seed(0)
        with torch.no_grad(), how():
            found.append(law.rsample())
    torch.testing.assert_close(*found)
    assert found[0].shape == (2000, 5, 3)


def test_the_kernel_keeps_nan_and_grey_pixels(kernels):
    layer, hidden = layer_of(20, 33), torch.randn(128, 2, 20, device=GPU)
    hidden[5, 1, 3] = math.nan
    grey = torch.rand(2, 33, device=GPU)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "SMALLEST", 0)
        for linear in (functional.linear, Rounded("tf32"), Rounded("float16")):  # three ways
            with LinearLayers(linear):
                found = bernoulli_pixels(layer(hidden), 1).log_prob(grey)
            assert bool(found[5, 1].isnan())
            assert int(found.isnan().sum()) == 1


def fitted(space=SPACE, num_epochs=20):
    data = random_data(("VAE", space, None), sizes=(200, 20, 40))
    model = pv.models.VAE(space, latent_dim=2, hidden_dims=(32, 32))
    pv.fit(model, data, num_epochs=num_epochs, batch_size=50, device="cuda")
    return model, data.test


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "float64"])
def test_importance_sampling_agrees_with_the_cpu(precision, monkeypatch):
    monkeypatch.setattr(head, "SMALLEST", 0)
    monkeypatch.setitem(streaming.BLOCK_ROWS, "cuda", 4 * 600)  # several blocks of data and of particles
    model, test = fitted()
    estimator = pv.importance_sampling(5000, precision=precision)
    here = pv.log_likelihood(model, test, estimator=estimator, device="cuda")
    there = pv.log_likelihood(model, test, estimator=pv.importance_sampling(5000), device="cpu", seed=1)
    gap = (here.log_prob - there.log_prob) / np.sqrt(here.variance + there.variance)
    assert np.abs(gap).max() < 4.5  # of 40 normal numbers
    again = pv.log_likelihood(model, test, estimator=estimator, device="cuda")
    assert np.array_equal(here.log_prob, again.log_prob)
    if precision in ("tf32", "float16"):
        assert abs(here.precision_error.mean) < 1e-3


def test_importance_sampling_never_waits_for_the_gpu():
    model, test = fitted()
    pair, args = traces.as_pair(model.to(GPU)), (test.obs.to(GPU),)
    blocks = streaming.Blocks(pair, args, 300, 0, tiled=False, fixed_law=True)
    blocks.block_particles, blocks.block_data = 100, 10
    with torch.no_grad(), pyro.validation_enabled(False):
        for warm in (True, False):
            if not warm:
                torch.cuda.set_sync_debug_mode("error")
            for start, stop in ((0, 10), (10, 20)):
                sums = streaming.Accumulator(300, 10, GPU, jackknife=False)
                for log_weights in blocks.particles(start, stop):
                    sums.update(log_weights)
                figures = sums.finish()
    torch.cuda.set_sync_debug_mode("default")
    assert bool(figures["log_prob"].isfinite().all())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_bad_weight_is_named(precision, monkeypatch):
    monkeypatch.setattr(head, "SMALLEST", 0)
    model, test = fitted(num_epochs=1)
    obs = test.obs.clone()
    with torch.no_grad():
        model.decoder.layers[-1].weight.mul_(1e6 if precision == "float16" else math.nan)
    message = "beyond 65504" if precision == "float16" else r"log weight of datum 0 is nan \(40 such data"
    with pytest.raises(ValueError, match=message):
        pv.log_likelihood(
            model,
            replace(test, obs=obs),
            estimator=pv.importance_sampling(500, precision=precision),
            device="cuda",
        )


def test_memory_that_runs_out_leaves_the_digits():
    model, test = fitted()
    estimator = pv.importance_sampling(1000)
    whole = pv.log_likelihood(model, test, estimator=estimator, device="cuda")
    calls, score = 0, streaming.Blocks._score_block

    def short_of_memory(self, args, count, values, log_q):
        nonlocal calls
        calls += 1
        if calls == 1:
            self.shrunk = 4
        return score(self, args, count, values, log_q)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Blocks, "_score_block", short_of_memory)
        parts = pv.log_likelihood(model, test, estimator=estimator, device="cuda")
    np.testing.assert_allclose(parts.log_prob, whole.log_prob, atol=1e-4)  # products of other shapes
    assert any("4 parts" in note for note in parts.notes)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_annealing_as_a_cuda_graph_is_annealing(start, monkeypatch):
    model, test = fitted()
    estimator, found = pv.annealed_importance_sampling(20, 8, 5, start), []
    for limit in (10**9, 0):
        monkeypatch.setattr(ais, "WORTH_A_GRAPH", limit)
        found.append(pv.log_likelihood(model, test, estimator=estimator, device="cuda"))
    assert not any("no CUDA graph" in note for note in found[1].notes)
    # A last digit may decide an accept step: most chains are the same.
    assert np.median(np.abs(found[0].log_prob - found[1].log_prob)) < 1e-3
    exact = pv.log_likelihood(model, test, estimator=pv.importance_sampling(20_000), device="cuda")
    assert abs(found[1].mean - exact.mean) < 4 * found[1].mc_se + 0.05  # of T = 20


def test_what_cannot_be_replayed_says_so():
    def looks(u):
        return (u * float(u.sum()), u)

    with pytest.raises(RuntimeError, match="tracing tensor") as caught:
        graphs.replayed(looks, nn.ModuleList(), (), torch.randn(3, 2, device=GPU))
    assert "takes numbers out of tensors" in graphs.why(caught.value)


@pytest.mark.parametrize("name", ["GaussianMixture", "BernoulliMixture"])
def test_mixtures_are_those_of_the_cpu(name):
    case = next(each for each in cases((3, 3)) if each[0] == name)
    data = random_data(case, sizes=(300, 20, 20))
    found = []
    for device in ("cpu", "cuda"):
        model = build(case)
        pv.fit(model, copy.deepcopy(data), device=device)
        found.append(pv.log_likelihood(model, data.test, device=device).mean)
    assert found[0] == pytest.approx(found[1], abs=1e-2)
