"""The autoencoder: what it learns where the best reconstruction is known, and what it refuses for want of a p(x)."""

import csv
import json

import numpy as np
import pytest
import torch
from commands import call, trained
from helpers import all_cases, build, case_id, parameters, random_data, same

import pyro_vae as pv
from pyro_vae import runs
from pyro_vae.minibatches import mean_error
from pyro_vae.models import listing
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.randomness import VALIDATION, derived_seed
from pyro_vae.spaces import Binary, Quantized, Real

SENTENCE = "Autoencoder has no p(x): it minimises a squared error, which is not -log p(x)"
WITHOUT = [name for name in listing().values() if pv.traces.lacks_log_prob(getattr(pv.models, name)) is not None]
every_case = pytest.mark.parametrize("case", [case for case in all_cases((4, 4)) if case[0] in WITHOUT], ids=case_id)


def data_of(obs, space):
    half = len(obs) // 2
    parts = obs.split([half, len(obs) - half - 2, 2])  # the best epoch is chosen by many data, and so by little chance
    return pv.Data("made", space, *(pv.Batch(part, space=space) for part in parts))


def fitted(space, obs, num_epochs=20, **options):
    torch.manual_seed(0)
    model = Autoencoder(space, **{"latent_dim": 2, "hidden_dims": (32, 32), **options})
    settings = {"num_epochs": num_epochs, "batch_size": 250, "learning_rate": 1e-2}
    return model, pv.fit(model, data_of(obs, space), device="cpu", seed=0, **settings)


@pytest.fixture(autouse=True)
def _random_state_kept():
    with torch.random.fork_rng([]):
        yield


# --- the best reconstruction --------------------------------------------------------------------------------------


def test_the_denoiser_of_two_points_is_a_hyperbolic_tangent():
    # x = ±1 with equal odds, x̃ = x + σ ε: E[x | x̃] = tanh(x̃ / σ²)
    generator = torch.Generator().manual_seed(1)
    obs = 2 * torch.randint(2, (8000, 1, 1), generator=generator).float() - 1
    model, _ = fitted(Real((1, 1)), obs, noise=0.8)
    noisy = torch.linspace(-2, 2, 41)
    with torch.no_grad():
        found = model.decode(model.encode(noisy.view(-1, 1, 1))).flatten()
    # 80,000 pairs at a residual sd of at most 1 for some 20 effective parameters: an rms error near 0.013, and what
    # Adam leaves; the identity is off by 1 and the mean image by 0.9
    assert float((found - (noisy / 0.64).tanh()).abs().max()) < 0.08


def test_the_denoiser_of_a_flipped_bit_follows_bayes_rule():
    # P(x = 1 | x̃) from a prior p and flips with probability ν
    p, flip = 0.3, 0.2
    obs = (torch.rand(16000, 1, 1, generator=torch.Generator().manual_seed(2)) < p).float()
    model, _ = fitted(Binary((1, 1)), obs, noise=flip)
    truth = [p * flip / (p * flip + (1 - p) * (1 - flip)), p * (1 - flip) / (p * (1 - flip) + (1 - p) * flip)]
    with torch.no_grad():
        found = model.decode(model.encode(torch.tensor([0.0, 1.0]).view(2, 1, 1))).flatten()
    # the shares of 8,000 bits are within 3 x 0.005 of p, and within 3 x 0.008 where x̃ = 1; and what Adam leaves
    assert found.tolist() == pytest.approx(truth, abs=0.04)


@pytest.mark.parametrize("space", [Binary((4, 4)), Quantized((4, 4), levels=5), Real((4, 4))], ids=str)
def test_few_images_are_rebuilt_from_a_code_of_two_numbers(space):
    generator = torch.Generator().manual_seed(3)
    top = getattr(space, "levels", 2) or 2
    templates = torch.randint(top, (5, 4, 4), generator=generator).float()
    obs = templates[torch.randint(5, (1000,), generator=generator)]
    model, history = fitted(space, obs, num_epochs=150)
    variance = float(space.to_unit(obs).var(0, correction=0).sum())
    assert history.rows[-1]["valid_error"] < 0.01 * variance  # what the mean image leaves is the variance
    with torch.no_grad():
        rebuilt = model.reconstruct(templates)
    # an error of 1% of the variance over 16 pixels leaves none of them more than a quarter of a unit off
    assert float((rebuilt - space.to_unit(templates)).abs().max()) < 0.25


