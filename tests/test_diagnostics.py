"""What the weights say of themselves, against the definitions and against ArviZ."""

import math
import warnings

import numpy as np
import pytest
import torch

from pyro_vae import diagnostics


def tail(log_weights: torch.Tensor) -> torch.Tensor:
    return log_weights.topk(diagnostics.tail_length(len(log_weights)) + 1, 0).values


def arviz_khat(log_weights: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its next version at import
        import arviz

        if hasattr(arviz, "psislw"):
            return float(arviz.psislw(log_weights)[1])
        from arviz_stats.base import array_stats

        return float(array_stats.psislw(-log_weights)[1])


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("num_particles", [100, 5000])
def test_khat_equals_arviz(scale, num_particles):
    log_weights = scale * torch.randn(num_particles, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = float(diagnostics.pareto_khat(tail(log_weights))[0])
    assert ours == pytest.approx(arviz_khat(log_weights[:, 0].numpy()), abs=1e-6)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_pareto_weights(shape):
    uniform = torch.rand(100_000, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    khat = diagnostics.pareto_khat(tail(-shape * uniform.log()))  # w = u^-k is Pareto with shape k
    # 949 tail weights: sd of the fit about (1 + k)/sqrt(949), of the mean of 20 far less; the prior pulls by 10/959
    assert abs(float(khat.mean()) - shape) < 4 * (1 + shape) / math.sqrt(949 * 20) + 0.02


def test_khat_of_equal_weights_and_of_weights_too_far_apart():
    assert float(diagnostics.pareto_khat(torch.zeros(20, 1))[0]) == -math.inf
    spread = torch.linspace(0, 1e6, 20)[:, None]
    assert float(diagnostics.pareto_khat(spread)[0]) == math.inf


def test_effective_sample_size_by_hand():
    weights = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    np.testing.assert_allclose(diagnostics.effective_sample_size(weights.log()), [16 / 10, 2])


def test_delta_variance_is_the_sample_variance_of_the_relative_weights():
    weights = torch.rand(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relative = weights / weights.mean(0)
    ess = diagnostics.effective_sample_size(weights.log())
    assert float(diagnostics.delta_variance(ess, 50)[0]) == pytest.approx(float(relative.var(0)[0]) / 50)


def test_delta_variance_of_one_particle_is_unknown():
    assert float(diagnostics.delta_variance(torch.ones(1), 1)[0]) == math.inf


@pytest.mark.parametrize(("num_particles", "expected"), [(10, 2), (100, 20), (5000, 213), (100_000, 949)])
def test_tail_length(num_particles, expected):
    assert diagnostics.tail_length(num_particles) == expected


def test_doubling_check_finds_the_limit_of_a_geometric_approach():
    limit, ratio = torch.tensor([-5.0]), 0.5  # L_K = limit - c/K: every doubling halves what is missing
    quarter, half, whole = limit - 0.8, limit - 0.4, limit - 0.2
    bias, found = diagnostics.doubling_check(quarter, half, whole)
    assert bias == pytest.approx(0.2, abs=1e-6)
    assert found == pytest.approx(ratio, abs=1e-6)


def test_doubling_check_without_growth_or_without_end():
    level = torch.tensor([-5.0])
    assert diagnostics.doubling_check(level, level, level) == (0.0, None)
    assert diagnostics.doubling_check(level - 3, level - 2, level)[0] is None
