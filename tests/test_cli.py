"""The command line writes what it promises, gives the digits of the Python API, and says what is wrong in one line."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, trained
from helpers import read_arrays
from PIL import Image

from pyro_vae import pictures, plots, runs
from pyro_vae.estimators.evaluate import log_likelihood
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.estimators.result import ARRAYS, LogLikelihood
from pyro_vae.history import History
from pyro_vae.options import values

PNG = b"\x89PNG"
ROW_KEYS = {"model", "estimator", "num_particles", "direction", "mean_log_prob", "mc_se", "test_se", "bits_per_dim"}
ROW_KEYS |= {"seconds", "train_seconds", "frac_khat_above_0.7"}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def assert_pngs(folder, *names):
    for name in names:
        assert (folder / name).read_bytes().startswith(PNG), name


def assert_same_digits(left, right):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert (left.digest, left.num_particles, left.mean) == (right.digest, right.num_particles, right.mean)


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of numbers: drawing is the slowest part of a tiny run."""
    monkeypatch.setattr(pictures, "plot_run", lambda run: [])
    monkeypatch.setattr(plots, "plot_comparison", lambda comparison, path: path)


@pytest.fixture(scope="module")
def quadrants_run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quadrants"
    trained(tiny, out, "--model", "cvae", "--given", "quadrants", "--quadrants", "2")
    return out


@pytest.fixture(scope="module")
def digits_comparison(tmp_path_factory):
    """The whole way on real data, with the networks and the pictures of the real comparison."""
    out = tmp_path_factory.mktemp("digits")
    rows = ("--models", "independent_pixel, vae,cvae", "--fit", "num_epochs=2", "--particles", "20")
    text = call("compare", "--data", "digits", *rows, "--jobs", "1", "--out", out, "--quiet")
    return out, text


# help


@pytest.mark.parametrize("program", [[sys.executable, "-m", "pyro_vae"], [Path(sys.executable).parent / "pyro-vae"]])
def test_help_lists_the_commands(program) -> None:
    if not Path(program[0]).is_file():
        pytest.skip("a plain checkout: the command is not installed")
    text = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in text for name in ("train", "evaluate", "compare", "sample", "score"))


def test_help_of_a_command_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from pyro_vae.cli import main\n"
        "assert CliRunner().invoke(main, ['compare', '--help']).exit_code == 0\n"
        "assert not {'torch', 'pyro', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# train


def test_train_writes_configuration_history_checkpoint_and_pictures(vae_run, tiny) -> None:
    config = read_json(vae_run / "config.json")
    assert (config["model"], config["data"], config["seed"]) == ("vae", str(tiny), 0)
    assert config["options"] == {"latent_dim": 2, "hidden_dims": [8]}
    with open(vae_run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    record = read_json(vae_run / "fit.json")
    assert record["status"] == "finished"
    assert record["best_valid_elbo"] == max(float(row["valid_elbo"]) for row in rows)
    assert_pngs(vae_run, "samples.png", "reconstructions.png", "elbo.png")
    weights = torch.load(vae_run / "checkpoint.pt", weights_only=True)["model"]
    opened = runs.open_run(vae_run)
    assert all(torch.equal(weights[name], value) for name, value in opened.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "quantity"),
    [
        (("--model", "made", "--set", "hidden_dims=[4]"), "log p(x)"),
        (("--model", "conditional_independent_pixel", "--given", "label"), "log p(x | label)"),
        (("--model", "vae", "--set", "hidden_dims=[4]"), "ELBO"),
        (
            ("--model", "vae", "--set", "hidden_dims=[4]", "--fit", "objective=renyi", "--fit", "num_particles=2"),
            "Rényi bound (alpha 0.5) of 2 particles",
        ),
        (
            ("--model", "vae", "--set", "hidden_dims=[4]", "--fit", "objective=dreg", "--fit", "num_particles=2"),
            "importance weighted bound of 2 particles",
        ),
    ],
)
def test_what_a_fit_brought_up_is_called_by_its_name(options, quantity, tmp_path, monkeypatch) -> None:
    named = []
    monkeypatch.setattr(plots, "plot_history", lambda rows, path, *, name: named.append(name) or path)
    fit = ("--space", "binary", "--fit", "num_epochs=1", "--fit", "batch_size=500", "--quiet")
    said = call("train", "--data", "digits", "--out", tmp_path, *options, *fit)
    assert f"validation {quantity} -" in said
    assert named == [quantity]


