"""Bounds of several model/guide pairs against closed forms, and what the table makes of them."""

import itertools
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian

import pyro_vae as pv
from pyro_vae import bound_tables, plot_bounds
from pyro_vae.bound_rows import BoundRow, figure, gain
from pyro_vae.bounds import Bounds, _Scoring, compare_bounds
from pyro_vae.estimators.curve import Curve, _Groups, flat, sample_curve
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.spaces import Real
from pyro_vae.traces import Pair

ORACLE = LinearGaussian(5, 3)
LOOSE = LinearGaussian(5, 3, guide="mean_field")  # a guide for the same p(x)
FLATTER = LinearGaussian(5, 3, guide="mean_field", widen=1.5)  # its weights have a light tail
OTHER = LinearGaussian(5, 3, seed=1)  # another p(x), with its own exact posterior
OBS = ORACLE.draw(100)
PAIRS = {
    "loose": (ORACLE.model, LOOSE.guide),
    "flatter": (ORACLE.model, FLATTER.guide),
    "exact": (ORACLE.model, ORACLE.guide),
    "other": (OTHER.model, OTHER.guide),
}
SIZES = (1, 4, 30, 120)
FAST = pv.annealed_importance_sampling(8, num_chains=8, num_leapfrog=2)


@pytest.fixture(scope="module")
def bounds():
    return compare_bounds(PAIRS, pv.Batch(OBS), num_particles=SIZES, best=FAST)


def close(value, truth):
    """Within 4 Monte Carlo standard errors; 1e-9 where there are none."""
    return abs(value.mean - truth) < 4 * value.mc_se + 1e-9


# Against closed forms


def test_the_elbo_is_log_p_less_the_mean_field_gap(bounds):
    truth = float(ORACLE.log_prob(OBS).mean())
    row = bounds.row("loose")
    assert row.bounds[0].mc_se < 0.02  # the gap is .3, so that the next line says something
    assert close(row.bounds[0], truth - LOOSE.mean_field_gap())
    # annealing is a lower bound, low by about half its variance, which its bias bound is
    assert -4 * row.best.mc_se - row.best.bias_bound < row.best.mean - truth < 4 * row.best.mc_se


@pytest.mark.parametrize("name", ["exact", "other"])
def test_with_the_exact_guide_every_column_is_log_p(bounds, name):
    truth = {"exact": ORACLE, "other": OTHER}[name].log_prob(OBS).numpy()
    row = bounds.row(name)
    np.testing.assert_allclose(row.curve.bounds, np.tile(truth, (len(SIZES), 1)), atol=1e-9)
    np.testing.assert_allclose(row.best.log_prob, truth, atol=1e-9)
    assert abs(row.gap).max() < 1e-9


