"""Conditional independent pixels: a network from the context straight to p(y | x), the baseline of a CVAE."""

from collections.abc import Sequence

import pyro
from torch import Tensor, nn

from ..networks import MLPDecoder
from ..spaces import Binary, Labels, Quadrants, Quantized, Real, Space
from ..traces import announce


class ConditionalIndependentPixel(nn.Module):
    r"""p(y | x) = Π_d p(y_d | x): every pixel on its own, given the context x; log p is exact.

    Args:
        space: where the observations y live.
        context: what the context x is.
        hidden_dims: widths of the network's layers.
        activation: "tanh", "relu", "silu" or "elu".

    Source: the baseline network of Sohn, Lee, Yan, "Learning Structured Output Representation using Deep Conditional
    Generative Models", 2015 (NeurIPS).
    """

    spaces = (Binary, Quantized, Real)

    def __init__(
        self,
        space: Space,
        context: Labels | Quadrants,
        *,
        hidden_dims: Sequence[int] = (500, 500),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.space, self.context = space, context
        self.decoder = MLPDecoder(context.num_dims, hidden_dims, space.num_params, space.shape, activation)

    def model(self, obs: Tensor, context: Tensor) -> None:
        """p(y | x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", self.space.likelihood(self.decoder(context)), obs=obs)  # p(y | x)

    def guide(self, obs: Tensor, context: Tensor) -> None:
        """No latent sites."""

    def initialize(self, obs: Tensor) -> None:
        """Start at the mean image of the training data."""
        self.decoder.center(self.space.marginal_params(obs))
