"""Outlier scores against their definitions; p-values and flags on the command line."""

import csv
import lzma
import math
import zlib

import numpy as np
import pyro
import pytest
import torch
from commands import call
from helpers import build, read_arrays

import pyro_vae as pv
from pyro_vae.data import Batch, Data
from pyro_vae.estimators.choice import Choice
from pyro_vae.randomness import own_randomness
from pyro_vae.runs import open_run
from pyro_vae.scores import compressed_lengths
from pyro_vae.scoring import check_same_way
from pyro_vae.spaces import Binary, Quadrants, Quantized, Real

SPACE = Quantized((4, 4), 5)


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return pv.models.VAE(SPACE, latent_dim=2, hidden_dims=(8,))


@pytest.fixture(scope="module")
def pixels():
    model = pv.models.IndependentPixel(SPACE)
    model.maximum_likelihood(batch(50, 1).obs)
    return model


def batch(num, seed=0, space=SPACE):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randint(5, (num, *space.shape), generator=generator).float(), space=space)


def test_scores_by_log_prob_are_what_they_are_said_to_be(pixels) -> None:
    other = pv.models.IndependentPixel(SPACE)
    some, reference = batch(6), batch(20, 2)
    scorer = pv.Scorer(pixels, background=other, reference=reference)
    found = scorer(some, ("complexity", "log_prob", "typicality", "ratio"))
    assert list(found) == ["complexity", "log_prob", "typicality", "ratio"]
    log_prob = {m: pv.log_likelihood(m, some).log_prob for m in (pixels, other)}
    np.testing.assert_allclose(found["log_prob"], -log_prob[pixels])
    np.testing.assert_allclose(found["ratio"], log_prob[other] - log_prob[pixels])
    typical = pv.log_likelihood(pixels, reference).mean
    np.testing.assert_allclose(found["typicality"], np.abs(log_prob[pixels] - typical))
    np.testing.assert_allclose(found["complexity"], -log_prob[pixels] - compressed_lengths(some.obs, SPACE))


def test_terms_of_the_elbo_are_those_of_latent_use(vae) -> None:
    some = batch(40)
    found = pv.Scorer(vae)(some, ("elbo", "kl"))
    use = pv.latent_use(vae, some, num_particles=256)
    assert found["kl"].mean() == pytest.approx(use.kl.mean, abs=0.05)  # 4 SE of 40 x 64 draws of a KL of some tenths
    assert -found["elbo"].mean() == pytest.approx(use.elbo.mean, abs=0.1)


def test_reconstruction_is_the_squared_error_of_the_mean_image() -> None:
    silent = pv.models.VAE(SPACE, latent_dim=2, hidden_dims=(8,))
    with torch.no_grad():
        for value in silent.decoder.parameters():
            value.zero_()
        flat = silent.likelihood(torch.zeros(1, 2)).mean[0]  # whatever the code is
    found = pv.Scorer(silent)(batch(5), ("reconstruction",))["reconstruction"]
    expected = ((batch(5).obs - flat) / 4).square().flatten(1).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_score_of_a_datum_is_its_own(pixels) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        ppca = pv.models.PPCA(Real((4, 4)), latent_dim=2)  # codes in closed form
    for model, names in ((pixels, ("log_prob", "complexity")), (ppca, ("log_prob", "reconstruction"))):
        some = batch(6, space=model.space)
        together = pv.Scorer(model)(some, names)
        first = pv.Scorer(model)(Batch(some.obs[:3], space=model.space), names)
        for name in names:  # up to the order of float32 sums of numbers of some tens
            np.testing.assert_allclose(first[name], together[name][:3], rtol=1e-5)


def test_kl_of_each_datum_is_that_of_the_guide_in_closed_form(vae) -> None:
    some = batch(6)
    with torch.no_grad():
        q = pyro.poutine.trace(vae.guide).get_trace(some.obs).nodes["z"]["fn"].base_dist
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1).numpy()
    found = np.stack([pv.Scorer(vae, seed=seed)(some, ("kl",))["kl"] for seed in range(30)])
    error = found.std(0, ddof=1) / math.sqrt(30)
    assert (np.abs(found.mean(0) - expected) < 4.5 * error).all()
    assert (error < 0.05 + 0.05 * expected).all()  # small enough that another datum's KL would not pass
    assert np.ptp(expected) > 9 * error.max()


