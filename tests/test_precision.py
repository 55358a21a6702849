"""Linear layers in shorter numbers against float64, and against rounding that numpy does."""

import json
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae.estimators import head
from pyro_vae.estimators.estimate import PrecisionError
from pyro_vae.estimators.importance import CHECKED_DATA
from pyro_vae.estimators.names import PRECISIONS
from pyro_vae.estimators.precision import REDUCED, Rounded, tf32_products, to_tf32
from pyro_vae.networks import NETWORKS

SHAPE = (8, 8)


def vae(scale=1.0):
    torch.manual_seed(0)
    model = pv.models.VAE(pv.Binary(SHAPE), latent_dim=4, hidden_dims=(32,))
    with torch.no_grad():
        model.decoder.layers[-1].weight.mul_(scale)
    return model


def bits(num_data=40):
    generator = torch.Generator().manual_seed(0)
    return pv.Batch(torch.bernoulli(torch.full((num_data, *SHAPE), 0.3), generator=generator))


def scored(model, precision, batch=None, num_particles=200, **kwargs):
    estimator = pv.importance_sampling(num_particles, precision=precision)
    return pv.log_likelihood(model, batch or bits(), estimator=estimator, device="cpu", **kwargs)


def test_tf32_has_the_mantissa_of_float16():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))  # within the range of float16
    torch.testing.assert_close(to_tf32(values), values.half().float(), rtol=0, atol=2**-25)  # its subnormal numbers
    large = torch.tensor([1e30, -3e38, 1e-30])
    assert bool(((to_tf32(large) - large).abs() <= large.abs() * 2**-11).all())
    special = torch.tensor([torch.inf, -torch.inf, 0.0])
    assert torch.equal(to_tf32(special), special)
    assert to_tf32(torch.tensor(torch.nan)).isnan()


def test_ties_go_to_even():
    ulp = 2.0**-10
    found = to_tf32(torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2]))
    assert found.tolist() == [1.0, 1 + 2 * ulp]


@pytest.mark.parametrize("precision", REDUCED)
def test_a_layer_sums_rounded_products_and_keeps_the_bias(precision):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, generator=generator) for size in ((5, 3, 20), (7, 20)))
    bias = torch.full((7,), 1000.123)  # would lose its digits in a short number
    short = [each.numpy().astype(np.float16).astype(np.float64) for each in (rows, weight)]
    truth = short[0] @ short[1].T + bias.double().numpy()
    found = Rounded(precision)(rows, weight, bias)
    np.testing.assert_allclose(found.numpy(), truth, rtol=0, atol=2e-4)  # float32 near 1000 has steps of 6e-5
    assert found.dtype == torch.float32


@pytest.mark.parametrize("precision", REDUCED)
def test_the_error_stands_in_the_result_and_is_small(precision):
    result, truth, whole = (scored(vae(), each) for each in (precision, "float64", "float32"))
    error = result.precision_error
    assert (error.precision, error.num_data, error.num_particles) == (precision, CHECKED_DATA, 200)
    assert abs(error.mean) < 1e-3
    assert abs(error.mean) <= error.largest < 0.02
    assert error.largest > 0
    gaps = result.log_prob - truth.log_prob  # the same noise: other data and draws than those of `error`
    assert abs(gaps.mean()) < 1e-3
    assert 0 < np.abs(gaps).max() < 0.02
    assert np.abs(whole.log_prob - truth.log_prob).max() < 1e-4
    assert whole.precision_error is None
    assert truth.notes == ("the model was scored in float64, at the draws of the guide",)


def test_float64_is_what_a_model_in_float64_gives_at_the_same_draws():
    model, batch = vae(), bits(3)
    draws, kept = [], model.likelihood

    def likelihood(z):
        draws.append(z)
        return kept(z)

    model.likelihood = likelihood
    result = scored(model, "float64", batch, num_particles=50)
    z = next(each for each in draws if each.dtype == torch.float64)  # the first that are scored
    model.double()
    with torch.no_grad():
        log_joint = model.log_joint(z, batch.obs.double())
        law = model.posterior(model.encoder(batch.obs.double()))
    log_weights = log_joint - law.log_prob(z)
    truth = log_weights.logsumexp(0) - np.log(50)
    np.testing.assert_allclose(result.log_prob, truth.numpy(), atol=1e-4)  # log q is float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_is_left_as_it_was(precision):
    model = vae()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    scored(model, precision)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_a_number_beyond_float16_is_an_error():
    model = vae()
    with torch.no_grad():
        model.decoder.layers[0].weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"beyond 65504, the largest of float16; take precision='tf32'"):
        scored(model, "float16")
    assert np.isfinite(scored(model, "tf32").log_prob).all()


def test_multilevel_takes_a_precision():
    model, batch = vae(), bits()
    found = {
        precision: pv.log_likelihood(model, batch, estimator=pv.multilevel(50, precision=precision), device="cpu")
        for precision in PRECISIONS
    }
    for precision in ("tf32", "float16"):
        assert abs(found[precision].mean - found["float64"].mean) < 1e-3
        assert found[precision].precision_error.precision == precision
    assert found["float32"].precision_error is None
    # The levels of the data are the same, and so are the draws: what differs is rounding.
    np.testing.assert_allclose(found["float32"].log_prob, found["float64"].log_prob, atol=1e-4)


