"""Missing and noisy pixels restored: every law against enumeration, quadrature, or a dense normal law."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import parameters, same
from scipy.stats import norm
from torch import nn

import pyro_vae as pv
from pyro_vae.estimators.ais import annealed_importance_sampling
from pyro_vae.estimators.estimate import Certificate, Estimate, PrecisionError
from pyro_vae.masks import NAMES, Pixels, named, share_of
from pyro_vae.restoration import ways
from pyro_vae.restoration.differences import difference, exact_estimate
from pyro_vae.spaces import Binary, Labels, Quadrants, Quantized, Real

SHAPE = (2, 3)
MISSING = torch.tensor([[False, True, False], [False, True, True]])
LAST = torch.tensor([[False, False, False], [True, True, True]])  # in the order of the rows
GRID = torch.linspace(-7, 7, 4001, dtype=torch.float64)


def build(cls, *args, seed=0, **options):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return cls(*args, **options)


def spread(model, seed=0, scale=1.0):
    """The model with parameters far from its start, so that pixels depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return model


def states(levels, num):
    return torch.tensor(list(itertools.product(range(levels), repeat=num)), dtype=torch.float32)


def batch_of(obs, space):
    return pv.Batch(obs, space=space)


def completions(image, missing, levels):
    """Every image that has the given pixels, (levels^M, *shape), and its missing pixels (levels^M, M)."""
    hidden = states(levels, int(missing.sum()))
    images = image.expand(len(hidden), *image.shape).clone()
    images[:, missing] = hidden
    return images, hidden


def enumerated(model, image, missing, levels):
    """Log p(missing | given) of the image, and E[missing | given], by enumeration in float64."""
    images, hidden = completions(image, missing, levels)
    log_prob = torch.from_numpy(pv.log_likelihood(model, batch_of(images, model.space)).log_prob)
    own = pv.log_likelihood(model, batch_of(image[None], model.space)).log_prob[0]
    return own - float(log_prob.logsumexp(0)), log_prob.softmax(0) @ hidden.double()


# closed forms


def discrete_models():
    binary, grey = Binary(SHAPE), Quantized(SHAPE, 3)
    return [
        spread(build(pv.models.BernoulliMixture, binary, num_components=3)),
        spread(build(pv.models.IndependentPixel, binary)),
        spread(build(pv.models.GaussianMixture, grey, num_components=3)),
        spread(build(pv.models.IndependentPixel, grey)),
    ]


@pytest.mark.parametrize("model", discrete_models(), ids=lambda m: f"{type(m).__name__}-{m.space}")
def test_mixtures_and_independent_pixels_by_enumeration(model) -> None:
    levels = getattr(model.space, "levels", 2)
    obs = torch.randint(levels, (5, *SHAPE), generator=torch.Generator().manual_seed(1)).float()
    found = pv.restore(model, batch_of(obs, model.space), MISSING, num_draws=4000)
    for n, image in enumerate(obs):
        log_prob, mean = enumerated(model, image, MISSING, levels)
        assert found.log_prob.log_prob[n] == pytest.approx(log_prob, abs=1e-5)  # that one is a float32 model's
        torch.testing.assert_close(found.mean[n][MISSING].double(), mean, atol=1e-5, rtol=0)
        error = found.draws[:, n][:, MISSING].double().std(0) / 4000**0.5
        assert bool(((found.draws[:, n][:, MISSING].double().mean(0) - mean).abs() <= 4.5 * error + 1e-5).all())
    assert found.log_prob.direction == "exact"
    assert torch.equal(found.draws[..., ~MISSING], obs[:, ~MISSING].expand(4000, 5, -1))


def normal_law(model):
    """Weights, means and dense covariances of the components of a normal model."""
    if isinstance(model, pv.models.PPCA):
        noise = (2 * model.log_scale).exp().item() * torch.eye(model.space.num_dims)
        return [1.0], [model.loc.detach()], [(model.loadings @ model.loadings.T + noise).detach()]
    law = model.distribution()
    laws = law.components.laws
    weights = law.log_weights.exp().tolist()
    return weights, [each.loc.detach() for each in laws], [each.covariance_matrix.detach() for each in laws]