def test_two_batches_share_no_noise_and_the_same_one_has_its_own(vae) -> None:
    some, names = batch(4), ("log_prob", "kl", "reconstruction")
    other = Batch(torch.cat([some.obs[:3], 4 - some.obs[3:]]), space=SPACE)
    scorer = pv.Scorer(vae, estimator=pv.importance_sampling(20), seed=3)
    first, again, second = (scorer(each, names) for each in (some, some, other))
    for name in names:
        assert np.array_equal(first[name], again[name])
        assert (first[name][:3] != second[name][:3]).all()  # the same images at the same places


def test_log_prob_of_an_energy_model_is_by_the_estimator_asked_for() -> None:
    model = build(("RBM", Binary((2, 2)), None))
    some = Batch(torch.randint(2, (5, 2, 2), generator=torch.Generator().manual_seed(0)).float(), space=model.space)
    lower = pv.Scorer(model, estimator=Choice("raise", steps=5, chains=2).build(model, some)).log_prob(some)
    assert (lower.estimator, lower.direction) == ("reverse_annealing", "lower")
    upper = pv.Scorer(model).log_prob(some)
    assert upper.estimator == "exact"
    with pytest.raises(ValueError, match=r"got reverse_annealing \(lower, 2 particles\) for the images, exact"):
        check_same_way(lower, upper)
    check_same_way(lower, lower)


def test_a_gan_has_no_codes_and_a_bound_all_the_same() -> None:
    model = build(("GAN", Real((4, 4)), None))
    some = batch(3, space=Real((4, 4)))
    for name in ("kl", "reconstruction"):
        with pytest.raises(ValueError, match="GAN has no codes: it has no encoder"):
            pv.Scorer(model)(some, (name,))
    assert np.isfinite(pv.Scorer(model)(some, ("elbo",))["elbo"]).all()


def test_compressed_length_of_a_flat_image_is_the_shorter_and_by_zlib_no_longer() -> None:
    space = Quantized((28, 28))
    obs = torch.stack([torch.full((28, 28), 7.0), batch(1, 0, Quantized((28, 28))).obs[0]])
    flat, noise = compressed_lengths(obs, space) / (8 * math.log(2))
    assert flat < 40 < noise
    assert flat <= len(zlib.compress(bytes([7] * 784), 9))
    bits = compressed_lengths((obs > 2).float(), Binary((28, 28))) / (8 * math.log(2))
    assert bits[1] <= 98 + 40  # no byte needs more than itself but for the header


@pytest.mark.parametrize("side", [8, 28, 64])
def test_a_dictionary_as_long_as_the_image_compresses_as_that_of_preset_nine(side, monkeypatch) -> None:
    """Where zlib and bz2 are out of the race, the length is that of lzma with the 64 MiB dictionary of its preset."""
    monkeypatch.setattr("pyro_vae.scores.zlib.compress", lambda raw, level: bytes(10**6))
    monkeypatch.setattr("pyro_vae.scores.bz2.compress", lambda raw, level: bytes(10**6))
    space = Quantized((side, side))
    with own_randomness(0):
        obs = torch.cat([(256 * torch.rand(3, side, side) ** power).floor() for power in (1, 8, 40)])
    plain = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    packed = [lzma.compress(bytes(image.flatten().int().tolist()), lzma.FORMAT_RAW, filters=plain) for image in obs]
    expected = [8 * math.log(2) * len(each) for each in packed]
    np.testing.assert_allclose(compressed_lengths(obs, space), expected, rtol=1e-12)


def test_mutated_pixels_are_uniform_and_as_many_as_asked_for() -> None:
    part = Batch(torch.full((400, 4, 4), 2.0), space=SPACE)
    found = pv.mutated(Data("flat", SPACE, part, part, part), rate=0.3, seed=1)
    changed = (found.train.obs != 2).double().mean().item()
    assert changed == pytest.approx(0.3 * 4 / 5, abs=4 * math.sqrt(0.24 * 0.76 / 6400))
    assert torch.equal(found.test.obs, part.obs)
    assert not torch.equal(found.train.obs, found.valid.obs)
    SPACE.check(found.train.obs)


