"""Codes: closed forms, Bayes' rule, and means of many draws of the guide."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import call, trained
from helpers import all_cases, build, case_id, parameters, random_args, random_obs, read_arrays, same
from torch.distributions.transforms import ExpTransform

import pyro_vae as pv
from pyro_vae import codes, models, runs, traces
from pyro_vae.spaces import Binary, Labels, Quantized, Real

EVERY = all_cases((4, 4))


def batch_of(case, num=6, seed=0):
    args = random_args(case, num, seed)
    return pv.Batch(*args, space=case[1])


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


# --- closed forms -------------------------------------------------------------------------------------------------


def test_codes_of_ppca_are_the_conditional_mean_of_a_joint_normal():
    # (z, x) is normal with Cov(z, x) = W' and Cov(x) = W W' + σ² I: E[z | x] = W' (W W' + σ² I)^-1 (x - μ)
    ppca = pv.models.PPCA(Real((2, 3)), latent_dim=2).double()
    for value in ppca.parameters():
        value.data = torch.randn(value.shape, dtype=torch.float64)
    obs = torch.randn(7, 2, 3, dtype=torch.float64)
    loc, loadings, scale = (value.detach().numpy() for value in (ppca.loc, ppca.loadings, ppca.log_scale.exp()))
    covariance = loadings @ loadings.T + scale**2 * np.eye(6)
    expected = (np.linalg.inv(covariance) @ (obs.flatten(1).numpy() - loc).T).T @ loadings
    np.testing.assert_allclose(pv.features(ppca, obs, device="cpu").numpy(), expected, rtol=0, atol=1e-9)


def test_codes_of_ppca_keep_their_digits_in_float32():
    ppca = pv.models.PPCA(Real((20,)), latent_dim=3)
    obs = 5 + torch.randn(50, 3) @ torch.randn(3, 20) + 0.01 * torch.randn(50, 20)
    ppca.maximum_likelihood(obs)
    single = pv.features(ppca, obs, device="cpu")
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), pv.features(ppca.double(), obs.double(), device="cpu"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("space", [Binary((2, 2)), Quantized((2, 2), levels=4), Real((2, 2))], ids=str)
def test_codes_of_a_mixture_follow_bayes_rule(space):
    is_binary = isinstance(space, Binary)
    mixture = (models.BernoulliMixture if is_binary else models.GaussianMixture)(space, num_components=3)
    mixture.logits.data = torch.tensor([0.0, 1.0, -0.5])
    obs = random_obs(space, 9)
    joint = []  # of one component after the other: a mixture that has no other
    for k in range(3):
        only = torch.full((3,), -torch.inf)
        only[k] = 0.0
        weight = float(mixture.logits.detach().softmax(0)[k])
        alone = mixture.distribution()
        alone.log_weights = only
        joint.append(weight * alone.log_prob(obs).detach().double().exp())
    expected = torch.stack(joint, -1) / torch.stack(joint, -1).sum(-1, keepdim=True)
    found = pv.features(mixture, obs, device="cpu")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)  # rounding of float32


def test_codes_of_an_autoencoder_are_those_that_it_decodes():
    model, obs = models.Autoencoder(Binary((3, 3)), latent_dim=2, hidden_dims=(5,)), random_obs(Binary((3, 3)), 4)
    with torch.no_grad():
        assert torch.equal(model.decode(pv.features(model, obs, device="cpu")), model.reconstruct(obs))


# --- the mean of the guide ----------------------------------------------------------------------------------------


def mean_of_draws(model, args, site, num=20_000):
    """Mean and standard error of what the guide draws, (n, units)."""
    values, _ = traces.draw_latents(traces.as_pair(model), args, num, tiled=False)
    draws = values[site].detach().double()
    return draws.mean(0), draws.std(0) / num**0.5


def assert_near(found, mean, error):
    assert float(((found.double() - mean) / error).abs().max()) < 4.5  # at most 100 numbers: P < 0.001


@pytest.mark.parametrize("name", ["VAE", "CVAE"])
def test_codes_of_a_vae_are_the_mean_of_its_guide(name):
    context = Labels(log_prob=(-1.0, -1.0, -1.2)) if name == "CVAE" else None
    case = (name, Binary((4, 4)), context)
    model, batch = build(case), batch_of(case)
    found = pv.features(model, batch, device="cpu")
    with torch.no_grad():
        exact = model.posterior(model.hidden(*batch.arguments)).mean
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)  # the same network again
    assert_near(found, *mean_of_draws(model, batch.arguments, "z"))
    assert torch.equal(found, pv.features(model, batch, seed=5, device="cpu"))  # nothing is drawn


def test_codes_of_a_ladder_are_those_of_its_layers_side_by_side():
    space = Binary((4, 4))
    for inference in ("bottom_up", "top_down"):
        model = models.LadderVAE(space, latent_dims=(3, 2), hidden_dims=(8, 8), inference=inference)
        obs = random_obs(space, 5)
        how = {"num_draws": 4000, "device": "cpu"}
        found = pv.features(model, obs, seed=1, **how)
        each = {site: pv.features(model, obs, sites=[site], seed=1, **how) for site in ("z1", "z2")}
        assert (each["z1"].shape, each["z2"].shape) == ((5, 3), (5, 2))
        order = ("z1", "z2") if inference == "bottom_up" else ("z2", "z1")  # that of the guide
        # single sites: z1 bottom up and z2 top down are known exactly, the others have the same draws
        torch.testing.assert_close(found, torch.cat([each[site] for site in order], -1), rtol=0, atol=1e-5)
        for site, code in each.items():
            mean, error = mean_of_draws(model, (obs,), site)
            assert_near(code, mean, error * 6**0.5)  # 20,000 draws, and at most the error of 4,000 more
        known, drawn = order
        assert torch.equal(each[known], pv.features(model, obs, sites=[known], seed=2, **how))
        assert not torch.equal(each[drawn], pv.features(model, obs, sites=[drawn], seed=2, **how))


def test_the_mean_of_a_law_that_cannot_tell_it_is_that_of_its_draws():
    # log z ~ N(μ, σ²): E z = exp(μ + σ²/2), Var z = (exp(σ²) - 1) exp(2μ + σ²)
    sigma, num = 0.5, 4000

    def law(loc):
        normal = dist.Normal(loc[:, None], torch.tensor(sigma)).expand([len(loc), 1]).to_event(1)
        return dist.TransformedDistribution(normal, [ExpTransform()])

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", law(torch.zeros(len(obs))))
            pyro.sample("obs", dist.Normal(z[..., 0], 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", law(obs))

    obs = torch.linspace(-1, 1, 5)
    found = pv.features(model, obs, guide=guide, num_draws=num, device="cpu")[:, 0]
    expected = (obs + sigma**2 / 2).exp()
    assert_near(found, expected, expected * (np.expm1(sigma**2) / num) ** 0.5)
    again = [pv.features(model, obs, guide=guide, num_draws=9, seed=seed, device="cpu") for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_auxiliary_latents_of_a_guide_are_no_codes():
    model = models.VAE(Binary((4, 4)), latent_dim=2, hidden_dims=(8,), guide="hierarchical")
    obs = random_obs(model.space, 5)
    found = pv.features(model, obs, num_draws=2000, device="cpu")
    mean, error = mean_of_draws(model, (obs,), "z")
    assert_near(found, mean, error * 11**0.5)
    with pytest.raises(ValueError, match="sites must be some of z, got z_auxiliary"):
        pv.features(model, obs, sites=["z_auxiliary"], device="cpu")


def test_plates_left_of_the_data_become_units():
    def program(obs):
        shift = torch.arange(3.0)[:, None]
        with pyro.plate("data", len(obs), dim=-1):
            with pyro.plate("parts", 3, dim=-2):
                z = pyro.sample("z", dist.Normal(obs + shift, 1.0))  # (3, n)
            return z

    def model(obs):
        z = program(0 * obs)
        with pyro.plate("more", len(obs), dim=-1):
            pyro.sample("obs", dist.Normal(z.sum(-2), 1.0), obs=obs)

    obs = torch.tensor([1.0, 5.0])
    found = pv.features(model, obs, guide=program, device="cpu")
    assert found.tolist() == [[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]


# --- every model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EVERY, ids=case_id)
def test_every_model_has_codes_or_says_that_it_has_none(case):
    model, batch = build(case), batch_of(case)
    name = case[0]
    before, state = parameters(model), torch.random.get_rng_state()
    model.train()
    if name not in codes.with_codes():
        with pytest.raises(
            ValueError, match=f"{name} has no codes: it has no (latent sites|encoder.*); Autoencoder, .*VAE"
        ):
            pv.features(model, batch, device="cpu")
        return
    found = pv.features(model, batch, num_draws=16, device="cpu")
    assert found.shape == (6, found.shape[1])
    assert found.dtype == torch.float32
    assert len(found.unique(dim=0)) == len(batch.obs.unique(dim=0))  # each image has its own
    assert not found.requires_grad
    assert torch.equal(found, pv.features(model, batch, num_draws=16, device="cpu"))
    assert same(before, parameters(model))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["VAE", "PPCA", "Autoencoder"])
def test_codes_do_not_depend_on_what_else_is_in_the_batch(name, monkeypatch):
    case = (name, Real((4, 4)), None)
    model, batch = build(case), batch_of(case)
    whole = pv.features(model, batch, device="cpu")
    monkeypatch.setattr(codes, "ROWS", 4)  # two blocks, the second shorter
    # float32 rounding of matrix products of another size
    torch.testing.assert_close(pv.features(model, batch, device="cpu"), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(pv.features(model, batch.obs[4:5], device="cpu"), whole[4:5], rtol=0, atol=1e-5)


def test_what_makes_no_sense_is_refused():
    vae, obs = models.VAE(Binary((2, 2)), latent_dim=2, hidden_dims=(4,)), random_obs(Binary((2, 2)), 3)
    cvae = models.CVAE(Binary((2, 2)), Labels(log_prob=(-0.7, -0.7)), latent_dim=2, hidden_dims=(4,))
    mixture = models.BernoulliMixture(Binary((2, 2)), num_components=2)
    for model, given, options, message in (
        (vae, obs, {"sites": ["y"]}, "sites must be some of z, got y"),
        (vae, obs, {"sites": []}, "sites must be some of z, got none"),
        (vae, obs, {"num_draws": 0}, "num_draws must be a whole number of at least 1, got 0"),
        (vae, obs / 2, {}, "0 and 1 only"),
        (vae, obs[:, :1], {}, "obs must have shape"),
        (cvae, obs, {}, "the context of the model is label, but the batch has none"),
        (mixture, obs, {"sites": ["z"]}, "those of BernoulliMixture are its own"),
    ):
        with pytest.raises(ValueError, match=message):
            pv.features(model, given, device="cpu", **options)
    vae.posterior.linear.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the code of datum 0 is not finite"):
        pv.features(vae, obs, device="cpu")


def test_a_latent_category_is_no_number():
    def program(obs):
        with pyro.plate("data", len(obs), dim=-1):
            return pyro.sample("k", dist.Categorical(torch.ones(len(obs), 3) / 3))

    def model(obs):
        k = program(obs)
        with pyro.plate("more", len(obs), dim=-1):
            pyro.sample("obs", dist.Normal(k.float(), 1.0), obs=obs)

    with pytest.raises(ValueError, match="site 'k' is discrete and has no mean that could be a code"):
        pv.features(model, torch.randn(4), guide=program, device="cpu")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An .npz of small grey images with labels."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    arrays = {}
    for name, num in (("train", 40), ("valid", 12), ("test", 10)):
        arrays[name] = generator.integers(0, 5, (num, 4, 4), dtype=np.uint8)
        arrays[f"{name}_labels"] = np.arange(num) % 3
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "vae"
    trained(tiny, out, "--model", "vae", "--set", "guide=planar")  # a flow: its mean has no formula
    return out


def test_the_command_writes_the_codes_of_all_parts_with_their_labels(run, tmp_path):
    text = call("features", run, "--draws", 20, "--seed", 4, "--device", "cpu", "--out", tmp_path / "codes.npz")
    assert "codes of 2 numbers" in text
    found, opened = read_arrays(tmp_path / "codes.npz"), runs.open_run(run)
    assert set(found) == {name + end for name in ("train", "valid", "test") for end in ("", "_labels")}
    for name in ("train", "valid", "test"):
        batch = getattr(opened.data, name)
        mine = pv.features(opened.model, batch, num_draws=20, seed=4, device="cpu")
        np.testing.assert_array_equal(found[name], mine.numpy())
        np.testing.assert_array_equal(found[f"{name}_labels"], batch.labels.numpy())


def test_the_command_names_what_is_wrong(run, tmp_path):
    assert "expected a file that ends in .npz" in call("features", run, "--out", tmp_path / "codes.csv", code=2)
    text = call("features", run, "--sites", "z1,z2", "--out", tmp_path / "codes.npz", code=1)
    assert "sites must be some of z, got z1, z2" in text