# --- the noise ----------------------------------------------------------------------------------------------------


def test_noise_flips_the_share_of_bits_that_was_asked_for():
    model, bits = Autoencoder(Binary((10, 10)), noise=0.1), torch.randint(2, (1000, 10, 10)).float()
    noisy = model.corrupt(bits)
    assert set(noisy.unique().tolist()) == {0.0, 1.0}
    for value in (0, 1):
        flipped = (noisy != bits)[bits == value].float()
        assert float(flipped.mean()) == pytest.approx(0.1, abs=4 * (0.09 / len(flipped)) ** 0.5)  # 4 standard errors


@pytest.mark.parametrize("space", [Quantized((10, 10), levels=9), Real((10, 10))], ids=str)
def test_noise_on_grey_levels_is_gaussian_in_unit_scale(space):
    unit = torch.rand(1000, 10, 10)
    noise = (Autoencoder(space, noise=0.3).corrupt(unit) - unit).flatten()
    num = len(noise)
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.3 / num**0.5)
    assert float(noise.std()) == pytest.approx(0.3, abs=4 * 0.3 / (2 * num) ** 0.5)
    assert float((noise / 0.3).pow(4).mean()) == pytest.approx(3, abs=4 * (96 / num) ** 0.5)  # Var ε⁴ = 105 - 9


def test_without_noise_the_input_is_left_as_it_is():
    unit = torch.rand(3, 4, 4)
    assert Autoencoder(Real((4, 4))).corrupt(unit) is unit


# --- the fit ------------------------------------------------------------------------------------------------------


def test_the_best_epoch_on_validation_data_is_kept():
    data = random_data(("Autoencoder", Binary((4, 4)), None), sizes=(40, 20, 3))  # noise: the fit overtrains
    torch.manual_seed(0)
    model = Autoencoder(data.space, latent_dim=8, hidden_dims=(64,), noise=0.1)
    history = pv.fit(model, data, device="cpu", seed=3, num_epochs=60, batch_size=8, learning_rate=1e-2)
    errors = [row["valid_error"] for row in history.rows]
    assert history.best_epoch == 1 + int(np.argmin(errors)) < len(errors)
    found = mean_error(model, model.error, data.valid.obs, derived_seed(3, VALIDATION))
    assert found == pytest.approx(min(errors), rel=1e-6)  # the same sums again


