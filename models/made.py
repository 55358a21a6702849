"""MADE: the chain rule over pixels by one masked multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..chain_rule import PixelByPixel, Step, num_logits
from ..checks import check_count
from ..networks import activation_named
from ..spaces import Space


class MADE(PixelByPixel):
    r"""p(x) = Π_d p(x_d | pixels before d), all factors by one network whose weights are masked; log p is exact.

    A bit has a logit (Binary). A grey level has a softmax over the levels (Quantized), so that the masses sum to 1: its
    logits are A f_d + b_d with `num_features` numbers f_d from the network, a table A (levels, num_features) that the
    pixels share, and a free histogram b_d. With num_features = levels - 1 that is any law; for 256 levels fewer keep
    the last layer small.

    Args:
        space: where the observations live.
        hidden_dims: widths of the layers.
        activation: "tanh", "relu", "silu" or "elu".
        order_seed: of a random order of the pixels; row by row from the top left if None.
        num_features: numbers from which a pixel's grey levels get their logits; at most levels - 1 are used.

    Source: Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", 2015,
    arXiv:1502.03509.
    """

    def __init__(
        self,
        space: Space,
        *,
        hidden_dims: Sequence[int] = (500, 500),
        activation: str = "relu",
        order_seed: int | None = None,
        num_features: int = 16,
    ) -> None:
        super().__init__(space)
        if not hidden_dims or not all(isinstance(size, int) and size > 0 for size in hidden_dims):
            raise ValueError(f"hidden_dims must be positive whole numbers, one or more, got {list(hidden_dims)}")
        check_count("num_features", num_features)
        self.num_logits = num_logits(space)
        self.num_features = min(num_features, max(1, self.num_logits - 1))
        places = 1 + _order(space.num_dims, order_seed).argsort()  # (D,), 1 for the first pixel
        degrees = [places, *(_spread(size, space.num_dims) for size in hidden_dims)]
        self.register_buffer("places", places)
        self.layers = nn.ModuleList(_Masked(low, high) for low, high in pairwise(degrees))
        outputs = places.repeat_interleave(self.num_features)  # (D F,)
        self.out = _Masked(degrees[-1], outputs, strict=True, bias=False)
        self.direct = _Masked(places, outputs, strict=True, bias=False)
        self.activation = activation_named(activation)()
        self.table = nn.Parameter(_cosines(self.num_logits, self.num_features)) if self.num_logits > 1 else None

    def logits(self, obs: Tensor) -> Tensor:
        """Those of every pixel (..., *shape, P), P = 1 or levels, given the pixels before it; obs (..., *shape)."""
        pixels = self.space.to_unit(obs).flatten(obs.ndim - len(self.space.shape))  # (..., D)
        hidden = pixels
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        features = (self.out(hidden) + self.direct(pixels)).reshape(*obs.shape, self.num_features)
        return self.bias + self._of_levels(features)

    def steps(self) -> Step:
        """The logits (n, P) of one pixel, by its part of the last layer; weights are masked once for all pixels."""
        hidden_layers: list[Any] = list(self.layers)
        masked = [(layer.masked(), layer.bias) for layer in hidden_layers]
        out, direct = (layer.masked().unflatten(0, (-1, self.num_features)) for layer in (self.out, self.direct))
        bias = self.bias.flatten(0, -2)

        def step(rows: Tensor, index: int) -> Tensor:
            pixels = hidden = self.space.to_unit(rows)
            for layer in masked:
                hidden = self.activation(linear(hidden, *layer))
            return bias[index] + self._of_levels(linear(hidden, out[index]) + linear(pixels, direct[index]))

        return step

    def _of_levels(self, features: Tensor) -> Tensor:
        """A f_d, or the logit of a bit as it is."""
        return features if self.table is None else linear(features, self.table)

    def order(self) -> Tensor:
        """The pixels from the first to the last, (D,)."""
        return self.get_buffer("places").argsort()


class _Masked(nn.Module):
    """A linear layer whose outputs see the inputs of a degree no higher than their own, or lower if `strict`."""

    def __init__(self, inputs: Tensor, outputs: Tensor, *, strict: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(outputs), len(inputs))))
        self.bias = nn.Parameter(torch.zeros(len(outputs))) if bias else None

    def masked(self) -> Tensor:
        """The weights (outputs, inputs), 0 where an output must not see an input."""
        inputs, outputs = self.get_buffer("inputs"), self.get_buffer("outputs").unsqueeze(-1)
        return self.weight * (outputs > inputs if self.strict else outputs >= inputs)

    def forward(self, values: Tensor) -> Tensor:
        return linear(values, self.masked(), self.bias)


def _order(num_dims: int, seed: int | None) -> Tensor:
    """The pixels from the first to the last, (D,)."""
    if seed is None:
        return torch.arange(num_dims)
    return torch.randperm(num_dims, generator=torch.Generator().manual_seed(seed))


def _spread(size: int, num_dims: int) -> Tensor:
    """Degrees of hidden units, (size,): spread evenly over 1..D-1, as the last pixel is seen by none."""
    return 1 + torch.arange(size) * max(1, num_dims - 1) // size


def _cosines(levels: int, num_features: int) -> Tensor:
    """Smooth shapes of logits over the levels, cos(π f (l + ½) / L) for f = 1..F; (L, F), a basis if F = L - 1."""
    middle = torch.arange(levels).unsqueeze(-1) + 0.5
    return (math.pi / levels * middle * torch.arange(1, num_features + 1)).cos()