def test_same_seed_same_parameters_and_resuming_a_finished_run_changes_nothing(vae_run, tiny, tmp_path) -> None:
    def parameters(out):
        return torch.nn.utils.parameters_to_vector(runs.open_run(out).model.parameters())

    trained(tiny, tmp_path, "--model", "vae")
    assert torch.equal(parameters(tmp_path), parameters(vae_run))
    text = trained(tiny, tmp_path, "--model", "vae", "--resume")
    assert "finished after 2 epochs" in text
    assert torch.equal(parameters(tmp_path), parameters(vae_run))


def test_a_run_that_has_not_ended_is_not_evaluated(vae_run, tmp_path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.json", "checkpoint.pt"):
        (unfinished / name).write_bytes((vae_run / name).read_bytes())
    assert "has not ended: fit.json is missing" in call("evaluate", unfinished, code=1)


def test_quadrants_without_given_are_not_ignored(tiny, tmp_path) -> None:
    text = call("train", "--model", "vae", "--data", tiny, "--quadrants", 3, "--out", tmp_path, code=2)
    assert "--quadrants needs --given quadrants" in text


def test_one_particle_has_no_error_and_the_summary_is_strict_json(vae_run, tmp_path) -> None:
    call("evaluate", vae_run, "--particles", 1, "--out", tmp_path)
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["mc_se"] is None


def test_resume_refuses_another_configuration(vae_run, tiny) -> None:
    text = call("train", "--model", "vae", "--data", tiny, "--out", vae_run, "--resume", code=1)
    assert text.startswith(f"Error: cannot resume {vae_run}: its config.json differs")
    assert "options was {" in text
    assert text.strip().endswith("(--overwrite starts anew)")


def test_a_run_that_is_there_is_replaced_only_when_asked(vae_run, tiny, tmp_path) -> None:
    before = (vae_run / "checkpoint.pt").read_bytes()
    text = call("train", "--model", "vae", "--data", tiny, "--out", vae_run, code=1)
    assert text.startswith(f"Error: {vae_run} holds a run already: --resume goes on with it, --overwrite starts anew")
    assert (vae_run / "checkpoint.pt").read_bytes() == before


@pytest.mark.usefixtures("no_pictures")
def test_a_run_started_anew_takes_nothing_from_the_one_before(vae_run, tiny, tmp_path, monkeypatch) -> None:
    out = tmp_path / "vae"
    shutil.copytree(vae_run, out)
    monkeypatch.setattr(runs, "fit", lambda *args, **settings: sys.exit(9))  # as if it were killed
    call("train", "--model", "vae", "--data", tiny, "--out", out, "--quiet", "--overwrite", code=9)
    assert not (out / "checkpoint.pt").exists()
    assert not (out / "fit.json").exists()


def test_interrupted_fit_ends_with_130_and_names_the_way_on(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "fit", lambda *args, **settings: History((), 0, None, "interrupted", 0.0))
    text = call("train", "--model", "vae", "--data", tiny, "--out", tmp_path, code=130)
    assert text.splitlines()[-1] == "interrupted; what was saved can be resumed with --resume"
    assert read_json(tmp_path / "fit.json")["status"] == "interrupted"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_interrupt_anywhere_else_ends_with_130(command, tiny, tmp_path, monkeypatch) -> None:
    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "fit", interrupt)
    rows = ("--model", "vae") if command == "train" else ("--models", "vae", "--jobs", 1)
    text = call(command, *rows, "--data", tiny, "--out", tmp_path, "--quiet", code=130)
    assert "interrupted" in text.splitlines()[-1]


# evaluate


def test_evaluate_gives_the_digits_of_the_python_api_in_all_three_files(vae_run, tmp_path) -> None:
    noise = ("--particles", "30", "--seed", "3", "--quiet")
    text = call("evaluate", vae_run, *noise, "--out", tmp_path)
    run = runs.open_run(vae_run)
    mine = log_likelihood(run.model, run.data.test, estimator=importance_sampling(30), seed=3)
    loaded = LogLikelihood.load(tmp_path / "evaluation.npz")
    assert_same_digits(loaded, mine)
    with open(tmp_path / "evaluation.csv", newline="") as file:
        column = [float(row["log_prob"]) for row in csv.DictReader(file)]
    assert column == mine.log_prob.tolist()
    assert read_json(tmp_path / "evaluation.json")["mean_log_prob"] == mine.mean
    assert f"≥ {mine.mean:.2f}" in text


def test_subset_is_a_seeded_draw(vae_run, tmp_path) -> None:
    call("evaluate", vae_run, "--particles", 5, "--num-data", 4, "--seed", 7, "--out", tmp_path, "--quiet")
    test = runs.open_run(vae_run).data.test
    assert LogLikelihood.load(tmp_path / "evaluation.npz").digest == test.subset(4, 7).digest


