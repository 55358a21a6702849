"""Triton kernels for a GPU: sums over the pixels and the latents of many rows, each in one pass, without gradients."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_PIXELS = 4000  # one factor from [1, 2] for each tile of pixels: their product stays a float32
MAX_LATENTS = 1024
MAX_ROWS = 2**31 - 2**12  # that 32 bits count
NARROWEST, WIDEST = 16, 512  # numbers of a hidden row that is held on the chip
# Sizes of tiles, warps and stages: the fastest of those that were tried on an H200.
LAYER_ROWS, LAYER_PIXELS, LAYER_WARPS, LAYER_STAGES = 256, 32, 8, 3
PIXEL_ROWS, PIXELS = 4, 128
LATENT_NUMBERS = 1024


def takes_layer(weight: Tensor) -> bool:
    """Whether `layer_log_mass` is for a layer (D, H) of that size."""
    return NARROWEST <= weight.shape[1] <= WIDEST and len(weight) <= MAX_PIXELS


def layer_log_mass(rows: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Σ_d [x_d l_d - softplus(l_d)] of logits l = W h + b that never leave the chip, nats.

    The pixels are those of a datum, which all of its particles share. Products are of float16 numbers, sums float32.

    Args:
        rows: h, shape (K, n, H), K particles of each of n data, rounded to float16 on the way in.
        weight: W, shape (D, H), float16.
        bias: b, shape (D,), or None.
        bits: x, shape (n, D).

    Returns:
        Log masses (K, n), float32, and whether a number of h is infinite in float16, a boolean without dimensions; None
        where the chip is too small for the tiles.
    """
    num_particles, num_data, width = rows.shape
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    masses = torch.empty(num_particles, num_data, device=rows.device)
    overflow = torch.zeros(1, dtype=torch.int32, device=rows.device)
    tensors = [each.contiguous() for each in (rows, weight, bias.float(), bits.float())]
    grid = num_data, triton.cdiv(num_particles, LAYER_ROWS)
    sizes = num_particles, num_data, len(weight), width, *parts(width)
    tiles = {"ROWS": LAYER_ROWS, "PIXELS": LAYER_PIXELS, "num_warps": LAYER_WARPS, "num_stages": LAYER_STAGES}
    try:
        _layer_kernel[grid](*tensors, masses, overflow, *sizes, **tiles)
    except OutOfResources:
        return None
    return masses, overflow[0] > 0


def parts(width: int) -> tuple[int, int, int]:
    """Three powers of two, or zeros, that cover a width: tiles have no other sizes, and one that did would be large."""
    found: list[int] = []
    left = width
    while len(found) < 2 and left >= NARROWEST:
        found.append(1 << left.bit_length() - 1)
        left -= found[-1]
    found.append(max(NARROWEST, 1 << (left - 1).bit_length()) if left else 0)
    first, second, third = (*found, 0, 0)[:3]
    return first, second, third


def takes_pixels(logits: Tensor) -> bool:
    """Whether `pixel_log_mass` is for logits of that size and type."""
    is_single = logits.dtype == torch.float32 and logits.ndim > 1
    return is_single and logits.shape[-1] <= MAX_PIXELS and logits.shape[:-1].numel() < MAX_ROWS


def pixel_log_mass(logits: Tensor, bits: Tensor) -> Tensor:
    r"""Σ_d [x_d l_d - softplus(l_d)], read once.

    softplus(l) = max(l, 0) + log(1 + exp(-|l|)), and the logarithms of several pixels are that of a product.

    Args:
        logits: l, shape (..., D), float32.
        bits: x, of the same shape; what repeats along the first dimensions is read where it is.

    Returns:
        Shape (...), nats.
    """
    num_pixels, logits, bits = logits.shape[-1], logits.contiguous(), repeated_rows(bits).float()
    masses = torch.empty(logits.shape[:-1], device=logits.device)
    num_rows = masses.numel()
    grid = (triton.cdiv(num_rows, PIXEL_ROWS),)
    _pixel_kernel[grid](logits, bits, masses, num_rows, len(bits), num_pixels, ROWS=PIXEL_ROWS, PIXELS=PIXELS)
    return masses


def takes_latents(value: Tensor, loc: Tensor, scale: Tensor) -> bool:
    """Whether `square_distance` is for these."""
    return (
        value.ndim > 1 and value.shape[-1] <= MAX_LATENTS and {v.dtype for v in (value, loc, scale)} == {torch.float32}
    )


