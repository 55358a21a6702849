"""Annealing against closed forms: log p of linear Gaussian pairs, log Z of Gaussians, brackets from both sides."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, TwoModes

import pyro_vae as pv
from pyro_vae import graphs, traces
from pyro_vae.annealing import anneal, exponential_schedule, log_partition, sigmoid_schedule
from pyro_vae.estimators.ais import Annealer, bias_of_chains, check_chains
from pyro_vae.estimators.estimate import Estimate
from pyro_vae.estimators.hmc import GeometricPath, Tuning, pilot
from pyro_vae.estimators.sandwich import certify
from pyro_vae.randomness import own_randomness


def score(pair, obs, estimator, seed=0):
    return pv.log_likelihood(pair.model, pv.Batch(obs), guide=pair.guide, estimator=estimator, seed=seed)


class Gaussians:
    """f_t = N(t m / T, 1) up to the constant c^(t/T), moved by exact draws: log Z_T / Z_0 = log c."""

    def __init__(self, num_steps, mean=2.0, log_constant=3.0):
        self.num_steps, self.mean, self.log_constant = num_steps, mean, log_constant

    def log_density(self, state, step):
        share = step / self.num_steps
        return share * self.log_constant - (state - share * self.mean).square() / 2

    def move(self, state, step):
        return step / self.num_steps * self.mean + torch.randn_like(state)

    def take(self, state, chains):
        return state.gather(0, chains)


def test_the_schedule_rises_from_zero_to_one_and_is_symmetric():
    betas = sigmoid_schedule(11)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert bool((betas.diff() > 0).all())
    assert torch.allclose(betas + betas.flip(0), torch.ones(12, dtype=torch.float64), atol=1e-12)


def test_the_exponential_schedule_slows_down_by_its_sharpness():
    """Steps shrink by e^{-s} from the first to the last: dβ/dt ∝ exp(-s t/T)."""
    betas = exponential_schedule(1001, sharpness=2.0)
    steps = betas.diff()
    assert (betas[0], betas[-1]) == (0, 1)
    assert (steps[-1] / steps[0]).item() == pytest.approx(math.exp(-2 * 1000 / 1001), rel=1e-9)
    torch.testing.assert_close(steps[1:] / steps[:-1], steps.new_full((1000,), math.exp(-2 / 1001)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("resample", [False, True])
def test_mean_weight_is_unbiased_for_the_ratio_of_constants(resample):
    """E w = Z_T / Z_0 = e^3, over 2000 problems of 4 chains each: |t| < 4."""
    with own_randomness(0):
        start = torch.randn(4, 2000, dtype=torch.float64)
        weights = anneal(Gaussians(5), start, resample=resample)
    ratio = torch.exp(weights.log_mean - 3.0)
    assert abs(float((ratio.mean() - 1) / (ratio.std() / math.sqrt(2000)))) < 4


@pytest.mark.parametrize("resample", [False, True])
def test_the_variance_that_is_reported_is_the_variance_that_is_seen(resample):
    """Relative variance of the mean weight over 2000 problems; the mean of the estimates within 15% (4 SE of each)."""
    with own_randomness(1):
        weights = anneal(Gaussians(10), torch.randn(16, 2000, dtype=torch.float64), resample=resample)
    seen = float(torch.exp(weights.log_mean - 3.0).var())
    assert float(weights.variance.mean()) == pytest.approx(seen, rel=0.15)


def test_resampling_leaves_a_problem_alone_whose_weights_are_all_zero():
    class OneDead(Gaussians):
        def log_density(self, state, step):
            dead = torch.zeros(state.shape[1], dtype=torch.bool)
            dead[0] = step > 0
            return torch.where(dead, -math.inf, super().log_density(state, step))

    with own_randomness(0):
        start = torch.randn(8, 50, dtype=torch.float64)
        weights = anneal(OneDead(3, mean=6.0), start, resample=True)
    assert float(weights.log_mean[0]) == -math.inf
    assert bool(weights.log_mean[1:].isfinite().all())


def test_an_upper_bound_comes_from_the_way_back():
    with own_randomness(2):
        forth = anneal(Gaussians(4), torch.randn(4, 500, dtype=torch.float64))
        back = anneal(Gaussians(4), 2 + torch.randn(4, 500, dtype=torch.float64), reverse=True)
    ratio = torch.exp(back.log_mean + 3.0)  # E of it is 1
    assert abs(float((ratio.mean() - 1) / (ratio.std() / math.sqrt(500)))) < 4
    assert float(forth.log_mean.mean()) < 3.0 < float(-back.log_mean.mean())


def test_an_overestimate_by_b_nats_is_rarer_than_exp_minus_b():
    with own_randomness(3):
        weights = anneal(Gaussians(2, mean=4.0), torch.randn(1, 5000, dtype=torch.float64))
    for excess in (1.0, 2.0, 3.0):
        share = float((weights.log_mean > 3.0 + excess).double().mean())
        assert share < math.exp(-excess) + 4 * math.sqrt(math.exp(-excess) / 5000)


def test_log_partition_of_a_gaussian_and_its_error():
    found = log_partition(Gaussians(50), lambda: torch.randn(200, dtype=torch.float64), log_z_start=1.5, seed=0)
    assert abs(found.log_z - 4.5) < 4 * found.se
    assert 0 < found.se < 0.1
    assert found == log_partition(Gaussians(50), lambda: torch.randn(200, dtype=torch.float64), log_z_start=1.5, seed=0)
    assert found.direction == "lower"


def test_log_partition_refuses_what_is_no_constant():
    with pytest.raises(ValueError, match=r"must have shape \(num_chains,\) for one constant, got \(4, 2\)"):
        log_partition(Gaussians(3), lambda: torch.randn(4, 2))
    with pytest.raises(ValueError, match="log Z is nan"):
        log_partition(Gaussians(3, log_constant=math.nan), lambda: torch.randn(4))


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("resample", [False, True])
def test_log_p_of_a_linear_gaussian_pair(start, resample):
    """The mean error over 12 data is within 4 of its standard errors and its leading bias."""
    pair = LinearGaussian(6, 3, guide="mean_field")
    obs = pair.draw(12)
    steps = 30 if start == "guide" else 100
    found = score(pair, obs, pv.annealed_importance_sampling(steps, 16, 4, start, resample=resample))
    error = found.mean - float(pair.log_prob(obs).mean())
    assert abs(error) < 4 * found.mc_se + found.bias_bound
    assert found.mc_se < 0.1
    assert found.direction == "lower"
    assert found.num_particles == 16
    assert found.estimator == ("sequential_monte_carlo" if resample else "annealed_importance_sampling")


def test_from_the_exact_posterior_all_weights_are_equal():
    pair = LinearGaussian(6, 3)
    obs = pair.draw(5)
    found = score(pair, obs, pv.annealed_importance_sampling(5, 4, 3))
    assert np.abs(found.log_prob - pair.log_prob(obs).numpy()).max() < 1e-9
    assert found.spread.max() < 1e-18


def test_the_kernel_leaves_its_density_invariant():
    """From exact draws of N(0, s²), 2000 chains: mean and variance stay within 4 standard errors."""
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.float64)

    def densities(u):
        log_prob = dist.Normal(torch.zeros_like(scale), scale).log_prob(u).sum(-1)
        return log_prob, log_prob

    tuning = Tuning(torch.tensor([0, 1]), torch.zeros(2, 1).double(), scale.log().expand(2, 1, 2))
    path = GeometricPath(densities, sigmoid_schedule(1), 5, tuning)
    with own_randomness(0):
        state = path.at(scale * torch.randn(2000, 1, 2, dtype=torch.float64))
        for _ in range(5):
            state = path.move(state, 1)
    z = state.u / scale
    assert float(torch.stack(path.acceptance).mean()) < 0.999  # the test at the end of a trajectory is in use
    assert bool((z.mean(0).abs() < 4 / math.sqrt(2000)).all())
    assert bool(((z.var(0) - 1).abs() < 4 * math.sqrt(2 / 2000)).all())


def test_every_chain_and_datum_has_an_accept_step_of_its_own():
    pair = LinearGaussian(6, 3, guide="mean_field")
    settings = pv.annealed_importance_sampling(5, 8, 3)
    with own_randomness(0), torch.no_grad():
        annealer = Annealer(settings, traces.Pair(pair.model, pair.guide), (pair.draw(6),), 0)
        path = annealer.tuned(0, 6)
        start = path.at(annealer._draw(annealer.args, 8))
        moved, _ = path.propose(start, float(path.betas[3]), path.tuning.kick(3))
    stayed = (moved.u == start.u).all(-1)
    assert 0 < int(stayed.sum()) < stayed.numel()
    assert len({tuple(row) for row in stayed.T.tolist()}) > 1


def test_step_sizes_come_from_the_pilot_and_then_stay():
    pair = LinearGaussian(6, 3, guide="mean_field")
    settings = pv.annealed_importance_sampling(40, 16, 4)
    with own_randomness(0), torch.no_grad():
        annealer = Annealer(settings, traces.Pair(pair.model, pair.guide), (pair.draw(6),), 0)
        path = annealer.tuned(0, 6)
        before = path.tuning.kick(17).clone()
        anneal(path, path.at(annealer._draw(annealer.args, 16)))
        again = pilot(path, annealer._draw(annealer.args, 16), torch.ones(6, 3, dtype=torch.float64))
    assert torch.equal(path.tuning.kick(17), before)
    assert again.log_sizes.shape == (41, 6)
    acceptance = float(torch.stack(path.acceptance).mean())
    assert 0.5 < acceptance < 0.8  # tuned to 0.65


def test_constrained_and_discrete_latents_by_quadrature():
    """A Gamma scale is annealed in its logarithm, a coin summed out; the truth by a fine grid."""
    probs = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            coin = pyro.sample("coin", dist.Categorical(probs))
            scale = pyro.sample("scale", dist.Gamma(2.0 * torch.ones((), dtype=torch.float64), 1.0))
            pyro.sample("obs", dist.Normal(3.0 * coin, scale), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("coin", dist.Categorical(torch.full((2,), 0.5, dtype=torch.float64)))
            pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))

    obs = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    grid = torch.linspace(1e-4, 40, 400_001, dtype=torch.float64)
    prior = dist.Gamma(torch.tensor(2.0).double(), 1.0).log_prob(grid)
    truth = torch.stack(
        [
            torch.stack([probs[c].log() + prior + dist.Normal(3.0 * c, grid).log_prob(x) for c in (0, 1)]).logsumexp(
                (0, 1)
            )
            for x in obs
        ]
    ) + math.log(float(grid[1] - grid[0]))
    for start in ("guide", "prior"):
        estimator = pv.annealed_importance_sampling(30, 64, 3, start)
        found = pv.log_likelihood(model, pv.Batch(obs), guide=guide, estimator=estimator)
        error = np.abs(found.log_prob - truth.numpy())
        assert bool((error < 4 * np.sqrt(found.variance) + 1e-3).all()), start
        assert "discrete latents summed out over 2 joint states" in found.notes


def test_a_program_that_cannot_broadcast_is_annealed_on_tiled_data():
    pair = LinearGaussian(5, 2, guide="mean_field")

    def stubborn(obs):
        assert obs.ndim == 2
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            mean = torch.einsum("nk,dk->nd", z, pair.loadings) + pair.loc  # two axes and no more
            pyro.sample("obs", dist.Normal(mean, pair.noise).to_event(1), obs=obs)

    obs = pair.draw(4)
    found = pv.log_likelihood(
        stubborn, pv.Batch(obs), guide=pair.guide, estimator=pv.annealed_importance_sampling(20, 8, 4)
    )
    assert "tiled data" in " ".join(found.notes)
    assert abs(found.mean - float(pair.log_prob(obs).mean())) < 4 * found.mc_se + found.bias_bound


def test_discrete_latents_are_refused_where_they_are_many():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            bits = pyro.sample("bits", dist.Bernoulli(torch.full((8,), 0.5)).to_event(1))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(bits.sum(-1) + z, 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("bits", dist.Bernoulli(torch.full((8,), 0.5)).to_event(1))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"needs continuous latents: .* 256 joint states, .*at most 64"):
        pv.log_likelihood(
            model, pv.Batch(torch.zeros(3)), guide=guide, estimator=pv.annealed_importance_sampling(5, 2, 2)
        )


def test_discrete_latents_without_continuous_ones_are_enumerated_not_annealed():
    pair = LinearGaussian(3, 2)

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("obs", dist.Normal(k.float(), 1.0), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))

    batch = pv.Batch(torch.tensor([0.0, 1.0, 3.0]))
    with pytest.raises(ValueError, match=r"annealing needs continuous latents.*use exact\(\)"):
        pv.log_likelihood(model, batch, guide=guide, estimator=pv.annealed_importance_sampling(5, 2, 2))
    found = pv.log_likelihood(model, batch, guide=guide, estimator=pv.exact())
    means = torch.tensor([0.0, 1.0])
    truth = (torch.tensor([0.2, 0.8]).log() + dist.Normal(means, 1.0).log_prob(batch.obs[:, None])).logsumexp(1)
    assert np.abs(found.log_prob - truth.numpy()).max() < 1e-6  # float32
    assert found.direction == "exact"
    assert "2 joint states" in found.notes[0]
    with pytest.raises(ValueError, match="needs a model without continuous latents"):
        score(pair, pair.draw(2), pv.exact())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_chains": 0}, "num_chains must be a whole number of at least 1, got 0"),
        ({"num_leapfrog": 1.5}, "num_leapfrog must be a whole number of at least 1, got 1.5"),
        ({"start": "middle"}, "start must be 'guide' or 'prior', got 'middle'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        pv.annealed_importance_sampling(**changes)


def planar_guide(num_latents):
    """A guide that knows the density of its own draws only: the planar flow has no inverse."""
    flow = pyro.distributions.transforms.Planar(num_latents).double()

    def guide(obs):
        zero = torch.zeros(num_latents, dtype=torch.float64)
        with pyro.plate("data", len(obs), dim=-1):
            base = dist.Normal(zero, 1.0).to_event(1).expand([len(obs)])
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    return guide


def test_a_guide_without_density_refuses_annealing_and_says_why():
    torch.manual_seed(0)
    pair = LinearGaussian(4, 2)
    obs, guide = pair.draw(6), planar_guide(2)

    def scored(estimator):
        return pv.log_likelihood(pair.model, pv.Batch(obs), guide=guide, estimator=estimator)

    with pytest.raises(
        ValueError, match=r"annealing from the guide needs log q\(z \| x\) at any z.* its own draws only.*start='prior'"
    ):
        scored(pv.annealed_importance_sampling(10, 4, 3))
    found = scored(pv.annealed_importance_sampling(60, 16, 4, start="prior"))
    assert abs(found.mean - float(pair.log_prob(obs).mean())) < 4 * found.mc_se + found.bias_bound
    assert scored(pv.importance_sampling(100)).direction == "lower"


def test_non_finite_weights_name_the_datum():
    weights = torch.zeros(4, 3)
    weights[1, 2] = math.nan
    with pytest.raises(ValueError, match="log weights of datum 12 are not finite"):
        check_chains(weights, 10)
    weights[:, 2] = -math.inf
    with pytest.raises(ValueError, match="log weights of datum 2 are not finite"):
        check_chains(weights, 0)
    weights[0, 2] = 0.0  # one chain of weight zero is none the worse
    check_chains(weights, 0)


def test_a_model_that_breaks_at_one_datum_names_it():
    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, torch.where(obs == 0, math.nan, 1.0)), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="log weights of datum 4 are not finite"):
        pv.log_likelihood(
            model,
            pv.Batch(torch.tensor([1.0, 1, 1, 1, 0])),
            guide=guide,
            estimator=pv.annealed_importance_sampling(5, 4, 2),
        )


@pytest.mark.parametrize("num_chains", [1, 2])
def test_one_and_two_chains(num_chains):
    pair = LinearGaussian(4, 2, guide="mean_field")
    found = score(pair, pair.draw(3), pv.annealed_importance_sampling(20, num_chains, 3))
    assert np.isfinite(found.log_prob).all()
    assert np.isinf(found.variance).all() == (num_chains == 1)
    assert f"({num_chains} chains, where 16 are needed to tell)" in found.warning
    if num_chains == 1:
        assert found.spread is None
        assert found.bias_bound is None


def test_the_model_is_left_as_it_was():
    space = pv.Binary((4, 4))
    with own_randomness(0):
        vae = pv.models.VAE(space, latent_dim=2, hidden_dims=(8,)).train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    batch = pv.Batch((torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float(), space=space)
    pv.log_likelihood(vae, batch, estimator=pv.sandwich(num_steps=5, num_chains=4, num_leapfrog=2, num_simulated=4))
    assert vae.training
    assert all(parameter.requires_grad for parameter in vae.parameters())
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("steps", [5, 40])
def test_the_bracket_holds_the_truth_of_the_simulated_data(steps):
    """Lower and upper mean lie on their sides of the truth, each within 3 standard errors of its own."""
    pair = LinearGaussian(6, 3, guide="mean_field")
    batch = pv.Batch(pair.draw(4))
    estimator = pv.sandwich(num_steps=steps, num_chains=16, num_leapfrog=4, num_simulated=20, tolerance=5.0)
    found = pv.log_likelihood(pair.model, batch, guide=pair.guide, estimator=estimator)
    certificate = found.certificate
    assert certificate.granted, certificate.reason
    assert certificate.gap == pytest.approx(certificate.upper - certificate.lower, abs=1e-9)
    assert certificate.gap > -3 * certificate.gap_se
    assert found.bias_bound >= max(certificate.gap + 2 * certificate.gap_se, 0)
    assert found.warning is None


def test_the_certificate_catches_a_mode_that_the_guide_never_visits():
    pair = TwoModes()
    batch = pv.Batch(pair.draw(30))
    plain = score(pair, batch.obs, pv.importance_sampling(200))
    assert plain.khat.max() < 0.5
    assert plain.warning is None
    checked = score(
        pair,
        batch.obs,
        pv.sandwich(pv.importance_sampling(200), num_steps=100, start="prior", num_leapfrog=5, num_simulated=30),
    )
    assert not checked.certificate.granted
    assert "may be low by" in checked.certificate.reason
    assert checked.bias_bound is None
    assert checked.warning.startswith("no certificate")
    assert np.array_equal(checked.log_prob, plain.log_prob)


def test_the_certificate_is_withheld_where_real_data_are_harder():
    """Weights of the same law on both sides pass; twice the variance on real data does not."""
    rng = np.random.default_rng(0)

    def annealed(scale):
        spread = scale * rng.chisquare(5, 50) / 5
        return Estimate(rng.normal(-3, 0.01, 50), np.full(50, 0.01), "lower", "x", 10, spread=spread)

    lower, estimated = rng.normal(-3, 0.01, 50), rng.normal(-3, 0.01, 50)
    upper = lower + 0.02
    assert certify(estimated, lower, upper, annealed(1.0), annealed(1.0), 0.5).granted
    hard = certify(estimated, lower, upper, annealed(2.0), annealed(1.0), 0.5)
    assert not hard.granted
    assert "real data are harder than simulated ones" in hard.reason
    above = certify(estimated, lower, upper - 0.1 + rng.normal(0, 0.01, 50), annealed(1.0), annealed(1.0), 0.5)
    assert not above.granted
    assert "above an upper bound" in above.reason
    missed = certify(estimated - 0.7, lower, upper, annealed(1.0), annealed(1.0), 0.5)
    assert not missed.granted
    assert "annealing puts the real data 0.7" in missed.reason


def test_a_mode_that_only_real_data_have_is_found_by_annealing_them():
    """p(x | z) folds z over at 0, so that half of the posterior lies where the guide never looks."""

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("obs", dist.Normal(z.abs(), 0.3), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs / 1.09, 0.3))

    obs = torch.linspace(1.5, 2.5, 20, dtype=torch.float64)
    estimator = pv.sandwich(
        pv.importance_sampling(200), num_steps=100, num_leapfrog=5, start="prior", num_simulated=20, tolerance=5
    )
    found = pv.log_likelihood(model, pv.Batch(obs), guide=guide, estimator=estimator)
    assert not found.certificate.granted
    assert "annealing puts the real data" in found.certificate.reason


def test_resampling_does_not_hide_that_few_chains_are_left():
    """From the prior in 5 steps the chains of the start die out: every datum is flagged, whatever the last ESS says."""
    pair = LinearGaussian(20, 10, guide="mean_field")
    obs = pair.draw(20)
    found = score(pair, obs, pv.annealed_importance_sampling(5, 16, 5, "prior", resample=True))
    assert found.mean < float(pair.log_prob(obs).mean()) - 5
    assert found.flagged.mean() > 0.9
    assert found.warning is not None


def test_the_interval_of_annealing_holds_the_bias_of_few_chains():
    """Log-normal weights, s = 0.8, 16 chains, 1000 data: the mean is low by .029, beyond 3 of its standard errors."""
    spread, chains, data = 0.8, 16, 1000
    covered = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        log_weights = spread * torch.randn(chains, data, generator=generator).double() - spread**2 / 2
        ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
        variance = (1 / ess - 1 / chains) * chains / (chains - 1)
        mean = float((log_weights.logsumexp(0) - math.log(chains)).mean())
        error = math.sqrt(float(variance.sum())) / data
        bias = bias_of_chains(variance, log_weights.var(0), chains)
        covered.append(mean - 2 * error <= 0 <= mean + bias + 2 * error)
    assert np.mean(covered) >= 0.85  # 99.9% binomial bound of 0.95 in 40


def test_a_weight_of_zero_is_no_error():
    """obs is uniform around z, so that p(x) is half the normal mass of (x - 1, x + 1)."""

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("obs", dist.Uniform(z - 1, z + 1, validate_args=False), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs / 2, 1.0))

    obs = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    law = torch.distributions.Normal(0.0, 1.0)
    truth = ((law.cdf(obs + 1) - law.cdf(obs - 1)) / 2).log()
    for start in ("guide", "prior"):
        found = pv.log_likelihood(
            model, pv.Batch(obs), guide=guide, estimator=pv.annealed_importance_sampling(20, 400, 3, start)
        )
        error = np.abs(found.log_prob - truth.numpy())
        assert bool((error < 4 * np.sqrt(found.variance)).all()), start


def test_sandwich_refuses_what_it_cannot_certify():
    with pytest.raises(ValueError, match="num_simulated must be a whole number of at least 2, got 1"):
        pv.sandwich(num_simulated=1)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        pv.sandwich(tolerance=0)
    space = pv.Binary((2, 2))
    batch = pv.Batch(torch.ones(3, 2, 2), space=space)
    pixel = pv.models.IndependentPixel(space)
    estimator = pv.sandwich(pv.exact(), num_steps=2)
    assert pv.log_likelihood(pixel, batch, estimator=estimator).direction == "exact"  # no latents: there is no error


def test_annealing_from_a_refined_proposal_needs_few_steps():
    """From a Gaussian fitted to the posterior of a linear Gaussian pair, the weights are nearly equal at once."""
    pair = LinearGaussian(6, 3, guide="mean_field")
    obs = pair.draw(6)
    start = pv.refined(overdispersion=1)
    found = score(pair, obs, pv.annealed_importance_sampling(3, 8, 3, proposal=start))
    plain = score(pair, obs, pv.annealed_importance_sampling(3, 8, 3))
    assert np.abs(found.log_prob - pair.log_prob(obs).numpy()).max() < 0.01
    assert found.spread.max() < 0.01 * plain.spread.mean()
    assert any(note.startswith("proposal: refined") for note in found.notes)
    with pytest.raises(ValueError, match="start must be 'guide', got 'prior'"):
        pv.annealed_importance_sampling(start="prior", proposal=start)


# Densities and gradients as a graph, which a GPU replays: here its operations run one by one


class OneByOne:
    """In place of `graphs.Captured`, which needs a GPU."""

    def __init__(self, graph, parameters, buffers, inputs, num_kept=None):
        self.graph = graph

    def __call__(self, parameters, buffers, *inputs):
        return self.graph(parameters, buffers, *inputs)


@pytest.fixture
def as_a_graph(monkeypatch):
    monkeypatch.setattr(graphs, "Captured", OneByOne)
    monkeypatch.setattr(Annealer, "_worth_a_graph", lambda self, device: True)


def small_vae():
    with own_randomness(0):
        model = pv.models.VAE(pv.Binary((3, 3)), latent_dim=2, hidden_dims=(8,))
        return model, pv.Batch(torch.bernoulli(torch.full((6, 3, 3), 0.4)), space=pv.Binary((3, 3)))


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_a_graph_of_the_densities_anneals_to_the_same_digits(start, as_a_graph):
    model, batch = small_vae()
    estimator, found = pv.annealed_importance_sampling(8, 4, 3, start), []
    found.append(pv.log_likelihood(model, batch, estimator=estimator, device="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Annealer, "_worth_a_graph", lambda self, device: False)
        found.append(pv.log_likelihood(model, batch, estimator=estimator, device="cpu"))
    assert np.array_equal(found[0].log_prob, found[1].log_prob)
    assert found[0].notes == found[1].notes


@pytest.mark.parametrize(("quirk", "reason"), [("looks", "takes numbers out of tensors"), ("counts", "changes ")])
def test_densities_that_are_no_graph_anneal_as_they_are_and_say_why(quirk, reason, as_a_graph):
    count = [0]

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
            count[0] += quirk == "counts"
            scale = 1.0 + (0 * float(z.sum()) if quirk == "looks" else 0)
            pyro.sample("obs", dist.Normal(scale * z, 1.0).to_event(1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs / 2, 1.0).to_event(1))

    batch = pv.Batch(torch.randn(5, 1, generator=torch.Generator().manual_seed(0)))
    result = pv.log_likelihood(model, batch, guide=guide, estimator=pv.annealed_importance_sampling(8, 4, 3))
    assert any("no CUDA graph: " in note and reason in note for note in result.notes)
    assert np.isfinite(result.log_prob).all()


def test_a_graph_that_gives_something_else_is_refused(monkeypatch):
    class Off(OneByOne):
        def __call__(self, parameters, buffers, *inputs):
            first, *others = super().__call__(parameters, buffers, *inputs)
            return [first.masked_fill(first == -math.inf, 0.0), *others]

    def densities(u):
        return torch.where(u > 0, u, -math.inf), u.square()

    u = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for captured, message in ((OneByOne, None), (Off, "does not give what the pair gives")):
        monkeypatch.setattr(graphs, "Captured", captured)
        if message is None:
            assert torch.equal(graphs.replayed(densities, torch.nn.ModuleList(), (), u)(u)[0], densities(u)[0])
        else:
            with pytest.raises(graphs.Unfit, match=message):
                graphs.replayed(densities, torch.nn.ModuleList(), (), u)
