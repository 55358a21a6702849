"""Conformal p-values are uniform by exchangeability alone; flags and areas against brute force."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, kstest

from pyro_vae.conformal import conformal_p_values, false_discoveries
from pyro_vae.roc import auroc

# p-values


def all_p_values(values, sides="one"):
    """p-value of the last of every ordering of some scores, the others being the calibration."""
    orders = np.array(list(itertools.permutations(values)))
    return np.concatenate([conformal_p_values(row[:-1], row[-1:], sides=sides) for row in orders])


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("num", [5, 6])
def test_over_all_orderings_of_distinct_scores_p_values_are_exactly_uniform(sides, num) -> None:
    found = all_p_values(np.arange(num) ** 2.0, sides)
    for p in np.unique(found):
        share = np.mean(found <= p)
        assert share == pytest.approx(min(p, 1.0), abs=1e-12)
    expected = np.arange(1, num + 1) / num if sides == "one" else np.minimum(1, 2 * np.arange(1, num // 2 + 1) / num)
    assert set(np.round(expected, 12)) <= set(np.round(found, 12))


def test_by_hand() -> None:
    p = conformal_p_values(np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 3.5, 0.0]))
    assert p.tolist() == [1 / 5, 2 / 5, 5 / 5]
    two = conformal_p_values(np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 3.5, 0.0]), sides="two")
    assert two.tolist() == [2 / 5, 4 / 5, 2 / 5]


def test_ties_are_broken_by_one_seeded_draw_so_that_discrete_scores_are_uniform_too() -> None:
    rng, num, found = np.random.default_rng(0), 4, []
    for seed in range(6000):
        scores = rng.integers(0, 2, num + 1).astype(float)  # mostly ties
        found.append(conformal_p_values(scores[:-1], scores[-1:], seed=seed)[0])
    counts = [np.sum(np.isclose(found, k / (num + 1))) for k in range(1, num + 2)]
    assert sum(counts) == 6000
    for count in counts:
        assert binomtest(int(count), 6000, 1 / (num + 1)).pvalue > 1e-4
    again = conformal_p_values(np.zeros(9), np.zeros(50), seed=3)
    assert np.array_equal(again, conformal_p_values(np.zeros(9), np.zeros(50), seed=3))
    assert not np.array_equal(again, conformal_p_values(np.zeros(9), np.zeros(50), seed=4))


def test_of_many_inliers_they_pass_kolmogorov_and_smirnov() -> None:
    rng = np.random.default_rng(1)
    p = conformal_p_values(rng.standard_cauchy(20_000), rng.standard_cauchy(500))
    assert kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("calibration", "scores", "message"),
    [
        ([], [1.0], "at least one score, got none"),
        ([1.0], [np.nan], "scores must not be NaN, but that of datum 0 is"),
        ([[1.0]], [1.0], r"calibration must have shape \(n,\), got \(1, 1\)"),
    ],
)
def test_what_is_refused(calibration, scores, message) -> None:
    with pytest.raises(ValueError, match=message):
        conformal_p_values(np.array(calibration), np.array(scores))


# flags


def test_false_discoveries_against_the_definition() -> None:
    rng = np.random.default_rng(2)
    for level in (0.05, 0.2, 0.5):
        p = np.round(rng.beta(0.4, 1, 30), 2)  # with ties
        counts = [k for k in range(1, 31) if np.sort(p)[k - 1] <= level * k / 30]
        largest = max(counts, default=0)
        flagged = false_discoveries(p, level)
        assert flagged.sum() == largest
        assert not largest or p[flagged].max() <= p[~flagged].min()


def test_the_rate_of_false_discoveries_is_kept_with_a_shared_calibration() -> None:
    rng, shares = np.random.default_rng(3), []
    for seed in range(400):
        scores = np.concatenate([rng.normal(size=40), rng.normal(3, 1, size=10)])
        p = conformal_p_values(rng.normal(size=200), scores, seed=seed)
        flagged = false_discoveries(p, 0.2)
        shares.append(flagged[:40].sum() / max(1, flagged.sum()))
    assert np.mean(shares) < 0.2 * 0.8 + 4 * np.std(shares) / 20  # theirs is at most level x share of inliers


def test_level_must_be_a_share() -> None:
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 1"):
        false_discoveries(np.array([0.1]), 1)


# areas


def test_auroc_and_its_error_against_all_pairs() -> None:
    rng = np.random.default_rng(4)
    above, below = np.round(rng.normal(1, 1, 40), 1), np.round(rng.normal(0, 1, 60), 1)  # with ties
    right = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    found = auroc(above, below)
    assert found.value == pytest.approx(right.mean(), abs=1e-12)
    se = np.sqrt(right.mean(1).var(ddof=1) / 40 + right.mean(0).var(ddof=1) / 60)
    assert found.se == pytest.approx(se, rel=1e-9)
    assert 0 < found.low < found.value < found.high < 1


def test_interval_covers_the_area_of_two_normal_laws() -> None:
    from scipy.stats import norm

    rng, truth = np.random.default_rng(5), norm.cdf(1.5 / np.sqrt(2))
    found = [auroc(rng.normal(1.5, 1, 50), rng.normal(0, 1, 50)) for _ in range(400)]
    covered = sum(each.low <= truth <= each.high for each in found)
    assert binomtest(covered, 400, 0.95).pvalue > 0.001


def test_perfect_order_has_an_interval_all_the_same() -> None:
    found = auroc(np.arange(10, 40.0), np.arange(5.0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 5))  # Clopper and Pearson for 5 successes in 5
    assert auroc(np.arange(5.0), np.arange(10, 40.0)).high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_scores_that_all_tie_have_an_interval_as_wide_as_pairs_unseen_allow() -> None:
    found = auroc(np.zeros(5), np.zeros(30))
    alike = 0.025 ** (1 / 5)  # the least share of ties of which 5 in 5 are no surprise; the others in either order
    assert (found.value, found.se) == (0.5, 0.0)
    assert (found.low, found.high) == pytest.approx((0.5 * alike, 1 - 0.5 * alike))


def test_interval_of_scores_that_mostly_tie_covers() -> None:
    rng, rare = np.random.default_rng(6), 0.03  # P(an outlier scores 1): all else is 0, and the area 1/2 + rare/2
    found = [auroc((rng.random(20) < rare).astype(float), np.zeros(20)) for _ in range(300)]
    tied = [each for each in found if each.se == 0]
    assert len(tied) > 100
    assert all(each.low <= 0.5 + rare / 2 <= each.high for each in tied)


def test_too_few_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="outliers must hold at least two scores"):
        auroc(np.array([1.0]), np.arange(3.0))
