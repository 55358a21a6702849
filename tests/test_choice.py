"""Estimators by name, from Python and from the command line."""

import json

import numpy as np
import pytest
import torch
from commands import FEW_EPOCHS, call, trained

import pyro_vae as pv
from pyro_vae.estimators.choice import ANNEALED, PARTICLES, Choice
from pyro_vae.estimators.names import ESTIMATORS
from pyro_vae.randomness import own_randomness
from pyro_vae.runs import open_run

FEW = ("--num-data", "6", "--quiet")
FAST = ("--steps", "4", "--chains", "4", "--leapfrog", "2", *FEW)
NAMES = {
    "is": "importance_sampling",
    "multilevel": "multilevel",
    "ais": "annealed_importance_sampling",
    "smc": "sequential_monte_carlo",
    "router": "router",
}


@pytest.fixture(scope="module")
def vae():
    with own_randomness(0):
        return pv.models.VAE(pv.Binary((3, 3)), latent_dim=2, hidden_dims=(8,))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return pv.Batch((torch.rand(8, 3, 3, generator=generator) < 0.5).float(), space=pv.Binary((3, 3)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_name_builds_what_the_function_of_that_name_does(name, vae, batch):
    annealed = pv.annealed_importance_sampling(num_steps=7, num_chains=3, num_leapfrog=2, start="prior")
    expected = {
        "exact": pv.exact(),
        "is": pv.importance_sampling(40),
        "is-jackknife": pv.importance_sampling(40, jackknife=True),
        "multilevel": pv.multilevel(40),
        "ais": annealed,
        "smc": pv.annealed_importance_sampling(7, 3, 2, "prior", resample=True),
        "router": pv.router(40, annealing=annealed),
        "raise": pv.reverse_annealing(),
    }[name]
    annealing = {"steps": 7, "chains": 3, "leapfrog": 2, "start": "prior"} if name in ANNEALED else {}
    choice = Choice(name, particles=40 if name in PARTICLES else None, **annealing)
    assert choice.build(vae, batch) == expected
    assert choice == Choice(**json.loads(json.dumps(choice.to_dict())))


def test_defaults_are_those_that_help_prints(vae, batch):
    assert {name: Choice(name).build(vae, batch).num_particles for name in PARTICLES} == PARTICLES
    assert Choice("ais").build(vae, batch) == pv.annealed_importance_sampling()
    assert Choice("router").build(vae, batch) == pv.router()
    assert Choice("is", certify=True).build(vae, batch) == pv.sandwich(pv.importance_sampling())


def test_proposals_by_name_and_a_tuned_factor(vae, batch):
    built = {
        name: Choice("is", 50, name).build(vae, batch) for name in ("guide", "overdispersed", "defensive", "refined")
    }
    proposals = [None, pv.overdispersed(1.5), pv.defensive(), pv.refined()]
    assert list(built.values()) == [pv.importance_sampling(50, proposal=each) for each in proposals]
    tuned = Choice("is", 50, "overdispersed", "tuned").build(vae, batch)
    assert tuned == pv.importance_sampling(50, proposal=pv.overdispersed(pv.tune_overdispersion(vae, batch)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "magic"}, "estimator must be one of exact, is, .*, got 'magic'"),
        ({"proposal": "wide"}, "proposal must be one of guide, overdispersed, defensive, refined, got 'wide'"),
        (
            {"estimator": "router", "proposal": "refined"},
            "a proposal goes with is, .*; 'router' has none",
        ),
        ({"estimator": "ais", "start": "middle"}, "start must be 'guide' or 'prior', got 'middle'"),
        ({"estimator": "ais", "particles": 9}, "particles is for estimators is, .*, and would be ignored by 'ais'"),
        ({"steps": 9}, "steps is for ais, smc, router, raise and certify, and would be ignored by 'is'"),
        ({"overdispersion": 2.0}, "overdispersion is for the proposal overdispersed, and would be ignored by 'is'"),
        ({"precision": "float8"}, "precision must be one of float32, tf32, float16, float64, got 'float8'"),
        (
            {"estimator": "ais", "precision": "tf32"},
            "precision is for estimators is, .*, and would be ignored by 'ais'",
        ),
        ({"simulated": 9}, "simulated is for certify, and would be ignored by 'is'"),
        ({"estimator": "exact", "certify": True}, "an exact log-likelihood needs no certificate"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Choice(**settings).build(None, None)


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_by_every_estimator(name, vae_run, tmp_path):
    particles = ("--particles", "40") if name in PARTICLES else ()
    how = FAST if name in ANNEALED else FEW
    call("evaluate", vae_run, "--estimator", name, *particles, *how, "--out", tmp_path)
    found = pv.LogLikelihood.load(tmp_path / "evaluation.npz")
    assert found.estimator == NAMES[name]
    assert len(found) == 6
    assert np.isfinite(found.log_prob).all()
    summary = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert summary["choice"]["estimator"] == name
    assert summary["direction"] == ("unbiased" if name == "multilevel" else "lower")
    if name == "router":
        assert sum(summary["shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["is", "multilevel"])
def test_evaluate_in_another_precision(name, vae_run, tmp_path, vae, batch):
    how = ("--estimator", name, "--particles", "40", "--precision", "tf32")
    call("evaluate", vae_run, *how, *FEW, "--out", tmp_path)
    assert pv.LogLikelihood.load(tmp_path / "evaluation.npz").precision_error.precision == "tf32"
    assert Choice(name, 40, precision="tf32").build(vae, batch).precision == "tf32"


def test_certify_says_what_it_found_on_the_terminal_and_in_the_summary(vae_run, tmp_path):
    text = call("evaluate", vae_run, "--estimator", "ais", "--certify", "--simulated", "8", *FAST, "--out", tmp_path)
    certificate = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["certificate"]
    assert certificate["num_simulated"] == 8
    assert f"{certificate['gap']:.2f}" in text
    assert "certificate" in text.lower()


def test_a_tuned_factor_comes_from_the_validation_data(vae_run, tmp_path):
    how = (
        "--proposal",
        "overdispersed",
        "--overdispersion",
        "tuned",
        "--particles",
        "40",
        "--num-data",
        "6",
        "--quiet",
    )
    call("evaluate", vae_run, *how, "--out", tmp_path)
    run = open_run(vae_run)
    factor = pv.tune_overdispersion(run.model, run.data.valid)
    found = pv.LogLikelihood.load(tmp_path / "evaluation.npz")
    assert any(f"overdispersed({factor:g})" in note for note in found.notes)
    text = call(
        "evaluate", vae_run, "--proposal", "overdispersed", "--overdispersion", "much", "--out", tmp_path, code=2
    )
    assert "expected a number or 'tuned', got 'much'" in " ".join(text.split())


def test_compare_with_several_fits_and_clusters(tiny, tmp_path):
    np.save(tmp_path / "groups.npy", np.arange(18) // 3)
    small = (
        "--models",
        "independent_pixel,vae",
        *FEW_EPOCHS,
        "--particles",
        "30",
        "--fits",
        "2",
        "--jobs",
        "1",
        "--quiet",
    )
    text = call("compare", "--data", tiny, *small, "--groups", tmp_path / "groups.npy", "--out", tmp_path / "out")
    assert "2 fits" in text
    assert "clusters" in text
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert {row["model"] for row in rows} == {"independent_pixel", "vae"}
    first, second = (pv.LogLikelihood.load(tmp_path / "out" / name / "evaluation.npz") for name in ("vae", "vae_fit2"))
    assert first.digest == second.digest
    assert first.mean != second.mean
    assert (tmp_path / "out" / "comparison.nc").is_file()
    np.save(tmp_path / "short.npy", np.arange(3))
    text = call("compare", "--data", tiny, *small, "--groups", tmp_path / "short.npy", "--out", tmp_path / "x", code=1)
    assert "one label per test datum, shape (18,), found (3,)" in " ".join(text.split())


def test_bounds_of_two_runs_side_by_side(vae_run, tiny, tmp_path):
    trained(tiny, tmp_path / "other", "--model", "vae", "--seed", "0", "--fit", "learning_rate=1e-2")
    how = ("--curve", "1,4,16", "--estimator", "ais", *FAST)
    text = call("bounds", vae_run, tmp_path / "other", *how, "--out", tmp_path / "out")
    assert "ELBO" in text
    contents = json.loads((tmp_path / "out" / "bounds.json").read_text(encoding="utf-8"))
    assert len(contents["rows"]) == 2
    assert (tmp_path / "out" / "bounds.png").read_bytes().startswith(b"\x89PNG")
    text = call("bounds", vae_run, *how, "--curve", "1,x", "--out", tmp_path / "out", code=2)
    assert "expected whole numbers with commas, got '1,x'" in " ".join(text.split())
