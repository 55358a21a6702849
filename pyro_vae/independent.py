"""Laws of independent coordinates whose log-probability is taken as one sum: black and white pixels, normal latents."""

import functools
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

PART = 2**19  # numbers that are summed together on a CPU: two temporaries of that size stay in its cache
HALVINGS = 6  # a product of 2^6 numbers from [1/2, 1] is at least 2^-64, far from the smallest float32
HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)

_takes_kernels = False  # inside `by_kernels()`


class BernoulliPixels(dist.Independent):
    r"""Independent Bernoulli pixels by logits l: log p(x) = Σ_d [x_d l_d - softplus(l_d)], nats.

    The same law as `Bernoulli(logits=l).to_event(n)`. Where no gradient is recorded, `log_mass` stands in for the sum
    over single pixels; where one is, torch's own sum is faster there and back.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of pixels (..., *shape), shape (...)."""
        logits, start = self.base_dist.logits, -self.reinterpreted_batch_ndims
        if self._validate_args or (torch.is_grad_enabled() and (logits.requires_grad or value.requires_grad)):
            return super().log_prob(value)
        return log_mass(logits.flatten(start), value.to(logits.dtype).flatten(start))


def bernoulli_pixels(logits: Tensor, num_dims: int) -> Any:
    """Bernoulli pixels by logits (..., *shape), where `shape` has `num_dims` entries."""
    pixels = dist.Bernoulli(logits=logits, validate_args=False)
    return BernoulliPixels(pixels, num_dims) if num_dims else pixels


