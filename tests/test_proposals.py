"""Proposals against closed forms: laws that widen, mixtures that are what they say, posteriors that are reached."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, LogNormalWeights
from pyro.distributions.transforms import Planar
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.estimators import proposals
from pyro_vae.estimators.proposals import defensive, overdispersed, refined
from pyro_vae.estimators.widening import widen
from pyro_vae.randomness import systematic


def score(oracle, obs, num_particles, proposal=None, seed=0, **settings):
    estimator = pv.importance_sampling(num_particles, proposal=proposal, **settings)
    return pv.log_likelihood(oracle.model, pv.Batch(obs), guide=oracle.guide, estimator=estimator, seed=seed)


def proposed(proposal, oracle, obs, seed=0):
    """The pair and the arguments that a proposal makes of an oracle's."""
    torch.manual_seed(seed)
    with torch.no_grad(), pyro.validation_enabled(False):
        return proposal(traces.as_pair(oracle.model, oracle.guide), (obs,), seed)


class TwoSites:
    """z ~ N(0, 1), w | z ~ N(z, 1), x | w ~ N(w, 1): x ~ N(0, 3). The guide is rough, its sites are dependent."""

    def __init__(self, stubborn=False):
        self.stubborn = stubborn

    def log_prob(self, obs):
        return torch.distributions.Normal(0.0, math.sqrt(3)).log_prob(obs)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(obs), 1.0))
            w = pyro.sample("w", dist.Normal(z.view(len(obs)) if self.stubborn else z, 1.0))
            pyro.sample("obs", dist.Normal(w, 1.0), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(obs / 3 + 0.1, 0.7))
            pyro.sample("w", dist.Normal((z + obs) / 2, 0.6))


class Waiting:
    """rate ~ Gamma(2, 1), x | rate ~ Exponential(rate): p(x) = 2/(1 + x)³; the latent lives on the positive numbers."""

    def log_prob(self, obs):
        return math.log(2) - 3 * torch.log1p(obs)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(torch.full_like(obs, 2.0), 1.0))
            pyro.sample("obs", dist.Exponential(rate), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("rate", dist.LogNormal(torch.log(2 / (1 + obs)), 0.8))


# Widened laws

LOC, SCALE = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
TRIL = torch.tensor([[1.0, 0.0], [0.4, 0.8]])


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(LOC, SCALE),
        dist.Normal(LOC, SCALE).to_event(1),
        dist.Normal(0.0, 2.0).expand([3, 2]).to_event(1),
        dist.StudentT(5.0, LOC, SCALE),
        dist.Laplace(LOC, SCALE),
        dist.MultivariateNormal(LOC, scale_tril=TRIL),
        dist.LowRankMultivariateNormal(LOC, TRIL[:, :1], SCALE),
        dist.ExpandedDistribution(dist.Normal(LOC, SCALE), (3, 2)),
    ],
    ids=lambda law: type(law).__name__,
)
def test_a_widened_law_has_its_variance_multiplied(law):
    wide = widen(law, 2.5)
    torch.testing.assert_close(wide.variance, 2.5 * law.variance)
    torch.testing.assert_close(wide.mean, law.mean)
    assert wide.batch_shape == law.batch_shape
    assert wide.event_shape == law.event_shape
    if hasattr(law, "covariance_matrix"):
        torch.testing.assert_close(wide.covariance_matrix, 2.5 * law.covariance_matrix)


def test_mixtures_and_transformed_laws_are_widened_inside():
    weights = dist.Categorical(torch.tensor([0.3, 0.7]))
    mixture = widen(dist.MixtureSameFamily(weights, dist.Normal(LOC, SCALE)), 4.0)
    by_hand = dist.MixtureSameFamily(weights, dist.Normal(LOC, 2 * SCALE))
    diagonal = widen(dist.MixtureOfDiagNormals(TRIL, TRIL + 1, torch.zeros(2)), 4.0)
    value = torch.tensor([0.7, 1.3])
    torch.testing.assert_close(mixture.log_prob(value), by_hand.log_prob(value))
    torch.testing.assert_close(diagonal.coord_scale, 2 * (TRIL + 1))
    torch.testing.assert_close(
        widen(dist.LogNormal(LOC, SCALE), 4.0).log_prob(value), dist.LogNormal(LOC, 2 * SCALE).log_prob(value)
    )
    coin = dist.Bernoulli(0.3)
    assert widen(coin, 4.0) is coin


