"""Coupling flows of rational-quadratic splines that see the features: fast in both directions."""

from typing import Any

from pyro.distributions import TorchDistribution
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.checks import check_count
from pyro_vae.guides.heads import linear, location_scale, shrink


class Spline(nn.Module):
    r"""q(z | h): z = μ + σ (f_F ∘ ... ∘ f_1)(ε), ε ~ N(0, I), where f bends each coordinate by a monotone spline.

    Of half of the latents the splines depend on h alone, of the other half on h and on the first; the halves change
    places from flow to flow. A spline is the identity outside [-5, 5], which standard noise leaves once in 1.7 million
    draws: μ and σ come behind the flows. log q at any z costs about two passes.

    Args:
        in_dim: number of features.
        latent_dim: number of latents; a single one has splines of h alone.
        num_flows: F.
        num_bins: pieces of a spline.
        hidden_dim: width of the two hidden layers that give its knots.

    Raises:
        ValueError: there is no flow, or a spline has fewer than two pieces.

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019, arXiv:1906.04032.
    """

    has_density = True

    def __init__(
        self, in_dim: int, latent_dim: int, *, num_flows: int = 2, num_bins: int = 8, hidden_dim: int = 128
    ) -> None:
        super().__init__()
        from zuko.flows import NSF

        check_count("num_flows", num_flows)
        check_count("num_bins", num_bins, least=2)
        check_count("hidden_dim", hidden_dim)
        self.linear = linear(in_dim, 2 * latent_dim)
        widths = (hidden_dim, hidden_dim)
        self.flow = NSF(latent_dim, in_dim, transforms=num_flows, passes=2, bins=num_bins, hidden_features=widths)
        for part in self.flow.transform.transforms:
            shrink(part.hyper[-1], 0.1)

    def forward(self, features: Tensor) -> TorchDistribution:
        return location_scale(self.linear(features), [_Kept(self.flow.transform(features))])


class _Kept(Transform):
    """A map of zuko's that keeps its last input, output and log-determinant, so that none is computed twice."""

    domain = pyro_constraints.real_vector
    codomain = pyro_constraints.real_vector
    bijective = True

    def __init__(self, inner: Any) -> None:
        super().__init__(cache_size=1)
        self.inner = inner

    def _call(self, x: Tensor) -> Tensor:
        y, self.log_det = self.inner.call_and_ladj(x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self.inner.inv.call_and_ladj(y)
        self.log_det = -log_det
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._cached_x_y[0] is not x or self._cached_x_y[1] is not y:
            self(x)
        return self.log_det