def test_elbo_and_l_2_are_those_of_quadrature():
    """For one latent whose guide has half the posterior's precision, L_1 and L_2 by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)  # against exp(-e²/2)
    weights = weights / weights.sum()
    oracle = LinearGaussian(2, 1, guide="exact", widen=2.0)
    # z = m + e √(2/A) with e ~ N(0, 1): log w - log p(x) = log N(z; m, 1/A) - log N(z; m, 2/A)
    log_w = math.log(2) / 2 - nodes**2 / 2
    truth = {1: weights @ log_w, 2: weights @ np.logaddexp.outer(log_w, log_w) @ weights - math.log(2)}
    obs = oracle.draw(100)
    curve, _ = sample_curve((1, 2, 7, 400), Pair(oracle.model, oracle.guide), (obs,), 0)
    for place, size in enumerate((1, 2)):
        gap = figure(curve.bounds[place] - oracle.log_prob(obs).numpy(), curve.variance[place])
        assert close(gap, truth[size])
        assert gap.mc_se < 0.1 * abs(truth[2])


def test_two_guides_of_one_model_have_one_best_estimate(bounds):
    """Each is low by at most about its bias bound, beyond 4 standard errors of the difference."""
    pair = gain(bounds.row("flatter"), bounds.row("loose"))
    slack = bounds.row("flatter").best.bias_bound + bounds.row("loose").best.bias_bound
    assert pair.same_model
    assert abs(pair.best.mean) < 4 * pair.best.mc_se + slack
    assert (pair.model.mean, pair.model.se, pair.direction) == (0, 0, "exact")
    assert pair.guide == pair.elbo


def test_gain_of_another_model_is_that_of_the_closed_forms(bounds):
    """Both guides are the exact posteriors, so that nothing but p(x) differs."""
    got = gain(bounds.row("other"), bounds.row("exact"))
    difference = (OTHER.log_prob(OBS) - ORACLE.log_prob(OBS)).numpy()
    assert not got.same_model
    assert got.model.mean == pytest.approx(difference.mean(), abs=1e-9)
    assert got.model.se == pytest.approx(difference.std(ddof=1) / math.sqrt(len(OBS)), rel=1e-6)
    assert got.guide.mean == pytest.approx(0, abs=1e-9)


def test_gain_in_elbo_is_the_sum_of_both_gains(bounds):
    for name in PAIRS:
        for each in bounds.gains(name):
            assert each.elbo.mean == pytest.approx(each.model.mean + each.guide.mean, abs=1e-9)


# The curve


def test_bounds_rise_with_the_particles_up_to_log_p(bounds):
    """E L_K is nondecreasing: each step of the means is above -4 of its Monte Carlo errors."""
    for row in bounds.rows:
        for low, high in itertools.pairwise(row.bounds):
            assert high.mean - low.mean > -4 * math.hypot(low.mc_se, high.mc_se) - 1e-9
    loose = [each.mean for each in bounds.row("loose").bounds]
    assert loose == sorted(loose)
    assert loose[-1] - loose[0] > 0.1  # and they do rise


def test_all_particles_give_the_digits_of_importance_sampling(bounds):
    for name, (model, guide) in PAIRS.items():
        result = pv.log_likelihood(model, pv.Batch(OBS), guide=guide, estimator=pv.importance_sampling(SIZES[-1]))
        row = bounds.row(name)
        assert np.array_equal(row.curve.bounds[-1], result.log_prob)
        assert np.array_equal(row.curve.bounds[0], result.elbo)
        assert np.array_equal(row.sampled.khat, result.khat)
    again = pv.importance_sampling(SIZES[-1])
    other = pv.log_likelihood(ORACLE.model, pv.Batch(OBS), guide=FLATTER.guide, estimator=again, seed=1)
    last = bounds.row("flatter").bounds[-1]
    assert abs(last.mean - other.mean) < 4 * math.hypot(last.mc_se, other.mc_se)


@pytest.mark.parametrize("size", [1, 2, 7, 10, 60, 100])
@pytest.mark.parametrize("cuts", [(), (1, 2, 9), (33, 66), tuple(range(1, 100))])
def test_groups_are_disjoint_and_streaming_does_not_matter(size, cuts):
    generator = torch.Generator().manual_seed(0)
    weights = 3 * torch.randn(100, 4, generator=generator, dtype=torch.float64) - 500
    weights[5] = -math.inf  # a weight of zero counts as a particle
    if size == 1:
        weights[5] = -500.0
    groups = _Groups(size, 4, torch.device("cpu"))
    for piece in weights.tensor_split(cuts):
        groups.update(piece)
    count = 100 // size
    truth = weights[: count * size].reshape(count, size, 4).logsumexp(1) - math.log(size)
    torch.testing.assert_close(groups.mean, truth.mean(0))
    assert groups.count == count
    if count > 1:
        torch.testing.assert_close(groups.variance({}, 100), truth.var(0) / count)


def test_errors_of_the_curve_are_its_spread_over_repeats():
    """One datum 600 times: the mean of the variances against the variance of the bounds, for every K."""
    obs = OBS[:1].expand(600, 5)
    curve, _ = sample_curve((1, 3, 20, 35, 60), Pair(ORACLE.model, FLATTER.guide), (obs,), 0)
    spread = curve.bounds.var(1, ddof=1)
    # the variance of 600 repeats has a relative error of √((κ-1)/600), κ about 4 here; K = 35 and 60 have one group,
    # whose delta variance is off by terms in 1/K
    np.testing.assert_allclose(curve.variance.mean(1), spread, rtol=4 * math.sqrt(3 / 600))


def test_exactly_the_particles_of_the_largest_k_are_drawn_in_blocks_of_data():
    drawn = []

    def guide(obs):
        drawn.append((pv.traces.particle_shape() or (1,), len(obs)))
        LOOSE.guide(obs)

    sample_curve((1, 10, 1500), Pair(ORACLE.model, guide), (OBS,), 0)
    sizes = [math.prod(shape) * num for shape, num in drawn[3:]]  # the first runs see whether it broadcasts
    assert max(sizes) <= 2048
    assert sum(sizes) >= 1500 * len(OBS)
    assert sum(sizes) - 1500 * len(OBS) <= sum(math.prod(s) * n for s, n in drawn[:3]) + 16


# What is taken for the best estimate


def coin_model(obs):
    with pyro.plate("data", len(obs), dim=-1):
        side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("obs", dist.Normal(side, 1.0), obs=obs)


def coin_guide(obs):
    with pyro.plate("data", len(obs), dim=-1):
        pyro.sample("side", dist.Bernoulli(torch.tensor(0.5)))


def test_the_best_estimate_is_annealed_where_it_can_be_and_sampled_elsewhere():
    chosen = _Scoring(SIZES, None)._choice(Pair(*PAIRS["loose"]), (OBS[:3],))
    assert chosen == pv.annealed_importance_sampling(100)
    coins = compare_bounds({"coin": (coin_model, coin_guide)}, pv.Batch(torch.randn(4)), num_particles=(2, 50))
    (row,) = coins.rows
    assert (row.best.estimator, row.best.num_particles) == ("importance_sampling", 50)
    assert np.array_equal(row.best.log_prob, row.curve.bounds[-1])
    assert "Note: coin: best is importance sampling: annealing needs continuous latents" in coins.table()


def test_a_model_without_latents_is_exact_in_every_column():
    model = pv.models.IndependentPixel(pv.Binary((2, 2)))
    obs = torch.bernoulli(torch.full((6, 2, 2), 0.5, dtype=torch.float32), generator=torch.Generator().manual_seed(0))
    bounds = compare_bounds({"pixel": model}, pv.Batch(obs, space=pv.Binary((2, 2))), num_particles=(1, 5))
    (row,) = bounds.rows
    truth = pv.log_likelihood(model, pv.Batch(obs)).log_prob
    assert np.array_equal(row.curve.bounds, np.stack([truth, truth]))
    assert row.best.direction == "exact"
    assert abs(row.gap).max() == 0


def test_our_own_model_is_the_same_model_with_another_guide():
    torch.manual_seed(0)
    vae = pv.models.VAE(pv.Binary((2, 2)), latent_dim=2, hidden_dims=(4,))

    def wide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))

    obs = torch.bernoulli(torch.full((5, 2, 2), 0.5))
    pairs = {
        "own": vae,
        "wide": (vae, wide),
        "again": (vae.model, vae.guide),
        "copy": type(vae)(vae.space, latent_dim=2),
    }
    bounds = compare_bounds(pairs, pv.Batch(obs), num_particles=(1, 20), best=pv.importance_sampling(30))
    assert [row.model for row in bounds.rows] == ["own", "own", "own", "copy"]
    assert np.array_equal(bounds.row("own").best.log_prob, bounds.row("again").best.log_prob)
    assert bounds.row("own").best.num_particles == 30


# The text, the file and the picture


def test_the_table_holds_its_figures_and_is_narrow(bounds):
    text = bounds.table()
    assert repr(bounds) == text
    assert max(map(len, text.splitlines())) <= bound_tables.WIDTH
    row, (first, *_) = bounds.row("loose"), bounds.gains()
    line = next(line for line in text.splitlines() if line.startswith("loose"))
    assert [f"{each.mean:.2f}" for each in row.bounds] == line.split()[1:5]
    assert f"≥ {row.best.mean:.2f}" in line
    assert line.split()[-2:] == [f"{row.gap.mean():.3f}", f"{figure(row.gap, row.gap_variance).se:.3f}"]
    assert "AIS K=8" in line
    line = next(line for line in text.splitlines() if line.endswith("same p(x)"))
    assert line.split()[:3] == ["flatter", f"{first.elbo.mean:.3f}", f"{first.elbo.se:.3f}"]
    assert "Gains over loose in nats" in text
    assert "Gains over other in nats" in bounds.table("other")
    assert "flatter and loose hold one model, so p(x) is the same; best differs by" in " ".join(text.split())
    assert "other and" not in text
    assert bounds.highest in PAIRS


def test_many_columns_are_cut_into_tables_that_fit():
    sizes = tuple(2**k for k in range(20))
    result = made(np.zeros(3), "lower")
    rows = [BoundRow(f"a rather long name {i}", flat(sizes, np.zeros(3)), result, result, model=f"{i}") for i in "ab"]
    lines = Bounds(tuple(rows), sizes).table().splitlines()
    assert max(map(len, lines)) <= bound_tables.WIDTH
    assert sum(line.startswith("a rather long name a") for line in lines) == 2
    assert all(any(f"L_{size}" in line for line in lines) for size in sizes[1:])


def made(log_prob, direction, variance=0.0):
    """A result out of thin air."""
    return LogLikelihood(
        log_prob=log_prob,
        variance=np.full(len(log_prob), variance),
        direction=direction,
        estimator="importance_sampling",
        num_particles=100,
        space=Real((1,)),
        digest="ab" * 32,
        seed=0,
        seconds=1.0,
        khat=np.zeros(len(log_prob)),
        bias_bound=0.0,
    )


def made_row(name, elbo, best, direction, sampled=None, model=None):
    curve = Curve((1, 100), np.full((2, 9), [[elbo], [best]]), np.full((2, 9), 0.01))
    results = made(np.full(9, best if sampled is None else sampled), "lower", 0.01), made(np.full(9, best), direction)
    return BoundRow(name, curve, *results, model=model or name)


@pytest.mark.parametrize(
    ("mine", "yours", "expected"),
    [
        ("exact", "exact", "exact"),
        ("lower", "exact", "lower"),
        ("exact", "lower", "upper"),
        ("lower", "lower", "unknown"),
    ],
)
def test_gains_know_their_side(mine, yours, expected):
    """With log p_a at least so and log p_b known, the gain in p(x) is at least so, and that in tightness at most."""
    each = gain(made_row("a", -5.0, -3.0, mine), made_row("b", -6.0, -5.0, yours))
    assert (each.model.mean, each.guide.mean, each.elbo.mean) == (2.0, -1.0, 1.0)
    assert each.direction == expected
    flipped = {"lower": "upper", "upper": "lower"}.get(expected, expected)
    assert each.to_dict()["guide_direction"] == flipped


def test_remarks_name_a_best_estimate_that_is_none():
    """L_100 half a nat above a lower bound, with a Monte Carlo error of √.01/3 = .03, shows the bound to be loose."""
    loose = made_row("a", -6.0, -5.0, "lower", sampled=-4.5)
    assert "Note: a: L_100 lies 0.500 nats above best" in bound_tables.remarks([loose])[0]
    assert bound_tables.remarks([made_row("a", -6.0, -5.0, "lower")]) == []
    slack = bound_tables.remarks([made_row("a", -6, -5.0, "lower"), made_row("b", -6, -4.0, "lower", model="a")])
    assert "best differs by 1.000 nats (MC SE 0.000), the slack of the estimator" in slack[0]


def test_the_file_holds_the_figures_and_no_nan(bounds, tmp_path):
    contents = json.loads(bounds.to_json(tmp_path / "bounds.json").read_text())
    assert contents["num_particles"] == list(SIZES)
    assert contents["data"]["sha256"] == pv.Batch(OBS).digest
    first, second = contents["rows"][:2]
    assert (first["same_model_as"], second["same_model_as"]) == (None, "loose")
    assert first["elbo"]["mean"] == bounds.row("loose").bounds[0].mean
    assert first["best"]["direction"] == first["gap"]["direction"] == "lower"
    assert [each["against"] for each in contents["gains"]] == ["loose"] * 3
    single = compare_bounds({"one": PAIRS["exact"]}, pv.Batch(OBS[:1]), num_particles=(1, 9), best=FAST)
    assert single.to_dict()["rows"][0]["gap"]["se"] is None  # one datum has no error over test sets
    assert "Gains" not in single.table()


def test_the_picture_draws_every_curve_with_its_best_estimate(bounds, tmp_path):
    path = pv.plot_bound_curves(bounds, tmp_path / "bounds.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    ax = plot_bounds._bounds_figure(bounds).axes[0]
    curves = [bar.lines[0].get_xydata() for bar in ax.containers if len(bar.lines[0].get_xdata()) > 1]
    for row, curve in zip(bounds.rows, curves, strict=True):
        np.testing.assert_allclose(curve, [(k, each.mean) for k, each in zip(SIZES, row.bounds, strict=True)])
    dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [row.best.mean for row in bounds.rows]
    assert [line.get_marker() for line in ax.lines if line.get_marker() == "^"] == ["^"] * 4


def test_curves_that_a_common_scale_would_flatten_get_a_panel_of_their_own():
    near = Bounds((made_row("a", -6, -5.0, "lower"), made_row("b", -6, -4.0, "lower")), (1, 100))
    far = Bounds((made_row("a", -6, -5.0, "lower"), made_row("b", -60, -59.0, "lower")), (1, 100))
    assert len(plot_bounds._bounds_figure(near).axes) == 1
    _, rests = plot_bounds._bounds_figure(far).axes
    assert [bar.lines[0].get_ydata()[0] for bar in rests.containers] == [1, 1]


# Refusals


@pytest.mark.parametrize("sizes", [(), (10, 1), (1, 1, 5), (0, 5), (1, 2.5), (1, True), "abc", 1.0])
def test_particles_must_be_whole_and_ascending(sizes):
    with pytest.raises(ValueError, match="num_particles must be whole numbers of at least 1 in ascending order"):
        compare_bounds(PAIRS, pv.Batch(OBS), num_particles=sizes)


def test_one_particle_gives_no_errors():
    with pytest.raises(ValueError, match=r"last of num_particles must be at least 2.*got \(1,\)"):
        compare_bounds(PAIRS, pv.Batch(OBS), num_particles=(1,))


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ({}, ValueError, "pairs must hold at least one model, got an empty dict"),
        ([ORACLE.model], TypeError, r"pairs must be a dict of name to model or \(model, guide\), got list"),
        ({"a": 3}, TypeError, r"pairs\['a'\] must be a model or \(model, guide\), both callable, got 3"),
        ({"a": (ORACLE.model, None)}, TypeError, r"both callable, got \(method, NoneType\)"),
        ({"a": (ORACLE.model,) * 3}, TypeError, r"pairs\['a'\] must be a model or \(model, guide\)"),
        ({"a": (coin_model, ORACLE.guide)}, ValueError, "must have the same latent sites"),
    ],
)
def test_what_is_no_pair_is_refused(pairs, error, message):
    with pytest.raises(error, match=message):
        compare_bounds(pairs, pv.Batch(OBS), num_particles=(1, 5))


def test_an_error_inside_an_entry_names_it():
    with pytest.raises(ValueError, match="latent sites") as caught:
        compare_bounds({"fine": PAIRS["exact"], "odd": ORACLE.model}, pv.Batch(OBS[:3]), num_particles=(5,), best=FAST)
    assert caught.value.__notes__ == ["in the entry 'odd' of pairs"]


def test_best_must_be_an_estimator_and_against_a_row(bounds):
    with pytest.raises(TypeError, match=r"best must be one of pv\.exact.*got 'ais'"):
        compare_bounds(PAIRS, pv.Batch(OBS), best="ais")
    with pytest.raises(
        ValueError, match="against must be one of the rows 'loose', 'flatter', 'exact', 'other', got 'x'"
    ):
        bounds.table("x")


def test_a_guide_that_leaves_the_support_has_no_elbo():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Uniform(torch.zeros(()), 2.0))

    with pytest.raises(ValueError, match="the ELBO of datum 0 is -inf"):
        compare_bounds({"a": (model, guide)}, pv.Batch(torch.randn(3)), num_particles=(1, 50))
