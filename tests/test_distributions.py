"""Laws cut into grey levels: masses, tails, gradients, draws, against integrals and counts."""

import math

import pytest
import torch
from scipy import integrate, stats

from pyro_vae.distributions import (
    DiscretizedLogistic,
    DiscretizedNormal,
    log_interval_logistic,
    log_interval_normal,
)

LAWS = {DiscretizedLogistic: stats.logistic, DiscretizedNormal: stats.norm}
pytestmark = pytest.mark.parametrize("cls", LAWS, ids=lambda cls: cls.__name__)


def all_levels(levels):
    return torch.arange(levels, dtype=torch.float64)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("loc", [-50.0, 0.0, 3.3, 255.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 40.0])
def test_masses_sum_to_one(cls, levels, loc, scale):
    law = cls(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64), levels)
    assert float(law.log_prob(all_levels(levels)).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_a_mass_is_the_integral_of_the_density_over_the_rounding_interval(cls):
    law = cls(torch.tensor(2.3, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64), 6)
    density = LAWS[cls](2.3, 1.7).pdf
    for level, mass in enumerate(law.log_prob(all_levels(6)).exp().tolist()):
        low = -math.inf if level == 0 else level - 0.5
        high = math.inf if level == 5 else level + 0.5
        assert mass == pytest.approx(integrate.quad(density, low, high)[0], abs=1e-9)


def test_far_tails_keep_their_digits(cls):
    log_interval = {DiscretizedLogistic: log_interval_logistic, DiscretizedNormal: log_interval_normal}[cls]
    low, high = torch.tensor([-31.0, 30.0], dtype=torch.float64), torch.tensor([-30.0, 31.0], dtype=torch.float64)
    left, right = log_interval(low, high).tolist()
    assert left == pytest.approx(right, rel=1e-12)  # symmetric laws
    law = LAWS[cls]
    truth = law.logcdf(-30.0) + math.log1p(-math.exp(law.logcdf(-31.0) - law.logcdf(-30.0)))
    assert left == pytest.approx(truth, rel=1e-10)


def test_gradients_are_finite_everywhere_in_float32(cls):
    loc = torch.tensor([-100.0, 0.0, 8.0, 16.0, 200.0], requires_grad=True)
    log_scale = torch.tensor([-3.0, 0.0, 3.0, 1.0, -2.0], requires_grad=True)
    law = cls(loc, log_scale.exp(), 17)
    law.log_prob(torch.arange(17.0)[:, None]).sum().backward()
    assert loc.grad.isfinite().all()
    assert log_scale.grad.isfinite().all()


def test_gradient_against_finite_differences(cls):
    loc = torch.tensor([0.5, 8.0, 15.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.4, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([0.0, 6.0, 16.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: cls(a, b, 17).log_prob(value), (loc, scale))


def test_draws_follow_the_masses(cls):
    torch.manual_seed(0)
    law = cls(torch.tensor(3.0), torch.tensor(2.0), 8)
    counts = torch.bincount(law.sample((20_000,)).long(), minlength=8).double()
    expected = law.log_prob(torch.arange(8.0)).exp().double()
    assert stats.chisquare(counts, expected / expected.sum() * 20_000).pvalue > 1e-4


def test_the_mean_is_the_sum_over_levels(cls):
    law = cls(
        torch.tensor([-3.0, 2.2, 20.0], dtype=torch.float64), torch.tensor([1.0, 0.7, 3.0], dtype=torch.float64), 9
    )
    levels = all_levels(9)[:, None]
    truth = (levels * law.log_prob(levels).exp()).sum(0)
    torch.testing.assert_close(law.mean, truth, rtol=0, atol=1e-9)


def test_values_outside_the_levels_are_refused(cls):
    law = cls(torch.tensor(3.0), torch.tensor(2.0), 8, validate_args=True)
    for bad in (-1.0, 8.0, 2.5):
        with pytest.raises(ValueError, match="within the support"):
            law.log_prob(torch.tensor(bad))
