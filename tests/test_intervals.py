import math

import numpy as np
import pytest
from scipy import stats

from pyro_vae.intervals import (
    NUM_DRAWS,
    Clusters,
    StandardError,
    clusters,
    influence,
    simultaneous_level,
    skewness,
)

BAND_400 = (0.914, 0.986)  # 99.9% binomial band of a 95% interval in 400 repeats
BAND_1000 = (0.927, 0.973)  # and in 1000
LEVEL_SE = math.sqrt(0.95 * 0.05 / NUM_DRAWS)  # of the coverage at an empirical quantile


def single(num_data: int) -> Clusters:
    return clusters(num_data)


# standard errors


def test_single_data_have_the_ordinary_covariance_of_means() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    moves = influence(values, single(50))
    np.testing.assert_allclose(moves.T @ moves, np.cov(values.T) / 50, rtol=1e-12)


def test_clusters_of_one_size_have_the_sandwich_with_its_small_sample_factor() -> None:
    values, index = np.random.default_rng(1).normal(size=60), np.arange(60) // 5
    sums = np.bincount(index, values - values.mean())
    expected = 12 / 11 * (sums**2).sum() / 60**2
    moves = influence(values[:, None], clusters(60, index))
    assert (moves**2).sum() == pytest.approx(expected, rel=1e-12)


def test_clusters_of_different_sizes_have_the_jackknife() -> None:
    """(G-1)/G Σ (mean without g - mean)², each mean computed anew."""
    rng = np.random.default_rng(2)
    labels = np.repeat(list("abcd"), [1, 4, 10, 25])
    values = rng.normal(size=40)
    without = np.array([values[labels != name].mean() for name in "abcd"])
    moves = influence(values[:, None], clusters(40, labels))
    assert (moves**2).sum() == pytest.approx(3 / 4 * ((without - values.mean()) ** 2).sum(), rel=1e-12)


def test_a_single_datum_has_no_error() -> None:
    assert np.isnan(influence(np.ones((1, 2)), single(1))).all()


def test_one_part_gives_the_t_interval() -> None:
    """t(9) = 2.262157 at 97.5%, a table's value; many degrees of freedom give the normal 1.959964."""
    assert StandardError(((2.0, 9),)).half_width(0.95) == pytest.approx(2 * 2.2621571628, rel=1e-9)
    assert StandardError(((1.0, 1e9),)).half_width(0.95) == pytest.approx(1.9599639845, rel=1e-7)
    assert StandardError(((2.0, 9),)).of_fits is None


def test_parts_add_in_squares() -> None:
    error = StandardError(((3.0, 99), (4.0, 4)))
    assert (error.value, error.of_data, error.of_fits) == (5.0, 3.0, 4.0)
    assert error.half_width(0.95) == pytest.approx(math.hypot(3 * 1.9842169516, 4 * 2.7764451052), rel=1e-9)


def two_way_coverage(num_fits: int, ratio: float, num_repeats: int = 1000, num_data: int = 50) -> float:
    """Share of 95% intervals that hold the mean 0 of data effect + fit effect + noise; `ratio` of their variances."""
    rng = np.random.default_rng([num_fits, int(10 * ratio)])
    data = rng.normal(size=(num_repeats, 1, num_data))
    fit = rng.normal(size=(num_repeats, num_fits, 1)) * math.sqrt(ratio * num_fits / num_data)
    values = data + fit + 0.5 * rng.normal(size=(num_repeats, num_fits, num_data))
    se_data = values.mean(1).std(1, ddof=1) / math.sqrt(num_data)
    se_fits = values.mean(2).std(1, ddof=1) / math.sqrt(num_fits)
    parts = zip(se_data, se_fits, values.mean((1, 2)), strict=True)
    held = [abs(m) <= StandardError(((d, num_data - 1), (f, num_fits - 1))).half_width(0.95) for d, f, m in parts]
    return float(np.mean(held))


@pytest.mark.parametrize("num_fits", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.1, 1, 10])
def test_two_way_intervals_cover_at_least_as_often_as_they_say(num_fits, ratio) -> None:
    """Conservative by Banerjee's inequality: only the lower end of the band can be missed."""
    assert two_way_coverage(num_fits, ratio) >= BAND_1000[0]


def test_two_way_intervals_are_exact_where_one_part_dominates() -> None:
    """Then only one t interval is left, and the band has both ends."""
    assert BAND_1000[0] <= two_way_coverage(5, 1000) <= BAND_1000[1]


# clusters


def test_clusters_take_labels_of_any_kind() -> None:
    for labels in (["a", "b", "a"], [7, 3, 7], np.array([0.5, 0.2, 0.5])):
        found = clusters(3, labels)
        assert (found.count, found.given, found.df) == (2, True, 1)
        assert found.index[0] == found.index[2] != found.index[1]
    assert not single(3).given


