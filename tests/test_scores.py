"""Outlier scores against their definitions; p-values and flags on the command line."""

import csv
import math
import zlib

import numpy as np
import pytest
import torch
from commands import call
from helpers import read_arrays

import pyro_vae as pv
from pyro_vae.data import Batch, Data
from pyro_vae.scores import compressed_lengths
from pyro_vae.spaces import Binary, Quantized, Real

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


def test_each_score_of_a_datum_is_its_own(pixels, vae) -> None:
    some = batch(6)
    for model, names in ((pixels, ("log_prob", "complexity")), (vae, ("reconstruction", "kl"))):
        together = pv.Scorer(model)(some, names)
        first = pv.Scorer(model)(Batch(some.obs[:3], space=SPACE), names)
        for name in names:  # the noise of the terms is that of a block, so those agree within it
            np.testing.assert_allclose(first[name], together[name][:3], atol=1e-6 if model is pixels else 0.7)


def test_compressed_length_of_a_flat_image_is_the_shorter_and_by_zlib_no_longer() -> None:
    space = Quantized((28, 28))
    obs = torch.stack([torch.full((28, 28), 7.0), batch(1, 0, Quantized((28, 28))).obs[0]])
    flat, noise = compressed_lengths(obs, space) / (8 * math.log(2))
    assert flat < 40 < noise
    assert flat <= len(zlib.compress(bytes([7] * 784), 9))
    bits = compressed_lengths((obs > 2).float(), Binary((28, 28))) / (8 * math.log(2))
    assert bits[1] <= 98 + 40  # no byte needs more than itself but for the header


def test_mutated_pixels_are_uniform_and_as_many_as_asked_for() -> None:
    part = Batch(torch.full((400, 4, 4), 2.0), space=SPACE)
    found = pv.mutated(Data("flat", SPACE, part, part, part), rate=0.3, seed=1)
    changed = (found.train.obs != 2).double().mean().item()
    assert changed == pytest.approx(0.3 * 4 / 5, abs=4 * math.sqrt(0.24 * 0.76 / 6400))
    assert torch.equal(found.test.obs, part.obs)
    assert not torch.equal(found.train.obs, found.valid.obs)
    SPACE.check(found.train.obs)


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
    text, rows = scored(
        vae_run, tmp_path / "own.npy", tmp_path / "o", "--score", "ratio", "--background", vae_run, "--sides", "two"
    )
    assert all(abs(float(row["score"])) < 40 for row in rows)  # its own background, but for Monte Carlo noise
    assert "goes with --score ratio" in call(
        "score", vae_run, tmp_path / "own.npy", "--score", "ratio", "--out", tmp_path, code=2
    )
