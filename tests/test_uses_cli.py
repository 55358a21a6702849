"""The commands restore, traverse and sample --label, on a tiny run."""

import json
import re

import numpy as np
import pytest
from commands import call, trained
from helpers import read_arrays

from pyro_vae.estimators.result import LogLikelihood


@pytest.fixture(scope="module")
def cvae_run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cvae"
    trained(tiny, out, "--model", "cvae", "--given", "quadrants", "--quadrants", "3")
    return out


@pytest.fixture(scope="module")
def labels_run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "labels"
    trained(tiny, out, "--model", "cvae", "--given", "label")
    return out


def restored(run, out, *words):
    text = call("restore", run, "--out", out, "--draws", 3, *words)
    assert all((out / f"restored.{kind}").is_file() for kind in ("png", "npz", "json"))
    return text, read_arrays(out / "restored.npz"), json.loads((out / "restored.json").read_text())


def test_restored_quadrant_stands_beside_the_cvae_and_the_seen_pixels_stay(vae_run, cvae_run, tmp_path) -> None:
    found = {}
    for name, run, words in (("vae", vae_run, ("--particles", 50)), ("cvae", cvae_run, ())):
        text, arrays, figures = restored(run, tmp_path / name, "--missing", "bottom_right", "--num-data", 5, *words)
        assert "log p(x | quadrants(3)) in nats" in text
        assert arrays["draws"].shape == (3, 5, 4, 4)
        assert arrays["missing"].tolist() == np.pad(np.ones((2, 2), bool), ((2, 0), (2, 0))).tolist()
        seen = ~arrays["missing"]
        np.testing.assert_array_equal(arrays["draws"][..., seen], np.tile(arrays["truth"][:, seen], (3, 1, 1)))
        error = (arrays["mean"] - arrays["truth"])[:, ~seen]
        assert figures["rmse_of_mean"] == pytest.approx(float(np.sqrt((error**2).mean())), rel=1e-5)
        found[name] = LogLikelihood.load(tmp_path / name / "restored_log_prob.npz")
    assert found["vae"].digest == found["cvae"].digest
    assert found["vae"].given == found["cvae"].given


def test_masks_of_a_file_and_of_a_share_and_images_of_ones_own(vae_run, tiny, tmp_path) -> None:
    mask = np.zeros((4, 4))
    mask[1, 2] = 1
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "own.npy", read_arrays(tiny)["images"][:2])
    words = ("--missing", tmp_path / "mask.npy", "--images", tmp_path / "own.npy")
    _, arrays, figures = restored(vae_run, tmp_path / "a", *words)
    assert arrays["missing"].sum() == 1
    assert "truth" not in arrays
    assert "log_prob" not in figures
    _, arrays, _ = restored(vae_run, tmp_path / "b", "--missing", "0.25", "--num-data", 2, "--no-score")
    assert arrays["missing"].sum() == 4


def test_noise_of_real_pixels(tiny, tmp_path) -> None:
    trained_to = tmp_path / "ppca"
    call("train", "--data", tiny, "--space", "real", "--model", "ppca", "--set", "latent_dim=2", "--out", trained_to)
    _, arrays, figures = restored(trained_to, tmp_path / "out", "--noise", "0.2", "--num-data", 18)
    noise = arrays["seen"] - arrays["truth"]
    assert noise.std() == pytest.approx(0.2, abs=4 * 0.2 / np.sqrt(2 * noise.size))
    assert figures["rmse_of_mean"] < noise.std()  # the mean is nearer to the truth than what was seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--missing", "middle"), r"must be one of top_left, .* a share or an .npy file, got 'middle'"),
        (("--missing", "1.5"), "must lie between 0 and 1, got 1.5"),
        ((), "one of `missing`, a mask, and `noise`"),
        (("--noise", "0.1"), r"noise is for real pixels .* and bits"),
    ],
)
def test_what_restore_refuses(words, message, vae_run, tmp_path) -> None:
    text = call("restore", vae_run, "--num-data", 2, "--out", tmp_path, *words, code=1)
    assert text.startswith("Error: ")
    assert re.search(message, text)


def test_traversals_and_the_way_between_two_images(vae_run, labels_run, cvae_run, tmp_path) -> None:
    for run in (vae_run, labels_run, cvae_run):
        text = call("traverse", run, "--units", 2, "--steps", 3, "--around", 1, "--out", tmp_path / run.name)
        assert "KL, nats" in text
        arrays = read_arrays(tmp_path / run.name / "traversal.npz")
        assert arrays["images"].shape[:2] == (2, 3)
        assert (tmp_path / run.name / "traversal.png").is_file()
    call("traverse", vae_run, "--between", 0, 4, "--steps", 4, "--out", tmp_path / "way")
    assert read_arrays(tmp_path / "way" / "interpolation.npz")["images"].shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("traverse", "--between", 0, 4, "--around", 1), "--around"),
        (("traverse", "--between", 0, 4, "--units", 2), "--units"),
        (("traverse", "--way", "linear"), "--way"),
        (("restore", "--missing", "top", "--how", "mcmc", "--particles", 50), "--particles"),
        (("restore", "--missing", "top", "--images", ".", "--num-data", 2), "--num-data"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, name, vae_run, tmp_path) -> None:
    text = call(words[0], vae_run, "--out", tmp_path, *words[1:], code=2)
    assert f"{name} would be ignored: " in text


def test_several_labels_are_drawn_and_others_refused(labels_run, vae_run, tmp_path) -> None:
    call("sample", labels_run, "--label", 2, "--label", 0, "--num", 3, "--out", tmp_path / "s.png")
    assert read_arrays(tmp_path / "s.npz")["given"].argmax(1).tolist() == [2, 2, 2, 0, 0, 0]
    text = call("sample", labels_run, "--label", 3, "--out", tmp_path / "s.png", code=1)
    assert text == "Error: label must be from 0 to 2, got 3\n"
    text = call("sample", vae_run, "--label", 1, "--out", tmp_path / "s.png", code=1)
    assert "vae is of p(x) alone, which draws from all classes at once" in text
