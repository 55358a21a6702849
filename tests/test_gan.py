"""The GAN, its noise, its training, and the kernel density estimate, against closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import pyro_vae as pv
from pyro_vae import adversarial
from pyro_vae.data import Batch, Data
from pyro_vae.kernel_density import parzen_window
from pyro_vae.noise_scale import likeliest_scale
from pyro_vae.randomness import own_randomness
from pyro_vae.spaces import Binary, Real
from pyro_vae.spherical import Spherical

NUM_DIMS, LATENT_DIM, SCALE = 6, 2, 0.4


def linear_gan(scale: float | None = SCALE) -> pv.models.GAN:
    """G(z) = W z + b, so that p(x) = N(b, W W' + σ² I)."""
    with own_randomness(5):
        gan = pv.models.GAN(Real((NUM_DIMS,)), latent_dim=LATENT_DIM, hidden_dims=(), noise_scale=scale).double()
        nn.init.normal_(gan.generator.layers[-1].bias)
    return gan


def marginal(gan: pv.models.GAN, scale: float) -> MultivariateNormal:
    weight, bias = (each.detach() for each in gan.generator.layers[-1].parameters())
    return MultivariateNormal(bias, weight @ weight.T + scale**2 * torch.eye(NUM_DIMS, dtype=torch.float64))


def data_of(obs: torch.Tensor) -> Data:
    """The same rows for everything."""
    space = Real(tuple(obs.shape[1:]))
    return Data("toy", space, *(Batch(obs, space=space) for _ in range(3)))


def test_annealing_from_the_prior_meets_the_closed_form_of_a_linear_generator() -> None:
    gan = linear_gan()
    with own_randomness(1):
        batch = Batch(marginal(gan, SCALE).sample((40,)), space=gan.space)
    truth = marginal(gan, SCALE).log_prob(batch.obs).numpy()
    estimator = pv.annealed_importance_sampling(num_steps=30, num_chains=48, num_leapfrog=3, start="prior")
    found = pv.log_likelihood(gan, batch, estimator=estimator, seed=0)
    assert abs(found.mean - truth.mean()) < 4 * found.mc_se + (found.bias_bound or 0.0)
    assert found.mc_se < 0.05  # so that the line above can fail


def test_importance_sampling_from_the_prior_is_flagged_where_it_is_wrong() -> None:
    """The posterior has a thousandth of the prior's width in each of 2 directions: few draws in a million hit it."""
    gan = linear_gan(1e-3)
    with own_randomness(2):
        batch = Batch(marginal(gan, 1e-3).sample((20,)), space=gan.space)
    found = pv.log_likelihood(gan, batch, estimator=pv.importance_sampling(1000), seed=0)
    assert found.mean < float(marginal(gan, 1e-3).log_prob(batch.obs).mean()) - 100
    assert found.flagged.all()
    assert found.warning is not None


@pytest.mark.parametrize("truth", [0.1, 1.0])
def test_the_noise_scale_is_that_of_the_closed_form_likelihood(truth: float) -> None:
    gan, num = linear_gan(), 300
    with own_randomness(3):
        obs = marginal(gan, truth).sample((num,))
        found = float(likeliest_scale(gan.mean, LATENT_DIM, obs))
    grid = truth * torch.linspace(0.8, 1.25, 901, dtype=torch.float64)
    best = float(grid[torch.stack([marginal(gan, float(s)).log_prob(obs).mean() for s in grid]).argmax()])
    # σ² is a mean over num (D - d) residuals, which 100 moves of z average: less noise than the data's own by far
    assert found == pytest.approx(best, rel=1 / math.sqrt(2 * num * (NUM_DIMS - LATENT_DIM)))
    assert found == pytest.approx(truth, rel=4 / math.sqrt(2 * num * (NUM_DIMS - LATENT_DIM)))


def test_training_finds_the_mean_and_the_spread_of_a_normal_law() -> None:
    """No likelihood leads there: only the discriminator tells the generator of the data."""
    with own_randomness(4):
        obs = 2 + 0.5 * torch.randn(2000, 1)
        gan = pv.models.GAN(Real((1,)), latent_dim=1, hidden_dims=(16,), noise_scale=0.05)
    settings = {"num_epochs": 80, "batch_size": 200, "learning_rate": 1e-2, "penalty": 0.3}
    start = _mean_and_spread(gan)
    pv.fit(gan, data_of(obs), seed=0, device="cpu", **settings)
    mean, spread = _mean_and_spread(gan)
    # four times what a batch of 200 can tell: 0.5/√200 of the mean, 0.5/√400 of the standard deviation
    assert abs(mean - float(obs.mean())) < 4 * 0.5 / math.sqrt(200) < abs(start[0] - float(obs.mean()))
    assert abs(spread - float(obs.std())) < 4 * 0.5 / math.sqrt(400) < abs(start[1] - float(obs.std()))


def _mean_and_spread(gan: pv.models.GAN) -> tuple[float, float]:
    with own_randomness(6), torch.no_grad():
        drawn = gan.mean(torch.randn(10_000, 1))
    return float(drawn.mean()), float(drawn.std())


def test_a_discriminator_that_can_tell_nothing_has_the_loss_log_4() -> None:
    """Draws that are data: a generator at the balance."""
    with own_randomness(7):
        obs = torch.randn(2000, 2)
        generator, discriminator = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))
        how = {"num_epochs": 5, "batch_size": 100, "learning_rate": 1e-3, "penalty": 1.0}
        (*_, last) = adversarial.train(
            generator,
            discriminator,
            lambda count: torch.randn(count, 2) + 0 * generator(torch.zeros(count, 2)),
            obs,
            progress=lambda row: None,
            **how,
        )
    # the loss of logits of size ε is log 4 + O(ε²), and those of a small network in 100 steps are below 0.2
    assert last["discriminator_loss"] == pytest.approx(math.log(4), abs=0.02)
    assert last["generator_loss"] == pytest.approx(math.log(2), abs=0.1)
    assert last["discriminator_accuracy"] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * 2000) + 0.02)