def log_normal(x, mean, covariance):
    """By inverse and determinant: nothing here is shared with what it checks."""
    offset = x - mean
    _, log_det = np.linalg.slogdet(covariance)
    return -0.5 * (offset @ np.linalg.inv(covariance) @ offset + log_det + len(x) * np.log(2 * np.pi))


@pytest.mark.parametrize("kind", ["ppca", "full", "low_rank"])
@pytest.mark.parametrize("noise", [None, 0.7])
def test_normal_laws_against_dense_matrices(kind, noise) -> None:
    space = Real(SHAPE)
    if kind == "ppca":
        model = spread(build(pv.models.PPCA, space, latent_dim=2), scale=0.5)
    else:
        model = spread(build(pv.models.GaussianMixture, space, num_components=2, covariance=kind, rank=2), scale=0.3)
    obs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2))
    mask = None if noise else MISSING
    found = pv.restore(model, batch_of(obs, space), mask, noise=noise, num_draws=4000)
    hidden = np.arange(6) if noise else np.flatnonzero(MISSING.flatten().numpy())
    seen = np.arange(6) if noise else np.flatnonzero(~MISSING.flatten().numpy())
    for n, x in enumerate(obs.flatten(1).double().numpy()):
        joint, parts, given = [], [], []
        for weight, mean, covariance in zip(*normal_law(model), strict=True):
            mu, cov = mean.double().numpy(), covariance.double().numpy()
            of_seen = cov[np.ix_(seen, seen)] + (noise or 0.0) ** 2 * np.eye(len(seen))
            gain = cov[np.ix_(hidden, seen)] @ np.linalg.inv(of_seen)
            joint.append(np.log(weight) + log_normal(x[seen], mu[seen], of_seen))
            given.append(np.log(weight) + log_normal(x, mu, cov))
            parts.append(mu[hidden] + gain @ (x[seen] - mu[seen]))
        share = np.exp(joint - np.logaddexp.reduce(joint))
        expected = share @ np.array(parts)
        np.testing.assert_allclose(found.mean[n].flatten()[hidden].double(), expected, atol=1e-4)  # float32 images
        drawn = found.draws[:, n].flatten(1)[:, hidden].double().numpy()
        assert (np.abs(drawn.mean(0) - expected) < 4.5 * drawn.std(0) / 4000**0.5).all()
        if noise is None:
            log_prob = np.logaddexp.reduce(given) - np.logaddexp.reduce(joint)
            assert found.log_prob.log_prob[n] == pytest.approx(log_prob, abs=1e-4)


def test_flipped_bits_of_a_mixture_by_enumeration() -> None:
    model = spread(build(pv.models.BernoulliMixture, Binary(SHAPE), num_components=3))
    images, seen = states(2, 6).reshape(-1, *SHAPE), torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    log_prob = torch.from_numpy(pv.log_likelihood(model, batch_of(images, model.space)).log_prob)
    flips = (images != seen).flatten(1).sum(1)
    posterior = (log_prob + flips * np.log(0.2) + (6 - flips) * np.log(0.8)).softmax(0)
    found = pv.restore(model, batch_of(seen[None], model.space), noise=0.2, num_draws=4)
    mean = (posterior[:, None, None] * images).sum(0)
    torch.testing.assert_close(found.mean[0].double(), mean, atol=1e-5, rtol=0)
    assert found.log_prob is None
    assert found.missing is None


# models with latents


def one_latent(space, seed=0):
    model = build(pv.models.VAE, space, latent_dim=1, hidden_dims=(8,), seed=seed)
    return spread(model, seed, 0.7).eval()


def by_quadrature(model, image, log_seen, of_hidden):
    """∫ of_hidden(z) p(z | seen) dz and log p(seen) over a grid of z."""
    with torch.no_grad():
        law = model.likelihood(GRID.float()[:, None])
        log_joint = log_seen(law, image).double() - 0.5 * GRID**2 - 0.5 * np.log(2 * np.pi)
        weights = log_joint.softmax(0)
        return weights @ of_hidden(law).double(), float(log_joint.logsumexp(0) + (GRID[1] - GRID[0]).log())