def square_distance(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    r"""Σ_j ((z_j - μ_j)/σ_j)², read once.

    Args:
        value: z, shape (..., D), float32.
        loc: μ, of the same shape; what repeats along the first dimensions is read where it is.
        scale: σ, the same.

    Returns:
        Shape (...).
    """
    width, value, loc, scale = value.shape[-1], value.contiguous(), repeated_rows(loc), repeated_rows(scale)
    squares = torch.empty(value.shape[:-1], device=value.device)
    num_rows, columns = squares.numel(), triton.next_power_of_2(width)
    rows = max(1, LATENT_NUMBERS // columns)
    grid = (triton.cdiv(num_rows, rows),)
    lengths = num_rows, len(loc), len(scale), width
    _square_kernel[grid](value, loc, scale, squares, *lengths, ROWS=rows, COLUMNS=columns)
    return squares


def repeated_rows(values: Tensor) -> Tensor:
    """The rows (P, D) that come again and again in (..., D): row r of all is row r modulo P of these."""
    lead = 0
    while lead < values.ndim - 1 and (values.stride(lead) == 0 or values.shape[lead] == 1):
        lead += 1
    return values[(0,) * lead].contiguous().reshape(-1, values.shape[-1])


@triton.jit
def _layer_kernel(
    rows,
    weight,
    bias,
    bits,
    masses,
    overflow,
    num_particles,
    num_data,
    num_pixels: tl.constexpr,
    width: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Log masses of one datum by `ROWS` of its particles; the width of a row is cut into three parts."""
    datum = tl.program_id(0)
    particles = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = particles.to(tl.int64) * num_data + datum
    inside = particles < num_particles
    h_1 = _part(rows, row, inside, 0, width, FIRST)
    _report_infinite(h_1, overflow)
    if SECOND > 0:
        h_2 = _part(rows, row, inside, FIRST, width, SECOND)
        _report_infinite(h_2, overflow)
    if THIRD > 0:
        h_3 = _part(rows, row, inside, FIRST + SECOND, width, THIRD)
        _report_infinite(h_3, overflow)
    gains = tl.zeros((ROWS, PIXELS), tl.float32)
    products = tl.full((ROWS, PIXELS), 1.0, tl.float32)
    for start in range(0, num_pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        is_pixel = pixel < num_pixels
        logits = tl.dot(h_1, tl.trans(_part(weight, pixel, is_pixel, 0, width, FIRST)))
        if SECOND > 0:
            logits = tl.dot(h_2, tl.trans(_part(weight, pixel, is_pixel, FIRST, width, SECOND)), logits)
        if THIRD > 0:
            logits = tl.dot(h_3, tl.trans(_part(weight, pixel, is_pixel, FIRST + SECOND, width, THIRD)), logits)
        logits += tl.load(bias + pixel, mask=is_pixel, other=0.0)[None, :]
        observed = tl.load(bits + datum.to(tl.int64) * num_pixels + pixel, mask=is_pixel, other=0.0)[None, :]
        gains += _gain(observed, logits)
        products *= tl.where(is_pixel[None, :], 1.0 + tl.exp2(tl.abs(logits) * -LOG2_E), 1.0)
    tl.store(masses + row, tl.sum(gains - tl.log(products), 1), mask=inside)


@triton.jit
def _part(values, row, is_row, start, width: tl.constexpr, SIZE: tl.constexpr):
    """Columns start..start + SIZE of some rows of a matrix, in float16, zeros beyond its edges."""
    column = start + tl.arange(0, SIZE)
    mask = is_row[:, None] & (column < width)[None, :]
    return tl.load(values + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float16)


@triton.jit
def _gain(observed, logits):
    """Of a pixel, x l - max(l, 0), at infinite logits as well if x is a bit."""
    below, above = tl.minimum(logits, 0.0), tl.maximum(logits, 0.0)
    return tl.where(observed == 1.0, below, tl.where(observed == 0.0, -above, observed * logits - above))


@triton.jit
def _report_infinite(values, overflow):
    """Set the flag if there is an infinity."""
    is_infinite = tl.max(tl.max(tl.where(tl.abs(values) == float("inf"), 1, 0), 1), 0)
    tl.atomic_or(overflow, 1, mask=is_infinite > 0)


@triton.jit
def _pixel_kernel(
    logits,
    bits,
    masses,
    num_rows,
    num_repeated,
    num_pixels: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Log masses of `ROWS` rows."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = number < num_rows
    observed_row = (number % num_repeated).to(tl.int64)
    row = number.to(tl.int64)  # of a remainder it takes much longer than 32 bits, of a place in memory 32 are too few
    gains = tl.zeros((ROWS, PIXELS), tl.float32)
    products = tl.full((ROWS, PIXELS), 1.0, tl.float32)
    for start in range(0, num_pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = inside[:, None] & (pixel < num_pixels)[None, :]
        logit = tl.load(logits + row[:, None] * num_pixels + pixel[None, :], mask=mask, other=0.0)
        observed = tl.load(bits + observed_row[:, None] * num_pixels + pixel[None, :], mask=mask, other=0.0)
        gains += _gain(observed, logit)
        products *= tl.where(mask, 1.0 + tl.exp2(tl.abs(logit) * -LOG2_E), 1.0)
    tl.store(masses + row, tl.sum(gains - tl.log(products), 1), mask=inside)


@triton.jit
def _square_kernel(
    value,
    loc,
    scale,
    squares,
    num_rows,
    num_locs,
    num_scales,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Squared distances of `ROWS` rows."""
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = number < num_rows
    row, column = number.to(tl.int64), tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < width)[None, :]
    z = tl.load(value + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    mean = tl.load(loc + (number % num_locs).to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    deviation = tl.load(
        scale + (number % num_scales).to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=1.0
    )
    distance = tl.div_rn(z - mean, deviation)
    tl.store(squares + row, tl.sum(distance * distance, 1), mask=inside)