def test_a_seed_has_its_digits_and_the_fit_leaves_the_random_state() -> None:
    def fitted() -> dict[str, torch.Tensor]:
        with own_randomness(0):
            gan = pv.models.GAN(Real((3,)), latent_dim=2, hidden_dims=(4,))
        obs = torch.linspace(0, 1, 60).view(20, 3)
        before = torch.random.get_rng_state()
        history = pv.fit(gan, data_of(obs), num_epochs=2, batch_size=8, num_noise=5, seed=3, device="cpu")
        assert torch.equal(before, torch.random.get_rng_state())
        assert [row["epoch"] for row in history.rows] == [1, 2]
        return gan.state_dict()

    first, second = fitted(), fitted()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any("discriminator" in name for name in first)


def test_data_for_a_noise_scale_that_was_given_are_refused() -> None:
    gan = pv.models.GAN(Real((3,)), latent_dim=2, hidden_dims=(4,), noise_scale=0.1)
    with pytest.raises(
        ValueError, match="num_noise is of the fit of the noise scale, which was given, got num_noise=5"
    ):
        pv.fit(gan, data_of(torch.zeros(9, 3)), num_epochs=1, num_noise=5, device="cpu")


def test_a_given_noise_scale_stays_and_a_fitted_one_moves() -> None:
    obs = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    for scale in (0.3, None):
        gan = pv.models.GAN(Real((3,)), latent_dim=2, hidden_dims=(4,), noise_scale=scale)
        pv.fit(gan, data_of(obs), num_epochs=1, seed=0, device="cpu")
        found = float(gan.observation.log_scale.detach().exp())
        assert (found == pytest.approx(0.3)) == (scale is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"noise_scale": 0.0}, "noise_scale"), ({"latent_dim": 0}, "latent_dim"), ({"activation": "no"}, "activation")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pv.models.GAN(Real((3,)), **options)


@pytest.mark.parametrize("options", [{"num_epochs": 0}, {"learning_rate": 0.0}, {"penalty": -1.0}, {"num_noise": 0}])
def test_settings_of_the_training_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        pv.fit(pv.models.GAN(Real((3,))), data_of(torch.zeros(4, 3)), device="cpu", **options)


# --- one variance for all pixels ----------------------------------------------------------------------------------


def test_the_spherical_law_is_that_of_the_formula() -> None:
    for levels, mean in ((None, lambda a: a), (256, torch.sigmoid)):
        law = Spherical(Real((2, 3), levels=levels), 0.3)
        params, obs = torch.randn(4, 1, 2, 3), torch.rand(4, 2, 3)
        expected = -((obs - mean(params.squeeze(1))) ** 2).sum((1, 2)) / 0.18 - 6 * math.log(
            0.3 * math.sqrt(2 * math.pi)
        )
        torch.testing.assert_close(law(params).log_prob(obs), expected, rtol=1e-5, atol=1e-4)  # float32


