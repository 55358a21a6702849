"""A convolutional network as an energy: log p(x) = log p_0(x) + CNN(x) - log Z."""

from torch import Tensor, nn

from ..annealing import sigmoid_schedule
from ..checks import check_choice, check_count
from ..energy import EnergyBased
from ..gibbs_with_gradients import GibbsWithGradients, Tempered
from ..networks import ConvEncoder
from ..spaces import Space

SMOOTH = ("tanh", "silu", "elu")  # activations whose slope tells what a flip of a bit does


class ConvolutionalEnergy(EnergyBased):
    r"""p(x) = p_0(x) exp CNN(x) / Z on bits, p_0 being independent pixels at the base rates of the training data.

    The network adds what the base rates do not say: with CNN = 0 the model is p_0, from where annealing goes. Three
    convolutions halve the image each, a layer of `hidden_dim` units sees all of it, and one number comes out. The
    chains of its fit, by persistent contrastive divergence, and those that find log Z are moved by Gibbs with
    gradients, each move Metropolis-adjusted.

    Args:
        space: `Binary`, images (height, width) or (channels, height, width).
        num_channels: of the first convolution; twice and four times as many of the second and the third.
        hidden_dim: units of the last layer.
        activation: "silu", "tanh" or "elu".
        num_flips: mean number of bits that one move proposes to flip.

    Source: Grathwohl, Swersky, Hashemi, Duvenaud, Maddison, "Oops I took a gradient: scalable sampling for discrete
    distributions", 2021, arXiv:2102.04509.
    """

    def __init__(
        self,
        space: Space,
        *,
        num_channels: int = 16,
        hidden_dim: int = 256,
        activation: str = "silu",
        num_flips: int = 10,
    ) -> None:
        super().__init__(space)
        for name, value in (("num_channels", num_channels), ("hidden_dim", hidden_dim), ("num_flips", num_flips)):
            check_count(name, value)
        check_choice("activation", activation, SMOOTH)
        if len(space.shape) not in (2, 3):
            raise ValueError(
                f"a convolutional energy needs images (height, width), or with channels, got {space.shape}"
            )
        self.num_flips = num_flips
        channels = (num_channels, 2 * num_channels, 4 * num_channels)
        self.encoder = ConvEncoder(space.shape, channels, hidden_dim, activation)
        self.head = nn.Linear(hidden_dim, 1, bias=False)  # a constant would cancel against log Z

    def network(self, obs: Tensor) -> Tensor:
        """CNN(x) of (n, *shape), shape (n,), nats."""
        return self.head(self.encoder(obs)).squeeze(-1)

    def log_unnormalized(self, obs: Tensor) -> Tensor:
        """F(x) = log p_0(x) + CNN(x) of (n, *shape), shape (n,), nats."""
        return self.space.likelihood(self.base_logits[None]).log_prob(obs) + self.network(obs)

    def path(self, num_steps: int) -> Tempered:
        """f_β = p_0 exp(β CNN) for β from 0 to 1."""
        kernel = GibbsWithGradients(self.network, self.base_logits, num_flips=self.num_flips)
        return Tempered(kernel, sigmoid_schedule(num_steps).tolist())