def log_mass(logits: Tensor, bits: Tensor) -> Tensor:
    r"""Σ_d [x_d l_d - softplus(l_d)], with one logarithm for many pixels.

    softplus(l) = max(l, 0) - log σ(|l|), and Σ_d log σ(|l_d|) is the logarithm of products of up to 64 factors, each of
    them in [1/2, 1]: nothing is left out. Exponential and logarithm of every pixel are most of what a plain sum costs.
    It works in place on numbers of its own, and has no gradient.

    Args:
        logits: l, shape (..., D); what is shorter than float32 is summed in float32.
        bits: x, broadcastable with `logits`.

    Returns:
        Shape (...), nats.
    """
    if has_torch_function((logits, bits)):
        return handle_torch_function(log_mass, (logits, bits), logits, bits)
    if logits.element_size() < 4:
        logits, bits = logits.float(), bits.float()
    logits, bits = torch.broadcast_tensors(logits, bits)
    num_parts = -(-logits.numel() // PART) if logits.device.type == "cpu" and logits.ndim > 1 else 1
    parts = zip(logits.chunk(num_parts), bits.chunk(num_parts), strict=True)
    masses = [pixel_sum(*part) for part in parts]
    mass = torch.cat(masses) if len(masses) > 1 else masses[0]
    if _holds_nan(mass):
        infinite = mass.isnan()
        mass[infinite] = one_by_one(logits[infinite], bits[infinite])
    return mass


def pixel_sum(logits: Tensor, bits: Tensor, *, overwrite: bool = False) -> Tensor:
    """`log_mass` of one part, finite logits given; with `overwrite` they are gone afterwards, and may be infinite."""
    kernels = kernels_for(logits)
    if kernels is not None and kernels.takes_pixels(logits):
        masses: Tensor = kernels.pixel_log_mass(logits, bits)
        return masses
    missed = torch.addcmul(logits.relu(), logits, bits, value=-1).sum(-1)  # Σ max(l, 0) - x l
    if overwrite and _holds_nan(missed):
        return log_mass(logits, bits)
    factors = (logits.abs_() if overwrite else logits.abs()).sigmoid_()
    return products(factors, HALVINGS).log().sum(-1) - missed


def one_by_one(logits: Tensor, bits: Tensor) -> Tensor:
    r"""Σ_d [x_d log σ(l_d) + (1 - x_d) log σ(-l_d)], where 0 times anything is 0: infinite logits are certainties."""
    on, off = bits * functional.logsigmoid(logits), (1 - bits) * functional.logsigmoid(-logits)
    return (on.masked_fill(bits == 0, 0) + off.masked_fill(bits == 1, 0)).sum(-1)


def _holds_nan(values: Tensor) -> bool:
    """Whether one of these, which are not infinite on both sides, is NaN: an infinite logit was multiplied by 0.

    Not asked on a GPU, which would be waited for, nor where there are no numbers to look at.
    """
    if values.device.type != "cpu":
        return False
    try:
        return math.isnan(values.sum())
    except RuntimeError:  # inside `torch.func.vmap`, and where operations are written down as a graph
        return False


def products(factors: Tensor, num_halvings: int) -> Tensor:
    """Products of up to 2^num_halvings of the numbers (..., D), which are lost; shape (..., D / 2^num_halvings)."""
    width = factors.shape[-1]
    for _ in range(num_halvings):
        half = -(-width // 2)
        factors[..., : width - half].mul_(factors[..., half:width])  # of an odd number the one in the middle waits
        width = half
    return factors[..., :width]


@contextmanager
def by_kernels() -> Iterator[None]:
    """Inside, and where no gradient is recorded, a GPU takes these sums by kernels of its own.

    Not everywhere: whoever writes down the operations of a pair, to run them as a graph, would miss a kernel.
    """
    global _takes_kernels
    before, _takes_kernels = _takes_kernels, True
    try:
        yield
    finally:
        _takes_kernels = before


def kernels_for(values: Tensor) -> ModuleType | None:
    """`pyro_vae.kernels` inside `by_kernels()`, where there is a GPU for them, and Triton."""
    return _kernels_on(values.device) if _takes_kernels and not torch.is_grad_enabled() else None


@functools.cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return importlib.import_module("pyro_vae.kernels")


class DiagonalNormal(dist.Independent):
    r"""Independent normals: log p(z) = -½ Σ_j ((z_j - μ_j)/σ_j)² - Σ_j log σ_j - (D/2) log 2π, nats.

    The same law as `Normal(μ, σ).to_event(n)`; particles that share σ share its logarithm.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, μ + σ ε; where kernels are taken in one operation less."""
        law = self.base_dist
        if kernels_for(law.loc) is None:
            return super().rsample(sample_shape)
        noise = torch.randn(self._extended_shape(sample_shape), dtype=law.loc.dtype, device=law.loc.device)
        return torch.addcmul(law.loc, law.scale, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of (..., *event_shape), shape (...)."""
        law, dims = self.base_dist, tuple(range(-self.reinterpreted_batch_ndims, 0))
        if self._validate_args:
            law._validate_sample(value)
        square = _square_distance(value, law.loc, law.scale, dims)
        log_scale = _once(law.scale).log()
        log_scale = log_scale.expand(*log_scale.shape[: dims[0]], *self.event_shape)
        return -0.5 * square - (log_scale + HALF_LOG_TAU).sum(dims)


def diagonal_normal(loc: Tensor, scale: Tensor) -> DiagonalNormal:
    """Normals with mean and scale of shape (..., D), independent along the last dimension."""
    return DiagonalNormal(dist.Normal(loc, scale, validate_args=False), 1)


def _square_distance(value: Tensor, loc: Tensor, scale: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Σ ((z - μ)/σ)² over the last dimensions."""
    kernels = kernels_for(value) if len(dims) == 1 else None
    if kernels is not None and kernels.takes_latents(value, loc, scale):
        squares: Tensor = kernels.square_distance(*torch.broadcast_tensors(value, loc, scale))
        return squares
    return ((value - loc) / scale).square().sum(dims)


def _once(values: Tensor) -> Tensor:
    """What `expand` made copies of, along every dimension in which it did."""
    for dim, (size, stride) in enumerate(zip(values.shape, values.stride(), strict=True)):
        values = values.narrow(dim, 0, 1) if size > 1 and stride == 0 else values
    return values
