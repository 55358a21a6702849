"""Energy models against sums over all states: log Z, its error in every result, both sides, the gradient of a fit."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.comparison import compare
from pyro_vae.contrastive import _gap
from pyro_vae.energy import EnergyBased
from pyro_vae.estimators.choice import Choice
from pyro_vae.estimators.estimate import Bracket
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.intervals import StandardError
from pyro_vae.log_partition import Constant
from pyro_vae.models import RBM, IndependentPixel
from pyro_vae.randomness import own_randomness

SHAPE = (3, 4)


def tiny(seed=0, scale=0.7, **options):
    """An RBM far from independent pixels, with base rates that are not its own."""
    model = RBM(pv.Binary(SHAPE), **{"hidden_dim": 5, **options})
    with own_randomness(seed), torch.no_grad():
        for each in (*model.parameters(), model.base_logits, model.hidden_base_logits):
            each.normal_(0, scale)
    return model


@pytest.fixture(scope="module")
def images():
    """All 4096 images."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=12))).view(-1, *SHAPE)


def drawn(images, model, num, seed=0):
    """Exact draws of the model."""
    with own_randomness(seed), torch.no_grad():
        return images[torch.multinomial(model.log_unnormalized(images).softmax(0), num, replacement=True)]


def score(model, obs, estimator=None, seed=0):
    return pv.log_likelihood(model, pv.Batch(obs), estimator=estimator, seed=seed, device="cpu")


def with_error(model, images, se, drift=0.05):
    """The result of a model whose log Z is known up to `se`, as annealing would leave it."""
    log_z = model.sum_log_partition()
    how = {"num_steps": 1000.0, "num_chains": 100.0, "num_repeats": 4.0}
    model._keep(log_z=log_z, se=se, drift=drift, **how)
    return score(model, images)


@pytest.mark.parametrize("hidden_dim", [5, 13])
def test_sums_over_hidden_and_over_visible_states_agree(hidden_dim, images):
    model = tiny(hidden_dim=hidden_dim)
    with torch.no_grad():
        truth = float(model.log_unnormalized(images).double().logsumexp(0))
    # float32 sums of a dozen terms of size 1
    assert model.sum_log_partition() == pytest.approx(truth, abs=1e-5)
    assert EnergyBased.sum_log_partition(model) == pytest.approx(truth, abs=1e-5)


def test_f_is_the_joint_law_with_the_hidden_bits_summed_out(images):
    model = tiny()
    hidden = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
    x = images.flatten(1)
    with torch.no_grad():
        joint = (x @ model.visible_bias)[:, None] + hidden @ model.hidden_bias + x @ model.weight.T @ hidden.T
        torch.testing.assert_close(model.log_unnormalized(images), joint.logsumexp(1), rtol=0, atol=1e-5)


def test_masses_of_all_images_sum_to_one_with_the_summed_constant(images):
    model = tiny()
    model.sum_log_partition()
    result = score(model, images)
    assert result.direction == "exact"
    assert float(np.exp(result.log_prob).sum()) == pytest.approx(1, abs=1e-5)  # 4096 float32 masses


def test_annealed_log_z_is_that_of_the_sum_and_every_run_too():
    model = tiny()
    truth = model.sum_log_partition()
    found = model.estimate_log_partition(200, num_chains=500)
    assert abs(found.log_z - truth) < min(0.02, 4 * found.se)
    for run in (*found.repeats, found.doubled):
        assert abs(run.log_z - truth) < 4 * run.se
    assert found.is_stable


def test_the_path_begins_at_independent_bits_and_ends_at_the_model(images):
    model = tiny()
    path = model.path(4)
    state = path.at(images)
    base = torch.distributions.Bernoulli(logits=model.base_logits).log_prob(images).sum((1, 2))
    with torch.no_grad():
        torch.testing.assert_close(path.log_density(state, 0).float(), base, rtol=0, atol=1e-5)
        last = path.log_density(state, 4).float()
        torch.testing.assert_close(last, model.log_unnormalized(images), rtol=0, atol=1e-5)
    assert torch.equal(path.values(state), images)


