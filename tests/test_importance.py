"""How importance sampling counts, streams, seeds, refuses and cleans up."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae import traces
from pyro_vae.estimators import streaming
from pyro_vae.estimators.streaming import Accumulator


def accumulate(log_weights, num_blocks=1, jackknife=False):
    accumulator = Accumulator(len(log_weights), log_weights.shape[1], torch.device("cpu"), jackknife)
    for piece in log_weights.tensor_split(num_blocks):
        accumulator.update(piece)
    return accumulator.finish()


def random_weights(num_particles, num_data=3, scale=3.0):
    generator = torch.Generator().manual_seed(num_particles)
    return scale * torch.randn(num_particles, num_data, generator=generator, dtype=torch.float64) - 500


def score(model, obs, guide=None, num_particles=50, **kwargs):
    return pv.log_likelihood(
        model, pv.Batch(obs), guide=guide, estimator=pv.importance_sampling(num_particles), **kwargs
    )


@pytest.mark.parametrize("num_particles", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_streamed_figures_equal_the_definitions(num_particles, num_blocks):
    weights = random_weights(num_particles)
    figures = accumulate(weights, min(num_blocks, num_particles))
    torch.testing.assert_close(figures["log_prob"], weights.logsumexp(0) - math.log(num_particles))
    torch.testing.assert_close(figures["ess"], torch.softmax(weights, 0).square().sum(0).reciprocal())
    if num_particles >= 8:
        half = weights[: num_particles // 2]
        torch.testing.assert_close(figures["half"], half.logsumexp(0) - math.log(len(half)))


@pytest.mark.parametrize("num_particles", [2, 3, 10, 64, 65, 300, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_streamed_jackknife_equals_leaving_out_each_particle(num_particles, scale):
    weights = random_weights(num_particles, scale=scale)
    whole = weights.logsumexp(0) - math.log(num_particles)
    without = torch.stack(
        [torch.cat([weights[:k], weights[k + 1 :]]).logsumexp(0) for k in range(num_particles)]
    ) - math.log(num_particles - 1)
    truth = num_particles * whole - (num_particles - 1) * without.mean(0)
    # log weights near -500 lose 1e-13 each, times K in the difference
    torch.testing.assert_close(
        accumulate(weights, 2, jackknife=True)["log_prob"], truth, rtol=0, atol=1e-12 * num_particles
    )


def test_zero_weights_count_as_particles():
    weights = torch.tensor([[-math.inf], [0.0], [-math.inf], [0.0]], dtype=torch.float64)
    assert float(accumulate(weights, 4)["log_prob"][0]) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("num_particles", [1, 2, 3, 600, 5000])
def test_exactly_the_number_of_particles_asked_for_is_drawn(num_particles):
    drawn = []

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=obs)

    class Counted(dist.Normal):
        def rsample(self, sample_shape=torch.Size()):  # noqa: B008
            drawn.append(self._extended_shape(sample_shape).numel())
            return super().rsample(sample_shape)

        def expand(self, batch_shape, _instance=None):
            return Counted(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", Counted(torch.zeros(len(obs)), torch.ones(len(obs))))

    pair = traces.as_pair(model, guide)
    estimator = pv.importance_sampling(num_particles)
    tiled = not traces.broadcasts(pair, (torch.zeros(3),))
    drawn.clear()
    blocks = streaming.Blocks(pair, (torch.zeros(3),), num_particles, 0, tiled)
    for start, stop in blocks.data_ranges():
        list(blocks.particles(start, stop))
    assert sum(drawn) == 3 * num_particles
    assert estimator.num_particles == num_particles


@pytest.mark.parametrize("bad", [0, -1, 2.5, "many"])
def test_number_of_particles_must_be_a_positive_whole_number(bad):
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 1"):
        pv.importance_sampling(bad)


def test_jackknife_needs_two_particles():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        pv.importance_sampling(1, jackknife=True)


def test_same_seed_same_digits_other_seed_other_digits():
    oracle = LinearGaussian(6, 2, guide="mean_field")
    obs = oracle.draw(9)
    first, again, other = (score(oracle.model, obs, oracle.guide, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.log_prob, again.log_prob)
    assert not np.array_equal(first.log_prob, other.log_prob)


def test_another_block_size_agrees_within_the_monte_carlo_error(monkeypatch):
    oracle = LinearGaussian(6, 2, guide="mean_field", widen=1.3)
    obs = oracle.draw(50)
    first = score(oracle.model, obs, oracle.guide, 1000)
    monkeypatch.setitem(streaming.BLOCK_ROWS, "cpu", 300)
    second = score(oracle.model, obs, oracle.guide, 1000)
    assert not np.array_equal(first.log_prob, second.log_prob)
    assert abs(first.mean - second.mean) < 4 * math.hypot(first.mc_se, second.mc_se)


def test_a_device_out_of_memory_gets_smaller_parts_and_the_same_digits(monkeypatch):
    oracle = LinearGaussian(6, 2, guide="mean_field")
    obs = oracle.draw(9)
    whole = score(oracle.model, obs, oracle.guide, 1000)
    log_joint, limit = traces.log_joint, 100

    def scarce(pair, args, values, num_particles, tiled):
        if num_particles > limit:
            raise torch.OutOfMemoryError("pretended")
        return log_joint(pair, args, values, num_particles, tiled)

    monkeypatch.setattr(traces, "log_joint", scarce)
    parts = score(oracle.model, obs, oracle.guide, 1000)
    np.testing.assert_allclose(parts.log_prob, whole.log_prob, rtol=1e-12)  # same noise; float64 sums in other parts
    assert parts.notes[0] == "memory ran out: each block was scored in 16 parts"
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        score(oracle.model, obs, oracle.guide, 1000)


@pytest.mark.parametrize("tiled", [False, True])
def test_blocks_scored_together_or_alone_have_the_same_digits(tiled, monkeypatch):
    oracle = LinearGaussian(6, 2, guide="mean_field")
    pair, obs = traces.as_pair(oracle.model, oracle.guide), oracle.draw(9)
    found = []
    for together in (1, 2, 7):
        monkeypatch.setitem(streaming.TOGETHER, "cpu", together)
        blocks = streaming.Blocks(pair, (obs,), 1700, 0, tiled)
        found.append(torch.cat([torch.cat(list(blocks.particles(*part))) for part in blocks.data_ranges()], 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("network", "space"), [("conv", "binary"), ("mlp", "quantized"), ("mlp", "binary")])
def test_blocks_of_many_logits_are_scored_one_by_one_unless_they_stay_in_the_cache(network, space):
    shape = (28, 28)
    space = pv.Binary(shape) if space == "binary" else pv.Quantized(shape, levels=4)
    model = pv.models.VAE(space, latent_dim=2, hidden_dims=(4,), network=network)
    blocks = streaming.Blocks(traces.as_pair(model), (torch.zeros(3, *shape),), 6000, 0, tiled=False)
    with torch.no_grad():
        sizes = [len(each) for each in blocks.particles(0, 1)]
    most = streaming.TOGETHER["cpu"] * blocks.block_particles
    stays = network == "mlp" and isinstance(space, pv.Binary)
    assert sizes[0] == (most if stays else blocks.block_particles)
    assert sum(sizes) == 6000


def test_later_data_have_the_digits_that_they_have_after_the_first():
    """As in another process, at sizes at which the last digits of a product depend on its number of rows."""
    torch.manual_seed(0)
    model = pv.models.VAE(pv.Binary((28, 28)), latent_dim=50, hidden_dims=(200, 200))
    pair, obs = traces.as_pair(model), torch.bernoulli(torch.full((8, 28, 28), 0.2))
    found = []
    for ranges in ([(0, 4), (4, 8)], [(4, 8)]):
        blocks = streaming.Blocks(pair, (obs,), 700, 0, tiled=False)
        with torch.no_grad(), pyro.validation_enabled(False):
            found.append([torch.cat(list(blocks.particles(*each))) for each in ranges][-1])
    assert blocks.block_data == 4
    assert torch.equal(*found)


def test_a_guide_that_runs_once_gives_the_digits_of_one_that_runs_for_every_block(monkeypatch):
    torch.manual_seed(0)
    vae = pv.models.VAE(pv.Binary((3, 3)), latent_dim=2, hidden_dims=(4,))
    batch, runs = pv.Batch(torch.bernoulli(torch.full((9, 3, 3), 0.5))), []
    vae.encoder.register_forward_hook(lambda *_: runs.append(1))
    found, spent = [], []
    for fixed in (True, False):
        if not fixed:
            monkeypatch.setattr(traces, "has_fixed_law", lambda *_: False)
        runs.clear()
        found.append(pv.log_likelihood(vae, batch, estimator=pv.importance_sampling(2000), device="cpu").log_prob)
        spent.append(len(runs))
    assert np.array_equal(*found)
    assert spent[1] - spent[0] == 3 * (4 - 1) - 2  # three ranges of data, four blocks each; two runs to find it out


class Once(dist.Normal):
    """A law that cannot be drawn for more particles."""

    def expand(self, batch_shape, _instance=None):
        if len(batch_shape) > 1 and len(self.batch_shape) == 1:
            raise ValueError("no")
        return Once(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


@pytest.mark.parametrize("guide", ["flow-like noise", "counts its runs", "two sites", "no expand", "a fixed law"])
def test_a_guide_is_run_again_unless_its_law_is_fixed(guide):
    calls = []

    def programs(obs):
        calls.append(1)
        loc = obs / 2
        if guide == "flow-like noise":
            loc = loc + torch.randn(2, len(obs))[0]
        if guide == "counts its runs":
            loc = loc + len(calls)
        with pyro.plate("data", len(obs), dim=-1):
            if guide == "two sites":
                pyro.sample("w", dist.Normal(loc, 1.0))
            law = Once if guide == "no expand" else dist.Normal
            pyro.sample("z", law(loc, torch.ones(len(obs))))

    pair = traces.as_pair(gaussian_model, programs)
    assert traces.has_fixed_law(pair, (OBS,), 0) == (guide == "a fixed law")


@pytest.mark.parametrize("where", [0, 499, 999])
def test_a_guide_that_draws_more_for_some_data_only_is_found_out_wherever_they_are(where):
    obs = torch.zeros(1000)
    obs[where] = 1

    def guide(obs):
        loc = obs / 2
        if bool(obs.any()):
            loc = loc + torch.randn(2, len(obs))[0]
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(loc, torch.ones(len(obs))))

    pair = traces.as_pair(gaussian_model, guide)
    assert not traces.has_fixed_law(pair, (obs,), 0)
    assert not traces.has_fixed_law(pair, (obs[where : where + 1],), 0)


@pytest.mark.parametrize(("num_particles", "num_data"), [(1, 5000), (50, 300), (5000, 9), (20_000, 2)])
def test_no_block_grows_with_particles_or_data(num_particles, num_data):
    oracle = LinearGaussian(3, 1)
    pair = traces.as_pair(oracle.model, oracle.guide)
    blocks = streaming.Blocks(pair, (oracle.draw(num_data),), num_particles, 0, tiled=False)
    sizes = [block.numel() for start, stop in blocks.data_ranges() for block in blocks.particles(start, stop)]
    assert max(sizes) <= streaming.TOGETHER["cpu"] * streaming.BLOCK_ROWS["cpu"]
    assert sum(sizes) == num_particles * num_data
    accumulator = Accumulator(num_particles, 9, torch.device("cpu"), jackknife=True)
    accumulator.update(random_weights(num_particles, 9))
    assert len(accumulator.largest) <= max(64, 1 + 3 * math.sqrt(num_particles) + 1)


def test_memory_for_one_pass_over_the_data_is_found_by_parts_of_the_data(monkeypatch):
    space = pv.Binary((2, 2))
    model, obs = pv.models.IndependentPixel(space), torch.bernoulli(torch.full((40, 2, 2), 0.5))
    whole = pv.log_likelihood(model, pv.Batch(obs))
    log_joint = traces.log_joint

    def scarce(pair, args, *rest, **named):
        if len(args[0]) > 10:
            raise torch.OutOfMemoryError("pretended")
        return log_joint(pair, args, *rest, **named)

    monkeypatch.setattr(traces, "log_joint", scarce)
    parts = pv.log_likelihood(model, pv.Batch(obs))
    assert np.array_equal(parts.log_prob, whole.log_prob)
    assert parts.notes == ("memory ran out: each block was scored in 4 parts",)


def test_jackknife_where_one_weight_is_nearly_all():
    weights = torch.tensor([[0.0], [-60.0], [-61.0]], dtype=torch.float64)
    whole = weights.logsumexp(0) - math.log(3)
    without = torch.stack([torch.cat([weights[:k], weights[k + 1 :]]).logsumexp(0) for k in range(3)]) - math.log(2)
    truth = 3 * whole - 2 * without.mean(0)
    torch.testing.assert_close(accumulate(weights, 1, jackknife=True)["log_prob"], truth)


def test_a_guide_without_sites_answers_where_the_data_lie():
    """On a GPU all parts of a weight must lie there; "meta" stands in for it."""
    space = pv.Binary((2, 2))
    pair = traces.as_pair(pv.models.IndependentPixel(space).to("meta"))
    args = (torch.zeros(3, 2, 2, device="meta"),)
    assert traces.draw_latents(pair, args, 1, tiled=False)[1].device == args[0].device


# Programs that are refused, or run another way


def gaussian_model(obs):
    with pyro.plate("data", len(obs), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=obs)


def gaussian_guide(obs):
    with pyro.plate("data", len(obs), dim=-1):
        pyro.sample("z", dist.Normal(obs / 2, 0.9))


OBS = torch.linspace(-2, 2, 9)
TRUTH = dist.Normal(0.0, math.sqrt(2)).log_prob(OBS).numpy()


def test_any_pyro_pair_is_scored():
    result = score(gaussian_model, OBS, gaussian_guide, 4000)
    assert np.all(np.abs(result.log_prob - TRUTH) < 4.5 * np.sqrt(result.variance))
    assert result.notes == ()
    assert str(result.space) == "Real"


def test_a_program_that_cannot_broadcast_runs_on_tiled_data_with_the_same_law():
    def stubborn(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z.view(len(obs)), 1.0), obs=obs)  # no room for a particle axis

    result = score(stubborn, OBS, gaussian_guide, 4000)
    assert np.all(np.abs(result.log_prob - TRUTH) < 4.5 * np.sqrt(result.variance))
    assert result.notes == ("the programs ran on tiled data, one row per particle and datum",)


def test_a_program_that_broadcasts_to_a_wrong_answer_is_found_out():
    def mixes_particles(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            centered = z - z.reshape(-1, len(obs)).mean(0) if z.ndim > 1 else z
            pyro.sample("obs", dist.Normal(centered, 1.0), obs=obs)

    result = score(mixes_particles, OBS, gaussian_guide, 4000)
    assert np.all(np.abs(result.log_prob - TRUTH) < 4.5 * np.sqrt(result.variance))
    assert result.notes


@pytest.mark.parametrize("score", [True, False])
def test_a_law_that_would_be_broadcast_to_other_data_is_refused(score):
    """Logits of shape (n, 1, 2, 2) under data (n, 2, 2): every datum would be scored on all of them."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 4)

        def model(self, obs):
            with pyro.plate("data", len(obs), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
                logits = self.linear(z).unflatten(-1, (1, 2, 2))
                pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(3), obs=obs)

        def guide(self, obs):
            with pyro.plate("data", len(obs), dim=-1):
                pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))

    net, batch = Net(), pv.Batch(torch.ones(5, 2, 2), space=pv.Binary((2, 2)))
    data = pv.Data("ones", batch.space, batch, batch, batch)
    work = partial(pv.log_likelihood, net, batch) if score else partial(pv.fit, net, data, num_epochs=1)
    with pytest.raises(ValueError, match=r"events of shape \(1, 2, 2\), but the last 3 dimensions of the data there"):
        work()


