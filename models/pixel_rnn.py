"""PixelRNN: the chain rule over pixels by a recurrent network that reads an image pixel by pixel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..chain_rule import PixelByPixel, Step, num_logits
from ..checks import check_choice, check_count
from ..spaces import Space

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class PixelRNN(PixelByPixel):
    r"""p(x) = Π_d p(x_d | x_1, ..., x_{d-1}) with p(x_d | ·) = RNN(x_1, ..., x_{d-1}); log p is exact.

    The network reads the pixels in the flat order of the image. A bit has a logit (Binary), a grey level a softmax over
    the levels (Quantized), and each pixel a bias of its own. Training and log p run over the whole image at once, since
    all pixels are known; a sample carries the state from pixel to pixel, one step of the network each.

    Args:
        space: where the observations live.
        cell: "gru" or "lstm".
        hidden_dim: width of the state.
        num_layers: number of recurrent layers.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016, arXiv:1601.06759, whose
    layers read images in two dimensions, where this one reads a sequence.
    """

    def __init__(self, space: Space, *, cell: str = "gru", hidden_dim: int = 128, num_layers: int = 1) -> None:
        super().__init__(space)
        check_choice("cell", cell, CELLS)
        check_count("hidden_dim", hidden_dim)
        check_count("num_layers", num_layers)
        self.rnn = CELLS[cell](1, hidden_dim, num_layers, batch_first=True)
        self.out = nn.Linear(hidden_dim, num_logits(space), bias=False)

    def logits(self, obs: Tensor) -> Tensor:
        """Those of every pixel (..., *shape, P), P = 1 or levels, given the pixels before it; obs (..., *shape)."""
        pixels = self.space.to_unit(obs).reshape(-1, self.space.num_dims)
        before = pad(pixels[:, :-1], (1, 0))  # a 0 stands before the first pixel
        states, _ = self._read(before.unsqueeze(-1))  # (n, D, hidden_dim)
        return self.bias + self.out(states).reshape(*obs.shape, -1)

    def steps(self) -> Step:
        """The logits (n, P) of one pixel after another, by a state that is carried on."""
        bias, state = self.bias.flatten(0, -2), None

        def step(rows: Tensor, index: int) -> Tensor:
            nonlocal state
            last = rows[:, index - 1 : index] if index else torch.zeros_like(rows[:, :1])
            features, state = self._read(self.space.to_unit(last).unsqueeze(-1), state)
            return bias[index] + self.out(features.squeeze(1))

        return step

    def _read(self, pixels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Features (n, T, hidden_dim) after each of the pixels (n, T, 1), and the state after the last."""
        with _without_cudnn():
            return self.rnn(pixels, state)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Recurrent layers as plain operations, step by step: cuDNN's have no gradient unless the module is in training."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