def test_moves_leave_each_density_of_the_path_as_it_is(images):
    """Exact draws, moved: the frequency of each pixel and of each pair of pixels within 5 standard errors."""
    model = tiny()
    path, step, num = model.path(4), 2, 40_000
    with own_randomness(0), torch.no_grad():
        masses = path.log_density(path.at(images), step).softmax(0)
        chains = images[torch.multinomial(masses, num, replacement=True)]
        moved = path.values(path.move(path.at(chains), step)).flatten(1).double()
    x = images.flatten(1).double()
    truth = torch.einsum("n,ni,nj->ij", masses, x, x)
    error = (moved.T @ moved / num - truth) / (truth * (1 - truth) / num).sqrt()
    assert float(error.abs().max()) < 5


def test_a_move_and_its_way_back_are_equally_likely():
    """Detailed balance of block Gibbs sampling with 2 pixels: annealing backwards rests on it."""
    model = RBM(pv.Binary((1, 2)), hidden_dim=3)
    with own_randomness(1), torch.no_grad():
        for each in model.parameters():
            each.normal_()
        images = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).view(-1, 1, 2)
        mass = model.log_unnormalized(images).softmax(0)
        starts = torch.multinomial(mass, 200_000, replacement=True)
        ends = (model.move_chains(images[starts], 1).flatten(1) @ torch.tensor([2.0, 1.0])).long()
    flow = torch.zeros(4, 4).index_put_((starts, ends), torch.ones(()), accumulate=True)
    error = (flow - flow.T) / (flow + flow.T).clamp(min=1).sqrt()
    assert float(error.abs().max()) < 4.5  # six pairs


def test_no_log_p_before_log_z_is_estimated_nor_after_the_parameters_changed(images):
    model = tiny()
    with pytest.raises(ValueError, match=r"call model\.estimate_log_partition"):
        score(model, images)
    model.estimate_log_partition(5, num_chains=4)
    score(model, images)
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="have changed since"):
        score(model, images)


def test_log_z_is_saved_and_loaded_with_the_parameters_and_survives_float64(images):
    model, other = tiny(), RBM(pv.Binary(SHAPE), hidden_dim=5)
    model.estimate_log_partition(20, num_chains=8)
    other.load_state_dict(model.state_dict())
    assert other.constant() == model.constant()
    log_prob = score(model, images).log_prob
    assert np.array_equal(score(other, images).log_prob, log_prob)
    np.testing.assert_allclose(score(other.double(), images).log_prob, log_prob, atol=1e-5)  # rounding of float32
    assert other.constant().log_z == model.constant().log_z


def test_a_fit_by_svi_is_refused_as_it_lacks_the_gradient_of_log_z(images):
    data = pv.Data("bits", pv.Binary(SHAPE), *[pv.Batch(images[:8], space=pv.Binary(SHAPE))] * 3)
    model = tiny()
    model.sum_log_partition()
    with pytest.raises(ValueError, match="contrastive divergence"):
        pv.fit(model, data, method="svi", num_epochs=1, device="cpu")


def test_the_contrastive_gradient_is_that_of_the_likelihood(images):
    """∇ mean log p of data, by a sum over all images, against data less exact draws: within 5 standard errors."""
    model = tiny()
    data, num = drawn(images, tiny(seed=3), 50), 20_000
    parameters = list(model.parameters())
    truth = torch.autograd.grad(
        model.log_unnormalized(data).mean() - model.log_unnormalized(images).logsumexp(0), parameters
    )
    chains = drawn(images, model, num, seed=5)
    found = torch.autograd.grad(_gap(model, data, chains), parameters)
    for right, left in zip(truth, found, strict=True):
        # a derivative by a parameter is a mean of numbers in [0, 1] over the draws: sd at most ½
        assert float((right - left).abs().max()) < 5 * 0.5 / math.sqrt(num)


def test_what_all_data_share_is_not_divided_by_their_number(images):
    model = tiny()
    for num in (4, 400):
        result = with_error(model, images[:num], 0.03)
        assert result.direction == "upper"
        assert result.mc_se == pytest.approx(0.03)
        assert result.test_se == pytest.approx(math.hypot(np.std(result.log_prob, ddof=1) / math.sqrt(num), 0.03))
        assert np.allclose(result.variance, 0.03**2)
    assert result.summary()["shared_se"] == pytest.approx(0.03)
    assert result.bias_bound == pytest.approx(0.05 + 0.03**2 / 2)
    assert result.mean - result.bias_bound in result.interval()
    assert result.mean + 0.1 not in result.interval()