def test_different_latent_sites_are_both_listed():
    def other_guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("w", dist.Normal(obs, 1.0))

    with pytest.raises(ValueError, match=r"model: \['z'\], guide: \['w'\]"):
        score(gaussian_model, OBS, other_guide)


def test_one_weight_for_a_whole_batch_is_refused():
    def no_plate(obs):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(obs)), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=obs)

    def no_plate_guide(obs):
        pyro.sample("z", dist.Normal(obs, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"one entry per datum, got .*: put the site inside pyro.plate"):
        score(no_plate, OBS, no_plate_guide)


@pytest.mark.parametrize("program", ["model", "guide"])
def test_a_scaled_site_is_refused(program):
    scaled = {"model": gaussian_model, "guide": gaussian_guide}
    scaled[program] = pyro.poutine.scale(scaled[program], 0.5)
    with pytest.raises(ValueError, match=r"has scale 0\.5; a log-likelihood needs scale 1"):
        score(scaled["model"], OBS, scaled["guide"])


def test_a_subsampling_plate_is_refused():
    def subsampled(obs):
        with pyro.plate("data", 2 * len(obs), subsample_size=len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=obs)

    with pytest.raises(ValueError, match="needs scale 1"):
        score(subsampled, OBS, gaussian_guide)


def test_a_nan_weight_names_the_datum():
    def breaks_at_the_fifth(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            scale = torch.where(obs == 0, math.nan, 1.0)
            pyro.sample("obs", dist.Normal(z, scale), obs=obs)

    with pytest.raises(ValueError, match="log weight of datum 4 is nan"):
        score(breaks_at_the_fifth, OBS, gaussian_guide)


def test_an_impossible_datum_is_an_error_not_a_dropped_row():
    def impossible(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Uniform(z * 0 - 1, z * 0 + 1, validate_args=False), obs=obs)

    with pytest.raises(ValueError, match="log_prob of datum 0 is -inf"):
        score(impossible, OBS, gaussian_guide)


def test_exact_refuses_latent_sites_and_names_them():
    with pytest.raises(ValueError, match=r"exact\(\) needs a model without continuous latents, this one has \['z'\]"):
        pv.log_likelihood(gaussian_model, pv.Batch(OBS), guide=gaussian_guide, estimator=pv.exact())


def test_discrete_latents_against_enumeration():
    weights, locs = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])

    def mixture(obs):
        with pyro.plate("data", len(obs), dim=-1):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=obs)

    def coin(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))

    truth = torch.logsumexp(weights.log() + dist.Normal(locs, 1.0).log_prob(OBS[:, None]), 1).numpy()
    result = score(mixture, OBS, coin, 4000)
    assert np.all(np.abs(result.log_prob - truth) < 4.5 * np.sqrt(result.variance))


