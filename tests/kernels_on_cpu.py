"""What the kernels give when Triton interprets them on a CPU, against float64: run by test_kernels.py on its own."""

import torch
from torch.nn.functional import softplus

from pyro_vae import kernels

SIZES = [(260, 1, 200, 70), (9, 3, 50, 30), (5, 1, 16, 64)]  # particles, data, width, pixels


def log_mass(logits, bits):
    return (bits.double() * logits.double() - softplus(logits.double())).sum(-1)


def check_pixels(num_particles, num_data, width, num_pixels):
    hidden, bias = torch.randn(num_particles, num_data, width).tanh(), torch.randn(num_pixels)
    weight = (torch.randn(num_pixels, width) * 3 / width**0.5).half()
    bits = torch.bernoulli(torch.full((num_data, num_pixels), 0.3))
    logits = hidden.half().double() @ weight.double().T + bias.double()
    found, overflow = kernels.layer_log_mass(hidden, weight, bias, bits)
    # Sums of float32: a few of its roundings of the largest sum.
    torch.testing.assert_close(found.double(), log_mass(logits, bits), rtol=1e-6, atol=1e-5)
    assert not overflow
    found, _ = kernels.layer_log_mass(hidden, weight, None, bits)
    torch.testing.assert_close(found.double(), log_mass(logits - bias.double(), bits), rtol=1e-6, atol=1e-5)
    grey = torch.rand(num_particles, num_data, num_pixels)
    for observed in (bits.expand_as(grey), grey):
        found = kernels.pixel_log_mass(logits.float(), observed)
        torch.testing.assert_close(found.double(), log_mass(logits.float(), observed), rtol=1e-6, atol=1e-5)


def check_infinite_logits():
    """Certain pixels: log 1 = 0 where they are as expected, log 0 where they are not; NaN stays."""
    inf = float("inf")
    logits, bits = torch.tensor([[inf, -inf, 0.0], [inf, 0.0, 1.0], [float("nan"), 0.0, 0.0]]), torch.zeros(3, 3)
    bits[0, 0] = 1
    found = kernels.pixel_log_mass(logits, bits)
    torch.testing.assert_close(found[0], torch.tensor(0.5).log())
    assert found[1] == -inf
    assert found[2].isnan()


def check_latents(num_particles, num_data, width):
    value, shape = torch.randn(num_particles, num_data, width), (num_particles, num_data, width)
    loc, scale, zero = torch.randn(num_data, width), torch.rand(num_data, width) + 0.1, torch.zeros(())
    for mean, deviation in ((loc, scale), (zero, zero + 1), (loc[:, :1], scale), (value / 2, value.abs() + 1)):
        found = kernels.square_distance(value, mean.expand(shape), deviation.expand(shape))
        truth = ((value.double() - mean) / deviation).square().sum(-1)
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)


def check_overflow():
    hidden = torch.zeros(5, 2, 50)
    hidden[3, 1, 49] = 1e6  # beyond the largest float16
    masses, overflow = kernels.layer_log_mass(hidden, torch.ones(30, 50).half(), None, torch.zeros(2, 30))
    assert overflow
    assert masses.isfinite().sum() == 9


def check_parts():
    for width in range(kernels.NARROWEST, kernels.WIDEST + 1, 7):
        parts = kernels.parts(width)
        assert width <= sum(parts) < width + 16 + width // 4
        assert all(part == 0 or (part >= kernels.NARROWEST and part & (part - 1) == 0) for part in parts)


if __name__ == "__main__":
    torch.manual_seed(0)
    for sizes in SIZES:
        check_pixels(*sizes)
        check_latents(*sizes[:3])
    check_infinite_logits()
    check_overflow()
    check_parts()