def test_independent_and_shared_errors_add_up():
    values = np.array([-1.0, -2.0, -3.0, -4.0])
    result = LogLikelihood(
        log_prob=values,
        variance=np.full(4, 0.04 + 0.01),
        shared_variance=0.01,
        direction="upper",
        estimator="energy",
        num_particles=0,
        space=pv.Binary((1,)),
        digest="",
        seed=0,
        seconds=0.0,
    )
    assert result.mc_se == pytest.approx(math.sqrt(0.04 / 4 + 0.01))


def test_differences_of_two_models_hold_the_shared_errors_of_both(images):
    obs = drawn(images, tiny(), 300)
    first, second = with_error(tiny(), obs, 0.3), with_error(tiny(seed=2), obs, 0.4)
    pixels = IndependentPixel(pv.Binary(SHAPE))
    exact = score(pixels, obs)
    table = compare({"a": first, "b": second, "pixels": exact})
    for pair in table.pairs:
        names = {pair.a, pair.b}
        shared = math.hypot(*(0.3 * ("a" in names), 0.4 * ("b" in names)))
        gain = {"a": first, "b": second, "pixels": exact}[pair.a].log_prob - {
            "a": first, "b": second, "pixels": exact}[pair.b].log_prob  # fmt: skip
        assert pair.mc_se == pytest.approx(shared)
        assert pair.se == pytest.approx(math.hypot(np.std(gain, ddof=1) / math.sqrt(300), shared))
        assert pair.high - pair.low > 2 * 1.95 * pair.se
    assert "≤" in table.table()
    assert table.to_dict(data_name="bits")["rows"][0]["model"] == table.rows[0].model
    assert {row["model"]: row.get("shared_se") for row in table.to_dict(data_name="bits")["rows"]}[
        "a"
    ] == pytest.approx(0.3)


def test_a_shared_error_enters_an_interval_beside_that_of_the_data():
    error = StandardError(((3.0, 1e9),), shared=4.0)
    assert error.value == 5
    assert error.of_data == 3
    assert error.half_width(0.95) == pytest.approx(1.959964 * 5, rel=1e-5)


def test_an_unstable_log_z_is_warned_of(images):
    unstable = with_error(tiny(), images, 0.01, drift=0.5)
    assert "moves by up to 0.50" in unstable.warning
    assert unstable.flagged.all()
    assert with_error(tiny(), images, 0.01, drift=0.05).warning is None
    once = with_error(tiny(), images, 0.01, drift=math.nan)
    assert "estimated once" in once.warning


def test_a_result_is_read_back_with_log_z_and_bracket(images, tmp_path):
    model = tiny()
    model.estimate_log_partition(50, num_chains=20)
    result = score(model, images[::100], pv.bracket(20, 4, num_data=10))
    result.save(tmp_path / "result.npz")
    again = LogLikelihood.load(tmp_path / "result.npz")
    assert again.constant == result.constant == model.constant()
    assert again.bracket == result.bracket
    assert again.shared_variance == result.shared_variance > 0
    assert again.mc_se == result.mc_se


def test_mean_weight_of_reverse_annealing_is_the_mass_of_the_annealing_sampler(images):
    """E w(x) = p_T(x), the law of what the moves along the path give, which a sum over all chains of states has."""
    model = tiny(hidden_dim=2)
    path, num_steps = model.path(2), 2
    with torch.no_grad():
        hidden = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))
        x = images.flatten(1).double()
        mass = path.log_density(path.at(images), 0).exp()
        for step in range(1, num_steps + 1):  # Σ_x p(x) p(h | x), then Σ_h p(h) p(x | h), at f_β
            beta = path.betas[step]
            inner = (1 - beta) * model.hidden_base_logits + beta * (x @ model.weight.T.double() + model.hidden_bias)
            on = inner.sigmoid()[:, None]
            of_hidden = mass @ torch.where(hidden == 1, on, 1 - on).prod(-1)
            bias = (1 - beta) * model.base_logits.flatten() + beta * model.visible_bias
            lit = (bias + beta * (hidden @ model.weight)).double().sigmoid()[:, None]
            mass = of_hidden @ torch.where(x == 1, lit, 1 - lit).prod(-1)
    few = images[[0, 100, 2000, 4095]]
    result = score(model, few, pv.reverse_annealing(num_steps, 20_000))
    truth = mass[[0, 100, 2000, 4095]].log().numpy()
    assert result.direction == "lower"
    assert np.all(np.abs(result.log_prob - truth) < 4 * np.sqrt(result.variance) + 1e-5)


