"""Sums over pixels and latents against torch's own laws in float64, autograd, and masses that add up to 1."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import independent, networks, traces
from pyro_vae.independent import bernoulli_pixels, diagonal_normal, log_mass
from pyro_vae.spaces import Binary

# forward-mode derivatives load a part of torch that warns of itself
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
EPS = torch.finfo(torch.float32).eps


def pixels(*shape, seed=0, scale=6.0, dtype=torch.float64):
    """Logits and bits; some logits are so large that σ is 0 or 1 to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = torch.where(torch.rand(shape, generator=generator) < 0.05, 20 * logits, logits)
    bits = torch.bernoulli(torch.full(shape, 0.3, dtype=torch.float64), generator=generator)
    return logits.to(dtype), bits.to(dtype)


def plain(logits, bits):
    return (bits * logits - torch.logaddexp(logits, torch.zeros_like(logits))).sum(-1)  # softplus cuts its tail


@pytest.mark.parametrize("width", [1, 2, 3, 17, 49, 63, 64, 65, 127, 784, 1000])
def test_every_width_gives_the_plain_sum(width):
    logits, bits = pixels(5, width)
    torch.testing.assert_close(log_mass(logits, bits), plain(logits, bits), rtol=1e-12, atol=1e-12)


def test_float32_is_off_by_its_rounding_only():
    logits, bits = pixels(400, 784, dtype=torch.float32)
    truth = plain(logits.double(), bits.double())
    error = log_mass(logits, bits).double() - truth
    size = (bits * logits).abs().sum(-1) + truth.abs()
    assert bool((error.abs() < 8 * EPS * size).all())  # sums of 784 numbers by halves: log2 784 roundings
    assert float(error.mean().abs()) < 1e-4


