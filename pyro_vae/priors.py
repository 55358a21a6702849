"""Laws p(z) of a code, one module each: called as `prior(about)`, it gives a law with events of shape (latent_dim,).

`about` is what a prior may depend on: for VampPrior the posterior itself, for a conditional one the context.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, distributions, nn

from pyro_vae.checks import check_count
from pyro_vae.distributions import Mixture as Mixed
from pyro_vae.distributions import NormalComponents
from pyro_vae.guides import family
from pyro_vae.guides.mean_field import MeanField
from pyro_vae.independent import diagonal_normal
from pyro_vae.networks import MLPEncoder

Posterior = Callable[[Tensor], TorchDistribution]  # q(z | x) at inputs as the encoder reads them, (num, *shape)


class StandardNormal(nn.Module):
    """p(z) = N(0, I).

    Args:
        latent_dim: number of latents.
    """

    zero: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, about: object = None) -> TorchDistribution:
        loc = self.zero.expand(self.latent_dim)
        return diagonal_normal(loc, (self.zero + 1).expand(self.latent_dim))


class Mixture(nn.Module):
    """p(z) = Σ_k π_k N(z; μ_k, diag σ_k²), all learned; the start has equal weights, σ = 1 and scattered centres.

    Args:
        latent_dim: number of latents.
        num_components: K.

    Source: Dilokthanakul et al., "Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders", 2016,
    arXiv:1611.02648.
    """

    def __init__(self, latent_dim: int, *, num_components: int = 100) -> None:
        super().__init__()
        check_count("num_components", num_components)
        self.loc = nn.Parameter(0.5 * torch.randn(num_components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, latent_dim))
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self, about: object = None) -> TorchDistribution:
        parts = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        return mixture(self.logits, parts)


class VampPrior(nn.Module):
    """p(z) = 1/K Σ_k q(z | u_k), the mean of the posterior over K learned pseudo-inputs u_k.

    The pseudo-inputs are free: where the space is bounded they start inside, at images, and may leave it.

    Args:
        latent_dim: number of latents.
        shape: of an input.
        num_components: K.

    Source: Tomczak, Welling, "VAE with a VampPrior", 2018, arXiv:1705.07120.
    """

    uniform: Tensor

    def __init__(self, latent_dim: int, shape: Sequence[int], *, num_components: int = 500) -> None:
        super().__init__()
        check_count("num_components", num_components)
        self.pseudo_inputs = nn.Parameter(torch.rand(num_components, *shape))
        self.register_buffer("uniform", torch.zeros(num_components), persistent=False)

    def forward(self, about: Posterior) -> TorchDistribution:
        return mixture(self.uniform, about(self.pseudo_inputs))

    @torch.no_grad()
    def initialize(self, inputs: Tensor) -> None:
        """Start the pseudo-inputs at random data (n, *shape), all different ones if there are K or more."""
        num = len(self.pseudo_inputs)
        chosen = torch.cat([torch.randperm(len(inputs)) for _ in range(-(-num // len(inputs)))])[:num]
        self.pseudo_inputs.copy_(inputs[chosen.to(inputs.device)])


class Flow(nn.Module):
    """p(z): N(0, I) carried through masked autoregressive flows; a draw takes latent_dim passes, a density one.

    Args:
        latent_dim: number of latents.
        num_flows: how many, each over the latents in the opposite order.
        hidden_dim: width of their two hidden layers.

    Source: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation", 2017, arXiv:1705.07057.
    """

    def __init__(self, latent_dim: int, *, num_flows: int = 3, hidden_dim: int = 128) -> None:
        super().__init__()
        from zuko.flows import MAF

        check_count("num_flows", num_flows)
        check_count("hidden_dim", hidden_dim)
        self.base = StandardNormal(latent_dim)
        # a smooth activation: samplers that follow the gradient of log p(z) need one
        self.flow = MAF(latent_dim, transforms=num_flows, hidden_features=(hidden_dim, hidden_dim), activation=nn.ELU)

    def forward(self, about: object = None) -> TorchDistribution:
        return dist.TransformedDistribution(self.base(), [self.flow.transform().inv], validate_args=False)


class LearnedConditional(nn.Sequential):
    """p(z | x) = N(z; μ(x), diag σ(x)²) by a network of the context x.

    Args:
        context_dim: number of entries of the context.
        hidden_dim: width of the hidden layer.
        latent_dim: number of latents.
        activation: "tanh", "relu", "silu" or "elu".

    Source: Sohn, Lee, Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", 2015.
    """

    def __init__(self, context_dim: int, hidden_dim: int, latent_dim: int, activation: str = "tanh") -> None:
        super().__init__(MLPEncoder((context_dim,), (hidden_dim,), activation), MeanField(hidden_dim, latent_dim))


def mixture(logits: Tensor, parts: TorchDistribution) -> TorchDistribution:
    """Σ_k π_k p_k(z), by matrix products where the p_k are independent normals.

    Args:
        logits: log π up to a constant, shape (K,).
        parts: the p_k, batch shape (K,) and event shape (latent_dim,).

    Returns:
        A law with event shape (latent_dim,). Its density at (particles, n) points takes particles x n x K numbers for
        independent normals, and latent_dim times as many for other components.
    """
    base = getattr(parts, "base_dist", None)
    if isinstance(parts, distributions.Independent) and isinstance(base, distributions.Normal):
        return Mixed(logits, NormalComponents(base.loc, base.scale), parts.event_shape)
    weights = dist.Categorical(logits=logits, validate_args=False)
    return dist.MixtureSameFamily(weights, parts, validate_args=False)


PRIORS: dict[str, Any] = {"standard": StandardNormal, "mixture": Mixture, "vamp": VampPrior, "flow": Flow}


def make_prior(
    name: str, latent_dim: int, shape: Sequence[int], posterior: nn.Module, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A prior by name, built.

    Args:
        name: "standard", "mixture", "vamp" or "flow".
        latent_dim: number of latents.
        shape: of what the encoder reads.
        posterior: the family of q(z | x), which "vamp" mixes.
        options: further arguments of the prior's constructor.

    Raises:
        ValueError: an unknown name, options that the prior does not have, or "vamp" for a family without a density.
    """
    if name not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {name!r}")
    made, options = PRIORS[name], dict(options or {})
    known = [key for key, p in inspect.signature(made).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"prior {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    if made is VampPrior:
        _check_density(posterior)
        return made(latent_dim, shape, **options)
    return made(latent_dim, **options)


def initialize(prior: nn.Module, inputs: Tensor) -> None:
    """Start a prior at the training inputs (n, *shape), as the encoder reads them, if it looks at any."""
    own: Any = getattr(prior, "initialize", None)
    if own is not None:
        own(inputs)


def _check_density(posterior: nn.Module) -> None:
    """Refuse a family whose posteriors cannot be mixed."""
    reason = None
    if hasattr(posterior, "sample_latents"):
        reason = "draws z without giving its law"
    elif not family.has_density(posterior):
        reason = "has a density at its own draws only"
    if reason:
        raise ValueError(
            f"prior vamp is a mean of posteriors and needs the density of q(z | x) at any z, but the guide "
            f"{type(posterior).__name__} {reason}; take another guide, or prior mixture or flow"
        )
