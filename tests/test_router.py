"""The router: every datum as far as its diagnostics send it, and figures that were not chosen for looking good."""

import math

import numpy as np
import pytest
import torch
from oracles import LinearGaussian

import pyro_vae as pv
from pyro_vae.estimators.router import is_hard
from pyro_vae.traces import Pair

ANNEALING = pv.annealed_importance_sampling(20, 16, 4)


def score(pair, obs, estimator, seed=0):
    return pv.log_likelihood(pair.model, pv.Batch(obs), guide=pair.guide, estimator=estimator, seed=seed)


def test_easy_data_end_at_the_first_stage_and_hard_ones_at_the_second():
    obs = LinearGaussian(8, 4).draw(20)
    shares = {}
    for name, widen in (("easy", 1.2), ("hard", 0.1)):
        pair = LinearGaussian(8, 4, widen=widen)
        found = score(pair, obs, pv.router(500, annealing=ANNEALING))
        shares[name] = found.shares
        assert sum(found.shares.values()) == pytest.approx(1)
        assert abs(found.mean - float(pair.log_prob(obs).mean())) < 4 * found.mc_se + found.bias_bound
        assert found.warning is None
        assert found.direction == "lower"
    assert shares["easy"]["importance sampling"] == 1
    assert shares["hard"]["importance sampling"] < 0.2
    assert shares["hard"]["refined"] > 0.8


def test_to_stop_where_the_samples_look_good_does_not_raise_the_estimate():
    """A guide so wide that ESS is about 100, where half of the data are sent on: the mean of p-hat/p is 1, |t| < 4."""
    pair = LinearGaussian(8, 4, widen=6)
    obs = pair.draw(300, seed=1)
    found = score(pair, obs, pv.router(1000, annealing=ANNEALING))
    assert 0.05 < found.shares["importance sampling"] < 0.95
    ratio = np.exp(found.log_prob - pair.log_prob(obs).numpy())
    assert abs((ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio)))) < 4


def test_what_the_second_stage_leaves_is_annealed():
    """With 50 particles no datum of the second stage has an ESS of 100."""
    pair = LinearGaussian(8, 4, widen=0.3)
    obs = pair.draw(12)
    found = score(pair, obs, pv.router(500, refined_particles=50, annealing=pv.annealed_importance_sampling(60, 16, 4)))
    assert found.shares["annealed"] > 0.3
    assert found.shares["refined"] == 0
    assert abs(found.mean - float(pair.log_prob(obs).mean())) < 4 * found.mc_se + found.bias_bound
    assert np.isinf(found.khat).mean() == pytest.approx(found.shares["annealed"])
    assert any("annealed: 60 steps from the guide" in note for note in found.notes)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 25, got 24"):
        pv.router(24)
    with pytest.raises(ValueError, match=r"refined_particles must be a whole number of at least 25, got 2\.5"):
        pv.router(refined_particles=2.5)
    pair = LinearGaussian(3, 2)
    few = pv.importance_sampling(4)

    with torch.no_grad():
        estimate = few(Pair(pair.model, pair.guide), (pair.draw(3),), 0, lambda num: None)
    with pytest.raises(ValueError, match="4 particles are too few for a k-hat"):
        is_hard(estimate)
