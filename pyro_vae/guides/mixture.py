"""Mixture of diagonal Gaussians, with gradients along paths and components drawn evenly over the particles."""

import torch
from pyro.distributions import MixtureOfDiagNormals, TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Categorical

from pyro_vae.distributions import Shape
from pyro_vae.guides.heads import linear


class Mixture(nn.Module):
    r"""q(z | h) = Σ_c π_c N(z; μ_c, diag σ_c²), μ_c and log σ_c linear in the features h; π_c = 1/C unless learned.

    Equal weights keep every component alive. Learned ones, log π linear in h, can starve a component before it has
    found its mode, and it is then never drawn again.

    Draws have gradients with respect to all of the parameters, learned weights too. In training mode, where there are K
    particles for each datum, each component comes up floor(K π_c) or so many plus one times, in random order: every
    particle has the law q, and sums over particles vary less than with components drawn one by one. Particles are
    independent in evaluation mode, as the errors of an estimate take them to be, and where `stratified` is False, which
    `fit` sees to for objectives that couple particles: their gradients are right for independent ones only.

    Args:
        in_dim: number of features.
        latent_dim: number of latents, at least 2.
        num_components: C.
        learn_weights: whether π is learned too.

    Raises:
        ValueError: there is one latent only, or no component.

    Source: Jankowiak, Karaletsos, "Pathwise Derivatives for Multivariate Distributions", 2018, arXiv:1806.01856;
    Morningstar et al., "Automatic Differentiation Variational Inference with Mixtures", 2021, arXiv:2003.01687.
    """

    has_density = True
    stratified = True
    equal: Tensor

    def __init__(self, in_dim: int, latent_dim: int, *, num_components: int = 5, learn_weights: bool = False) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"mixture needs latent_dim of at least 2 for its gradients, got {latent_dim}")
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}")
        self.num_components = num_components
        self.loc = linear(in_dim, num_components * latent_dim)
        self.log_scale = linear(in_dim, num_components * latent_dim)
        self.logits = linear(in_dim, num_components, gain=0.1) if learn_weights else None
        self.register_buffer("equal", torch.zeros(num_components), persistent=False)
        nn.init.normal_(self.loc.bias, std=0.5)  # the path's gradient divides by the distances of the components

    def forward(self, features: Tensor) -> TorchDistribution:
        loc, log_scale = (
            layer(features).unflatten(-1, (self.num_components, -1)) for layer in (self.loc, self.log_scale)
        )
        logits = self.equal.expand(loc.shape[:-1]) if self.logits is None else self.logits(features)
        law = _Even if self.training and self.stratified else _Independent
        return law(loc, log_scale.exp(), logits)


class _Systematic(Categorical):
    """Draws spread evenly along the first of two or more batch dimensions, which is that of the particles."""

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        if len(self.batch_shape) < 2:
            return super().sample(Size(sample_shape))
        return systematic(self.probs)


class _Independent(MixtureOfDiagNormals):
    """Pyro's law with draws in double precision: its gradients divide densities, which leave float32 in 50 dimensions.

    Pyro expands any class that keeps its constructor, so that this one survives a plate.
    """

    component = Categorical  # the law of the components

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        if sample_shape:  # Pyro takes the wrong components where a batch is asked for more than one draw
            return self.expand(Size(sample_shape) + self.batch_shape).rsample()
        wide = MixtureOfDiagNormals(self.locs.double(), self.coord_scale.double(), self.component_logits.double())
        wide.categorical = self.component(logits=wide.component_logits)
        return wide.rsample().to(self.locs.dtype)


class _Even(_Independent):
    """The same, with components spread evenly over the particles."""

    component = _Systematic


def systematic(probs: Tensor) -> Tensor:
    """One index for each row: those of a column are drawn by systematic sampling, and then put in random order.

    Args:
        probs: probabilities, shape (num_particles, ..., num_components).

    Returns:
        Shape (num_particles, ...), int64; each entry has the law `probs` of its place.
    """
    size, shape = len(probs), probs.shape[:-1]
    steps = torch.rand(shape, device=probs.device).argsort(0)  # a permutation of 0..size-1 in each column
    points = (steps + torch.rand(shape[1:], dtype=probs.dtype, device=probs.device)) / size
    return (points[..., None] > probs.cumsum(-1)[..., :-1]).sum(-1)