@pytest.mark.parametrize(
    ("mean", "se", "warns"), [(0.0027, 0.0015, False), (0.0027, 0.0005, True), (-0.01, None, True)]
)
def test_a_shift_that_matters_is_a_warning_and_scatter_over_few_data_is_none(mean, se, warns):
    result = scored(vae(), "tf32")
    shifted = replace(result, precision_error=replace(result.precision_error, mean=mean, se=se))
    assert (f"tf32 moves the mean by {mean:+}" in shifted.warning) == warns
    assert "moves" not in result.warning


def test_the_error_of_the_mean_is_that_of_the_data():
    """Rounding moves every datum by another amount."""
    result = scored(vae(scale=300.0), "tf32", num_particles=50)
    error = result.precision_error
    assert 0 < error.se < error.largest
    assert abs(error.mean) < 5 * error.se  # rounding has no direction


def test_the_error_is_saved_with_the_result(tmp_path):
    result = scored(vae(), "tf32")
    result.save(tmp_path / "result.npz")
    assert pv.LogLikelihood.load(tmp_path / "result.npz").precision_error == result.precision_error
    assert PrecisionError(**json.loads(json.dumps(result.summary()))["precision_error"]) == result.precision_error
    assert "precision_error" not in scored(vae(), "float32").summary()


def test_a_pair_of_plain_functions_whose_layers_are_not_modules():
    weight = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=functional.linear(z, weight)).to_event(1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(obs), 2), 1.0).to_event(1))

    batch = pv.Batch(torch.bernoulli(torch.full((9, 16), 0.5), generator=torch.Generator().manual_seed(0)))
    results = {each: scored(model, each, batch, guide=guide) for each in PRECISIONS}
    for each in PRECISIONS:
        np.testing.assert_allclose(results[each].log_prob, results["float64"].log_prob, rtol=0, atol=5e-3)
    assert results["tf32"].precision_error.num_data == 9


PROPOSALS = {
    "none": None,
    "refined": pv.refined(2, 2),
    "defensive": pv.defensive(),
    "overdispersed": pv.overdispersed(1.5),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("form", ["a module", "functions"])
def test_every_precision_goes_with_every_proposal_and_network(network, proposal, form):
    torch.manual_seed(0)
    vae = pv.models.VAE(pv.Binary(SHAPE), latent_dim=2, hidden_dims=(6,), network=network)
    model, guide = (vae, None) if form == "a module" else (lambda obs: vae.model(obs), lambda obs: vae.guide(obs))
    results = {}
    for precision in PRECISIONS:
        estimator = pv.importance_sampling(8, precision=precision, proposal=PROPOSALS[proposal])
        results[precision] = pv.log_likelihood(model, bits(3), guide=guide, estimator=estimator, device="cpu").log_prob
    for precision in PRECISIONS:  # the same draws
        np.testing.assert_allclose(results[precision], results["float64"], rtol=0, atol=1e-2)
    assert all(value.dtype == torch.float32 for value in vae.parameters())


@pytest.mark.parametrize("precision", ["tf32", "float16", "float64"])
def test_a_convolution_that_no_module_holds_is_refused(precision):
    weight = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, *SHAPE), 1.0).to_event(3))
            logits = functional.conv2d(z.reshape(-1, 2, *SHAPE), weight, padding=1).reshape(*z.shape[:-3], *SHAPE)
            pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(2), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(obs), 2, *SHAPE), 1.0).to_event(3))

    assert np.isfinite(scored(model, "float32", bits(3), guide=guide).log_prob).all()
    with pytest.raises(ValueError, match="precision 'float64', which 'tf32' and 'float16' are held against, needs"):
        scored(model, precision, bits(3), guide=guide)


def test_another_complaint_of_the_model_stays_as_it_is():
    model = vae()

    def fail(z):
        raise RuntimeError("no such double")

    kept = model.likelihood
    model.likelihood = lambda z: (fail if z.dtype == torch.float64 else kept)(z)
    with pytest.raises(RuntimeError, match=r"^no such double"):
        scored(model, "float64", bits(3))


def test_a_layer_that_waits_is_rounded_too(monkeypatch):
    results = []
    for smallest in (0, 10**9):
        monkeypatch.setattr(head, "SMALLEST", smallest)
        results.append(scored(vae(), "tf32").log_prob)
    np.testing.assert_allclose(*results, rtol=0, atol=1e-5)


def test_the_setting_of_the_process_is_put_back():
    backend = torch.backends.cuda.matmul
    name, inside = ("fp32_precision", "tf32") if hasattr(backend, "fp32_precision") else ("allow_tf32", True)
    before, found = getattr(backend, name), []

    def fail():
        with tf32_products():
            found.append(getattr(backend, name))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (found, getattr(backend, name)) == ([inside], before)
    assert not backend.allow_tf32  # readable: the older setting and the newer one agree


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, float16, float64, got 'bfloat16'"):
        pv.importance_sampling(10, precision="bfloat16")


def test_convolutions_stay_in_float32():
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(model.weight, 1 + 2**-20)
    with torch.no_grad(), head.LinearLayers(Rounded("tf32")):
        assert float(model(torch.ones(1, 1, 1, 1))) == 1 + 2**-20
