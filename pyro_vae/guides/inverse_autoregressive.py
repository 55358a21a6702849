"""Inverse autoregressive flows that see the features: fast to draw from, latent_dim passes to invert."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.nn.functional import softsign

from pyro_vae.checks import check_count
from pyro_vae.guides.heads import linear, location_scale, shrink

LIMIT = 3.0  # of |log s|


class InverseAutoregressive(nn.Module):
    r"""q(z | h): z = μ + σ (f_F ∘ ... ∘ f_1)(ε), ε ~ N(0, I), f(ε)_j = m_j(ε_<j, h) + s_j(ε_<j, h) ε_j.

    Masked networks of h and ε, with connections past their hidden layers, give m and log s, bent into (-3, 3). Every
    other flow goes over the latents in the opposite order. The paper puts μ and σ first; here the networks see noise of
    one size whatever the datum is. The law's own draws are one pass; log q at any other z takes latent_dim passes for
    each flow.

    Args:
        in_dim: number of features.
        latent_dim: number of latents, at least 2.
        num_flows: F.
        hidden_dim: width of the two hidden layers of each network, at least latent_dim.

    Raises:
        ValueError: there is one latent only, no flow, or a hidden layer too narrow to tell the latents apart.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference with Inverse
    Autoregressive Flow", 2016, arXiv:1606.04934.
    """

    has_density = True

    def __init__(self, in_dim: int, latent_dim: int, *, num_flows: int = 2, hidden_dim: int = 200) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"inverse_autoregressive needs latent_dim of at least 2, got {latent_dim}: use mean_field")
        check_count("num_flows", num_flows)
        check_count("hidden_dim", hidden_dim)
        if hidden_dim < latent_dim:
            raise ValueError(f"hidden_dim must be at least latent_dim = {latent_dim}, got {hidden_dim}")
        self.linear = linear(in_dim, 2 * latent_dim)
        forth = torch.arange(latent_dim)
        orders = [forth.flip(0) if number % 2 else forth for number in range(num_flows)]
        self.flows = nn.ModuleList(_flow(in_dim, hidden_dim, order) for order in orders)

    def forward(self, features: Tensor) -> TorchDistribution:
        # Ignored: the modules of a list have no type of their own.
        flows: list[Any] = [flow.condition(features) for flow in self.flows]  # type: ignore[operator]
        return location_scale(self.linear(features), flows)


def _flow(in_dim: int, hidden_dim: int, order: Any) -> nn.Module:
    network: Any = ConditionalAutoRegressiveNN(
        len(order), in_dim, [hidden_dim] * 2, permutation=order, skip_connections=True, nonlinearity=nn.Tanh()
    )
    shrink(network.layers[-1], 0.1)
    nn.init.xavier_uniform_(network.skip_layer.weight, gain=0.1)
    return ConditionalAffineAutoregressive(_Bounded(network))


class _Bounded(nn.Module):
    """A masked network whose log-scales are bent into (-3, 3): beyond Pyro's hard limits they would not find back."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @property
    def permutation(self) -> Tensor:
        return self.network.permutation

    def get_permutation(self) -> Tensor:
        return self.permutation

    def forward(self, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.network(noise, context)
        return loc, LIMIT * softsign(log_scale / LIMIT)