def test_a_law_that_cannot_be_widened_is_named():
    with pytest.raises(
        ValueError, match="the law Gamma at site 'rate' of the guide cannot be widened; known are Normal"
    ):
        widen(dist.Gamma(1.0, 1.0), 2.0, "rate")


# Over-dispersion


def test_overdispersed_is_the_wider_guide_written_by_hand():
    narrow, wide = (LinearGaussian(6, 2, guide="mean_field", widen=widen) for widen in (1.0, 1.5))
    obs = narrow.draw(9)
    result = score(narrow, obs, 100, overdispersed(1.5))
    np.testing.assert_allclose(result.log_prob, score(wide, obs, 100).log_prob, rtol=1e-12)  # the same noise
    assert result.notes == ("proposal: overdispersed(1.5)",)
    assert result.estimator == "importance_sampling"
    assert np.array_equal(score(narrow, obs, 100, overdispersed(1)).log_prob, score(narrow, obs, 100).log_prob)


@pytest.mark.parametrize(("widen", "expected"), [(0.3, (2.0, 3.0)), (1.0, (1.0,)), (2.0, (0.5,))])
def test_tuning_finds_back_the_factor_that_the_exact_posterior_needs(widen, expected):
    oracle = LinearGaussian(6, 3, widen=widen)
    obs = oracle.draw(60)
    factors = (0.5, 1.0, 2.0, 3.0)
    found = pv.tune_overdispersion(
        oracle.model, pv.Batch(obs), guide=oracle.guide, factors=factors, num_particles=100, seed=1
    )
    assert found in expected


def test_bad_factors_are_refused():
    for factor in (0, -1.0, math.inf, "wide"):
        with pytest.raises(ValueError, match="factor must be a positive number"):
            overdispersed(factor)
    with pytest.raises(ValueError, match="factors must hold at least one factor"):
        pv.tune_overdispersion(LogNormalWeights(1.0).model, pv.Batch(torch.zeros(2)), factors=())


# Unbiasedness of p-hat


CASES = {
    "overdispersed": (overdispersed(1.5), LinearGaussian(6, 2, guide="mean_field", widen=0.7)),
    "defensive": (defensive(), LinearGaussian(6, 2, guide="mean_field", widen=0.7)),
    "defensive, two sites": (defensive(), TwoSites()),
    "defensive, tiled": (defensive(), TwoSites(stubborn=True)),
    "refined": (refined(5), LinearGaussian(6, 2, guide="mean_field", widen=0.7)),
    "refined, diagonal": (refined(5, covariance="diagonal"), LinearGaussian(6, 2, guide="mean_field", widen=0.7)),
    "refined, two sites": (refined(5), TwoSites()),
    "refined, tiled": (refined(5), TwoSites(stubborn=True)),
    "refined, positive": (refined(5), Waiting()),
}


@pytest.mark.parametrize("case", CASES)
def test_estimate_of_p_is_unbiased(case):
    proposal, oracle = CASES[case]
    one = oracle.draw(1) if isinstance(oracle, LinearGaussian) else torch.tensor([2.0], dtype=torch.float64)
    obs = one.expand(2000, *one.shape[1:]).contiguous()  # one datum, 2000 repeats
    result = score(oracle, obs, 20, proposal)
    ratio = np.exp(result.log_prob - float(oracle.log_prob(one)[0]))
    assert abs(stats.ttest_1samp(ratio, 1).statistic) < 4
    assert ratio.std() > 0.01  # a test that could fail
    assert any(note.startswith("the programs ran on tiled data") for note in result.notes) == ("tiled" in case)