@pytest.mark.parametrize("space", [Binary(SHAPE), Real(SHAPE), Quantized(SHAPE, 3)], ids=str)
def test_vae_of_one_latent_by_quadrature(space) -> None:
    model = one_latent(space)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        obs = model.likelihood(torch.randn(3, 1)).sample()
    wide = pv.defensive()  # on Real there are posteriors with two modes, of which a refined Gaussian sees one
    how = {"proposal": wide, "estimator": pv.multilevel(2000, proposal=wide)} if isinstance(space, Real) else {}
    found = pv.restore(model, batch_of(obs, space), MISSING, num_draws=500, num_particles=2000, **how)
    for n, image in enumerate(obs):

        def log_pixels(law, image, mask):
            return law.base_dist.log_prob(image.expand(len(GRID), *SHAPE))[:, mask].sum(-1)

        mean, log_given = by_quadrature(
            model, image, lambda law, x: log_pixels(law, x, ~MISSING), lambda law: law.mean[:, MISSING]
        )
        _, log_whole = by_quadrature(model, image, lambda law, x: law.log_prob(x), lambda law: law.mean[:, MISSING])
        error = found.log_prob.variance[n] ** 0.5
        assert abs(found.log_prob.log_prob[n] - (log_whole - log_given)) < 4.5 * error + 1e-4
        spread_of = found.draws[:, n][:, MISSING].double().std(0) + 0.1
        assert bool(((found.mean[n][MISSING].double() - mean).abs() < 5 * spread_of / 500**0.5).all())
    assert found.log_prob.direction == "unbiased"
    assert found.ess.min() > 100


@pytest.mark.parametrize("noise", [None, 0.3])
def test_mcmc_gives_the_posterior_mean_of_quadrature(noise) -> None:
    model = one_latent(Binary(SHAPE), seed=4)
    obs = states(2, 6).reshape(-1, *SHAPE)[[5, 40]]
    steps = annealed_importance_sampling(15, num_leapfrog=4)
    found = pv.restore(
        model, batch_of(obs, model.space), None if noise else MISSING, noise=noise, how="mcmc", num_draws=200,
        annealing=steps, score=False,
    )  # fmt: skip
    again = pv.restore(
        model, batch_of(obs, model.space), None if noise else MISSING, noise=noise, num_draws=200, score=False
    )
    for n, image in enumerate(obs):

        def log_seen(law, x):
            on = law.mean if noise is None else (1 - noise) * law.mean + noise * (1 - law.mean)
            log_prob = (x * on.log() + (1 - x) * (1 - on).log()).flatten(1)
            return log_prob.sum(-1) if noise else log_prob[:, ~MISSING.flatten()].sum(-1)

        def hidden(law, image=image):
            if noise is None:
                return law.mean[:, MISSING]
            likely = torch.where(image == 1, 1 - noise, noise)
            return (law.mean * likely / (law.mean * likely + (1 - law.mean) * (1 - likely))).flatten(1)

        mean, _ = by_quadrature(model, image, log_seen, hidden)
        for each in (found, again):
            got = each.mean[n].flatten() if noise else each.mean[n][MISSING]
            # means over 200 draws of a probability: standard errors are below .5/√200, chains count as half of them
            torch.testing.assert_close(got.double(), mean, atol=4 * 0.5 / 200**0.5 * 2**0.5, rtol=0)
    assert "HMC annealed from the prior" in found.how


# the chain rule


@pytest.mark.parametrize("missing", [LAST, MISSING], ids=["missing pixels last", "in between"])
def test_chain_rule_by_enumeration(missing) -> None:
    model = spread(build(pv.models.MADE, Binary(SHAPE), hidden_dims=(8,)), 1)
    obs = states(2, 6).reshape(-1, *SHAPE)[[3, 17, 52]]
    found = pv.restore(model, batch_of(obs, model.space), missing, num_draws=2000, num_particles=20_000)
    is_last = missing is LAST
    assert found.log_prob.direction == ("exact" if is_last else "upper")
    for n, image in enumerate(obs):
        log_prob, mean = enumerated(model, image, missing, 2)
        error = 1e-5 if is_last else 4.5 * found.log_prob.variance[n] ** 0.5
        assert abs(found.log_prob.log_prob[n] - log_prob) < error
        drawn = found.draws[:, n][:, missing].double()
        assert bool(((drawn.mean(0) - mean).abs() < 4.5 * 0.5 / 2000**0.5).all())
        torch.testing.assert_close(found.mean[n][missing].double(), mean, atol=4.5 * 0.5 / 20_000**0.5 * 3, rtol=0)


