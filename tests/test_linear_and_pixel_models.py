import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from pyro_vae.models.independent_pixel import IndependentPixel
from pyro_vae.models.ppca import PPCA
from pyro_vae.spaces import MIN_SCALE, Binary, Quantized, Real


def linear_data(num: int = 400, dim: int = 5, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    code = torch.randn(num, 2, generator=source, dtype=torch.float64)
    noise = torch.randn(num, dim, generator=source, dtype=torch.float64)
    return 3.0 + code @ torch.randn(2, dim, generator=source, dtype=torch.float64) + 0.3 * noise


def covariance_of(ppca: PPCA) -> Tensor:
    noise = (2 * ppca.log_scale).exp() * torch.eye(len(ppca.loc), dtype=torch.float64)
    return (ppca.loadings @ ppca.loadings.T + noise).detach()


def train(model: nn.Module, obs: Tensor, steps: int, lr: float) -> float:
    pyro.clear_param_store()
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(steps):
        loss = svi.step(obs)
    pyro.clear_param_store()
    return -loss / len(obs)


def draws_of(model: nn.Module, num: int = 20_000) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.distribution().sample((num,))


# --- PPCA ---------------------------------------------------------------------------------------------------------


def test_ppca_log_prob_equals_the_full_covariance() -> None:
    source = torch.Generator().manual_seed(1)
    ppca = PPCA(Real((2, 3)), latent_dim=2).double()
    with torch.no_grad():
        for value in ppca.parameters():
            value.copy_(torch.randn(value.shape, generator=source, dtype=torch.float64))
    obs = torch.randn(9, 2, 3, generator=source, dtype=torch.float64)
    truth = MultivariateNormal(ppca.loc.detach(), covariance_of(ppca)).log_prob(obs.flatten(1))
    torch.testing.assert_close(ppca.distribution().log_prob(obs).detach(), truth, rtol=0, atol=1e-9)


def test_ppca_fit_equals_numpy_eigenvalues() -> None:
    obs = linear_data()
    ppca = PPCA(Real((5,)), latent_dim=2).double()
    (mean_log_prob,) = ppca.maximum_likelihood(obs)
    values, vectors = np.linalg.eigh(np.cov(obs.numpy().T, bias=True))
    noise = values[:3].mean()
    expected = (vectors[:, 3:] * (values[3:] - noise)) @ vectors[:, 3:].T + noise * np.eye(5)
    np.testing.assert_allclose(covariance_of(ppca).numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ppca.loc.detach().numpy(), obs.numpy().mean(0), rtol=0, atol=1e-12)
    truth = MultivariateNormal(obs.mean(0), torch.from_numpy(expected)).log_prob(obs).mean().item()
    assert mean_log_prob == pytest.approx(truth, abs=1e-10)


def test_ppca_fit_is_stationary() -> None:
    obs = linear_data()
    ppca = PPCA(Real((5,)), latent_dim=2).double()
    ppca.maximum_likelihood(obs)
    ppca.distribution().log_prob(obs).mean().backward()
    assert max(float(value.grad.abs().max()) for value in ppca.parameters()) < 1e-9


def test_ppca_density_integrates_to_one() -> None:
    ppca = PPCA(Real((2,)), latent_dim=1).double()
    ppca.maximum_likelihood(linear_data(dim=2))
    axis = torch.linspace(-17, 23, 801, dtype=torch.float64)
    log_prob = ppca.distribution().log_prob(torch.cartesian_prod(axis, axis))
    assert (log_prob.exp().sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=1e-6)


def test_ppca_floors_the_noise_of_degenerate_data() -> None:
    obs = torch.linspace(0, 1, 20, dtype=torch.float64).unsqueeze(-1).expand(20, 4)
    ppca = PPCA(Real((4,)), latent_dim=1, min_scale=0.01).double()
    ppca.maximum_likelihood(obs)
    assert ppca.log_scale.exp().item() == pytest.approx(0.01)


def test_ppca_samples_have_its_mean_and_covariance() -> None:
    ppca = PPCA(Real((5,)), latent_dim=2).double()
    ppca.maximum_likelihood(linear_data())
    draws = draws_of(ppca)
    centered, truth, num = draws - ppca.loc.detach(), covariance_of(ppca), len(draws)
    assert (centered.mean(0).abs() < 4 * (truth.diag() / num).sqrt()).all()
    se = ((truth**2 + truth.diag().outer(truth.diag())) / num).sqrt()  # of a Gaussian sample covariance
    assert ((centered.T @ centered / num - truth).abs() < 4 * se).all()


def test_ppca_trains_by_plain_svi_to_the_closed_form() -> None:
    obs = linear_data(200).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ppca = PPCA(Real((5,)), latent_dim=2)
    ppca.initialize(obs)
    (target,) = PPCA(Real((5,)), latent_dim=2).maximum_likelihood(obs)
    assert train(ppca, obs, steps=300, lr=0.05) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": Binary((5,))}, "PPCA lives on Real, got Binary"),
        ({"latent_dim": 5}, "latent_dim must be from 1 to 4, got 5"),
        ({"min_scale": 0.0}, "min_scale must be positive, got 0"),
    ],
)
def test_ppca_rejects(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPCA(**{"space": Real((5,)), "latent_dim": 2, **options})


# --- independent pixels -------------------------------------------------------------------------------------------

BITS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
GREYS = torch.tensor([[0.0, 2.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)


def test_binary_pixels_add_half_to_either_count() -> None:
    model = IndependentPixel(Binary((2,))).double()
    (mean_log_prob,) = model.maximum_likelihood(BITS)
    prob = torch.tensor([3.5 / 5, 1.5 / 5], dtype=torch.float64)
    truth = Bernoulli(prob).log_prob(BITS).sum(-1)
    torch.testing.assert_close(model.distribution().log_prob(BITS).detach(), truth)
    torch.testing.assert_close(model.params.detach(), Binary((2,)).marginal_params(BITS))
    assert mean_log_prob == pytest.approx(truth.mean().item())


def test_grey_pixels_are_smoothed_histograms() -> None:
    model = IndependentPixel(Quantized((2,), levels=3), pseudo_count=0.6).double()
    (mean_log_prob,) = model.maximum_likelihood(GREYS)
    share = torch.tensor([[1.2, 2.2, 0.2], [0.2, 0.2, 3.2]], dtype=torch.float64) / 3.6
    truth = torch.stack([share[0][GREYS[:, 0].long()].log(), share[1][GREYS[:, 1].long()].log()]).sum(0)
    torch.testing.assert_close(model.distribution().log_prob(GREYS).detach(), truth)
    assert mean_log_prob == pytest.approx(truth.mean().item())


def test_real_pixels_are_normals_with_a_floor() -> None:
    obs = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    model = IndependentPixel(Real((2,))).double()
    (mean_log_prob,) = model.maximum_likelihood(obs)
    law = Normal(torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([1.0, MIN_SCALE], dtype=torch.float64))
    assert mean_log_prob == pytest.approx(law.log_prob(obs).sum(-1).mean().item(), abs=1e-9)


@pytest.mark.parametrize("levels", [2, 3])
def test_masses_of_all_images_sum_to_one(levels: int) -> None:
    model = IndependentPixel(Binary((2, 1)) if levels == 2 else Quantized((2, 1), levels=levels)).double()
    model.maximum_likelihood((BITS if levels == 2 else GREYS).unsqueeze(-1))
    images = torch.tensor(list(itertools.product(range(levels), repeat=2)), dtype=torch.float64).unsqueeze(-1)
    assert model.distribution().log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("space", [Binary((2, 1)), Quantized((2, 1), levels=3), Real((2, 1))])
def test_pixels_broadcast_sample_and_train_by_plain_svi(space: Binary | Quantized | Real) -> None:
    obs = (BITS if isinstance(space, Binary) else GREYS + 0.5 * BITS[1:]).unsqueeze(-1).float()
    obs = obs.floor() if space.is_discrete else obs
    model, best = IndependentPixel(space), IndependentPixel(space, pseudo_count=1e-6)
    (target,) = best.maximum_likelihood(obs)
    law = model.distribution()
    assert (law.batch_shape, law.event_shape) == ((), (2, 1))
    assert law.expand((3, len(obs))).log_prob(obs).shape == (3, len(obs))
    assert train(model, obs, steps=400, lr=0.1) == pytest.approx(target, abs=0.05)
    draws = draws_of(model)
    assert draws.dtype == torch.float32
    space.check(draws)
    if space.is_discrete:
        images = torch.tensor(list(itertools.product(range(3 if space.num_params == 2 else 2), repeat=2)))
        images = images.float().unsqueeze(-1)
        mean = (model.distribution().log_prob(images).exp().view(-1, 1, 1) * images).sum(0).detach()
    else:
        mean = model.params[0].detach()
    assert ((draws.mean(0) - mean).abs() <= 4 * draws.std(0) / len(draws) ** 0.5 + 1e-6).all()


def test_independent_pixel_rejects() -> None:
    with pytest.raises(ValueError, match="pseudo_count must be positive, got 0"):
        IndependentPixel(Binary((2,)), pseudo_count=0.0)
    with pytest.raises(ValueError, match="independent pixels live on"):
        IndependentPixel("binary")
    with pytest.raises(ValueError, match="obs must have shape"):
        IndependentPixel(Binary((2,))).maximum_likelihood(torch.zeros(3, 3))