# The defensive mixture


def test_any_part_of_the_particles_is_unbiased():
    oracle = LinearGaussian(6, 2, guide="mean_field", widen=0.7)
    one = oracle.draw(1)
    pair, args = proposed(defensive(), oracle, one.expand(3000, -1).contiguous())
    with torch.no_grad():
        weights = (traces.log_weights(pair, args, 20) - oracle.log_prob(one)).exp()  # (20, 3000)
    for part in (weights[:1], weights[:7], weights[-3:]):
        assert abs(stats.ttest_1samp(part.mean(0), 1).statistic) < 4


def test_defensive_density_is_the_mixture_written_by_hand():
    oracle = LinearGaussian(6, 2, guide="mean_field")
    obs = oracle.draw(5)
    pair, args = proposed(defensive(), oracle, obs)
    at = {"z": 2 * torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(at["z"]).sum(-1)
    parts = [math.log(0.05) + prior]
    for share, factor in ((0.6, 1.0), (0.25, 1.5), (0.1, 3.0)):
        wide = LinearGaussian(6, 2, guide="mean_field", widen=factor).guide
        parts.append(math.log(share) + traces.log_density(wide, (obs,), at, 3, tiled=False))
    truth = torch.stack(parts).logsumexp(0)
    with torch.no_grad():
        torch.testing.assert_close(traces.log_density(pair.guide, args, at, 3, tiled=False), truth)
        flat = {"z": at["z"].reshape(15, 2)}
        torch.testing.assert_close(traces.log_density(pair.guide, args, flat, 3, tiled=True), truth)


@pytest.mark.parametrize("tiled", [False, True])
def test_programs_and_laws_give_the_same_components(tiled):
    oracle = LinearGaussian(6, 2, guide="mean_field")
    obs = oracle.draw(5)
    pair = traces.as_pair(oracle.model, oracle.guide)
    how = (obs, 1, True) if tiled else (obs, 4, False)
    components = [kind(pair, (how[0],), *how[1:]) for kind in (proposals._Laws, proposals._Programs)]
    with torch.no_grad():
        drawn = [each.draw() for each in components]
        assert [v["z"].shape for v in drawn[0]] == [v["z"].shape for v in drawn[1]]
        for values in drawn[0]:
            torch.testing.assert_close(components[0].log_density(values), components[1].log_density(values))


@pytest.mark.parametrize("num_particles", [20, 33])
def test_shares_are_met_as_nearly_as_can_be_in_random_order(num_particles):
    shares = torch.tensor([0.6, 0.25, 0.1, 0.05])
    torch.manual_seed(0)
    index = systematic(shares, num_particles, 4000)
    counts = torch.stack([(index == i).sum(0) for i in range(4)])
    assert torch.all((counts - num_particles * shares[:, None]).abs() < 1 + 1e-4)
    for row in (0, 1, num_particles - 1):  # each particle on its own has the law of the shares
        expected = 4000 * shares.numpy()
        assert stats.chisquare(np.bincount(index[row], minlength=4), expected).pvalue > 1e-3
    neighbours = np.corrcoef(index[0], index[1])[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(4000) + 1 / (num_particles - 1)  # drawn without putting back


class PlanarGuide(nn.Module):
    """A flow without an inverse: log q is known at its own draws only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flow = Planar(2)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z.sum(-1), 1.0), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            base = dist.Normal(torch.stack([obs, obs], -1) / 3, 0.8).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


def test_a_guide_without_density_refuses_the_defensive_mixture_only():
    pair, obs = PlanarGuide(), torch.linspace(-1, 1, 20)
    truth = torch.distributions.Normal(0.0, math.sqrt(3)).log_prob(obs).numpy()
    for proposal in (None, overdispersed(1.3), refined(20)):
        result = pv.log_likelihood(pair, pv.Batch(obs), estimator=pv.importance_sampling(2000, proposal=proposal))
        assert np.all(np.abs(result.log_prob - truth) < 4.5 * np.sqrt(result.variance) + 1e-4)  # float32
    with pytest.raises(ValueError, match=r"the defensive mixture needs log q\(z \| x\) at any z"):
        pv.log_likelihood(pair, pv.Batch(obs), estimator=pv.importance_sampling(10, proposal=defensive()))


def test_a_mode_that_the_guide_never_visits_is_found_by_the_prior_in_the_mixture():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(obs), 2.0))
            pyro.sample("obs", dist.Normal(z.abs(), 0.3), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs, 0.3))

    obs = torch.full((20,), 2.0)
    truth = math.log(2) + stats.norm(0, math.hypot(2.0, 0.3)).logpdf(2.0)  # both modes, far apart
    plain, mixed = (
        pv.log_likelihood(model, pv.Batch(obs), guide=guide, estimator=pv.importance_sampling(5000, proposal=proposal))
        for proposal in (None, defensive())
    )
    assert truth - plain.mean == pytest.approx(math.log(2), abs=0.02)
    assert abs(mixed.mean - truth) < 4 * mixed.mc_se
    assert mixed.khat.min() > 0.7  # few particles found it, and k-hat says so


# Refinement


@pytest.mark.parametrize("start", ["mean_field", "prior"])
def test_refined_gaussian_reaches_the_exact_posterior(start):
    oracle = LinearGaussian(12, 5, guide="mean_field", widen=3.0)
    if start == "prior":

        def prior(obs):
            with pyro.plate("data", len(obs), dim=-1):
                pyro.sample("z", dist.Normal(torch.zeros(len(obs), 5, dtype=torch.float64), 1.0).to_event(1))

        oracle.guide = prior
    obs = oracle.draw(7)
    result = score(oracle, obs, 100, refined(overdispersion=1.0))
    # the noise of the steps vanishes with the distance, so that it falls geometrically: 1e-6 of KL after 100
    np.testing.assert_allclose(result.elbo, oracle.log_prob(obs), atol=1e-6)
    assert np.sqrt(result.spread.max()) < 1e-3
    np.testing.assert_allclose(result.ess, 100, rtol=1e-5)
    np.testing.assert_allclose(result.log_prob, oracle.log_prob(obs), atol=1e-4)


def test_diagonal_refinement_reaches_the_best_diagonal_gaussian():
    oracle = LinearGaussian(8, 4, guide="mean_field", widen=0.2)
    obs = oracle.draw(6)
    result = score(oracle, obs, 20_000, refined(200, 32, "diagonal", overdispersion=1.0))
    gap = oracle.log_prob(obs).numpy() - result.elbo
    # the steps' noise does not vanish here: it leaves some hundredths of a nat
    assert np.all(np.abs(gap - oracle.mean_field_gap()) < 4 * np.sqrt(result.spread / 20_000) + 0.05)


def test_wider_tails_keep_every_weight_bounded():
    oracle = LinearGaussian(12, 5, guide="mean_field")
    obs = oracle.draw(20)
    result = score(oracle, obs, 2000, refined())
    # against N(0, var x f) a Gaussian's weights have index 1 - f: below 0 all are bounded
    assert np.all(result.khat < 0.5)
    assert np.all(np.abs(result.log_prob - oracle.log_prob(obs).numpy()) < 4.5 * np.sqrt(result.variance))


def test_refined_density_is_the_same_for_a_copy_of_a_draw():
    for proposal in (refined(5), refined(5, covariance="diagonal")):
        for oracle in (TwoSites(), Waiting()):
            pair, args = proposed(proposal, oracle, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
            with torch.no_grad():
                values, log_q = traces.draw_latents(pair, args, 4, tiled=False)
                copies = {name: value.clone() for name, value in values.items()}
                again = traces.log_density(pair.guide, args, copies, 4, tiled=False)
            torch.testing.assert_close(again, log_q)


def test_refined_density_is_normalised_on_the_positive_numbers():
    pair, args = proposed(refined(), Waiting(), torch.tensor([1.0, 6.0], dtype=torch.float64))
    rates = torch.exp(torch.linspace(-12, 6, 4001, dtype=torch.float64))
    with torch.no_grad():
        density = traces.log_density(pair.guide, args, {"rate": rates[:, None].expand(-1, 2)}, 4001, tiled=False).exp()
    np.testing.assert_allclose(torch.trapezoid(density * rates[:, None], rates.log(), dim=0), 1, atol=1e-6)


def test_annealing_from_a_refined_start_differentiates_its_density():
    oracle = LinearGaussian(6, 2, guide="mean_field")
    pair, args = proposed(refined(overdispersion=1.0), oracle, oracle.draw(3))
    at = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(traces.log_density(pair.guide, args, {"z": at}, 4, tiled=False).sum(), at)
    mean = (args[0] - oracle.loc) @ oracle.loadings @ torch.linalg.inv(oracle.precision) / oracle.noise**2
    torch.testing.assert_close(slope, -(at.detach() - mean) @ oracle.precision, rtol=1e-3, atol=1e-2)


def test_refinement_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    vae = pv.models.VAE(pv.Binary((3, 3)), latent_dim=2, hidden_dims=(8,))
    obs = torch.bernoulli(torch.full((20, 3, 3), 0.5))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    estimator = pv.importance_sampling(200, proposal=refined(20))
    first, again = (pv.log_likelihood(vae, pv.Batch(obs), estimator=estimator) for _ in range(2))
    assert np.array_equal(first.log_prob, again.log_prob)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())
    assert first.notes == ("proposal: refined(20 steps of 8 samples, full covariance)",)


def test_chunks_do_not_grow_with_the_data_or_the_latents(monkeypatch):
    chunks = refined()._chunks(1000, 50, "cpu")
    assert chunks[0] == (0, 256)  # 2048 rows of 8 samples
    assert chunks[-1] == (768, 1000)
    assert refined()._chunks(1000, 2000, "cpu")[0] == (0, 33)  # 2^27 entries of 2000² each
    assert refined(covariance="diagonal")._chunks(1000, 2000, "cpu")[0] == (0, 256)


def test_proposals_go_with_a_context_and_its_marginal():
    torch.manual_seed(0)
    labels = pv.Labels(tuple(torch.tensor([0.5, 0.5]).log().tolist()))
    cvae = pv.models.CVAE(pv.Binary((2, 2)), labels, latent_dim=2, hidden_dims=(8,))
    obs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).reshape(16, 2, 2)
    batch = pv.Batch(obs, torch.eye(2)[torch.arange(16) % 2])
    for proposal in (overdispersed(1.2), defensive(), refined(20)):
        estimator = pv.importance_sampling(400, proposal=proposal)
        marginal = pv.log_likelihood(cvae, batch, estimator=estimator).marginal
        mass = np.exp(marginal.log_prob)
        assert abs(mass.sum() - 1) < 4.5 * math.sqrt((mass**2 * marginal.variance).sum())  # the masses of all images


def test_discrete_latents_are_refused_with_a_way_out():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("obs", dist.Normal(k.to(obs), 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))

    batch = pv.Batch(torch.zeros(3))
    for proposal, message in ((refined(), "continuous latents"), (overdispersed(), "a continuous latent to widen")):
        with pytest.raises(ValueError, match=message):
            pv.log_likelihood(model, batch, guide=guide, estimator=pv.importance_sampling(10, proposal=proposal))
    mixed = pv.log_likelihood(model, batch, guide=guide, estimator=pv.importance_sampling(4000, proposal=defensive()))
    truth = float(
        torch.logsumexp(
            torch.tensor([0.3, 0.7]).log() + dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(0.0)), 0
        )
    )
    assert abs(mixed.mean - truth) < 4 * mixed.mc_se


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ({"num_samples": 3}, "num_samples must be an even number of at least 2"),
        ({"covariance": "round"}, "covariance must be 'full' or 'diagonal'"),
        ({"overdispersion": 0.0}, "overdispersion must be a positive number"),
    ],
)
def test_bad_settings_of_a_refinement_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        refined(**settings)