def test_both_sides_bracket_the_truth_and_the_gap_closes_with_the_steps(images):
    model = tiny(scale=1.0)
    obs = drawn(images, model, 200)
    model.sum_log_partition()
    truth = score(model, obs).mean
    model.estimate_log_partition(300, num_chains=300)
    gaps = []
    for num_steps in (3, 30, 300):
        result = score(model, obs, pv.bracket(num_steps, 8, num_data=200))
        gaps.append(result.bracket.gap)
        assert result.bracket.lower < truth + 4 * result.bracket.gap_se + 4 * result.shared_se
        assert truth < result.mean + 4 * result.shared_se
        assert result.bias_bound >= result.bracket.gap
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05


def test_names_reach_the_lower_side_and_others_refuse_it(images):
    model, obs = tiny(), images[:6]
    model.sum_log_partition()
    assert score(model, obs, Choice("raise", steps=5, chains=2).build(model, None)).estimator == "reverse_annealing"
    certified = Choice("is", certify=True, steps=5, chains=2, simulated=4).build(model, None)
    assert score(model, obs, certified).bracket.num_data == 4
    with pytest.raises(ValueError, match="certify without it"):
        Choice("raise", certify=True)
    vae = pv.models.VAE(pv.Binary(SHAPE), latent_dim=2, hidden_dims=(4,))
    with pytest.raises(ValueError, match="energy models"):
        score(vae, obs, pv.reverse_annealing(5, 2))
    assert score(IndependentPixel(pv.Binary(SHAPE)), obs, pv.reverse_annealing(5, 2)).direction == "exact"


def test_draws_follow_the_model(images):
    """Frequencies of the 12 pixels in 4000 chains of a model that mixes, within 5 standard errors."""
    model = tiny()
    with own_randomness(0), torch.no_grad():
        drawn = model.distribution().sample((4000,))
        truth = (model.log_unnormalized(images).softmax(0)[:, None, None] * images).sum(0)
    error = (drawn.mean(0) - truth) / (truth * (1 - truth) / 4000).sqrt()
    assert float(error.abs().max()) < 5


def test_after_a_fit_annealing_starts_from_the_shares_of_the_hidden_bits():
    """By the parameters that the fit ends with, not by those that it begins with."""
    data = pv.load_data("digits", space="binary", seed=0)
    with own_randomness(0):
        model = RBM(data.space, hidden_dim=4)
    before = model.features(data.train.obs[:]).mean(0).detach()
    pv.fit(model, data, seed=0, num_epochs=5, learning_rate=0.05, log_z_steps=0, device="cpu")
    after = model.features(data.train.obs[:]).mean(0).detach()
    added = 1 / (len(data.train) + 1)  # at most this does one half on either count move a share
    assert float((after - before).abs().max()) > 10 * added
    torch.testing.assert_close(model.path(2).hidden_base.sigmoid(), after, rtol=0, atol=added)


def test_runs_from_before_there_were_shares_of_hidden_bits_keep_their_log_z(images):
    model = tiny()
    model.estimate_log_partition(50, num_chains=20)
    state = model.state_dict()
    del state["hidden_base_logits"]
    loaded = RBM(pv.Binary(SHAPE), hidden_dim=5)
    loaded.load_state_dict(state)
    assert loaded.constant() == model.constant()
    assert not loaded.hidden_base_logits.any()
    with torch.no_grad():
        assert torch.equal(loaded.distribution().log_prob(images), model.distribution().log_prob(images))


