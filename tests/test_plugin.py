"""A guide of the user's own, from its file into a fit, and back out of the run directory."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import FEW_EPOCHS, SMALL_NET, call, trained
from helpers import build, cases, random_data
from scipy import stats

import pyro_vae as pv
from pyro_vae import pictures, runs
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.guides import family
from pyro_vae.testing import check_pair

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = f"{ROOT / 'notebooks' / 'skew_normal.py'}:SkewNormal"
GUIDES = '''
import pyro, pyro.distributions as dist, torch
from torch import nn

class Whole(nn.Module):
    """q(z | x) = N(μ(x), s²) with a network of its own."""
    def __init__(self, model, *, width=4, scale=1.0):
        super().__init__()
        size = model.space.num_dims
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.Tanh(), nn.Linear(width, model.latent_dim))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
    def forward(self, obs, context=None):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(self.net(obs / 255), self.log_scale.exp()).to_event(1))

class Family(nn.Module):
    def __init__(self, in_dim, latent_dim, scale=1.0):
        super().__init__()
        self.loc, self.scale = nn.Linear(in_dim, latent_dim), scale
    def forward(self, features):
        return dist.Normal(self.loc(features), self.scale).to_event(1)

def prior(obs):
    """q(z | x) = p(z)."""
    with pyro.plate("data", len(obs), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

hidden = nn.Linear(16, 2)

def reader(obs):
    with pyro.plate("data", len(obs), dim=-1):
        pyro.sample("z", dist.Normal(hidden(obs.flatten(1)), 1.0).to_event(1))

class NoModule:
    def __init__(self, model): pass

class NoForward(nn.Module):
    def __init__(self, model): super().__init__()

class Nothing(nn.Module):
    def __init__(self): super().__init__()

class Picky(nn.Module):
    def __init__(self, model, width): super().__init__()
'''


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    path = tmp_path_factory.mktemp("guides") / "mine.py"
    path.write_text(GUIDES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fitted(guides, tiny, tmp_path_factory):
    """A run for each kind of guide."""
    folder = tmp_path_factory.mktemp("runs")
    trained(tiny, folder / "Whole", "--model", "vae", "--guide", f"{guides}:Whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "plot_run", lambda run: [])
        for name in ("Family", "prior"):
            trained(tiny, folder / name, "--model", "vae", "--guide", f"{guides}:{name}")
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of numbers: drawing is the slowest part of a tiny run."""
    monkeypatch.setattr(pictures, "plot_run", lambda run: [])


def copied(fitted, name, tmp_path):
    return Path(shutil.copytree(fitted / name, tmp_path / name))


@pytest.mark.parametrize("name", ["Family", "Whole", "prior"])
def test_a_run_read_back_is_the_pair_that_was_fitted(name, fitted):
    run = runs.open_run(fitted / name)
    saved = torch.load(fitted / name / "checkpoint.pt", weights_only=True)["best"]["model"]
    held = torch.nn.ModuleList(run.pair.modules).state_dict()
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[key], held[key]) for key in saved)
    assert (run.guide is None) == (name == "Family")
    assert not any(module.training for root in run.pair.modules for module in root.modules())
    check_pair(run.model, run.guide, data=run.data)


def test_a_whole_guide_is_trained_and_counted(fitted, guides):
    run = runs.open_run(fitted / "Whole")
    start = run.config.build(run.data)[1]
    after = dict(run.guide.named_parameters())
    assert not any(torch.equal(value, after[name]) for name, value in start.named_parameters())
    num = sum(p.numel() for root in (run.model, run.guide) for p in root.parameters())
    assert runs.fit_record(run.path)["num_parameters"] == num


def test_evaluation_draws_from_the_users_guide(fitted, tmp_path):
    """Against importance sampling from the prior, which is that guide, written out by hand."""
    call("evaluate", fitted / "prior", "--particles", 3000, "--seed", 1, "--out", tmp_path, "--quiet")
    result, run = LogLikelihood.load(tmp_path / "evaluation.npz"), runs.open_run(fitted / "prior")
    with torch.no_grad():
        z = torch.randn(20_000, 1, 2, generator=torch.Generator().manual_seed(0))
        log_like = run.model.likelihood(z).log_prob(run.data.test.obs)  # (K, n)
    weights = (log_like - log_like.logsumexp(0)).double().exp()
    mine, variance = log_like.double().logsumexp(0) - torch.tensor(20_000.0).log(), (weights**2).sum(0)
    se = (
        torch.from_numpy(result.variance) + variance
    ).sqrt()  # of the difference of two estimates, by the delta method
    assert bool(((torch.from_numpy(result.log_prob) - mine).abs() < 5 * se + 1e-3).all())  # 5 SE, for 18 images