def test_products_of_sixty_four_halves_do_not_underflow():
    zeros = torch.zeros(3, 784)
    torch.testing.assert_close(log_mass(zeros, zeros), torch.full((3,), -784 * float(torch.tensor(2.0).log())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_logits_are_summed_in_float32(dtype):
    logits, bits = pixels(4, 784, dtype=dtype)
    assert log_mass(logits, bits).dtype == torch.float32
    torch.testing.assert_close(log_mass(logits, bits), log_mass(logits.float(), bits.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "shapes", [((7, 3, 5), (3, 5)), ((3, 5), (7, 3, 5)), ((5,), (4, 5)), ((1, 6, 5), (6, 5)), ((5,), (5,))]
)
@pytest.mark.parametrize("part", [8, 10**9])
def test_shapes_broadcast_and_parts_change_nothing(shapes, part, monkeypatch):
    monkeypatch.setattr(independent, "PART", part)
    logits, bits = pixels(*shapes[0])[0], pixels(*shapes[1], seed=1)[1]
    torch.testing.assert_close(log_mass(logits, bits), plain(logits, bits))


def test_arguments_are_left_as_they_were():
    logits, bits = pixels(6, 784)
    before = logits.clone(), bits.clone()
    log_mass(logits, bits)
    assert torch.equal(logits, before[0])
    assert torch.equal(bits, before[1])


@pytest.mark.parametrize("part", [8, 10**9])
def test_infinite_logits_are_certainties(part, monkeypatch):
    """A wrong one makes the mass 0, a right one adds nothing; the other rows keep their digits."""
    monkeypatch.setattr(independent, "PART", part)
    logits, bits = pixels(12, 70)
    plain_rows = log_mass(logits, bits)
    cases = [(torch.inf, 0, False), (torch.inf, 1, True), (-torch.inf, 0, True), (-torch.inf, 1, False)]
    cases += [(torch.inf, 0.5, False), (-torch.inf, 0.5, False)]
    for row, (logit, bit, _) in enumerate(cases):
        logits[row, 3], bits[row, 3] = logit, bit
    found, rest = log_mass(logits, bits), [each for each in range(70) if each != 3]
    for row, (*_, is_right) in enumerate(cases):
        truth = plain(logits[row, rest], bits[row, rest]) if is_right else torch.tensor(-torch.inf).double()
        torch.testing.assert_close(found[row], truth)
    assert torch.equal(found[len(cases) :], plain_rows[len(cases) :])
    torch.testing.assert_close(log_mass(logits[1], bits[1]), found[1])  # of one row alone
    torch.testing.assert_close(independent.pixel_sum(logits.clone(), bits, overwrite=True), found)


def test_particles_that_a_certain_pixel_rules_out_have_a_weight_of_zero():
    """The pixel is on for sure if z > 0, and a fair coin otherwise: p(on) = 3/4."""

    def model(obs):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(obs.new_zeros(1), 1.0).to_event(1))
            pyro.sample("obs", bernoulli_pixels(torch.where(z > 0, torch.inf, 0.0), 1), obs=obs)

    def guide(obs):
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(obs.new_zeros(len(obs), 1), 1.0).to_event(1))

    batch, estimator = pv.Batch(torch.tensor([[1.0], [0.0]])), pv.importance_sampling(2000)
    found = pv.log_likelihood(model, batch, guide=guide, estimator=estimator, device="cpu").log_prob
    error = 4 * 0.25 / 2000**0.5  # weights are 1 or 1/2, and 0 or 1/2
    assert np.exp(found) == pytest.approx([0.75, 0.25], abs=error)


def test_nan_logits_give_nan():
    logits, bits = pixels(3, 10)
    logits[1, 4] = torch.nan
    assert log_mass(logits, bits).isnan().tolist() == [False, True, False]


def law_of(logits, bits):
    return bernoulli_pixels(logits, 1).log_prob(bits)


def test_gradients_are_those_of_torchs_law_digit_for_digit():
    logits, bits = pixels(4, 3, 7)[0].requires_grad_(), pixels(3, 7)[1].requires_grad_()
    truth = dist.Bernoulli(logits=logits, validate_args=False).to_event(1).log_prob(bits)
    here, there = (torch.autograd.grad(each.sin().sum(), (logits, bits)) for each in (law_of(logits, bits), truth))
    assert all(torch.equal(*each) for each in zip(here, there, strict=True))


def test_first_and_second_derivatives_against_finite_differences():
    logits, bits = (value.clamp(-3, 3).requires_grad_() for value in pixels(2, 3, 7))
    assert torch.autograd.gradcheck(law_of, (logits, bits))
    assert torch.autograd.gradgradcheck(law_of, (logits, bits))


@FORWARD_MODE
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_function_transforms_equal_those_of_the_plain_sum(in_dims):
    logits, bits = pixels(3, 5)
    logits, bits = (value if dim == 0 else value[0] for value, dim in zip((logits, bits), in_dims, strict=True))

    def every(function):
        return torch.func.vmap(function, in_dims)(logits, bits)

    torch.testing.assert_close(every(law_of), every(plain))
    with torch.no_grad():
        torch.testing.assert_close(every(law_of), every(plain))
    torch.testing.assert_close(every(torch.func.grad(law_of)), every(torch.func.grad(plain)))
    torch.testing.assert_close(every(torch.func.hessian(law_of)), every(torch.func.hessian(plain)))


def test_a_traced_graph_holds_the_value_and_the_gradient():
    from torch.fx.experimental.proxy_tensor import make_fx

    def both(logits, bits):
        leaf = logits.detach().requires_grad_()
        value = law_of(leaf, bits).sum()
        with torch.no_grad():
            return value.detach(), law_of(logits, bits), torch.autograd.grad(value, leaf)[0]

    graph = make_fx(both)(*pixels(4, 20))
    logits, bits = pixels(4, 20, seed=1)
    torch.testing.assert_close(graph(logits, bits), both(logits, bits))


def test_the_masses_of_all_images_add_up_to_1():
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).double().reshape(-1, 2, 3)
    law = Binary((2, 3)).likelihood(pixels(1, 2, 3)[0])
    assert float(law.log_prob(images).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_the_law_of_pixels_is_what_bernoulli_is():
    logits, bits = pixels(4, 2, 3)
    law, truth = bernoulli_pixels(logits, 2), dist.Bernoulli(logits=logits).to_event(2)
    assert (law.batch_shape, law.event_shape) == (truth.batch_shape, truth.event_shape)
    assert isinstance(traces.innermost(law), dist.Bernoulli)
    assert law.support.is_discrete
    torch.testing.assert_close(law.mean, truth.mean)
    torch.testing.assert_close(law.entropy(), truth.entropy())
    expanded = law.expand((5, 4))
    assert type(expanded) is type(law)
    torch.testing.assert_close(expanded.log_prob(bits), truth.log_prob(bits).expand(5, 4))
    assert law.sample((9,)).shape == (9, 4, 2, 3)


def test_a_single_pixel_is_a_plain_bernoulli():
    assert type(Binary(()).likelihood(torch.zeros(4, 1))) is dist.Bernoulli


def test_a_law_that_checks_its_values_refuses_grey_ones():
    law = independent.BernoulliPixels(dist.Bernoulli(logits=torch.zeros(3), validate_args=True), 1)
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.full((3,), 0.5))


