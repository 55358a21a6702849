"""Pairs whose log p(x) is known in closed form, with guides of known quality."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


class LinearGaussian:
    """z ~ N(0, I), x | z ~ N(W z + loc, noise² I): log p(x) and the posterior are known.

    The guide is the exact posterior with its precision divided by `widen`, or a diagonal one.
    """

    def __init__(self, num_dims: int, latent_dim: int, seed: int = 0, guide: str = "exact", widen: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.loadings = torch.randn(num_dims, latent_dim, generator=generator, dtype=torch.float64)
        self.loc = torch.randn(num_dims, generator=generator, dtype=torch.float64)
        self.noise, self.kind, self.widen = 0.7, guide, widen
        self.latent_dim = latent_dim
        eye = torch.eye(latent_dim, dtype=torch.float64)
        self.precision = eye + self.loadings.T @ self.loadings / self.noise**2  # of the posterior

    def log_prob(self, obs: Tensor) -> Tensor:
        covariance = self.loadings @ self.loadings.T + self.noise**2 * torch.eye(len(self.loc), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.loc, covariance).log_prob(obs)

    def draw(self, num: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num, self.latent_dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(num, len(self.loc), generator=generator, dtype=torch.float64)
        return z @ self.loadings.T + self.loc + self.noise * noise

    def model(self, obs: Tensor) -> None:
        zero = torch.zeros(self.latent_dim, dtype=torch.float64)
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", dist.Normal(zero, zero + 1).to_event(1))
            mean = z @ self.loadings.T + self.loc
            pyro.sample("obs", dist.Normal(mean, self.noise).to_event(1), obs=obs)

    def guide(self, obs: Tensor) -> None:
        mean = (obs - self.loc) @ self.loadings @ torch.linalg.inv(self.precision) / self.noise**2
        with pyro.plate("data", len(obs), dim=-1):
            if self.kind == "mean_field":
                scale = (self.precision.diagonal() / self.widen) ** -0.5
                pyro.sample("z", dist.Normal(mean, scale).to_event(1))
            else:
                pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=self.precision / self.widen))

    def guide_precision(self) -> Tensor:
        exact = self.precision if self.kind == "exact" else self.precision.diagonal().diag()
        return exact / self.widen

    def relative_second_moment(self) -> float:
        """E w² / (E w)² = det A / sqrt(det B det(2A - B)), A the posterior's precision, B the guide's."""
        a, b = self.precision, self.guide_precision()
        log = a.logdet() - (b.logdet() + (2 * a - b).logdet()) / 2
        return float(log.exp())

    def tail_index(self) -> float:
        """Pareto shape of the weights, 1 - 1/λ_max(A^-1 B)."""
        return 1 - 1 / float(
            torch.linalg.eigvals(torch.linalg.solve(self.precision, self.guide_precision())).real.max()
        )

    def mean_field_gap(self) -> float:
        """KL(q || p(z | x)) of the best diagonal q, (Σ log M_jj - log det M)/2."""
        return float(self.precision.diagonal().log().sum() - self.precision.logdet()) / 2


def quadrature_log_prob(vae: torch.nn.Module, obs: Tensor, half_width: float = 8.0, num: int = 161) -> Tensor:
    """log ∫ p(x | z) N(z; 0, I) dz over a square grid, for a model with a 2-D latent; (n,), nats."""
    axis = torch.linspace(-half_width, half_width, num, dtype=torch.float64)
    step = float(axis[1] - axis[0])
    z = torch.cartesian_prod(axis, axis)  # (num², 2)
    with torch.no_grad():
        log_prior = vae.prior().log_prob(z)  # (num²,)
        likelihood = vae.space.likelihood(vae.decoder(z))
        log_joint = torch.stack([log_prior + likelihood.log_prob(x) for x in obs])  # (n, num²)
    return log_joint.logsumexp(1) + 2 * math.log(step)


class TwoModes:
    """z ~ ½ N(-a, I) + ½ N(a, I) with a far out, x | z ~ N(W z, noise² I); the guide knows the mode at a only.

    p(x) is a mixture of two Gaussians, exactly; a guide that is the posterior of one of them has equal weights, and
    misses the other's share of p(x), about one half.
    """

    def __init__(self, num_dims: int = 4, distance: float = 6.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.center = torch.tensor([distance, 0.0], dtype=torch.float64)
        self.loadings = torch.randn(num_dims, 2, generator=generator, dtype=torch.float64)
        self.loadings[:, 0] *= 0.01  # the data say little about which of the modes it is
        self.noise = 0.7

    def prior(self) -> dist.TorchDistribution:
        centers = torch.stack([self.center, -self.center])
        modes = dist.Normal(centers, torch.ones_like(centers)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.full((2,), 0.5, dtype=torch.float64)), modes)

    def log_prob(self, obs: Tensor) -> Tensor:
        eye = torch.eye(len(self.loadings), dtype=torch.float64)
        covariance = self.loadings @ self.loadings.T + self.noise**2 * eye
        parts = [
            torch.distributions.MultivariateNormal(self.loadings @ center, covariance).log_prob(obs)
            for center in (self.center, -self.center)
        ]
        return torch.stack(parts).logsumexp(0) - math.log(2)

    def draw(self, num: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (num, 1), generator=generator).double() * 2 - 1
        z = signs * self.center + torch.randn(num, 2, generator=generator, dtype=torch.float64)
        noise = torch.randn(num, len(self.loadings), generator=generator, dtype=torch.float64)
        return z @ self.loadings.T + self.noise * noise

    def model(self, obs: Tensor) -> None:
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("obs", dist.Normal(z @ self.loadings.T, self.noise).to_event(1), obs=obs)

    def guide(self, obs: Tensor) -> None:
        precision = torch.eye(2, dtype=torch.float64) + self.loadings.T @ self.loadings / self.noise**2
        mean = (obs @ self.loadings / self.noise**2 + self.center) @ torch.linalg.inv(precision)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))


class LogNormalWeights:
    """z ~ N(s, 1) whatever x ~ N(0, 1) is, and the guide is N(0, 1): log w = log p(x) + s z - s²/2 is normal.

    The weights have all moments, and yet with s = 3 no sample of practical size shows them.
    """

    def __init__(self, sd: float) -> None:
        self.shift = torch.tensor(float(sd), dtype=torch.float64)
        self.zero = torch.zeros((), dtype=torch.float64)

    def log_prob(self, obs: Tensor) -> Tensor:
        return dist.Normal(self.zero, 1.0).log_prob(obs)

    def draw(self, num: int, seed: int = 0) -> Tensor:
        return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def model(self, obs: Tensor) -> None:
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(self.shift, 1.0))
            pyro.sample("obs", dist.Normal(self.zero, 1.0), obs=obs)

    def guide(self, obs: Tensor) -> None:
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", dist.Normal(self.zero, 1.0))