def test_bounds_of_runs_with_different_guides_and_samples(fitted, tmp_path):
    options = ("--curve", "1,20", "--estimator", "is", "--particles", 200, "--out", tmp_path, "--quiet")
    table = call("bounds", fitted / "prior", fitted / "Whole", fitted / "Family", *options)
    rows = {row["name"]: row for row in json.loads((tmp_path / "bounds.json").read_text())["rows"]}
    assert all(name in table for name in rows)
    assert len({row["elbo"]["mean"] for row in rows.values()}) == 3
    for row in rows.values():  # ELBO <= L_20, by 4 standard errors at most the other way
        low, high = (each for each in row["bounds"])
        assert low["mean"] <= high["mean"] + 4 * low["mc_se"]
    call("sample", fitted / "Whole", "--out", tmp_path / "drawn.png", "--num", 2)
    assert (tmp_path / "drawn.png").is_file()


def test_guide_options_reach_all_kinds(guides, tiny, tmp_path, no_pictures):
    trained(tiny, tmp_path / "a", "--model", "vae", "--guide", f"{guides}:Whole", "--guide-set", "width=3")
    assert runs.open_run(tmp_path / "a").guide.net[1].out_features == 3
    trained(tiny, tmp_path / "b", "--model", "vae", "--guide", f"{guides}:Family", "--guide-set", "scale=0.5")
    assert runs.open_run(tmp_path / "b").model.posterior.scale == 0.5
    trained(tiny, tmp_path / "c", "--model", "vae", "--guide", "mean_field")
    assert type(runs.open_run(tmp_path / "c").model.posterior).__name__ == "MeanField"