def test_the_command_line_fits_scores_compares_and_draws(tmp_path):
    run = CliRunner()
    data = ["--data", "digits", "--space", "binary", "--quiet"]
    fit = ["--set", "hidden_dim=8", "--fit", "num_epochs=2", "--fit", "log_z_steps=20", "--fit", "log_z_chains=20"]
    done = run.invoke(main, ["train", "--model", "rbm", *data, *fit, "--out", str(tmp_path / "rbm")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "rbm" / "samples.png").is_file()
    how = ["--num-data", "20", "--quiet", "--out", str(tmp_path / "scored")]
    done = run.invoke(main, ["evaluate", str(tmp_path / "rbm"), *how])
    assert done.exit_code == 0, done.output
    assert "≤" in done.output
    assert "log Z" in done.output
    lower = ["--estimator", "raise", "--steps", "20", "--chains", "2"]
    done = run.invoke(main, ["evaluate", str(tmp_path / "rbm"), *lower, *how])
    assert done.exit_code == 0, done.output
    assert "RAISE" in done.output


def test_constants_say_what_they_rest_on():
    summed = Constant(1.0, 0, 0, 0, 0, 0, 0)
    assert summed.is_exact
    assert summed.is_stable


def test_raise_promises_no_side_in_a_difference(images):
    """For fair bits, which a steep machine does not draw, the law of one step of annealing lies above the model's."""
    model = tiny(5, scale=1.5, hidden_dim=6)
    model.base_logits.zero_()
    model.sum_log_partition()
    obs = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:200]]
    comparison = compare({"raise": score(model, obs, pv.reverse_annealing(1, 16)), "exact": score(model, obs)})
    (pair,) = comparison.pairs
    assert pair.a == "raise"
    assert pair.told_apart
    assert pair.direction == "unknown"
    assert not pair.is_sure
    assert "RAISE" in pair.warning or "not to be trusted" in pair.warning


def test_a_bracket_whose_sides_cross_is_warned_of(images):
    result = with_error(tiny(), images, 0.01)
    crossed = Bracket(lower=result.mean + 1, gap=-1.0, gap_se=0.1, num_data=50, num_steps=10, num_chains=4)
    crossed = replace(result, bracket=crossed)
    assert "lies above the upper one" in crossed.warning
    assert f"≤ {result.mean:.2f}" in compare({"rbm": crossed}).table()
    assert replace(crossed, bracket=replace(crossed.bracket, gap=-0.1, lower=result.mean + 0.1)).warning is None


def test_a_summed_log_z_stays_exact_beside_its_lower_side(images):
    model = tiny()
    model.sum_log_partition()
    result = score(model, images[::64], pv.bracket(5, 4, 10))
    assert (result.direction, result.bias_bound) == ("exact", 0.0)
    assert result.bracket is not None


def test_the_shared_error_reaches_arviz_and_csv(images, tmp_path):
    result = with_error(tiny(), images, 0.5)
    elpd = pv.to_arviz({"rbm": result, "same": result})["rbm"]
    own = math.sqrt(len(images) * result.log_prob.var())
    assert float(elpd["se"]) == pytest.approx(math.hypot(own, 0.5 * len(images)), rel=1e-12)
    assert bool(elpd["warning"])
    result.to_csv(tmp_path / "r.csv")
    header, row = (tmp_path / "r.csv").read_text().splitlines()[:2]
    assert header.endswith(",shared_variance")
    assert row.endswith(",0.25")


def test_a_fit_that_diverges_stops_and_says_where():
    data = pv.load_data("digits", space="binary", seed=0)
    with pytest.raises(ArithmeticError, match="epoch 1 of RBM: gap is"):
        pv.fit(RBM(data.space, hidden_dim=4), data, num_epochs=2, learning_rate=1e38, log_z_steps=0, device="cpu")


@pytest.mark.parametrize(("name", "value"), [("log_z_steps", -1), ("log_z_chains", 0)])
def test_settings_of_log_z_are_checked_before_the_fit(name, value):
    data = pv.load_data("digits", space="binary", seed=0)
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        pv.fit(RBM(data.space, hidden_dim=4), data, num_epochs=1000, device="cpu", **{name: value})