def test_jackknife_promises_no_side(vae_run, tmp_path) -> None:
    call("evaluate", vae_run, "--estimator", "is-jackknife", "--particles", 10, "--out", tmp_path, "--quiet")
    assert read_json(tmp_path / "evaluation.json")["direction"] == "unbiased"


def test_exact_evaluation_of_a_vae_is_a_clear_error(vae_run, tmp_path) -> None:
    text = call("evaluate", vae_run, "--estimator", "exact", "--out", tmp_path, "--quiet", code=1)
    assert text.startswith("Error: exact() needs a model without continuous latents, this one has ['z']; use")


# compare


def test_comparison_of_digits_holds_what_is_promised(digits_comparison) -> None:
    out, text = digits_comparison
    contents = read_json(out / "comparison.json")
    assert set(contents) == {"data", "rows", "pairs", "remarks", "level", "sentences", "beside"}
    assert (contents["data"]["name"], contents["data"]["space"]) == ("digits", "Quantized(17)")
    assert contents["data"]["n_test"] == 360
    assert all(set(row) >= ROW_KEYS for row in contents["rows"])
    means = [row["mean_log_prob"] for row in contents["rows"]]
    assert means == sorted(means, reverse=True)
    assert {row["model"] for row in contents["rows"]} == {"independent_pixel", "vae", "cvae"}
    assert {row["quantity"] for row in contents["rows"]} == {"log p(x)"}
    assert len(contents["pairs"]) == 3
    assert all(set(pair) >= {"a", "b", "difference", "se", "low", "high"} for pair in contents["pairs"])
    assert (out / "comparison.txt").read_text(encoding="utf-8").strip() in text


def test_conditional_row_stands_beside_and_is_not_paired(digits_comparison) -> None:
    out, _ = digits_comparison
    (beside,) = read_json(out / "comparison.json")["beside"]
    assert beside["quantity"] == "log p(x | label)"
    assert [row["model"] for row in beside["rows"]] == ["cvae"]
    assert beside["pairs"] == []


def test_each_row_is_a_run_with_its_files_and_pictures(digits_comparison) -> None:
    out, _ = digits_comparison
    assert_pngs(out, "comparison.png", "comparison_label.png")
    for name in ("vae", "cvae"):
        assert_pngs(out / name, "samples.png", "reconstructions.png", "elbo.png")
        assert {"config.json", "history.csv", "checkpoint.pt"} <= {path.name for path in (out / name).iterdir()}
    assert_pngs(out / "independent_pixel", "samples.png")
    assert read_json(out / "independent_pixel" / "evaluation.json")["direction"] == "exact"


ROWS = ("--models", "independent_pixel,vae", "--fit", "num_epochs=1", "--particles", "8", "--threads", "1", "--quiet")


@pytest.fixture
def tiny_comparison(tiny, tmp_path, no_pictures):
    call("compare", "--data", tiny, *ROWS, "--jobs", 1, "--out", tmp_path / "one")
    return tmp_path / "one"


def figures(path):
    """A comparison without the seconds, which no two runs share."""
    contents = read_json(path / "comparison.json")
    for row in contents["rows"]:
        del row["seconds"], row["train_seconds"]
    return contents


def test_two_jobs_give_the_digits_of_one_and_resuming_fits_nothing(tiny_comparison, tiny, tmp_path) -> None:
    one, two = tiny_comparison, tmp_path / "two"
    call("compare", "--data", tiny, *ROWS, "--jobs", 2, "--out", two)
    assert figures(two) == figures(one)
    files = [one / name / file for name in ("independent_pixel", "vae") for file in ("checkpoint.pt", "evaluation.npz")]
    before = [file.stat().st_mtime_ns for file in files]
    call("compare", "--data", tiny, *ROWS, "--jobs", 1, "--out", one, "--resume")
    assert [file.stat().st_mtime_ns for file in files] == before
    assert figures(one) == figures(two)


@pytest.mark.parametrize("change", [("--seed", 1), ("--num-data", 5), ("--estimator", "is-jackknife")])
def test_resume_scores_again_what_evaluate_has_overwritten(change, tiny_comparison, tiny) -> None:
    before, checkpoint = figures(tiny_comparison), tiny_comparison / "vae" / "checkpoint.pt"
    saved = checkpoint.stat().st_mtime_ns
    call("evaluate", tiny_comparison / "vae", "--particles", 8, *change, "--quiet")
    call("compare", "--data", tiny, *ROWS, "--jobs", 1, "--out", tiny_comparison, "--resume")
    assert figures(tiny_comparison) == before
    assert checkpoint.stat().st_mtime_ns == saved