def test_a_model_does_not_score_data_of_another_space():
    model = pv.models.VAE(pv.Binary((8, 8)), latent_dim=2)
    grey = pv.Batch(torch.zeros(3, 8, 8), space=pv.Quantized((8, 8), levels=17))
    with pytest.raises(ValueError, match=r"the model lives in Binary .*, the data in Quantized\(17\)"):
        pv.log_likelihood(model, grey)


def test_a_density_does_not_score_masses_nor_a_mass_densities():
    bits = pv.Batch(torch.zeros(3), space=pv.Binary(()))
    with pytest.raises(ValueError, match="the law at site 'obs' has a density, but data in Binary need a mass"):
        pv.log_likelihood(gaussian_model, bits, guide=gaussian_guide)

    def coin(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", dist.Bernoulli(0.3), obs=obs)

    with pytest.raises(ValueError, match="the law at site 'obs' has a mass, but data in Real need a density"):
        pv.log_likelihood(coin, pv.Batch(torch.zeros(3), space=pv.Real(())))


def test_data_at_another_site_are_missed_by_name():
    def elsewhere(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=obs)

    with pytest.raises(ValueError, match=r"at the site 'obs' of the model, found the sites \['data', 'x'\]"):
        pv.log_likelihood(elsewhere, pv.Batch(OBS))


def test_an_estimator_is_no_word():
    with pytest.raises(TypeError, match=r"must be one of pv\.exact, pv\.importance_sampling"):
        pv.log_likelihood(gaussian_model, pv.Batch(OBS), guide=gaussian_guide, estimator="exact")


def test_context_of_model_and_batch_must_agree():
    space, labels = conditional()
    obs, one_hot = torch.zeros(3, 2, 2), torch.eye(3)
    with pytest.raises(ValueError, match="context of the model is label, but the batch has none"):
        pv.log_likelihood(pv.models.CVAE(space, labels, latent_dim=2), pv.Batch(obs))
    with pytest.raises(ValueError, match="context of the model is none, but the batch has one"):
        pv.log_likelihood(pv.models.VAE(space, latent_dim=2), pv.Batch(obs, one_hot))


def test_a_context_keeps_its_kind_of_number():
    """Whole-number observations beside a real context, and a context of whole numbers."""

    def binomial(obs, context):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", dist.Binomial(10, logits=context), obs=obs)

    def table(obs, context):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", dist.Normal(torch.tensor([0.0, 5.0])[context], 1.0), obs=obs)

    counts, logits = torch.tensor([3, 7]), torch.tensor([0.9, -0.4])
    result = pv.log_likelihood(binomial, pv.Batch(counts, logits, space=None))
    np.testing.assert_allclose(result.log_prob, dist.Binomial(10, logits=logits).log_prob(counts.float()), rtol=1e-6)
    result = pv.log_likelihood(table, pv.Batch(torch.tensor([0.0, 5.0]), torch.tensor([0, 1])))
    np.testing.assert_allclose(result.log_prob, -0.5 * math.log(2 * math.pi), rtol=1e-6)


def test_observations_come_in_the_precision_of_the_parameters():
    model = pv.models.VAE(pv.Binary((2, 2)), latent_dim=2, hidden_dims=(4,))
    obs = torch.bernoulli(torch.full((3, 2, 2), 0.5))
    assert score(model, obs.double()).mean == score(model, obs).mean


def test_a_tensor_is_no_batch():
    with pytest.raises(TypeError, match=r"batch must be a Batch, as in pv\.Batch\(obs\) of a tensor obs, got Tensor"):
        pv.log_likelihood(gaussian_model, OBS, guide=gaussian_guide)


# The model is left as it was


class Normalised(nn.Module):
    """A pair with all that an evaluation could disturb: batch norm, dropout, training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)

    def model(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(self.linear(z), 1.0).to_event(1), obs=obs)

    def guide(self, obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(self.drop(self.norm(obs)), 1.0).to_event(1))


def test_evaluation_leaves_no_trace():
    torch.manual_seed(0)
    pair = Normalised()
    pair.drop.eval()  # a mixed state, to be kept as it is
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    modes = [module.training for module in pair.modules()]
    state = torch.get_rng_state()
    first = score(pair, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in pair.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert len(pyro.get_param_store()) == 0
    assert first.mean == score(pair, torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).mean


def test_evaluation_that_fails_leaves_no_trace_either():
    pair = Normalised()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="nan"):
        score(pair, torch.full((3, 4), math.nan))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in pair.modules())


def test_validation_settings_of_pyro_are_kept():
    from torch.distributions import Distribution

    before = Distribution._validate_args
    score(gaussian_model, OBS, gaussian_guide)
    assert Distribution._validate_args == before


def test_modules_in_the_closure_of_a_function_are_left_alone_too():
    norm = nn.BatchNorm1d(4)

    def closed_guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(norm(obs), 1.0).to_event(1))

    def closed_model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=obs)

    score(closed_model, torch.randn(6, 4) + 3, closed_guide)
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert norm.training


# Labels: the marginal


def conditional():
    torch.manual_seed(0)
    prior = tuple(torch.tensor([0.5, 0.3, 0.2]).log().tolist())
    space = pv.Binary((2, 2))
    return space, pv.Labels(prior)


def test_marginal_of_an_exact_conditional_is_the_sum_over_labels():
    space, labels = conditional()
    model = pv.models.ConditionalIndependentPixel(space, labels, hidden_dims=(8,))
    obs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).reshape(16, 2, 2)
    own = torch.arange(16) % 3
    result = pv.log_likelihood(model, pv.Batch(obs, torch.eye(3)[own]))
    by_label = [pv.log_likelihood(model, pv.Batch(obs, torch.eye(3)[torch.full((16,), c)])).log_prob for c in range(3)]
    truth = np.logaddexp.reduce(np.array(labels.log_prob)[:, None] + np.stack(by_label), axis=0)
    np.testing.assert_allclose(result.marginal.log_prob, truth, rtol=1e-6)
    assert np.exp(truth).sum() == pytest.approx(1, abs=1e-6)  # the masses of all 16 images
    assert result.marginal.direction == "exact"
    assert result.quantity == "log p(x | label)"
    assert result.marginal.quantity == "log p(x)"
    assert result.marginal.digest == pv.Batch(obs).digest != result.digest


def test_marginal_of_a_cvae_sums_to_one_and_counts_its_particles():
    space, labels = conditional()
    cvae = pv.models.CVAE(space, labels, latent_dim=2, hidden_dims=(8,), prior="standard")
    with torch.no_grad():  # a guide wider than the prior: the weights have a light tail
        cvae.posterior.linear.weight.zero_()
        cvae.posterior.linear.bias.copy_(torch.tensor([0.0, 0.0, 0.3, 0.3]))
    obs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).reshape(16, 2, 2)
    batch = pv.Batch(obs, torch.eye(3)[torch.arange(16) % 3])
    result = pv.log_likelihood(cvae, batch, estimator=pv.importance_sampling(2000))
    mass, variance = np.exp(result.marginal.log_prob), result.marginal.variance
    assert result.khat.max() < 0.5
    assert abs(mass.sum() - 1) < 4 * math.sqrt((mass**2 * variance).sum())
    assert result.marginal.num_particles == 2000 + 2 * 1000
    assert result.marginal.direction == "lower"


def test_marginal_variance_is_the_spread_over_repeats():
    space, labels = conditional()
    cvae = pv.models.CVAE(space, labels, latent_dim=2, hidden_dims=(8,), prior="standard")
    with torch.no_grad():
        cvae.posterior.linear.weight.zero_()
        cvae.posterior.linear.bias.copy_(torch.tensor([0.0, 0.0, 0.3, 0.3]))
    obs = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(1000, 2, 2)  # one datum, 1000 repeats
    batch = pv.Batch(obs, torch.eye(3)[:1].expand(1000, 3))
    marginal = pv.log_likelihood(cvae, batch, estimator=pv.importance_sampling(100)).marginal
    # the sample variance of 1000 repeats has a relative standard error of sqrt(2/1000)
    assert marginal.variance.mean() == pytest.approx(marginal.log_prob.var(), rel=4 * math.sqrt(2 / 1000) + 0.05)


def test_marginal_of_a_jackknife_is_a_plain_lower_bound():
    space, labels = conditional()
    cvae = pv.models.CVAE(space, labels, latent_dim=2, hidden_dims=(8,))
    batch = pv.Batch(torch.ones(3, 2, 2), torch.eye(3))
    results = [pv.log_likelihood(cvae, batch, estimator=pv.importance_sampling(50, jackknife=j)) for j in (True, False)]
    assert [r.direction for r in results] == ["unbiased", "lower"]
    assert np.array_equal(results[0].marginal.log_prob, results[1].marginal.log_prob)
    assert results[0].marginal.direction == "lower"


def test_one_class_is_its_own_marginal():
    space = pv.Binary((2, 2))
    model = pv.models.ConditionalIndependentPixel(space, pv.Labels((0.0,)), hidden_dims=(4,))
    result = pv.log_likelihood(model, pv.Batch(torch.ones(3, 2, 2), torch.ones(3, 1)))
    assert np.array_equal(result.marginal.log_prob, result.log_prob)
