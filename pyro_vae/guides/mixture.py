"""Mixture of diagonal Gaussians, with gradients along paths and components drawn evenly over the particles."""

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from pyro_vae.checks import check_count
from pyro_vae.distributions import Shape
from pyro_vae.guides.heads import linear
from pyro_vae.randomness import systematic


class Mixture(nn.Module):
    r"""q(z | h) = 1/C Σ_c N(z; μ_c, diag σ_c²), with μ_c and log σ_c linear in the features h.

    Equal weights keep every component alive. Learned ones can starve a component before it has found its mode, and it
    is then never drawn again; where two components meet, their weights add up.

    In training mode, where there are K particles for each datum, each component comes up floor(K/C) or so many plus one
    times, in random order: every particle has the law q, and sums over particles vary less than with components drawn
    one by one. Particles are independent in evaluation mode, as the errors of an estimate take them to be, and where
    `stratified` is False, which `fit` sees to for objectives that couple particles: their gradients are right for
    independent ones only.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.
        num_components: C.

    Raises:
        ValueError: there is no component.

    Source: Morningstar et al., "Automatic Differentiation Variational Inference with Mixtures", 2021,
    arXiv:2003.01687.
    """

    has_density = True
    stratified = True
    logits: Tensor

    def __init__(self, in_dim: int, latent_dim: int, *, num_components: int = 5) -> None:
        super().__init__()
        check_count("num_components", num_components)
        self.num_components = num_components
        self.loc = linear(in_dim, num_components * latent_dim)
        self.log_scale = linear(in_dim, num_components * latent_dim)
        self.register_buffer("logits", torch.zeros(num_components), persistent=False)  # log weights, not learned
        nn.init.normal_(self.loc.bias, std=0.5)  # components apart

    def forward(self, features: Tensor) -> TorchDistribution:
        loc, log_scale = (
            layer(features).unflatten(-1, (self.num_components, -1)) for layer in (self.loc, self.log_scale)
        )  # (..., num_components, latent_dim) each
        weights = dist.Categorical(logits=self.logits.expand(loc.shape[:-1]), validate_args=False)
        parts = dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)
        law = _Even if self.training and self.stratified else _Independent
        return law(weights, parts, validate_args=False)


class _Independent(dist.MixtureSameFamily):
    r"""A mixture of independent normals whose draws have gradients with respect to locations and scales.

    Of the fields v that carry q along as a parameter θ moves, ∂q/∂θ = -∇·(q v), one is the mean over the components,
    Σ_c r_c(z) v_c, of what carries each of them: v_c = ∂(μ_c + σ_c ε_c)/∂θ at ε_c = (z - μ_c)/σ_c, with the
    responsibilities r_c(z) = π_c q_c(z) / q(z). There is none for the weights, which are fixed. Without a constructor
    of its own it survives the plates of Pyro, which expand it.

    Source: Figurnov, Mohamed, Mnih, "Implicit Reparameterization Gradients", 2018, arXiv:1805.08498; Jankowiak,
    Obermeyer, "Pathwise Derivatives Beyond the Reparameterization Trick", 2018, arXiv:1806.01851.
    """

    has_rsample = True

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        if sample_shape:
            return self.expand(Size(sample_shape) + self.batch_shape).rsample()
        normals = self.component_distribution.base_dist  # (..., num_components, latent_dim)
        loc, scale = normals.loc, normals.scale
        with torch.no_grad():
            chosen = self._component()[..., None, None].expand(*self.batch_shape, 1, loc.shape[-1])
            center, width = (each.gather(-2, chosen).squeeze(-2) for each in (loc, scale))  # (..., latent_dim)
            z = center + width * torch.randn_like(center)
            noise = (z[..., None, :] - loc) / scale  # of each component, had it drawn z
            log_parts = self.component_distribution.log_prob(z[..., None, :])
            shares = (self.mixture_distribution.logits + log_parts).softmax(-1)[..., None]
        path = (shares * (loc + scale * noise)).sum(-2)  # z again, with its gradient
        return z + (path - path.detach())

    def _component(self) -> Tensor:
        return self.mixture_distribution.sample()


class _Even(_Independent):
    """The same, with components spread evenly over the first of two or more batch dimensions: the particles."""

    def _component(self) -> Tensor:
        if len(self.batch_shape) < 2:
            return super()._component()
        size, rest = self.batch_shape[0], self.batch_shape[1:]
        shares = self.mixture_distribution.probs.flatten(0, -2)[0]  # of every particle and datum the same
        return systematic(shares, size, rest.numel()).reshape(self.batch_shape)
