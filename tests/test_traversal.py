"""Traversals and interpolations against decoders that are known in closed form."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

import pyro_vae as pv
from pyro_vae.data import Batch
from pyro_vae.spaces import Binary, Labels, Real
from pyro_vae.traversal import slerp

SPACE = Real((2, 3))


@pytest.fixture(scope="module")
def ppca():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = pv.models.PPCA(SPACE, latent_dim=3)
    with torch.no_grad():
        model.loadings.mul_(torch.tensor([1.0, 30.0, 10.0]))
        model.loc.copy_(torch.arange(6.0))
        model.log_scale.fill_(-2.0)
    return model


def batch(num=50, seed=0, space=SPACE):
    return Batch(torch.randn(num, *space.shape, generator=torch.Generator().manual_seed(seed)) + 2, space=space)


def test_ppca_code_is_the_posterior_mean_of_the_joint_normal_law(ppca) -> None:
    obs, w = batch().obs, ppca.loadings.detach().double()
    covariance = w @ w.T + float(np.exp(-4.0)) * torch.eye(6, dtype=torch.float64)
    expected = (obs.flatten(1).double() - ppca.loc.detach()) @ torch.linalg.solve(covariance, w)
    torch.testing.assert_close(ppca.features(obs).detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_traversal_of_ppca_is_its_loadings_at_quantiles_of_the_prior(ppca) -> None:
    found = pv.traverse(ppca, batch(), num_steps=5)
    assert found.images.shape == (3, 5, 2, 3)
    assert found.kind == "variance of the code"
    assert list(found.used) == sorted(found.used, reverse=True)
    quantiles = norm.ppf(np.linspace(0.01, 0.99, 5))
    # 4 SE of a quantile of 4096 draws at .01: √(.01 x .99 / 4096) / φ(2.33)
    np.testing.assert_allclose(found.values, np.tile(quantiles, (3, 1)), atol=4 * 0.058)
    for place, unit in enumerate(found.units):
        step = (found.images[place, 4] - found.images[place, 0]).flatten()
        length = found.values[place, 4] - found.values[place, 0]
        torch.testing.assert_close(step, ppca.loadings.detach()[:, unit] * length, rtol=1e-4, atol=1e-4)


def test_around_a_datum_all_other_latents_are_its_code(ppca) -> None:
    found = pv.traverse(ppca, batch(), around=7, num_units=1, num_steps=2)
    code = ppca.features(batch().obs[7:8]).detach()[0].clone()
    code[found.units[0]] = float(found.values[0, 1])
    torch.testing.assert_close(found.images[0, 1], ppca.decode(code[None]).detach()[0], rtol=1e-4, atol=1e-4)


def test_a_vae_is_ordered_by_the_divergence_of_its_units() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = pv.models.VAE(Binary((3, 3)), latent_dim=4, hidden_dims=(8,))
    some = Batch((batch(40, space=Binary((3, 3))).obs > 2).float(), space=Binary((3, 3)))
    found = pv.traverse(model, some, num_units=3, num_steps=4)
    kl = pv.latent_use(model, some, num_particles=2).latents[0].kl_per_unit
    assert found.kind == "KL, nats"
    assert found.units.tolist() == np.argsort(-kl)[:3].tolist()
    z = torch.zeros(4)  # the mean of p(z), as 4096 draws have it
    z[found.units[0]] = float(found.values[0, 3])
    with torch.no_grad():
        torch.testing.assert_close(found.images[0, 3], model.likelihood(z[None]).mean[0], atol=0.02, rtol=0)


def test_a_label_stays_what_it_is() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = pv.models.CVAE(Binary((3, 3)), Labels((-0.7, -0.7)), latent_dim=2, hidden_dims=(8,))
    obs = (batch(10, space=Binary((3, 3))).obs > 2).float()
    some = Batch(obs, torch.eye(2)[torch.arange(10) % 2], space=Binary((3, 3)))
    found = pv.traverse(model, some, around=1, num_steps=3)
    with torch.no_grad():
        model.decoder.center(torch.zeros(1, 3, 3))
        first = pv.traverse(model, some, num_units=1, num_steps=2)  # of the mean of p(z | label of the first datum)
        base = model.prior(some.context[:1]).mean[0].clone()
        base[first.units[0]] = float(first.values[0, 1])
        image = model.likelihood(base[None], some.context[:1]).mean[0]
    torch.testing.assert_close(first.images[0, 1], image, atol=0.02, rtol=0)
    assert found.images.shape == (2, 3, 3, 3)


@pytest.mark.parametrize("way", ["spherical", "linear"])
def test_interpolation_begins_and_ends_at_the_images_of_both_codes(ppca, way) -> None:
    found = pv.interpolate(ppca, batch(), 3, 5, way=way, num_steps=5)
    ends = ppca.decode(ppca.features(batch().obs[[3, 5]])).detach()
    torch.testing.assert_close(found[[0, -1]], ends, rtol=1e-3, atol=1e-3)
    middle = found[2] - ends.mean(0)
    assert bool(middle.abs().max() < 1e-3) == (way == "linear")


def test_slerp_keeps_norm_and_angle_and_is_linear_where_there_is_none() -> None:
    a, b, t = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([[0.0], [1 / 3], [1.0]])
    found = slerp(a, b, t)
    expected = 2 * torch.tensor([[1.0, 0.0], [np.cos(np.pi / 6), np.sin(np.pi / 6)], [0.0, 1.0]])
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(a, -a, t), torch.lerp(a, -a, t))
    torch.testing.assert_close(slerp(torch.zeros(2), b, t), torch.lerp(torch.zeros(2), b, t))


def test_a_gan_is_traversed_from_its_prior_and_has_no_codes() -> None:
    model, some = pv.models.GAN(SPACE, latent_dim=2, hidden_dims=(8,)), batch(6)
    assert pv.traverse(model, some, num_steps=2).images.shape == (2, 2, 2, 3)
    with pytest.raises(ValueError, match="GAN has no codes: it has no encoder"):
        pv.traverse(model, some, around=0)
    with pytest.raises(ValueError, match="GAN has no codes: it has no encoder"):
        pv.interpolate(model, some, 0, 1)


def test_what_is_refused(ppca) -> None:
    with pytest.raises(ValueError, match="around must be the index of a datum, from 0 to 49, got 50"):
        pv.traverse(ppca, batch(), around=50)
    with pytest.raises(ValueError, match="way must be one of spherical, linear"):
        pv.interpolate(ppca, batch(), 0, 1, way="bent")
    with pytest.raises(ValueError, match="this model has no latents"):
        pv.traverse(pv.models.IndependentPixel(SPACE), batch())
