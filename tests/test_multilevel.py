"""Multilevel estimates: unbiased where importance sampling is not, honest errors, exact counts."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, LogNormalWeights

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.estimators import multilevel as levels
from pyro_vae.estimators import streaming


def score(oracle, obs, estimator, seed=0):
    return pv.log_likelihood(oracle.model, pv.Batch(obs), guide=oracle.guide, estimator=estimator, seed=seed)


def zeros(num):
    return torch.zeros(num, dtype=torch.float64)


def test_unbiased_on_lognormal_weights_where_importance_sampling_is_low():
    oracle, obs = LogNormalWeights(1.5), zeros(4000)
    truth = float(oracle.log_prob(obs[0]))
    plain, result = (score(oracle, obs, estimator(64)) for estimator in (pv.importance_sampling, pv.multilevel))
    leading = (math.exp(1.5**2) - 1) / 64 / 2  # s²/2 of 64 log-normal weights
    assert truth - plain.mean > leading / 2 > 5 * plain.mc_se
    assert abs(result.mean - truth) < 4 * result.mc_se  # its own bias, of 64 * 2^9 particles, is 1e-4
    assert result.mc_se < leading / 2  # so that the bias would be seen
    assert result.direction == "unbiased"
    assert result.num_particles == result.khat_particles == 64


def test_the_error_of_a_sum_over_data_is_honest():
    oracle = LogNormalWeights(1.0)
    result = score(oracle, zeros(40_000), pv.multilevel(16))
    error = result.log_prob.reshape(100, 400).mean(1) - float(oracle.log_prob(zeros(1)))
    claimed = np.sqrt(result.variance.reshape(100, 400).sum(1)) / 400
    assert np.mean(np.abs(error) < 1.96 * claimed) >= 0.87  # 99.9% binomial band of 100 intervals at 95%
    # the sample variance of 100 sums has a relative standard error of sqrt(2/99), more with their heavy tail
    assert np.mean(claimed**2) == pytest.approx(error.var(ddof=1), rel=0.7)


def test_gains_telescope_to_the_logarithm_of_all_particles():
    generator = np.random.default_rng(0)
    level = np.array([0, 3, 1, 0, 2])
    log_means = generator.normal(size=8 + 2 + 4) * 3 - 500
    gains = levels.level_gains(log_means, level, 4)
    pieces = np.split(log_means, [8, 10])
    for datum, piece in zip((1, 2, 4), pieces, strict=True):
        whole = np.logaddexp.reduce(piece) - math.log(len(piece))
        assert piece.mean() + np.nansum(gains[datum]) == pytest.approx(whole, abs=1e-11)  # of numbers near 500
    assert np.array_equal((~np.isnan(gains)).sum(1), level)
    assert np.nanmin(gains) >= 0


def test_levels_have_their_shares_exactly_and_each_datum_its_law():
    shares = levels.level_probabilities(9)
    np.testing.assert_allclose(shares[1:] / shares[:-1], 2**-1.5)
    np.testing.assert_allclose(levels.reach_probabilities(9), [shares[j:].sum() for j in range(10)])
    drawn = np.stack([levels.draw_levels(50, 9, seed) for seed in range(400)])
    counts = np.stack([(drawn == level).sum(1) for level in range(10)], 1)
    assert np.all(np.abs(counts - 50 * shares) < 1)  # the nearest whole numbers on either side
    for datum in (0, 17, 49):
        assert abs(np.mean(drawn[:, datum] == 0) - shares[0]) < 4 * math.sqrt(shares[0] * (1 - shares[0]) / 400)


def test_the_note_counts_exactly_the_particles_that_were_drawn():
    drawn = []

    class Counted(dist.Normal):
        def rsample(self, sample_shape=torch.Size()):  # noqa: B008
            drawn.append(self._extended_shape(sample_shape).numel())
            return super().rsample(sample_shape)

        def expand(self, batch_shape, _instance=None):
            return Counted(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", Counted(torch.zeros(len(obs)), torch.ones(len(obs))))

    pair, args = traces.Pair(LogNormalWeights(1.0).model, guide), (torch.zeros(60),)
    with torch.no_grad():
        traces.broadcasts(pair, args)
        beside = sum(drawn)
        drawn.clear()
        estimate = pv.multilevel(37)(pair, args, 0, lambda num: None)
    spent = int(estimate.notes[0].split()[0].replace(",", ""))
    assert sum(drawn) - beside == spent
    each = float(re.search(r"all, ([\d.,]+) per datum", estimate.notes[0])[1])
    assert each == pytest.approx(spent / 60, abs=0.05)  # one digit is printed
    assert 1.5 < each / 37 < 6  # 2.5 on average over levels


def test_progress_ends_at_the_number_of_data():
    done = []
    oracle = LogNormalWeights(1.0)
    with torch.no_grad():
        pv.multilevel(500)(traces.Pair(oracle.model, oracle.guide), (zeros(50),), 0, done.append)
    assert sum(done) == 50


def test_the_first_particles_are_those_of_importance_sampling():
    oracle, obs = LogNormalWeights(1.0), zeros(80)
    plain, result = (score(oracle, obs, estimator(100)) for estimator in (pv.importance_sampling, pv.multilevel))
    for name in ("ess", "khat", "elbo", "spread"):
        assert np.array_equal(getattr(result, name), getattr(plain, name)), name
    lowest = result.variance == plain.variance
    assert 0.6 < lowest.mean() < 0.7  # P(l = 0) = .647, of 80 data within one
    assert np.array_equal(result.log_prob[lowest], plain.log_prob[lowest])
    assert np.all(result.log_prob[~lowest] > plain.log_prob[~lowest])


def test_same_seed_same_digits_other_seed_other_digits():
    oracle, obs = LogNormalWeights(1.0), zeros(30)
    first, again, other = (score(oracle, obs, pv.multilevel(20), seed) for seed in (0, 0, 1))
    assert np.array_equal(first.log_prob, again.log_prob)
    assert not np.array_equal(first.log_prob, other.log_prob)


def test_another_block_size_agrees_within_the_monte_carlo_error(monkeypatch):
    oracle, obs = LogNormalWeights(1.0), zeros(400)
    first = score(oracle, obs, pv.multilevel(100))
    monkeypatch.setitem(streaming.BLOCK_ROWS, "cpu", 500)
    second = score(oracle, obs, pv.multilevel(100))
    assert not np.array_equal(first.log_prob, second.log_prob)
    assert abs(first.mean - second.mean) < 4 * math.hypot(first.mc_se, second.mc_se)


def test_equal_weights_leave_nothing_to_correct():
    oracle = LinearGaussian(6, 2)
    obs = oracle.draw(40)
    result = score(oracle, obs, pv.multilevel(50))
    np.testing.assert_allclose(result.log_prob, oracle.log_prob(obs), atol=1e-9)
    assert result.mc_se < 1e-9
    assert result.bias_bound == pytest.approx(0, abs=1e-12)


def test_tame_weights_are_trusted_with_a_small_bound_on_the_bias():
    result = score(LogNormalWeights(0.5), zeros(1000), pv.multilevel(200))
    assert result.warning is None
    assert 0 < result.bias_bound < result.mc_se / 10
    assert result.doubling_ratio == pytest.approx(0.5, abs=0.2)  # 4 of its standard errors
    assert result.bias_bound >= result.doubling_bias > 0


def test_differences_that_do_not_fall_are_told():
    result = score(LogNormalWeights(4.0), zeros(1000), pv.multilevel(100, max_level=6))
    assert result.flagged.all()
    assert "too slowly for their variance to be trusted" in result.notes[-1]
    assert result.warning is not None
    assert result.bias_bound is None


def test_level_ratio_of_known_gains():
    gains = np.full((6, 3), np.nan)
    gains[:4, 0], gains[:4, 1], gains[:2, 2] = 8.0, 4.0, 2.0
    gains[4:, 0] = 1000.0  # data of the first level only, which say nothing of a ratio
    ratio, se = levels.level_ratio(gains)
    assert ratio == pytest.approx(0.5)
    assert se == pytest.approx(0, abs=1e-12)
    assert math.isnan(levels.level_ratio(gains[3:])[0])  # one datum beyond the first level
    assert math.isnan(levels.level_ratio(np.zeros((5, 3)))[0])


def test_a_first_level_of_two_particles_is_enough():
    result = score(LogNormalWeights(0.3), zeros(2000), pv.multilevel(2))
    assert abs(result.mean - float(LogNormalWeights(0.3).log_prob(zeros(1)))) < 4 * result.mc_se
    assert result.khat is None
    assert result.warning == "2 particles are too few to check the Monte Carlo error"


def test_particles_that_all_have_weight_zero_are_an_error():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Uniform(z - 0.1, z + 0.1, validate_args=False), obs=obs)

    with pytest.raises(ValueError, match=r"all of 5 particles of datum \d+ have weight zero"):
        pv.log_likelihood(model, pv.Batch(zeros(20)), guide=LogNormalWeights(1.0).guide, estimator=pv.multilevel(5))


@pytest.mark.parametrize("bad", [0, 1, 2.5, "many"])
def test_number_of_particles_must_be_two_or_more(bad):
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 2"):
        pv.multilevel(bad)


@pytest.mark.parametrize("bad", [0, 17, 2.5])
def test_last_level_must_be_in_its_range(bad):
    with pytest.raises(ValueError, match="max_level must be a whole number from 1 to 16"):
        pv.multilevel(100, max_level=bad)


def test_with_a_proposal_the_notes_name_it():
    oracle = LinearGaussian(6, 2, guide="mean_field")
    obs = oracle.draw(50)
    result = score(oracle, obs, pv.multilevel(100, proposal=pv.overdispersed(1.5)))
    assert result.notes[0] == "proposal: overdispersed(1.5)"
    assert abs(result.mean - float(oracle.log_prob(obs).mean())) < 4 * result.mc_se
