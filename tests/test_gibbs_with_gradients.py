"""Gibbs with gradients against enumeration: the transition matrix of a few bits, and draws of the kernel itself."""

import itertools
import math

import pytest
import torch

from pyro_vae.annealing import log_partition
from pyro_vae.gibbs_with_gradients import GibbsWithGradients, Tempered
from pyro_vae.randomness import own_randomness


def states(num_bits):
    """All states (2^D, D), float64; a state's number reads its bits from the left."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_bits)), dtype=torch.float64)


def numbers(values):
    powers = 2 ** torch.arange(values.shape[1] - 1, -1, -1, dtype=torch.float64)
    return (values @ powers).long()


def kernel_on(num_bits, num_flips, seed=0):
    """A kernel for f_β = p_0 exp(β g), with g neither linear nor quadratic in x."""
    with own_randomness(seed):
        first, second = torch.randn(num_bits, 5).double(), torch.randn(5).double()
        logits = torch.randn(num_bits).double()
    return GibbsWithGradients(lambda x: torch.tanh(2 * x @ first) @ (2 * second), logits, num_flips=num_flips)


def exact(kernel, beta):
    """Masses of all states by enumeration, from the definition of f_β."""
    every = states(len(kernel.logits))
    base = torch.distributions.Bernoulli(logits=kernel.logits).log_prob(every).sum(1)
    return torch.softmax(base + beta * kernel.gain(every), 0)


def proposal(kernel, beta):
    """Log q(i | x) of all states, by autograd of f_β written anew."""
    every = states(len(kernel.logits)).requires_grad_()
    log_f = every @ kernel.logits + beta * kernel.gain(every)  # log p_0 up to a constant
    (slope,) = torch.autograd.grad(log_f.sum(), every)
    return torch.log_softmax(((1 - 2 * every) * slope / 2).detach(), 1)


def transitions(kernel, beta):
    """P(x → x') over all flips that can be proposed, (2^D, 2^D)."""
    num_bits, most = len(kernel.logits), 2 * kernel.num_flips - 1
    every, log_q = states(num_bits), proposal(kernel, beta)
    here = torch.arange(len(every))
    matrix = torch.zeros(len(every), len(every), dtype=torch.float64)
    for length in range(1, most + 1):
        for path in itertools.product(range(num_bits), repeat=length):
            index = torch.tensor([*path, *[0] * (most - length)]).expand(len(every), -1)
            num = torch.full((len(every), 1), length)
            proposed, log_ratio = kernel.propose(kernel.at(every), index, num, beta)
            accepted = log_q[:, list(path)].sum(1).exp() / most * log_ratio.exp().clamp(max=1)
            matrix.index_put_((here, numbers(proposed.values)), accepted, accumulate=True)
    return matrix + torch.diag(1 - matrix.sum(1))


@pytest.mark.parametrize(("num_bits", "num_flips"), [(6, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_transition_matrix_is_in_detailed_balance(num_bits, num_flips, beta):
    """π_x P(x → x') = π_x' P(x' → x), by enumeration of states and flips; float64 rounding."""
    kernel = kernel_on(num_bits, num_flips)
    flow = exact(kernel, beta)[:, None] * transitions(kernel, beta)
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("num_bits", "num_flips"), [(6, 1), (3, 2)])
def test_every_state_is_reached_from_every_other(num_bits, num_flips):
    """The second largest modulus of an eigenvalue is below 1: no part is shut off and nothing goes in a circle."""
    values = torch.linalg.eigvals(transitions(kernel_on(num_bits, num_flips), 1.0)).abs().sort().values
    assert float(values[-1]) == pytest.approx(1, abs=1e-12)
    assert float(values[-2]) < 0.99


@pytest.mark.parametrize("num_flips", [1, 2])
def test_moves_have_the_probabilities_of_the_transition_matrix(num_flips):
    """100,000 moves from one state: every frequency within 5 standard errors (64 or fewer states)."""
    kernel, num = kernel_on(3, num_flips), 100_000
    expected = transitions(kernel, 0.7)[5]
    with own_randomness(1):
        moved = kernel.move(kernel.at(states(3)[5].expand(num, -1)), 0.7)
    seen = torch.bincount(numbers(moved.values), minlength=8) / num
    assert bool(((seen - expected).abs() <= 5 * (expected * (1 - expected) / num).sqrt()).all())
    again = kernel.at(moved.values)  # what is kept between moves is that of the state
    torch.testing.assert_close(moved.gain, again.gain)
    torch.testing.assert_close(moved.slope, again.slope)


@pytest.mark.parametrize("num_flips", [1, 4])
def test_exact_draws_stay_exact_draws(num_flips):
    """Image-shaped bits (2, 3), 100,000 chains, 3 moves: chi-square of 63 degrees below its 1 - 1e-4 quantile, 113."""
    flat = kernel_on(6, num_flips)
    kernel = GibbsWithGradients(lambda x: flat.gain(x.flatten(1)), flat.logits.view(2, 3), num_flips=num_flips)
    masses, num = exact(flat, 1.0), 100_000
    with own_randomness(2):
        bits = kernel.at(states(6)[torch.multinomial(masses, num, replacement=True)].view(-1, 2, 3))
        for _ in range(3):
            bits = kernel.move(bits)
    seen = torch.bincount(numbers(bits.values.flatten(1)), minlength=64)
    assert float(((seen - num * masses) ** 2 / (num * masses)).sum()) < 113


def test_log_density_and_start_are_those_of_the_path():
    kernel = kernel_on(6, 1)
    with own_randomness(3):
        start = kernel.start(100_000)
    share = kernel.logits.sigmoid()
    error = (start.values.mean(0) - share).abs() / (share * (1 - share) / 100_000).sqrt()
    assert float(error.max()) < 4.5  # the largest of 6
    assert bool((kernel.log_density(kernel.at(states(6)), 0.0).logsumexp(0).abs() < 1e-12).all())  # p_0 is normalised
    log_f = kernel.log_density(kernel.at(states(6)), 0.3)
    torch.testing.assert_close(log_f - log_f.logsumexp(0), exact(kernel, 0.3).log())


def test_evaluation_leaves_no_gradients_and_bad_flips_are_refused():
    weight = torch.nn.Parameter(torch.randn(4))
    kernel = GibbsWithGradients(lambda x: x @ weight, torch.zeros(4))
    bits = kernel.move(kernel.start(3))
    assert weight.grad is None
    assert not any(part.requires_grad for part in (bits.values, bits.gain, bits.slope))
    with pytest.raises(ValueError, match="num_flips must be a whole number of at least 1, got 0"):
        GibbsWithGradients(lambda x: x @ weight, torch.zeros(4), num_flips=0)


def test_a_gain_far_from_smooth_is_still_exact():
    """g is piecewise constant, its gradient 0: the proposals are blind, and the Metropolis test makes them right."""
    height = math.log(50.0)
    logits = torch.zeros(3).double()
    kernel = GibbsWithGradients(lambda x: height * (x.sum(1) > 2.5) + 0 * x.sum(1), logits, num_flips=2)
    flow = exact(kernel, 1.0)[:, None] * transitions(kernel, 1.0)
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("resample", [False, True])
def test_annealing_along_the_path_finds_log_z(resample):
    """log Σ_x p_0(x) exp g(x) over 64 states, within 4 standard errors of the estimate, and these are small."""
    kernel = kernel_on(6, 2)
    every = states(6)
    truth = float(kernel.log_density(kernel.at(every)).logsumexp(0))
    path = Tempered(kernel, torch.linspace(0, 1, 101).tolist())
    found = log_partition(path, lambda: kernel.start(500), resample=resample, seed=4)
    assert abs(found.log_z - truth) < 4 * found.se
    assert found.se < 0.02
    assert path.num_steps == found.num_steps == 100