@pytest.mark.parametrize(("model", "parts"), [("vae", 2), ("made", 1)])  # log p(x) and log p(given); walks
def test_progress_ends_at_the_number_of_images(model, parts, monkeypatch) -> None:
    seen, done = [], []

    @contextmanager
    def bar(total, show):
        seen.append((total, show))
        yield done.append

    monkeypatch.setattr(ways, "progress_bar", bar)
    made = build(getattr(pv.models, {"vae": "VAE", "made": "MADE"}[model]), Binary(SHAPE), hidden_dims=(4,))
    images = batch_of(states(2, 6).reshape(-1, *SHAPE)[:5], made.space)
    how = {} if model == "made" else {"estimator": pv.multilevel(9)}
    pv.restore(made, images, MISSING, num_draws=2, num_particles=20, progress=True, **how)
    assert (seen, sum(done)) == ([(5 * parts, True)], 5 * parts)


# the same question as a model that is given quadrants


def quadrant_models():
    space = Binary((4, 4))
    context = Quadrants(3, (4, 4))
    cvae = build(pv.models.CVAE, replace(space, shape=(4,)), context, latent_dim=1, hidden_dims=(8,))
    return build(pv.models.VAE, space, latent_dim=1, hidden_dims=(8,)), cvae, build(pv.models.IndependentPixel, space)


def test_vae_cvae_and_independent_pixels_stand_in_one_table() -> None:
    vae, cvae, pixels = quadrant_models()
    obs = torch.randint(2, (12, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    batch, missing = batch_of(obs, Binary((4, 4))), named("bottom_right", (4, 4))
    estimator = pv.multilevel(30)
    quadrant = {"a": (vae, estimator), "b": (cvae, estimator), "c": (pixels, None)}
    results = {
        name: pv.restore(model, batch, missing, num_draws=3, estimator=how).log_prob
        for name, (model, how) in quadrant.items()
    }
    assert {each.given for each in results.values()} == {"quadrants(3)"}
    table = pv.compare(results)
    assert table.quantity == "log p(x | quadrants(3))"
    given, hidden = Quadrants(3, (4, 4)).split(obs)
    data = pv.Batch(hidden, given, space=Binary((4,)))
    assert pv.log_likelihood(cvae, data, estimator=pv.importance_sampling(5)).digest == table.rows[0].result.digest
    other = pv.restore(pixels, batch, named("top_left", (4, 4)), num_draws=3).log_prob
    with pytest.raises(ValueError, match="they answer different questions"):
        pv.compare({"a": results["a"], "c": other})
    with pytest.raises(ValueError, match=r"restores what is missing beside quadrants\(3\), and nothing else"):
        pv.restore(cvae, batch, named("top_left", (4, 4)))


def test_labels_are_part_of_what_is_given() -> None:
    context = Labels((-0.7, -0.7))
    model = build(pv.models.CVAE, Binary(SHAPE), context, latent_dim=1, hidden_dims=(8,))
    batch = pv.Batch(states(2, 6)[:4].reshape(-1, *SHAPE), torch.eye(2)[[0, 1, 1, 0]], space=Binary(SHAPE))
    found = pv.restore(model, batch, MISSING, num_draws=2, estimator=pv.multilevel(20))
    assert found.log_prob.quantity.startswith("log p(x | label, 3 of 6 pixels, mask ")


# masks, promises, errors


@pytest.mark.parametrize("name", NAMES)
def test_names_of_parts(name) -> None:
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    words = {"top": rows < 2, "bottom": rows >= 2, "left": columns < 2, "right": columns >= 2}
    expected = torch.ones(5, 4, dtype=torch.bool)
    for word in name.split("_"):
        expected &= words[word]
    assert torch.equal(named(name, (5, 4)), expected)
    assert torch.equal(named(name, (3, 5, 4)), expected.expand(3, 5, 4))


def test_named_quadrant_is_that_of_the_cvae_and_a_share_is_one() -> None:
    assert torch.equal(named("bottom_right", (5, 4)), ~Quadrants(3, (5, 4)).mask())
    assert torch.equal(named("right", (5, 4)), ~Quadrants(2, (5, 4)).mask())
    assert int(share_of(0.3, (5, 4), 1).sum()) == 6
    assert torch.equal(share_of(0.3, (5, 4), 1), share_of(0.3, (5, 4), 1))
    assert not torch.equal(share_of(0.3, (5, 4), 1), share_of(0.3, (5, 4), 2))
    pixels = Pixels.of(MISSING)
    image = torch.arange(6.0).reshape(1, *SHAPE)
    assert torch.equal(pixels.join(*pixels.split(image)), image)


def test_seeded_and_leaves_model_and_random_state_alone() -> None:
    model = one_latent(Real(SHAPE))
    batch = batch_of(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), Real(SHAPE))
    before, state = parameters(model), torch.random.get_rng_state()
    first, again, other = (pv.restore(model, batch, MISSING, num_draws=4, score=False, seed=s) for s in (1, 1, 2))
    assert same(before, parameters(model))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.draws, again.draws)
    assert not torch.equal(first.draws, other.draws)


