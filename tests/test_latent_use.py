"""The use of latents against linear Gaussian models, where every part of the ELBO is known in closed form."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import call
from helpers import build, random_data
from oracles import LinearGaussian

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.randomness import own_randomness
from pyro_vae.usage.aggregate import log_aggregate
from pyro_vae.usage.sites import find_sites

NUM_DATA = 1500
USED = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)  # lengths of the columns of W: two latents unused


def separable():
    """A pair whose columns of W are orthogonal, so that its mean-field guide is the exact posterior."""
    pair = LinearGaussian(7, 5, guide="mean_field")
    pair.loadings = torch.linalg.qr(pair.loadings).Q * USED
    pair.precision = torch.eye(5, dtype=torch.float64) + pair.loadings.T @ pair.loadings / pair.noise**2
    return pair


@pytest.fixture(scope="module")
def known():
    """The separable pair, its data, and how its latents are used."""
    pair = separable()
    batch = pv.Batch(pair.draw(NUM_DATA))
    return pair, batch, pv.latent_use(pair.model, batch, guide=pair.guide)


class TwoSites(LinearGaussian):
    """The same law with its latents at two sites, a then b; the guide is q(a | x) q(b | a, x), the exact posterior."""

    split = 2

    def model(self, obs):
        zero = torch.zeros(self.latent_dim, dtype=torch.float64)
        with pyro.plate("data", len(obs), dim=-1):
            a = pyro.sample("a", dist.Normal(zero[: self.split], 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(zero[self.split :], 1.0).to_event(1))
            mean = torch.cat([a, b], -1) @ self.loadings.T + self.loc
            pyro.sample("obs", dist.Normal(mean, self.noise).to_event(1), obs=obs)

    def guide(self, obs):
        mean = (obs - self.loc) @ self.loadings @ torch.linalg.inv(self.precision) / self.noise**2
        first, second = slice(self.split), slice(self.split, None)
        covariance = torch.linalg.inv(self.precision)[first, first]
        inner = self.precision[second, second]
        slope = -torch.linalg.solve(inner, self.precision[second, first])
        with pyro.plate("data", len(obs), dim=-1):
            a = pyro.sample("a", dist.MultivariateNormal(mean[:, first], covariance))
            shift = (a - mean[:, first]) @ slope.T
            pyro.sample("b", dist.MultivariateNormal(mean[:, second] + shift, precision_matrix=inner))


def one_latent(law):
    """z ~ N(0, I) beside data that ignore it, with a guide that ignores the data."""

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", law())

    return model, guide


def planar():
    """A flow without an inverse, so that log q is known at its own draws only; nor does it tell its mean."""
    flow = dist.transforms.Planar(2).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.linspace(0.3, 0.6, parameter.numel()).double())
    return dist.TransformedDistribution(dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), [flow])


def numbers(n=40, dims=3):
    return pv.Batch(torch.randn(n, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_the_kl_of_each_unit_is_that_of_two_normals(known):
    """KL(N(μ, s²) || N(0, 1)) = (s² + μ² - 1 - log s²)/2, with rounding errors only."""
    pair, batch, use = known
    mean = (batch.obs - pair.loc) @ pair.loadings @ torch.linalg.inv(pair.precision) / pair.noise**2
    variance = 1 / pair.precision.diagonal()
    expected = (variance + mean**2 - 1 - variance.log()) / 2
    site = use.sites[0]
    np.testing.assert_allclose(site.kl_per_unit, expected.mean(0), atol=1e-10)
    np.testing.assert_allclose(site.kl_per_unit_se, expected.std(0) / math.sqrt(NUM_DATA), atol=1e-10)
    assert use.kl.mean == pytest.approx(float(expected.sum(1).mean()), abs=1e-9)
    assert use.kl.mc_se == pytest.approx(0, abs=1e-9)
    assert site.kl_per_unit[3:] == pytest.approx(0, abs=1e-12)


def test_active_units_are_those_that_the_data_depend_on(known):
    """In the population Var E[z_j | x] = |w_j|² / (|w_j|² + s²), for unused units 0; within 4 standard errors."""
    pair, _, use = known
    site = use.sites[0]
    truth = (USED**2 / (USED**2 + pair.noise**2)).numpy()
    assert (np.abs(site.variance - truth) <= 4 * site.variance_se).all()
    assert site.active.tolist() == [True, True, True, False, False]
    assert site.active_range == (3, 3)
    assert use.num_active == 3
    assert any("z: 3 of 5 units are active; the others hold 0.000 of" in text for text in use.remarks())
    assert "3 of 5 units are active" in use.table()


def test_reconstruction_and_elbo_in_closed_form(known):
    """E_q log p(x | z) = log N(x; W μ + loc, s² I) - Σ_j |w_j|² Var(z_j) / (2 s²); the ELBO of the exact posterior is
    log p(x). Within 4 Monte Carlo standard errors for these data.
    """
    pair, batch, use = known
    mean = (batch.obs - pair.loc) @ pair.loadings @ torch.linalg.inv(pair.precision) / pair.noise**2
    fitted = dist.Normal(mean @ pair.loadings.T + pair.loc, pair.noise).log_prob(batch.obs).sum(-1)
    expected = fitted - (USED**2 / pair.precision.diagonal()).sum() / (2 * pair.noise**2)
    assert abs(use.reconstruction.mean - float(expected.mean())) <= 4 * use.reconstruction.mc_se
    assert abs(use.elbo.mean - float(pair.log_prob(batch.obs).mean())) <= 4 * use.elbo.mc_se


def test_mutual_information_and_marginal_kl_in_closed_form(known):
    """I = ½ log det(I + W'W / s²), and q(z) = p(z) in the population.

    With N data, q(z) is off by chance: E KL(q_N || p) <= log(1 + (det(I + W'W / s²) - 1) / N) by Jensen, as the mean of
    q(z | x) / p(z) under the joint law is that determinant. By as much I falls short. Within 4 standard errors of that.
    """
    pair, _, use = known
    truth = float(pair.precision.logdet()) / 2
    short = math.log1p((float(pair.precision.det()) - 1) / NUM_DATA)
    information, marginal = use.mutual_information, use.marginal_kl
    assert truth - short - 4 * information.se <= information.mean <= truth + 4 * information.se
    assert -4 * marginal.mc_se <= marginal.mean <= short + 4 * marginal.se
    assert information.mean + marginal.mean == pytest.approx(use.kl.mean, abs=1e-9)
    assert information.mc_se < 0.2 * information.se  # what is known in closed form takes the noise away


@pytest.mark.parametrize("kind", ["exact", "mean_field"])
def test_the_parts_add_up_to_the_elbo_of_importance_sampling(kind):
    """Within 4 standard errors of both, on correlated latents; a full covariance has no KL of each unit."""
    pair = LinearGaussian(5, 3, guide=kind, widen=1.3)
    batch = pv.Batch(pair.draw(100))
    use = pv.latent_use(pair.model, batch, guide=pair.guide, num_particles=32, seed=1)
    sampled = pv.log_likelihood(pair.model, batch, guide=pair.guide, estimator=pv.importance_sampling(200), seed=2)
    error = math.hypot(use.elbo.mc_se, float(np.sqrt((sampled.spread / 200).sum())) / 100)
    parts = use.reconstruction.mean - use.mutual_information.mean - use.marginal_kl.mean
    assert abs(parts - float(sampled.elbo.mean())) <= 4 * error
    assert use.elbo.mean == pytest.approx(parts, abs=1e-9)
    site = use.sites[0]
    assert (site.kl_per_unit is None) == (kind == "exact")
    assert site.reason == (
        "q(z | x) does not consist of independent normals (MultivariateNormal)" if kind == "exact" else None
    )


@pytest.mark.parametrize("tiled", [False, True])
def test_the_aggregate_posterior_is_the_mean_of_the_laws(tiled):
    pair = TwoSites(5, 3)
    whole, obs = LinearGaussian(5, 3), pair.draw(6)
    sites = find_sites(traces.Pair(pair.model, pair.guide), (obs,), tiled)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = {"a": z[:, :2], "b": z[:, 2:]}
    found = log_aggregate(traces.Pair(pair.model, pair.guide), (obs,), sites, rows, tiled)
    mean = (obs - whole.loc) @ whole.loadings @ torch.linalg.inv(whole.precision) / whole.noise**2
    laws = dist.MultivariateNormal(mean, precision_matrix=whole.precision)
    expected = laws.log_prob(z[:, None]).logsumexp(1) - math.log(6)
    assert torch.allclose(found, expected, atol=1e-9)


def test_log_n_bounds_the_mutual_information_and_the_table_says_so():
    """Data so far apart that each draw is explained by its own datum alone: I = log N, to rounding."""
    pair = LinearGaussian(5, 2)
    batch = pv.Batch(40 * torch.eye(5, dtype=torch.float64)[:4])
    use = pv.latent_use(pair.model, batch, guide=pair.guide)
    assert use.mutual_information.mean == pytest.approx(math.log(4), abs=1e-6)
    assert any("near log N = 1.386, which it cannot exceed with 4 data" in text for text in use.remarks())


def test_several_sites_where_one_is_drawn_given_another():
    """The same law and posterior as with one site: the ELBO is log p(x), and units vary as E[z | x] does.

    Units of b are estimated, since their law depends on a: K = 4 draws would add a quarter of the posterior's variance
    to A_u, were it not taken away. Within 4 standard errors of the sample variance of the exact means.
    """
    pair = TwoSites(5, 3)
    batch = pv.Batch(pair.draw(300))
    use = pv.latent_use(pair.model, batch, guide=pair.guide, num_particles=4)
    assert use.elbo.mean == pytest.approx(float(pair.log_prob(batch.obs).mean()), abs=1e-9)
    mean = (batch.obs - pair.loc) @ pair.loadings @ torch.linalg.inv(pair.precision) / pair.noise**2
    a, b = use.sites
    np.testing.assert_allclose(a.variance, mean[:, :2].var(0), rtol=1e-9)
    assert abs(b.variance[0] - float(mean[:, 2].var())) <= 4 * b.variance_se[0]
    assert [a.name, *b.unit_names] == ["a", "b"]
    assert use.kl.mean == pytest.approx(a.kl.mean + b.kl.mean, abs=1e-9)
    whole = LinearGaussian(5, 3)
    single = pv.latent_use(whole.model, batch, guide=whole.guide, num_particles=4, seed=1)
    gap = use.mutual_information.mean - single.mutual_information.mean
    assert abs(gap) <= 4 * math.hypot(use.mutual_information.mc_se, single.mutual_information.mc_se)


def test_a_site_whose_law_depends_on_another_has_no_kl_of_each_unit():
    """Its closed form at a draw of the other would be that of a conditional law."""
    from pyro_vae.models import LadderVAE

    with own_randomness(0):
        model = LadderVAE(pv.Real((4,)), latent_dims=(3, 2), hidden_dims=(8,))
    use = pv.latent_use(model, pv.Batch(numbers(20, 4).obs.float()), num_particles=4)
    reasons = {site.name: site.reason for site in use.sites}
    assert reasons == {"z1": "p(z) depends on other latents", "z2": "q(z | x) depends on other latents"}
    assert [site.num_units for site in use.sites] == [3, 2]


def test_a_guide_without_a_density_is_told_apart_up_to_the_mutual_information(tmp_path):
    """Planar flows: no mutual information, and the reason; nothing is active, as A_u is 0 within 4 standard errors."""
    model, guide = one_latent(planar)
    use = pv.latent_use(model, numbers(200), guide=guide, num_particles=8)
    assert use.mutual_information is None
    assert use.marginal_kl is None
    assert "mutual information needs log q(z | x) at any z" in use.skipped
    site = use.sites[0]
    assert (np.abs(site.variance) <= 4 * site.variance_se).all()
    assert site.kl.mc_se > 0
    contents = json.loads(use.to_json(tmp_path / "latents.json").read_text(encoding="utf-8"))
    assert contents["mutual_information"] is None
    assert contents["skipped"] == use.skipped
    assert pv.plot_latent_use(use, tmp_path / "latents.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_guide_adds_to_the_model_is_no_latent_of_it(tmp_path):
    with own_randomness(0):
        model = pv.models.VAE(pv.Real((4,)), latent_dim=2, hidden_dims=(8,), guide="hierarchical")
    use = pv.latent_use(model, pv.Batch(numbers(20, 4).obs.float()), num_particles=4)
    assert {site.name: site.is_auxiliary for site in use.sites} == {"z_auxiliary": True, "z": False}
    assert use.num_units == 2
    assert use.num_active == next(site for site in use.sites if site.name == "z").num_active
    assert use.posterior_draws.shape[1] == 2
    assert use.kl.mean == pytest.approx(sum(site.kl.mean for site in use.sites))  # the ELBO pays for it all the same
    assert "Note: z_auxiliary is the guide's own and no latent of the model" in use.table()
    assert pv.plot_latent_use(use, tmp_path / "latents.png").read_bytes().startswith(b"\x89PNG")


def test_a_posterior_that_is_the_prior_has_collapsed(tmp_path):
    model, guide = one_latent(lambda: dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    use = pv.latent_use(model, numbers(), guide=guide)
    assert use.num_active == 0
    parts = (use.kl, use.mutual_information, use.marginal_kl)
    assert [each.mean for each in parts] == pytest.approx([0, 0, 0], abs=1e-9)
    assert any(text.startswith("Posterior collapse of z: none of its 2 units is active") for text in use.remarks())
    assert pv.plot_latent_use(use, tmp_path / "latents.png").read_bytes().startswith(b"\x89PNG")


def test_a_prior_given_the_context_has_no_marginal_to_compare_with():
    case = ("CVAE", pv.Real((2, 2)), pv.Labels(log_prob=(-1.5, -1.0, -0.9)))
    model = build(case)
    use = pv.latent_use(model, random_data(case, sizes=(12, 2, 2)).train, num_particles=4)
    assert "another law for each datum" in use.skipped
    assert use.sites[0].kl_per_unit is not None
    assert use.sites[0].prior is None


def test_the_same_seed_gives_the_same_digits_and_the_model_stays_as_it_was():
    with own_randomness(0):
        model = pv.models.VAE(pv.Real((3,)), latent_dim=2, hidden_dims=(8,), prior="mixture")
    batch = pv.Batch(numbers().obs.float())
    state = torch.get_rng_state()
    first, second, third = (pv.latent_use(model, batch, num_particles=4, seed=seed) for seed in (0, 0, 1))
    assert first.to_dict() == second.to_dict()
    assert first.elbo != third.elbo
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert first.sites[0].reason.startswith("p(z) does not consist of independent normals")


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (dist.Bernoulli(torch.tensor(0.5).double()), r"continuous sites only, and site 'z' is discrete \(Bernoulli\)"),
        (None, "needs a model with latent sites, and this one has none"),
    ],
)
def test_what_has_no_continuous_latents_is_refused(law, message):
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            if law is not None:
                pyro.sample("z", law)
            pyro.sample("obs", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            if law is not None:
                pyro.sample("z", law)

    with pytest.raises(ValueError, match=message):
        pv.latent_use(model, numbers(), guide=guide)


def test_a_masked_site_is_refused():
    """Its law alone does not say what it adds to log q."""
    model, _ = one_latent(None)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1), pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("z", dist.Normal(torch.ones(2).double(), 1.0).to_event(1))

    with pytest.raises(ValueError, match="is one masked"):
        pv.latent_use(model, numbers(), guide=guide)


def test_errors_need_two_data_and_two_particles():
    pair = separable()
    with pytest.raises(ValueError, match="the number of data must be a whole number of at least 2, got 1"):
        pv.latent_use(pair.model, pv.Batch(pair.draw(1)), guide=pair.guide)
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 2, got 1"):
        pv.latent_use(pair.model, pv.Batch(pair.draw(5)), guide=pair.guide, num_particles=1)


def test_the_command_writes_the_table_the_json_and_the_picture(vae_run, tmp_path):
    text = call("latents", vae_run, "--out", tmp_path, "--num-data", "12", "--particles", "8")
    assert "mutual information of x and z" in text
    contents = json.loads((tmp_path / "latents.json").read_text(encoding="utf-8"))
    assert contents["data"]["n"] == 12
    assert contents["sites"][0]["num_units"] == 2
    assert (tmp_path / "latents.png").read_bytes().startswith(b"\x89PNG")
