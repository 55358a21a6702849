"""A linear-Gaussian model with any family of posteriors: the ELBO of every Gaussian law is known in closed form."""

import inspect
import math

import pyro
import pyro.distributions as dist
import torch
from helpers import build
from oracles import LinearGaussian
from torch import Tensor, nn

from pyro_vae.guides import family
from pyro_vae.spaces import Binary, Labels

NUM_DATA = 4
SPACE = Binary((3, 3))
CASES = {"VAE": ("VAE", SPACE, None), "CVAE": ("CVAE", SPACE, Labels(log_prob=(-0.7, -0.7)))}
SIZES = {"num_components": 3, "hidden_dim": 16, "auxiliary_dim": 2, "num_steps": 2, "num_samples": 4, "num_flows": 2}


def tiny_options(name: str) -> dict[str, int]:
    """Options that make a family small, as far as it has them."""
    known = inspect.signature(family.load(name)).parameters
    return {key: size for key, size in SIZES.items() if key in known}


def model_with(name, kind="VAE", seed=0):
    """A tiny VAE or CVAE with the family."""
    return build(CASES[kind], seed, guide=name, guide_options=tiny_options(name))


def tiny_family(name: str, in_dim: int, latent_dim: int, seed: int = 0, scatter: float = 0.0, **options) -> nn.Module:
    """A small family; with `scatter`, away from its start by normal noise of that standard deviation."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = family.make_posterior(name, in_dim, latent_dim, {**tiny_options(name), **options}).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(scatter * torch.randn_like(parameter))
    return made


class LinearPair(nn.Module):
    """The model of `LinearGaussian` and a family whose features are x itself, of which the posterior is linear."""

    def __init__(self, target: LinearGaussian, name: str, **options) -> None:
        super().__init__()
        self.target = target
        self.posterior = tiny_family(name, len(target.loc), target.latent_dim, **options)

    def model(self, obs: Tensor) -> None:
        self.target.model(obs)

    def guide(self, obs: Tensor) -> None:
        with pyro.plate("data", len(obs), dim=-1):
            family.sample(self.posterior, obs, lambda z: self.log_joint(z, obs))

    def log_joint(self, z: Tensor, obs: Tensor) -> Tensor:
        mean = z @ self.target.loadings.T + self.target.loc
        log_prior = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1)
        return log_prior + dist.Normal(mean, self.target.noise).log_prob(obs).sum(-1)

    def elbo(self, obs: Tensor, law: dist.TorchDistribution) -> Tensor:
        """E_q log p(x, z) + H(q) of a Gaussian q: log p(x, z) is quadratic in z with the Hessian -precision."""
        mean, covariance = gaussian_moments(law)
        dim = self.target.latent_dim
        entropy = covariance.logdet() / 2 + dim * (1 + math.log(2 * math.pi)) / 2
        spread = (self.target.precision * covariance).sum((-2, -1)) / 2  # tr(M Σ)/2
        return self.log_joint(mean, obs) - spread + entropy

    def climb(self, obs: Tensor) -> None:
        """The posterior's parameters at the maximum of the closed-form ELBO."""
        # The steps end at rounding, so that the gap that is left is that of the family.
        optimizer = torch.optim.LBFGS(
            self.posterior.parameters(), max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-14,
            history_size=50, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self.elbo(obs, self.posterior(obs)).mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def carry(law: dist.TransformedDistribution, noise: Tensor) -> Tensor:
    """What a law made of transforms carries its base noise to."""
    for transform in law.transforms:
        noise = transform(noise)
    return noise


def gaussian_moments(law: dist.TorchDistribution) -> tuple[Tensor, Tensor]:
    """Mean (n, d) and covariance (n, d, d) of a Gaussian law, also of a Gaussian carried by an affine map."""
    if not isinstance(law, dist.TransformedDistribution):
        return law.mean, law.covariance_matrix if hasattr(law, "covariance_matrix") else law.variance.diag_embed()
    base = law.base_dist
    mean = carry(law, base.mean)
    ends = [carry(law, base.mean + base.stddev * one) - mean for one in torch.eye(base.event_shape[0]).to(mean)]
    columns = torch.stack(ends, -1)  # the images of σ_j e_j
    return mean, columns @ columns.mT


def stretched_grid(num: int = 161, reach: float = 5.0) -> tuple[Tensor, Tensor]:
    """Points z = sinh(u) in the plane, (num², 2), out to ±74 and close together near 0, and their log areas."""
    u = torch.linspace(-reach, reach, num, dtype=torch.float64)
    log_width = torch.log(torch.cosh(u) * (u[1] - u[0]))
    return torch.cartesian_prod(u.sinh(), u.sinh()), torch.cartesian_prod(log_width, log_width).sum(-1)
