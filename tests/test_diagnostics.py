"""What the weights say of themselves, against the definitions and against ArviZ."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_vae import diagnostics


def tail(log_weights: torch.Tensor) -> torch.Tensor:
    return log_weights.topk(diagnostics.tail_length(len(log_weights)) + 1, 0).values


def arviz_khat(log_weights: np.ndarray) -> tuple[float, int]:
    """K-hat by ArviZ, and the number of weights that it looks at: 0.23 rounds it up as PSIS does, 1.x down."""
    length = min(len(log_weights) / 5, 3 * math.sqrt(len(log_weights)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its next version at import
        import arviz

        if hasattr(arviz, "psislw"):
            return float(arviz.psislw(log_weights)[1]), math.ceil(length)
        from arviz_stats.base import array_stats

        return float(array_stats.psislw(-log_weights)[1]), math.floor(length)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("num_particles", [100, 5000])
def test_khat_equals_arviz(scale, num_particles):
    log_weights = scale * torch.randn(num_particles, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, length = arviz_khat(log_weights[:, 0].numpy())
    ours = float(diagnostics.pareto_khat(log_weights.topk(length + 1, 0).values)[0])
    assert ours == pytest.approx(theirs, abs=1e-6)  # the same fit in another order of summation


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


def test_khat_where_the_largest_weights_tie_is_not_defined():
    weights = torch.cat([torch.zeros(900, 1), torch.full((60, 1), 0.7)]).double()
    assert math.isnan(float(diagnostics.pareto_khat(tail(weights))[0]))


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


def growing(first, second, num_data=400, noise=0.5):
    """L at K/4, K/2 and K whose mean gains are `first` and `second`, with noise of each datum."""
    generator = torch.Generator().manual_seed(0)
    jitter = noise * torch.randn(2, num_data, generator=generator)
    jitter -= jitter.mean(1, keepdim=True)
    quarter = torch.full((num_data,), -5.0)
    half = quarter + first + jitter[0]
    return quarter, half, half + second + jitter[1]


def test_doubling_check_finds_the_limit_of_a_geometric_approach():
    bias, ratio = diagnostics.doubling_check(*growing(0.4, 0.2))  # what is missing halves: 0.2 is left
    assert bias == pytest.approx(0.2, abs=1e-5)
    assert ratio == pytest.approx(0.5, abs=1e-5)


def test_doubling_check_of_a_series_that_does_not_settle():
    bias, ratio = diagnostics.doubling_check(*growing(0.4, 0.36))
    assert bias is None
    assert ratio == pytest.approx(0.9, abs=1e-5)


def test_doubling_check_takes_no_noise_for_growth():
    assert diagnostics.doubling_check(*growing(0.0, 0.0, noise=0.0)) == (None, None)
    assert diagnostics.doubling_check(*growing(0.4, 0.01)) == (None, None)  # 0.01 is less than 3 x 0.5/20
    assert diagnostics.doubling_check(*growing(0.4, 0.2, num_data=1, noise=0.0)) == (None, None)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_doubling_check_rarely_speaks_of_healthy_weights(scale):
    generator, spoken = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        weights = scale * torch.randn(1000, 200, generator=generator, dtype=torch.float64)
        parts = [weights[:k].logsumexp(0) - math.log(k) for k in (250, 500, 1000)]
        ratio = diagnostics.doubling_check(*parts)[1]
        spoken += ratio is not None and ratio > diagnostics.RATIO_LIMIT
    assert spoken <= 2  # 5% of 40


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-700, 700), min_size=2, max_size=40),
    st.floats(-1e4, 1e4),
)
def test_ess_lies_between_one_and_the_number_of_particles_and_ignores_a_common_factor(values, shift):
    weights = torch.tensor(values, dtype=torch.float64)[:, None]
    ess = float(diagnostics.effective_sample_size(weights)[0])
    assert 1 - 1e-9 <= ess <= len(values) * (1 + 1e-9)
    shifted = float(diagnostics.effective_sample_size(weights + shift)[0])
    assert shifted == pytest.approx(ess, rel=1e-7)  # log weights of 1e4 keep twelve digits, doubled and subtracted