# Normals


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc, log_scale = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return loc, log_scale.exp()


@pytest.mark.parametrize("expanded", [(4,), (3, 4), (5, 3, 4)])
def test_diagonal_normals_equal_torchs(expanded):
    loc, scale = normals(4, 6)
    law = diagonal_normal(loc, scale).expand(expanded)
    truth = torch.distributions.Normal(loc, scale)
    value = torch.randn(*expanded, 6, dtype=torch.float64)
    assert type(law) is independent.DiagonalNormal
    torch.testing.assert_close(law.log_prob(value), truth.log_prob(value).sum(-1))


def test_normals_with_one_scale_for_all_latents():
    scale = torch.tensor(2.0).double()
    law = diagonal_normal(torch.zeros(6).double(), scale.expand(6)).expand((3,))
    value = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(value), torch.distributions.Normal(0.0, scale).log_prob(value).sum(-1))


def test_derivatives_of_a_normal_against_finite_differences():
    loc, scale = (value.requires_grad_() for value in normals(2, 3))
    value = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def density(loc, scale, value):
        return diagonal_normal(loc, scale).expand((4, 2)).log_prob(value)

    assert torch.autograd.gradcheck(density, (loc, scale, value))
    assert torch.autograd.gradgradcheck(density, (loc, scale, value))


def test_divergence_and_normals_are_still_found():
    first, second = diagonal_normal(*normals(4, 6)), diagonal_normal(*normals(4, 6, seed=1))
    truth = kl_divergence(*(torch.distributions.Normal(*normals(4, 6, seed=seed)) for seed in (0, 1))).sum(-1)
    torch.testing.assert_close(kl_divergence(first, second), truth)
    assert traces.independent_normals(first) is first.base_dist


# tanh


def test_tanh_without_gradients_is_within_rounding_of_tanh():
    values = torch.cat([torch.linspace(-12, 12, 10_001), torch.tensor([-1e4, 1e4, 1e-6, 0.0])])
    here, truth = networks.Tanh()(values), values.double().tanh()
    assert float((here - truth).abs().max()) < 2e-7
    assert float(here[-1]) == 0
    assert networks.Tanh()(torch.tensor(torch.nan)).isnan()


def test_tanh_with_gradients_is_torchs():
    values = torch.linspace(-3, 3, 7, requires_grad=True)
    assert torch.equal(networks.Tanh()(values), values.tanh())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tanh_of_short_numbers_is_torchs(dtype):
    values = torch.linspace(-3, 3, 1001).to(dtype)
    assert torch.equal(networks.Tanh()(values), values.tanh())