def test_a_spherical_vae_starts_at_the_mean_image_and_the_spread_around_it() -> None:
    obs = torch.rand(50, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = pv.models.VAE(Real((4, 4), levels=256), latent_dim=2, hidden_dims=(8,), observation="spherical")
    vae.initialize(obs)
    nn.init.zeros_(vae.decoder.layers[-1].weight)
    law = vae.likelihood(torch.zeros(1, 2))
    torch.testing.assert_close(law.mean[0], obs.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(law.variance.mean().detach(), (obs - obs.mean(0)).square().mean())


def test_a_spherical_vae_is_refused_where_pixels_are_no_real_numbers() -> None:
    with pytest.raises(ValueError, match="Real, got Binary"):
        pv.models.VAE(Binary((4, 4)), observation="spherical")
    with pytest.raises(ValueError, match="pixelwise, spherical"):
        pv.models.VAE(Real((4, 4)), observation="round")


# --- kernel density estimate --------------------------------------------------------------------------------------


def test_the_parzen_window_of_given_bandwidth_is_the_mean_of_its_kernels() -> None:
    rng = np.random.default_rng(0)
    samples, test = (torch.from_numpy(rng.normal(size=(num, 2, 2))) for num in (7, 5))
    kernels = Normal(samples, 0.5).log_prob(test.unsqueeze(1)).sum((-1, -2)).exp()  # (5, 7)
    found = parzen_window(samples, test, test, bandwidths=(0.5,))
    assert not found.is_at_end  # there was no choice
    torch.testing.assert_close(found.log_density, kernels.mean(1).log(), rtol=1e-12, atol=0)


def test_many_samples_on_a_line_give_the_convolution_with_the_kernel() -> None:
    """Quantiles of N(0, 1) as samples: their window is N(0, 1 + h²), and close data choose the narrowest."""
    quantiles = Normal(0.0, 1.0).icdf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).unsqueeze(1)
    test = torch.tensor([[-1.0], [0.0], [0.7]], dtype=torch.float64)
    found = parzen_window(quantiles, quantiles[::100], test, bandwidths=(0.2, 1.0, 3.0))
    assert (found.bandwidth, found.is_at_end) == (0.2, True)
    between = parzen_window(quantiles[::2000], quantiles[::100], test, bandwidths=(1e-3, 0.2, 9.0))
    assert (between.bandwidth, between.is_at_end) == (0.2, False)
    expected = Normal(0.0, math.sqrt(1 + 0.2**2)).log_prob(test[:, 0])
    torch.testing.assert_close(found.log_density, expected.double(), rtol=0, atol=1e-4)  # 1/S at a quantile's cell


def test_in_many_dimensions_the_parzen_window_is_far_off() -> None:
    """Samples of the very law that is scored: log p is known, and 2,000 samples are short of it by tens of nats."""
    law = MultivariateNormal(torch.zeros(100).double(), torch.eye(100).double())
    with own_randomness(0):
        samples, valid, test = (law.sample((num,)) for num in (2000, 100, 100))
    found = parzen_window(samples, valid, test)
    assert float((law.log_prob(test) - found.log_density).mean()) > 10


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match=r"valid must hold rows of shape \(2, 2\)"):
        parzen_window(rows, torch.zeros(3, 4), rows)
    with pytest.raises(ValueError, match="bandwidth must be greater than 0"):
        parzen_window(rows, rows, rows, bandwidths=(0.0,))
    with pytest.raises(ValueError, match="at least one"):
        parzen_window(rows, rows, rows, bandwidths=())


def test_a_run_on_disk_is_read_back_whole(tmp_path) -> None:
    """What was fitted, σ with it, is what is read back."""
    from pyro_vae.configuration import Config
    from pyro_vae.runs import open_run, train

    options = {"latent_dim": 2, "hidden_dims": [8]}
    config = Config("gan", space="real", options=options, fit={"num_epochs": 1, "num_noise": 5})
    run, _ = train(config, tmp_path)
    again = open_run(tmp_path)
    few = replace(run.data, test=run.data.test.subset(5)).test
    estimator = pv.annealed_importance_sampling(5, 2, 2, start="prior")
    scores = [pv.log_likelihood(each.model, few, estimator=estimator).log_prob for each in (run, again)]
    np.testing.assert_array_equal(*scores)
