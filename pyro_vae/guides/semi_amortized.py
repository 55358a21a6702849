"""Semi-amortised posterior: the encoder's mean-field law, improved for each datum by a few steps up its ELBO."""

import math

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.checks import check_count, check_number
from pyro_vae.guides.family import LogJoint
from pyro_vae.guides.heads import diagonal_normal, linear

TRUST = 1.0  # a step moves μ_j by at most this many σ_j, and log σ_j by `SLOWER` of it, times the step size
SLOWER = 0.4  # log σ moves by this part of its natural gradient, so that the errors of several steps average out
SEED = 0  # of the signs


class SemiAmortized(nn.Module):
    r"""q(z | x) = N(z; μ, diag σ²), where λ = (μ, log σ) starts at what the encoder gives and climbs the datum's ELBO.

    λ ← λ + ρ (σ² ∂_μ, 0.2 ∂_log σ) L(λ), L(λ) = 1/S Σ_s log p(x, μ + σ ε_s) + Σ_j log σ_j: the natural gradient, with
    the part of log σ damped, and cut: μ_j moves by at most ρ σ_j, log σ_j by at most 0.4 ρ. A step that would lower L
    is not taken, and ρ of that datum is halved. The ε_s of each step are fixed, so that the law is a function of x and
    log q can be asked for again. They are rows of signs: of mean 0 and variance 1 however few, where σ would fit itself
    to the variance of a few normals; up to latent_dim = S/2 they are uncorrelated too, and beyond it correlated in
    another way at each step. The encoder learns from the gradient at the improved λ, as if the way there were a
    constant. The call of the family is the encoder's law, without a step.

    L counts the latent terms once, whatever weight a training schedule gives them.

    Args:
        in_dim: number of features.
        latent_dim: number of latents.
        num_steps: steps; each costs two passes of the decoder forth and one back, over S draws.
        step_size: ρ of the first step.
        num_samples: S, a power of 2.

    Raises:
        ValueError: num_steps is negative, step_size not positive, or num_samples not a power of 2 of at least 2.

    Source: Kim, Wiseman, Miller, Sontag, Rush, "Semi-Amortized Variational Autoencoders", 2018, arXiv:1802.02550;
    Cremer, Li, Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018, arXiv:1801.03558.
    """

    has_density = True
    noise: Tensor

    def __init__(
        self, in_dim: int, latent_dim: int, *, num_steps: int = 5, step_size: float = 0.5, num_samples: int = 4
    ) -> None:
        super().__init__()
        check_count("num_steps", num_steps, least=0)
        check_number("step_size", step_size, above=0)
        check_count("num_samples", num_samples, least=2)
        if num_samples & (num_samples - 1):
            raise ValueError(f"num_samples must be a power of 2 of at least 2, got {num_samples}")
        self.num_steps, self.step_size = num_steps, step_size
        self.linear = linear(in_dim, 2 * latent_dim)
        self.register_buffer("noise", signs(num_steps, num_samples, latent_dim))

    def forward(self, features: Tensor) -> TorchDistribution:
        """The law that the encoder gives, without a step."""
        return diagonal_normal(self.linear(features))

    def sample_latents(self, features: Tensor, log_joint: LogJoint) -> None:
        """Draw z ~ N(μ, diag σ²), after the steps, at the site "z"."""
        start = self.linear(features)
        moved = self.improve(start.detach(), log_joint) - start.detach()
        pyro.sample("z", diagonal_normal(start + moved))

    def improve(self, parameters: Tensor, log_joint: LogJoint) -> Tensor:
        """(μ, log σ) after the steps, shape (n, 2 latent_dim); no datum depends on another."""
        step = torch.full_like(parameters[..., :1], self.step_size)
        for noise in self.noise:
            elbo, slope = _climb(parameters, noise, log_joint)
            trial = parameters + step * slope
            with torch.no_grad():
                better = (_elbo(trial, noise, log_joint) > elbo)[..., None]
            parameters, step = torch.where(better, trial, parameters), torch.where(better, step, step / 2)
        return parameters


def _elbo(parameters: Tensor, noise: Tensor, log_joint: LogJoint) -> Tensor:
    """L(λ) of each datum but for a constant, shape (n,), nats."""
    loc, log_scale = parameters.chunk(2, -1)
    z = loc + log_scale.exp() * noise[:, None]  # (num_samples, n, latent_dim)
    return log_joint(z).mean(0) + log_scale.sum(-1)


def _climb(parameters: Tensor, noise: Tensor, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
    """L(λ), and the way up from there, cut to the trust region: far from an optimum gradients are no measure."""
    with torch.enable_grad():
        point = parameters.detach().requires_grad_()
        elbo = _elbo(point, noise, log_joint)
        (gradient,) = torch.autograd.grad(elbo.sum(), point)  # of these alone: the decoder gets none
    by_loc, by_log_scale = gradient.chunk(2, -1)
    scale = parameters.chunk(2, -1)[1].exp()
    loc_step = scale * (scale * by_loc).clamp(-TRUST, TRUST)
    return elbo.detach(), torch.cat([loc_step, SLOWER * (by_log_scale / 2).clamp(-TRUST, TRUST)], -1)


def signs(num_steps: int, num_samples: int, latent_dim: int) -> Tensor:
    """Rows of ±1 and their negatives, shape (num_steps, num_samples, latent_dim).

    Their columns are those of a Hadamard matrix of order num_samples/2, in another order and with other signs at each
    step; where there are more latents than that, columns come up again.
    """
    matrix = torch.ones(1, 1)
    for _ in range(int(math.log2(num_samples)) - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])  # Sylvester's
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.empty(num_steps, num_samples // 2, latent_dim)
    for step in rows:
        columns = torch.randperm(latent_dim, generator=generator) % len(matrix)
        step.copy_(matrix[:, columns] * (2 * torch.randint(2, (latent_dim,), generator=generator) - 1))
    return torch.cat([rows, -rows], 1)