def test_effective_number_of_clusters() -> None:
    assert clusters(40, np.arange(40) // 4).effective == pytest.approx(10)
    assert clusters(4, [0, 0, 0, 1]).effective == pytest.approx(16 / 10)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1], r"groups must have shape \(3,\), one label per datum, got \(2,\)"),
        ([[0, 1, 2]], r"groups must have shape \(3,\), one label per datum, got \(1, 3\)"),
        ([0.0, math.nan, 1.0], "groups must hold a label for each datum, got NaN for datum 1"),
        ([5, 5, 5], "groups must hold at least 2 clusters, got 1"),
    ],
)
def test_groups_of_another_kind_are_refused(groups, message) -> None:
    with pytest.raises(ValueError, match=message):
        clusters(3, groups)


def cluster_coverage(sizes: list[int], *, known: bool, num_repeats: int = 400) -> float:
    """Share of 95% t intervals that hold the mean 0 where a cluster's data share half of their variance."""
    rng, index = np.random.default_rng(3), np.repeat(np.arange(len(sizes)), sizes)
    values = rng.normal(size=(num_repeats, len(sizes)))[:, index] + rng.normal(size=(num_repeats, len(index)))
    grouping = clusters(len(index), index if known else None)
    errors = np.linalg.norm(influence(values.T, grouping), axis=0)
    halves = [StandardError(((se, grouping.df),)).half_width(0.95) for se in errors]
    return float(np.mean(np.abs(values.mean(1)) <= halves))


@pytest.mark.parametrize("sizes", [[10] * 40, [10] * 8, [5, 10, 15, 20] * 8])
def test_intervals_over_clusters_cover_and_those_that_ignore_them_do_not(sizes) -> None:
    """The design effect 1 + 9/2 = 5.5 makes an interval that ignores clusters of 10 cover about .6."""
    assert BAND_400[0] <= cluster_coverage(sizes, known=True) <= BAND_400[1]
    assert cluster_coverage(sizes, known=False) < 0.8


# all intervals at once


def family_coverage(level: float, num_means: int) -> float:
    """Probability that all intervals at `level` hold for independent means of one variance: the studentised range."""
    quantile = stats.norm.ppf((1 + level) / 2)
    return float(stats.studentized_range.cdf(quantile * math.sqrt(2), num_means, np.inf))


@pytest.mark.parametrize("num_means", [3, 6])
def test_level_for_independent_means_is_that_of_the_studentised_range(num_means) -> None:
    """Columns that are exactly orthogonal, with exactly one variance; 4 standard errors of a quantile of the draws."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(200, num_means))
    moves = np.linalg.qr(values - values.mean(0))[0]
    level = simultaneous_level(moves, np.zeros(num_means), 0.95)
    assert family_coverage(level, num_means) == pytest.approx(0.95, abs=4 * LEVEL_SE)


def test_variance_over_fits_takes_part() -> None:
    """Means that all share their data and differ by independent fits are independent again."""
    moves = np.repeat(np.random.default_rng(5).normal(size=(200, 1)), 4, axis=1)
    level = simultaneous_level(moves, np.full(4, 0.3), 0.95)
    assert family_coverage(level, 4) == pytest.approx(0.95, abs=4 * LEVEL_SE)


def test_two_models_need_no_more_than_their_own_level() -> None:
    moves = np.random.default_rng(6).normal(size=(100, 2))
    assert simultaneous_level(moves, np.zeros(2), 0.9) == 0.9


def test_models_that_are_the_same_count_once() -> None:
    """a, and b twice: two pairs with one and the same difference, and one without any."""
    moves = np.random.default_rng(7).normal(size=(100, 2))[:, [0, 1, 1]]
    assert simultaneous_level(moves, np.zeros(3), 0.95) == pytest.approx(0.95, abs=4 * LEVEL_SE)
    assert simultaneous_level(np.zeros((100, 3)), np.zeros(3), 0.95) == 0.95


def test_few_data_get_bonferroni_and_many_less_than_it() -> None:
    rng = np.random.default_rng(8)
    bonferroni = 1 - 0.05 / 15
    assert simultaneous_level(rng.normal(size=(119, 6)), np.zeros(6), 0.95) == pytest.approx(bonferroni)
    assert 0.99 < simultaneous_level(rng.normal(size=(120, 6)), np.zeros(6), 0.95) < bonferroni


def test_level_is_seeded() -> None:
    moves = np.random.default_rng(9).normal(size=(300, 5))
    levels = [simultaneous_level(moves, np.zeros(5), 0.95, seed) for seed in (0, 0, 1)]
    assert levels[0] == levels[1] != levels[2]


def test_skewness_by_hand() -> None:
    """-1, -1, 2: mean square 2, mean cube 2."""
    assert skewness(np.array([-1.0, -1, 2])) == pytest.approx(2 / 2**1.5)
    assert skewness(np.array([-1.0, 1])) == 0
    assert skewness(np.zeros(4)) == 0
    assert math.isnan(skewness(np.array([math.nan])))