def test_the_same_seed_gives_the_same_parameters_and_leaves_the_random_state():
    space, found = Binary((4, 4)), []
    data = random_data(("Autoencoder", space, None), sizes=(40, 20, 3))
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = Autoencoder(space, latent_dim=3, hidden_dims=(8,), noise=0.2)
        state = torch.random.get_rng_state()
        pv.fit(model, data, device="cpu", seed=seed, num_epochs=2, batch_size=16)
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(parameters(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_dynamic_bits_are_drawn_anew_for_each_epoch():
    space = Binary((2, 2))
    data = random_data(("Autoencoder", space, None), sizes=(64, 8, 2))
    half = pv.Data("made", space, data.train, data.valid, data.test, intensity=torch.full((64, 2, 2), 0.5))
    seen = []

    class Watched(Autoencoder):
        def error(self, obs):
            seen.append(obs)
            return super().error(obs)

    Watched(space, latent_dim=1, hidden_dims=(4,)).own_training(half, num_epochs=2, batch_size=64)
    first, _, second, _ = seen  # each epoch's one batch, and the validation data after it
    assert not torch.equal(first.flatten(1).sum(0), second.flatten(1).sum(0))


def test_an_error_that_is_not_finite_is_named_with_its_epoch():
    data = random_data(("Autoencoder", Real((2, 2)), None))
    model = Autoencoder(data.space, latent_dim=1, hidden_dims=(4,))
    with pytest.raises(FloatingPointError, match="not finite in epoch 1; a smaller learning_rate may help"):
        pv.fit(model, data, device="cpu", num_epochs=3, learning_rate=1e30)


def test_encoder_and_decoder_are_those_of_a_vae():
    ours, vae = (cls(Binary((8, 8)), latent_dim=3, hidden_dims=(9, 7)) for cls in (Autoencoder, pv.models.VAE))
    for part in ("encoder", "decoder"):
        shapes = [[p.shape for p in getattr(model, part).parameters()] for model in (ours, vae)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("network", ["conv", "resnet"])
def test_convolutions_rebuild_images_of_odd_size_and_colour(network):
    for shape in ((7, 5), (3, 8, 8)):
        model = Autoencoder(Real(shape), latent_dim=2, hidden_dims=(8,), network=network)
        assert model.reconstruct(torch.rand(3, *shape)).shape == (3, *shape)


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (Binary((2, 2)), {"noise": 0.5}, "noise must be a share of bits from 0 to below 0.5, got 0.5"),
        (Real((2, 2)), {"noise": -1.0}, "noise must be 0 or more, got -1.0"),
        (Real((2, 2)), {"noise": float("nan")}, "noise must be a finite number, got nan"),
        (Real((2, 2)), {"latent_dim": 0}, "latent_dim must be a whole number of at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(space, options, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(space, **options)


def test_fit_settings_that_make_no_sense_are_refused():
    data = random_data(("Autoencoder", Real((2, 2)), None))
    model = Autoencoder(data.space, latent_dim=1, hidden_dims=(4,))
    with pytest.raises(ValueError, match="num_epochs must be a whole number of at least 1, got 0"):
        pv.fit(model, data, device="cpu", num_epochs=0)
    with pytest.raises(ValueError, match=r"Autoencoder.own_training has no setting patience"):
        pv.fit(model, data, device="cpu", patience=3)


# --- no p(x) ------------------------------------------------------------------------------------------------------


@every_case
def test_whatever_needs_a_density_is_refused_with_the_reason(case):
    model, data = build(case), random_data(case)
    reason = pv.traces.lacks_log_prob(model)
    asked = {
        "log_likelihood": lambda: pv.log_likelihood(model, data.test),
        "compare_bounds": lambda: pv.compare_bounds({"this": model}, data.test),
        "latent_use": lambda: pv.latent_use(model, data.test),
        "check_pair": lambda: pv.testing.check_pair(model, data=data.test),
        "fit by svi": lambda: pv.fit(model, data, method="svi"),
    }
    for what, call_it in asked.items():
        with pytest.raises(ValueError, match="has no p") as caught:
            call_it()
        assert str(caught.value) == reason, what
    with pytest.raises(ValueError, match="has no p"):  # and a program that nobody has asked before it runs
        pv.traces.simulate(pv.traces.as_pair(model), (data.test.obs,))


@every_case
def test_a_model_without_density_keeps_the_rest_of_the_contract(case):
    model, other, data = build(case), build(case, seed=1), random_data(case)
    codes = pv.features(model, data.test, device="cpu")
    assert not torch.equal(codes, pv.features(other, data.test, device="cpu"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(codes, pv.features(other, data.test, device="cpu"))
    before = parameters(model)
    pv.fit(model, data, device="cpu", num_epochs=1)
    moved = parameters(model)
    assert [name for name in before if torch.equal(before[name], moved[name])] == []
    rebuilt = model.reconstruct(data.test.obs)
    assert rebuilt.shape == data.test.obs.shape


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
    out = tmp_path_factory.mktemp("run") / "autoencoder"
    text = trained(tiny, out, "--model", "autoencoder", "--set", "noise=0.1")
    assert "autoencoder: finished after 2 epochs, best" in text
    return out


def test_train_writes_a_run_that_opens_again(run):
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_error", "valid_error", "best_epoch"]
    record = json.loads((run / "fit.json").read_text())
    assert record["best_epoch"] == int(rows[-1]["best_epoch"])
    assert sorted(path.name for path in run.glob("*.png")) == ["reconstructions.png"]
    opened = runs.open_run(run)
    assert opened.model.noise == 0.1
    again = mean_error(opened.model, opened.model.error, opened.data.valid.obs, derived_seed(0, VALIDATION))
    assert again == pytest.approx(float(rows[record["best_epoch"] - 1]["valid_error"]), rel=1e-6)


def test_commands_that_need_a_density_say_why_not(run, tiny, tmp_path):
    images = tmp_path / "images.npy"
    np.save(images, np.load(tiny)["test"])
    for words in (
        ("evaluate", run),
        ("bounds", run, "--out", tmp_path),
        ("latents", run, "--out", tmp_path),
        ("sample", run),
        ("score", run, images, "--out", tmp_path),
        ("compare", "--data", tiny, "--models", "independent_pixel,autoencoder", "--out", tmp_path / "comparison"),
    ):
        text = call(*words, code=1)
        assert SENTENCE in text.replace("\n", " "), words
    assert not (tmp_path / "comparison").exists()  # before any row was fitted