def test_the_same_seed_gives_the_same_guide(fitted, guides, tiny, tmp_path, no_pictures):
    trained(tiny, tmp_path / "again", "--model", "vae", "--guide", f"{guides}:Whole")
    states = [runs.open_run(path / name).guide.state_dict() for path, name in ((fitted, "Whole"), (tmp_path, "again"))]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_opens_from_another_folder_and_beside_a_file_that_came_along(tiny, tmp_path, monkeypatch, no_pictures):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "mine.py").write_text(GUIDES, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    trained(tiny, "run", "--model", "vae", "--guide", "mine.py:Whole")
    monkeypatch.chdir(tmp_path / "there")
    assert runs.open_run(tmp_path / "here" / "run").config.guide == "mine.py:Whole"  # as it was given
    (tmp_path / "here" / "mine.py").rename(tmp_path / "there" / "mine.py")
    assert runs.open_run(tmp_path / "here" / "run").guide is not None
    (tmp_path / "there" / "mine.py").unlink()
    assert runs.open_run(tmp_path / "here" / "run").guide is not None  # the copy that the run keeps
    again = ("--data", tiny, "--out", tmp_path / "here" / "run", "--overwrite", "--quiet", "--model", "vae")
    output = call("train", *again, "--guide", f"{tmp_path / 'here' / 'run' / 'guide.py'}:Whole", code=1)
    assert "is the copy that the run" in output
    (tmp_path / "here" / "run" / "guide.py").unlink()
    assert "has moved" in call("evaluate", tmp_path / "here" / "run", "--quiet", code=1)


def test_a_guide_that_has_changed_is_read_as_it_was_and_not_fitted_on(tiny, tmp_path, no_pictures):
    path, out = tmp_path / "mine.py", tmp_path / "run"
    path.write_text(GUIDES, encoding="utf-8")
    given = ("--model", "vae", "--guide", f"{path}:Whole")
    trained(tiny, out, *given)
    trained(tiny, out, *given, "--resume")  # the same code goes on
    path.write_text(GUIDES + "\n# a remark\n", encoding="utf-8")
    assert runs.open_run(out).guide is not None  # from the copy that the run keeps
    output = call("train", "--data", tiny, "--out", out, *given, "--resume", "--quiet", *SMALL_NET, *FEW_EPOCHS, code=1)
    assert "mine.py has changed" in output
    (out / "guide.py").write_text(GUIDES + "\n# another\n", encoding="utf-8")
    assert "has changed since the fit: its SHA-256 was" in call("evaluate", out, "--quiet", code=1)


def test_a_configuration_from_before_guides_still_opens(vae_run, tmp_path):
    old = Path(shutil.copytree(vae_run, tmp_path / "old"))
    for name, keys in (("config.json", ("guide", "guide_options")), ("fit.json", ("guide",))):
        content = json.loads((old / name).read_text())
        (old / name).write_text(json.dumps({key: content[key] for key in content if key not in keys}))
    assert runs.open_run(old).guide is None


ERRORS = [
    (("--model", "gmm", "--guide", "mean_field"), "gmm has no amortised posterior .* cvae, vae have one"),
    (("--model", "gmm", "--guide", "FILE:prior"), "fitted by maximum likelihood, which uses no guide"),
    (("--model", "vae", "--guide", "nothing"), "guide must be one of"),
    (("--model", "vae", "--guide", "FILE:Other"), "has no class or function 'Other'; it has Whole, Family"),
    (("--model", "vae", "--guide", "gone.py:Whole"), "no guide at .*gone.py"),
    (("--model", "vae", "--guide", "FILE:prior", "--guide-set", "width=3"), "a function and has no option width"),
    (("--model", "vae", "--guide", "FILE:Whole", "--guide-set", "depth=3"), "no option depth; it has width, scale"),
    (("--model", "vae", "--guide", "FILE:Family", "--guide-set", "depth=3"), "no option depth; it has scale"),
    (("--model", "vae", "--guide", "FILE:reader"), "reads hidden from its file"),
    (
        ("--model", "vae", "--guide", "FILE:NoModule"),
        r"must be a torch module built as No\w+\(in_dim, latent_dim, ...\) with a forward",
    ),
    (
        ("--model", "vae", "--guide", "FILE:NoForward"),
        r"must be a torch module built as No\w+\(in_dim, latent_dim, ...\) with a forward",
    ),
    (("--model", "vae", "--guide", "FILE:Nothing"), "must be built as Nothing"),
    (("--model", "vae", "--guide", "FILE:Picky"), "cannot be built as Picky.*width"),
    (("--model", "vae", "--guide", "FILE:Whole", "--set", "guide=mean_field"), "the guide is given twice"),
    (("--model", "vae", "--set", "guide=FILE:Family"), "not an option of the model: --guide"),
    (("--model", "vae", "--guide-set", "width=3"), "options width need a guide"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_with_a_guide_is_one_line(args, message, guides, tiny, tmp_path):
    args = [arg.replace("FILE", str(guides)) for arg in args]
    output = call("train", "--data", tiny, "--out", tmp_path / "run", *args, "--quiet", code=1)
    assert len(output.strip().splitlines()) == 1
    assert re.search(message, output), output


def test_a_file_that_cannot_be_run_is_named(tiny, tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    args = ("--data", tiny, "--out", tmp_path / "run", "--model", "vae", "--guide", f"{tmp_path / 'bad.py'}:Guide")
    assert "cannot be loaded: ModuleNotFoundError: No module named" in call("train", *args, "--quiet", code=1)


@pytest.mark.parametrize("guide", [*family.listing(), NOTEBOOK], ids=lambda name: name.rpartition(":")[2])
def test_every_family_and_the_notebooks_keep_the_contract(guide):
    case = ("VAE", pv.Binary((4, 4)), None)
    report = check_pair(build(case, guide=guide), data=random_data(case))
    assert not report.failed


def test_a_family_is_one_new_file(tmp_path, monkeypatch):
    """The notebook's file in a copy of guides/: it is listed, built by its name, and keeps the contract."""
    shutil.copytree(ROOT / "pyro_vae" / "guides", tmp_path, dirs_exist_ok=True)
    shutil.copy(ROOT / "notebooks" / "skew_normal.py", tmp_path)
    monkeypatch.setattr(family, "__file__", str(tmp_path / "family.py"))
    monkeypatch.setattr(pv.guides, "__path__", [str(tmp_path)])
    family.listing.cache_clear()
    try:
        assert family.listing()["skew_normal"] == "SkewNormal"
        for case in cases((4, 4), pv.Quantized):
            if case[0] in ("VAE", "CVAE"):
                assert not check_pair(build(case, guide="skew_normal"), data=random_data(case)).skipped
    finally:
        family.listing.cache_clear()
        sys.modules.pop("pyro_vae.guides.skew_normal", None)
        vars(pv.guides).pop("skew_normal", None)


def test_the_notebooks_law_is_the_skew_normal_of_scipy():
    law = sys.modules[family.load(NOTEBOOK).__module__].SkewNormalLaw
    loc, scale, delta = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.3]), torch.tensor([0.9, -0.995])
    alpha = delta.double() / (1 - delta.double() ** 2).sqrt()
    truth = stats.skewnorm(alpha.numpy(), loc.numpy(), scale.numpy())
    z = loc + scale * torch.linspace(-4, 4, 41)[:, None]
    expected = torch.from_numpy(truth.logpdf(z.numpy()))
    # float32: alpha is near 10, and its square times t² near 1600 nats has an error near 1e-3
    torch.testing.assert_close(law(loc, scale, delta).log_prob(z).double(), expected, rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    draws = law(loc, scale, delta).rsample((4000,)).numpy()
    for j in range(2):  # a level at which a right sampler fails once in ten thousand seeds
        one = stats.skewnorm(float(alpha[j]), float(loc[j]), float(scale[j]))
        assert stats.kstest(draws[:, j], one.cdf).pvalue > 1e-4