def test_what_lies_under_the_mask_does_not_change_what_is_drawn() -> None:
    for model in (one_latent(Real(SHAPE)), spread(build(pv.models.PPCA, Real(SHAPE), latent_dim=2), scale=0.3)):
        obs = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
        other = torch.where(MISSING, torch.full_like(obs, 9.0), obs)
        found = [pv.restore(model, batch_of(x, Real(SHAPE)), MISSING, num_draws=4, score=False) for x in (obs, other)]
        assert torch.equal(found[0].draws, found[1].draws)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of `missing`, a mask, and `noise`"),
        ({"missing": MISSING, "noise": 0.1}, "one of `missing`, a mask, and `noise`"),
        ({"missing": MISSING[:, :2]}, r"must have the shape of an image, \(2, 3\), got \(2, 2\)"),
        ({"missing": MISSING.float()}, "must be a tensor of booleans, got torch.float32"),
        ({"missing": torch.zeros(SHAPE, dtype=torch.bool)}, "some pixels must be missing and some given"),
        ({"noise": 0.5}, "flipped with a probability below one half, got 0.5"),
        ({"noise": -1}, "noise must be greater than 0"),
        ({"missing": MISSING, "how": "magic"}, "how must be one of resampling, mcmc, got 'magic'"),
        ({"missing": MISSING, "estimator": pv.importance_sampling(10)}, "that of two lower bounds lies on no known"),
    ],
)
def test_what_is_refused(options, message) -> None:
    model = one_latent(Binary(SHAPE))
    with pytest.raises(ValueError, match=message):
        pv.restore(model, batch_of(torch.ones(2, *SHAPE), Binary(SHAPE)), **options)


AIS = annealed_importance_sampling(2)
IGNORED = [  # model, options, what is named
    ("vae", {"how": "mcmc", "num_particles": 9, "proposal": pv.refined()}, "num_particles and proposal"),
    ("vae", {"annealing": AIS}, "annealing"),
    ("vae", {"estimator": pv.multilevel(9), "score": False}, "estimator"),
    ("vae", {"estimator": pv.multilevel(9), "missing": None, "noise": 0.1}, "estimator"),
    ("pixels", {"how": "mcmc"}, "how"),
    ("pixels", {"proposal": pv.refined(), "estimator": pv.multilevel(9)}, "proposal and estimator"),
    ("pixels", {"num_particles": 9}, "num_particles"),
    ("made", {"how": "resampling"}, "how"),
    ("made", {"estimator": pv.multilevel(9)}, "estimator"),
    ("cvae", {"how": "resampling", "num_particles": 9}, "how and num_particles"),
]


@pytest.mark.parametrize(("name", "options", "ignored"), IGNORED, ids=lambda value: str(value)[:40])
def test_settings_that_would_be_ignored_are_refused(name, options, ignored) -> None:
    vae, cvae, pixels = quadrant_models()
    made = build(pv.models.MADE, Binary((4, 4)), hidden_dims=(8,))
    model = {"vae": vae, "cvae": cvae, "pixels": pixels, "made": made}[name]
    options = {"missing": named("bottom_right", (4, 4)), **options}
    with pytest.raises(ValueError, match=f"^{ignored} would be ignored: "):
        pv.restore(model, batch_of(torch.ones(2, 4, 4), Binary((4, 4))), **options)


