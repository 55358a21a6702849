"""Log mass of bits that many rows share, by a few layers run on one part of the rows after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from pyro_vae.independent import PART, products

HALVINGS = 5  # one logarithm for 32 probabilities
SAFE = 1e-30  # no product of probabilities that ends above it came near the smallest float32 on its way
LARGE = 1e30  # weights from here on are not doubled


@dataclass(frozen=True)
class Layer:
    """A linear layer, and the function of each of its numbers that comes after it, if any.

    Attributes:
        weight: W, shape (out, in).
        bias: b, shape (out,), or None.
        function: of the output.
        is_tanh: whether that function is tanh, and nothing more.
    """

    weight: Tensor
    bias: Tensor | None
    function: Callable[[Tensor], Tensor] | None = None
    is_tanh: bool = False

    def __call__(self, rows: Tensor) -> Tensor:
        """Of rows (n, in), shape (n, out)."""
        output = functional.linear(rows, self.weight, self.bias)
        return output if self.function is None else self.function(output)

    def written(self, rows: Tensor, space: Tensor) -> Tensor:
        """The same, with the linear layer's output written to `space` (n, out)."""
        if self.bias is None:
            output = torch.mm(rows, self.weight.T, out=space)
        else:
            output = torch.addmm(self.bias, rows, self.weight.T, out=space)
        return output if self.function is None else self.function(output)

    def signed(self, sign: Tensor) -> "Layer":
        """Each output times its sign (out,)."""
        return Layer(self.weight * sign[:, None], None if self.bias is None else self.bias * sign)


def shared_log_mass(rows: Tensor, layers: Sequence[Layer], bits: Tensor) -> Tensor:
    r"""Log mass of bits that many rows share, Σ_d log σ(t_d) with t = s ∘ l and s = 2x - 1, where l are the logits.

    The signs go into the last layer, once for all rows, so that its output is the logits of what was observed, and the
    logarithms are those of products of probabilities. Nothing cancels, and no step needs the bits. A part of the rows
    goes through all layers before the next one does, so that no activation leaves a CPU's cache.

    Args:
        rows: shape (K, ..., H).
        layers: one or more, from rows of H numbers to logits l of D pixels.
        bits: x, shape (..., D), zeros and ones.

    Returns:
        Shape (K, ...), nats.
    """
    data = rows.flatten(1, -2).unbind(1) if rows.ndim > 2 else [rows]
    *hidden, last = folded(layers)
    num_pixels = len(last.weight)
    step = -(-len(rows) // -(-len(rows) * num_pixels // PART))  # parts of one size
    spaces = [rows.new_empty(step, len(layer.weight)) for layer in (*hidden, last)]
    masses = []
    for each, x in zip(data, bits.reshape(-1, num_pixels), strict=True):
        sign = 2 * x - 1
        signed = [*hidden, last.signed(sign)]
        for part in each.split(step):
            mass = _log_observed(part, signed, spaces)
            masses.append(_plainly(part, layers, sign) if mass is None else mass)
    return torch.cat(masses).reshape(len(data), len(rows)).T.reshape(rows.shape[:-1])


def folded(layers: Sequence[Layer]) -> list[Layer]:
    """Layers that give the same, with a logistic function in place of each tanh.

    tanh(W h + b) = 2 g - 1 with g = σ(2 W h + 2 b), and V (2 g - 1) + c = 2 V g + (c - V 1) in the layer behind it.
    The logistic function takes a quarter of the time of tanh, and the two factors and the term cost nothing. Weights
    so large that twice as much could be infinite are left alone.
    """
    if not all(bool(layer.weight.abs().amax() < LARGE) for layer in layers):
        return list(layers)
    found, is_behind_tanh = [], False
    for layer in layers:
        weight, bias = layer.weight, layer.bias
        if is_behind_tanh:
            ones = weight.sum(1)
            weight, bias = 2 * weight, -ones if bias is None else bias - ones
        is_behind_tanh = layer.is_tanh
        if layer.is_tanh:
            weight, bias = 2 * weight, None if bias is None else 2 * bias
            layer = replace(layer, function=Tensor.sigmoid_)
        found.append(replace(layer, weight=weight, bias=bias))
    return found


def is_binary(bits: Tensor) -> bool:
    """Whether all are zeros and ones."""
    return bool(((bits == 0) | (bits == 1)).all())


def _log_observed(rows: Tensor, layers: Sequence[Layer], spaces: Sequence[Tensor]) -> Tensor | None:
    """Σ_d log σ(t_d), shape (n,), of the logits t that the layers give, with what is on the way in `spaces`.

    None if that is too unlikely for products, or NaN.
    """
    for layer, space in zip(layers, spaces, strict=True):
        rows = layer.written(rows, space[: len(rows)])
    probabilities = products(rows.sigmoid_(), HALVINGS)
    return probabilities.log().sum(-1) if bool(probabilities.amin() > SAFE) else None  # NaN is not


def _plainly(rows: Tensor, layers: Sequence[Layer], sign: Tensor) -> Tensor:
    """The same whatever the logits are."""
    for layer in layers:
        rows = layer(rows)
    return functional.logsigmoid(rows * sign).sum(-1)