# sample


def test_samples_are_pictures_and_numbers_of_the_space(vae_run, tmp_path) -> None:
    for name in ("a", "b"):
        call("sample", vae_run, "--num", 5, "--seed", 2, "--out", tmp_path / f"{name}.png")
    assert_pngs(tmp_path, "a.png")
    first, second = (read_arrays(tmp_path / f"{name}.npz")["obs"] for name in ("a", "b"))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (5, 4, 4)
    runs.open_run(vae_run).data.space.check(torch.from_numpy(first))


def test_samples_of_one_label(digits_comparison, tmp_path) -> None:
    out, _ = digits_comparison
    call("sample", out / "cvae", "--label", 3, "--num", 4, "--out", tmp_path / "threes.png")
    drawn = read_arrays(tmp_path / "threes.npz")
    assert drawn["obs"].shape == (4, 8, 8)
    np.testing.assert_array_equal(drawn["given"], np.tile(np.eye(10)[3], (4, 1)))


def test_samples_that_continue_given_quadrants(quadrants_run, tmp_path) -> None:
    call("sample", quadrants_run, "--num", 3, "--out", tmp_path / "right.png")
    drawn, run = read_arrays(tmp_path / "right.npz"), runs.open_run(quadrants_run)
    truth = run.data.valid.subset(8, 0)
    assert drawn["obs"].shape == (24, 8)
    np.testing.assert_array_equal(drawn["given"][::3], truth.context.numpy())
    assert_pngs(tmp_path, "right.png")


def test_a_label_needs_a_model_given_labels(vae_run, tmp_path) -> None:
    text = call("sample", vae_run, "--label", 1, "--out", tmp_path / "x.png", code=1)
    assert text.startswith("Error: a label needs a model that is given labels")


# score


@pytest.fixture(scope="module")
def own_images(tiny):
    """Twenty images of the data set and, last, an inverted one."""
    images = read_arrays(tiny)["images"][:20]
    return np.concatenate([images, 255 - images[:1]])


def scores(vae_run, path, out):
    text = call("score", vae_run, path, "--particles", 20, "--out", out, "--top", 3, "--quiet")
    with open(out / "outliers.csv", newline="") as file:
        return text, list(csv.DictReader(file))


def test_inverted_image_ranks_first_and_the_ranking_ascends(vae_run, own_images, tmp_path) -> None:
    np.save(tmp_path / "own.npy", own_images)
    text, rows = scores(vae_run, tmp_path / "own.npy", tmp_path / "out")
    log_prob = [float(row["log_prob"]) for row in rows]
    assert rows[0]["index"] == "20"
    assert float(rows[0]["deviation"]) < -5
    assert log_prob == sorted(log_prob)
    assert "   1. image 20: log p" in text
    per_image = LogLikelihood.load(tmp_path / "out" / "scores.npz").log_prob
    assert [per_image[int(row["index"])] for row in rows] == log_prob


def test_file_and_folder_of_the_same_images_score_alike(vae_run, own_images, tmp_path) -> None:
    np.savez(tmp_path / "own.npz", images=own_images)
    (tmp_path / "own").mkdir()
    for number, image in enumerate(own_images):
        Image.fromarray(image).save(tmp_path / "own" / f"{number:02}.png")
    rankings = [scores(vae_run, tmp_path / name, tmp_path / "out")[1] for name in ("own.npz", "own")]
    assert rankings[0] == rankings[1]


def test_wrong_images_are_named(vae_run, own_images, tmp_path) -> None:
    np.save(tmp_path / "wide.npy", np.tile(own_images, (1, 1, 2)))
    text = call("score", vae_run, tmp_path / "wide.npy", "--out", tmp_path, code=1)
    expected = f"array in {tmp_path / 'wide.npy'} must have shape (batch, 4, 4), got (21, 4, 8)"
    assert text == f"Error: {expected}\n"


