"""The last linear layer and the pixels that it gives as one Triton kernel: on a GPU the logits never leave the chip."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

PRECISIONS = ("float32", "tf32", "float16")
NARROWEST, WIDEST = 16, 512  # numbers of a hidden row; in float32 half as many stay on the chip
MAX_PIXELS = 4000  # one factor from [1, 2] for each tile of pixels: their product stays a float32
TF32_LOW = tl.constexpr(13)  # bits of a float32's mantissa that TF32 does without
TF32_HALF, TF32_MASK = tl.constexpr((1 << 12) - 1), tl.constexpr(-(1 << 13))
LOG2_E = tl.constexpr(1.4426950408889634)
TILES = {  # ROWS, PIXELS, warps, stages: the fastest of those that were tried on an H200
    "float16": (128, 64, 8, 3),
    "tf32": (128, 32, 8, 2),
    "float32": (64, 32, 4, 2),
}


def takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for a layer of these types and sizes."""
    widest = WIDEST if rows.dtype == torch.float16 else WIDEST // 2
    is_short = all(each.dtype in (torch.float16, torch.float32) for each in (rows, weight))
    return is_short and NARROWEST <= weight.shape[1] <= widest and len(weight) <= MAX_PIXELS


def shared_log_mass(rows: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, precision: str) -> Tensor | None:
    r"""Σ_d [x_d l_d - softplus(l_d)] of logits l = W h + b, for pixels that all particles of a datum share, nats.

    softplus(l) = max(l, 0) + log(1 + exp(-|l|)), and the logarithms of many pixels are that of a product.

    Args:
        rows: h, shape (K, n, H), K particles of each of n data; float16 for that precision, else float32.
        weight: W, shape (D, H).
        bias: b, shape (D,), or None.
        bits: x, shape (n, D).
        precision: of the products, whose sums are float32. "float32" takes three products in TF32, which lose about as
            much as one in float32; "tf32" rounds both sides to the nearest; "float16" takes them as they are.

    Returns:
        Shape (K, n), float32; None where the chip is too small for the tiles.
    """
    num_particles, num_data, width = rows.shape
    rows, weight, bits = rows.contiguous(), weight.to(rows.dtype).contiguous(), bits.float().contiguous()
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    masses = torch.empty(num_particles, num_data, device=rows.device)
    row_tile, pixel_tile, num_warps, num_stages = TILES[precision]
    grid = num_data, triton.cdiv(num_particles, row_tile)
    try:
        _kernel[grid](
            *(rows, weight, bias.float().contiguous(), bits, masses),
            *(num_particles, num_data, len(weight), width),
            *parts(width),
            PRODUCT="tf32x3" if precision == "float32" else "tf32",
            ROUND=precision == "tf32",
            ROWS=row_tile,
            PIXELS=pixel_tile,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    except OutOfResources:
        return None
    return masses


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


@triton.jit
def _kernel(
    rows,
    weight,
    bias,
    bits,
    masses,
    num_particles,
    num_data,
    num_pixels: tl.constexpr,
    width: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Log masses of one datum by `ROWS` of its particles; the width of a row is cut into three parts."""
    datum = tl.program_id(0)
    particles = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = particles.to(tl.int64) * num_data + datum
    inside = particles < num_particles
    h_1 = _part(rows, row, inside, 0, width, FIRST, ROUND)
    if SECOND > 0:
        h_2 = _part(rows, row, inside, FIRST, width, SECOND, ROUND)
    if THIRD > 0:
        h_3 = _part(rows, row, inside, FIRST + SECOND, width, THIRD, ROUND)
    gains = tl.zeros((ROWS, PIXELS), tl.float32)
    products = tl.full((ROWS, PIXELS), 1.0, tl.float32)
    for start in range(0, num_pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        is_pixel = pixel < num_pixels
        w_1 = _part(weight, pixel, is_pixel, 0, width, FIRST, ROUND)
        logits = tl.dot(h_1, tl.trans(w_1), input_precision=PRODUCT)
        if SECOND > 0:
            w_2 = _part(weight, pixel, is_pixel, FIRST, width, SECOND, ROUND)
            logits = tl.dot(h_2, tl.trans(w_2), logits, input_precision=PRODUCT)
        if THIRD > 0:
            w_3 = _part(weight, pixel, is_pixel, FIRST + SECOND, width, THIRD, ROUND)
            logits = tl.dot(h_3, tl.trans(w_3), logits, input_precision=PRODUCT)
        logits += tl.load(bias + pixel, mask=is_pixel, other=0.0)[None, :]
        observed = tl.load(bits + datum.to(tl.int64) * num_pixels + pixel, mask=is_pixel, other=0.0)[None, :]
        gains += observed * logits - tl.maximum(logits, 0.0)
        products *= tl.where(is_pixel[None, :], 1.0 + tl.exp2(-LOG2_E * tl.abs(logits)), 1.0)
    tl.store(masses + row, tl.sum(gains - tl.log(products), 1), mask=inside)


@triton.jit
def _part(values, row, is_row, start, width: tl.constexpr, SIZE: tl.constexpr, ROUND: tl.constexpr):
    """Columns start..start + SIZE of some rows of a matrix, zeros beyond its edges; rounded to TF32, ties to even."""
    column = start + tl.arange(0, SIZE)
    mask = is_row[:, None] & (column < width)[None, :]
    found = tl.load(values + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)
    if ROUND:
        number = found.to(tl.int32, bitcast=True)
        rounded = (number + TF32_HALF + ((number >> TF32_LOW) & 1)) & TF32_MASK
        rounded = rounded.to(tl.float32, bitcast=True)
        found = tl.where(found == found, rounded, found)  # NaN stays
    return found