def test_noise_leaves_no_pixels_missing_to_score() -> None:
    with pytest.raises(ValueError, match="with noise no pixels are missing"):
        pv.restore(one_latent(Binary(SHAPE)), batch_of(torch.ones(2, *SHAPE), Binary(SHAPE)), noise=0.1, score=True)


def test_grey_levels_have_no_noise_in_closed_form() -> None:
    model = build(pv.models.IndependentPixel, Quantized(SHAPE, 3))
    with pytest.raises(ValueError, match=r"noise is for real pixels .* and bits"):
        pv.restore(model, batch_of(torch.ones(2, *SHAPE), Quantized(SHAPE, 3)), noise=0.1)


def test_an_exact_difference_stays_exact_and_two_bounds_are_refused() -> None:
    exact = exact_estimate(np.array([-3.0, -2.0]))
    assert difference(exact, lambda: exact).log_prob.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="two lower bounds lies on no known side"):
        difference(replace(exact, direction="lower"), lambda: exact)


def estimated(log_prob, bias, **rest):
    log_prob = np.asarray(log_prob, dtype=np.float64)
    return Estimate(log_prob, np.full_like(log_prob, 0.01), "unbiased", "multilevel", 9, bias_bound=bias, **rest)


def test_the_interval_of_a_difference_holds_what_both_biases_allow() -> None:
    whole, given = estimated([-9.0, -7.0], 0.3), estimated([-4.0, -3.0], 0.5)
    found = difference(whole, lambda: given)
    wanted = vars(found) | {"space": Binary((2,)), "digest": "ab", "seed": 0, "seconds": 0.0}
    result = pv.LogLikelihood(**wanted)
    for level in (0.5, 0.95):
        for of in ("interval", "population_interval"):
            held = getattr(result, of)(level)
            half = norm.ppf((1 + level) / 2) * (result.mc_se if of == "interval" else result.test_se)
            # -4.5 is the difference of the means; log p(given) up to 0.5 above its own, log p(x) up to 0.3
            assert (held.low, held.high) == pytest.approx((-4.5 - 0.5 - half, -4.5 + 0.3 + half))
    assert any("log p(given) may lie 0.5 nats above" in note for note in found.notes)
    small = difference(whole, lambda: replace(given, bias_bound=1e-5))
    assert len(small.notes) == 1
    assert difference(whole, lambda: replace(given, bias_bound=None)).bias_bound is None


def test_an_upper_bound_keeps_its_entries_and_its_bias_below() -> None:
    exact = exact_estimate(np.array([-3.0, -2.0]))
    lower = replace(estimated([-1.0, -1.0], 0.5), direction="lower")
    found = difference(exact, lambda: lower)
    assert found.log_prob.tolist() == [-2.0, -1.0]
    assert (found.direction, found.bias_bound) == ("upper", 0.5)


def test_a_difference_says_nothing_that_is_of_one_part_alone() -> None:
    certificate = Certificate(True, "gap small", 0.1, 0.1, -2, -1, 1, 1, 10)
    cost = PrecisionError("tf32", 0.003, 0.02, 10, 9, 0.004)
    whole = estimated(
        [-9.0], 0.0, notes=("same", "own"), certificate=certificate, precision_error=cost, shares={"annealed": 1.0}
    )
    given = estimated([-4.0], 0.0, notes=("same", "other"), precision_error=replace(cost, mean=-0.001, se=0.003))
    found = difference(whole, lambda: given)
    assert (found.certificate, found.shares) == (None, {})
    assert found.precision_error == PrecisionError("tf32", pytest.approx(0.004), 0.04, 10, 9, 0.005)
    assert found.notes[:3] == ("same", "log p(x): own", "log p(given): other")


def test_pixels_that_depend_on_each_other_are_refused() -> None:
    import pyro
    import pyro.distributions as dist

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.space = Real((2,))

        def model(self, obs, context=None):
            with pyro.plate("data", len(obs), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                law = dist.MultivariateNormal(z.expand(*z.shape[:-1], 2), torch.eye(2))
                pyro.sample("obs", law, obs=obs)

        def guide(self, obs, context=None):
            with pyro.plate("data", len(obs), dim=-1):
                pyro.sample("z", dist.Normal(obs[:, :1], 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"must consist of independent .* got MultivariateNormal"):
        pv.restore(Odd(), batch_of(torch.zeros(2, 2), Real((2,))), torch.tensor([True, False]))