# what is wrong, in one line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nope"], "model must be one of autoencoder, "),
        (["--model", "vae", "--set", "nope=1"], "vae has no option nope; it has latent_dim, "),
        (["--model", "vae", "--set", "latent_dim=wide"], "latent_dim must be a whole number of at least 1, got 'wide'"),
        (["--model", "vae", "--fit", "nope=1"], "the fit of vae has no setting nope; it has num_epochs, "),
        (["--model", "vae", "--fit", "seed=1"], "the fit of vae has no setting seed; "),
        (["--model", "vae", "--fit", "num_epochs=many"], "num_epochs must be a whole number of at least 1, got 'many'"),
        (["--model", "vae", "--fit", "learning_rate=0"], "learning_rate must be greater than 0, got 0"),
        (["--model", "vae", "--fit", "patience=long"], "patience must be a whole number of at least 1, got 'long'"),
        (
            ["--model", "gmm", "--fit", "num_epochs=2"],
            "the fit of gmm has no setting num_epochs; it has num_iterations, ",
        ),
        (["--model", "ppca"], "ppca cannot live in Quantized(256)"),
        (["--model", "cvae"], "cvae needs a context: --given label or --given quadrants"),
        (["--model", "vae", "--given", "label"], "vae models p(x) and takes no context, but the data are given label"),
        (["--model", "vae", "--resume"], "no run at "),
        (["--model", "vae", "--data", "nope"], "data must be one of digits, mnist, "),
        (["--model", "vae", "--data", "nope.npz"], "no such file or folder: nope.npz"),
    ],
)
def test_error_of_train_is_one_line(args, message, tiny, tmp_path) -> None:
    text = call("train", "--data", tiny, "--out", tmp_path / "out", "--quiet", *args, code=1)
    assert text.startswith(f"Error: {message}")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False), ("[1,2]", [1, 2])])
def test_values_of_options_are_those_of_python_or_true_and_false(text, value) -> None:
    assert values((f"coordinates={text}", "name=truest")) == {"coordinates": value, "name": "truest"}


def test_one_validation_image_is_enough_for_a_run_and_its_pictures(tmp_path) -> None:
    np.save(tmp_path / "six.npy", np.random.default_rng(0).integers(0, 2, (6, 3, 3)).astype(bool))
    how = ("--model", "vae", "--set", "hidden_dims=[4]", "--fit", "num_epochs=1", "--quiet")
    call("train", "--data", tmp_path / "six.npy", "--out", tmp_path / "run", *how)
    assert (tmp_path / "run" / "reconstructions.png").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--models", "nope"], "model must be one of autoencoder, "),
        (["--models", "nope", "--models", "independent_pixel"], "model must be one of autoencoder, "),
        (["--models", "vae,vae"], "rows must have different names, got vae more than once"),
        (["--models", "ppca"], "ppca cannot live in Quantized(256)"),
        (["--models", "independent_pixel,vae", "--fit", "nope=1"], "the fit of vae has no setting nope; "),
    ],
)
def test_error_of_compare_is_one_line(args, message, tiny, tmp_path) -> None:
    text = call("compare", "--data", tiny, "--out", tmp_path, "--quiet", "--jobs", 1, *args, code=1)
    assert text.startswith(f"Error: {message}")
    assert text.count("\n") == 1  # before any row is fitted


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--set", "latent_dim"], "expected NAME=VALUE, got 'latent_dim'"),
        (["--device", "nope"], "Invalid value for --device: no device 'nope': "),
        (["--given", "colour"], "Invalid value for '--given'"),
    ],
)
def test_misuse_ends_with_2_and_says_how_it_is_used(option, message, tiny, tmp_path) -> None:
    text = call("train", "--model", "vae", "--data", tiny, "--out", tmp_path, *option, code=2)
    assert "Usage: main" in text
    assert message in text.splitlines()[-1]


def test_output_that_cannot_be_a_folder_is_one_line(tiny, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    text = call("train", "--model", "vae", "--data", tiny, "--out", tmp_path / "file" / "run", "--quiet", code=1)
    assert text.startswith("Error: ")
    assert text.count("\n") == 1


def test_run_that_is_none_is_named(tmp_path) -> None:
    text = call("sample", tmp_path, code=1)
    assert text == f"Error: no run at {tmp_path}: config.json is missing\n"


def test_train_says_why_there_is_no_graph(tiny, tmp_path):
    """Pyro's inverse of an autoregressive flow, which `dreg` needs, indexes by the numbers of a tensor."""
    guide = ("--model", "vae", "--guide", "inverse_autoregressive")
    fit = ("--fit", "objective=dreg", "--fit", "num_particles=2", "--fit", "compile=True")
    with pytest.warns(UserWarning, match="compile=True has no effect"):
        said = trained(tiny, tmp_path / "run", *guide, *fit)
    assert "no graph of the steps was taken: the pair takes numbers out of tensors" in said
    assert read_json(tmp_path / "run" / "fit.json")["ran_as"] == "eager"