def test_a_part_of_an_image_is_not_mutated() -> None:
    part = Batch(torch.zeros(4, 12), torch.zeros(4, 4), space=Quantized((12,), 5))
    with pytest.raises(ValueError, match=r"of whole images, and these data are given quadrants\(1\)"):
        pv.mutated(Data("hidden", Quantized((12,), 5), part, part, part, Quadrants(1, (4, 4))))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("magic",), "score must be one of log_prob, typicality"),
        (("ratio",), "needs a background model"),
        (("typicality",), "needs data whose log p is typical"),
        (("elbo",), "need latents, and this model has none"),
        (("reconstruction",), "continuous latents, or methods `features` and `decode`; this model has no latents"),
    ],
)
def test_what_is_refused(names, message, pixels) -> None:
    with pytest.raises(ValueError, match=message):
        pv.Scorer(pixels)(batch(3), names)


def test_complexity_needs_levels_and_a_ratio_the_same_space(pixels) -> None:
    with pytest.raises(ValueError, match="at most 256 grey levels"):
        compressed_lengths(torch.rand(2, 4, 4), Real((4, 4)))
    with pytest.raises(ValueError, match="lives in"):
        pv.Scorer(pixels, background=pv.models.IndependentPixel(Real((4, 4))))(batch(3), ("ratio",))


# the command


def scored(run, images, out, *words):
    text = call("score", run, images, "--particles", 20, "--out", out, "--quiet", *words)
    with open(out / "outliers.csv", newline="") as file:
        return text, list(csv.DictReader(file))


def test_p_values_of_own_images(vae_run, tiny, tmp_path) -> None:
    images = read_arrays(tiny)["images"]
    np.save(tmp_path / "own.npy", np.concatenate([images[:3], 255 - images[:1]]))
    text, rows = scored(vae_run, tmp_path / "own.npy", tmp_path / "out", "--level", "0.5")
    p = {int(row["index"]): float(row["p_value"]) for row in rows}
    assert p[3] == 1 / 19  # the inverted image, above all 18 test data
    assert "p-values by 18 test data of the run: the least is 0.053" in text
    assert "1. image 3: log p" in text
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    text, rows = scored(vae_run, tmp_path / "own.npy", tmp_path / "none", "--calibrate", "none")
    assert "p_value" not in rows[0]


def test_scores_by_name_and_what_speaks_against_them(vae_run, tiny, tmp_path) -> None:
    np.save(tmp_path / "own.npy", read_arrays(tiny)["images"])  # all of them, the calibration too
    text, _ = scored(vae_run, tmp_path / "own.npy", tmp_path / "o", "--score", "kl", "--calibrate", "valid")
    assert "Note: validation data choose the epoch" in text
    assert "of the images are calibration data themselves" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--score", "ratio"), "goes with --score ratio"),
        (("--score", "typicality", "--calibrate", "valid"), "measures from validation data, which cannot calibrate"),
        (("--calibrate", "none", "--calibration", 9), "--calibration would be ignored"),
        (("--calibrate", "none", "--sides", "one"), "--sides would be ignored"),
        (("--calibrate", "none", "--level", "0.2"), "--level would be ignored"),
    ],
)
def test_what_the_command_refuses(words, message, vae_run, tiny, tmp_path) -> None:
    np.save(tmp_path / "own.npy", read_arrays(tiny)["images"][:2])
    text = call("score", vae_run, tmp_path / "own.npy", "--out", tmp_path, *words, code=2)
    assert message in " ".join(text.split())


def test_ratio_on_the_command_line_is_the_difference_of_two_exact_log_likelihoods(tiny, tmp_path) -> None:
    fits = {}
    for name, options in (("gmm", ("--set", "num_components=2")), ("independent_pixel", ())):
        call("train", "--data", tiny, "--model", name, *options, "--out", tmp_path / name, "--quiet")
        fits[name] = open_run(tmp_path / name)
    images = read_arrays(tiny)["images"][:6]
    np.save(tmp_path / "own.npy", images)
    words = ("--score", "ratio", "--background", tmp_path / "independent_pixel", "--sides", "two", "--quiet")
    call("score", tmp_path / "gmm", tmp_path / "own.npy", "--out", tmp_path / "o", *words)
    own = Batch(torch.from_numpy(images).float(), space=fits["gmm"].data.space)
    log_prob = {name: pv.log_likelihood(run.model, own).log_prob for name, run in fits.items()}
    with open(tmp_path / "o" / "outliers.csv", newline="") as file:
        found = {int(row["index"]): float(row["score"]) for row in csv.DictReader(file)}
    expected = log_prob["independent_pixel"] - log_prob["gmm"]
    np.testing.assert_allclose([found[i] for i in range(6)], expected, rtol=1e-9)  # both exact, and seeds play no part
