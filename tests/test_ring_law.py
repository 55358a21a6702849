"""The ring of notebooks/ring.py: its density against autograd's Jacobian, an integral that is 1, and its own draws."""

import math
import sys
from pathlib import Path

import pyro
import pytest
import torch

import pyro_vae as pv

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
from ring_law import RingLaw, ring


def test_density_is_that_of_the_normal_over_the_jacobian():
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(ring, row) for row in z])
    normal = -z.square().sum(-1) / 2 - math.log(2 * math.pi)
    torch.testing.assert_close(RingLaw().log_prob(ring(z)), normal - jacobian.det().abs().log())


def test_density_integrates_to_one_over_the_plane():
    axis = torch.linspace(-2.5, 2.5, 2001, dtype=torch.float64)  # |x| > 2.5 has probability exp(-112)
    total = RingLaw().log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    # at the unit circle the density is continuous with a kink: the error of the sum is of order step²
    assert float(total) == pytest.approx(1, abs=1e-4)


def test_there_is_nothing_inside_the_unit_circle_nor_on_it():
    inside = torch.tensor([[0.0, 0.0], [0.6, -0.7], [1.0, 0.0]])
    assert torch.all(RingLaw().log_prob(inside) == -math.inf)
    assert torch.all(ring(torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))).norm(dim=-1) > 1)


def test_mean_of_log_density_over_draws():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        found = RingLaw().log_prob(RingLaw().sample((20_000,)))
    rho = torch.linspace(0, 12, 100_001, dtype=torch.float64)
    shrink = torch.trapezoid((rho / 10).log1p() * rho * (-rho.square() / 2).exp(), rho)
    # E log ρ = (log 2 - γ)/2 and E ρ²/2 = 1
    truth = (math.log(2) - 0.5772156649015329) / 2 - 1 - math.log(math.pi / 5) - float(shrink)
    assert float(found.mean()) == pytest.approx(truth, abs=4 * float(found.std()) / math.sqrt(len(found)))


def test_log_likelihood_takes_it_as_an_exact_model():
    def truth(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", RingLaw(), obs=obs)

    obs = ring(torch.randn(30, 2, generator=torch.Generator().manual_seed(2)))
    result = pv.log_likelihood(truth, pv.Batch(obs, space=pv.Real((2,))))
    assert result.direction == "exact"
    torch.testing.assert_close(torch.as_tensor(result.log_prob), RingLaw().log_prob(obs))
