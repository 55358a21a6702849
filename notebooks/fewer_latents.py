"""A VAE with more latents than its decoder's first layer has units, in as many latents as there are units."""

import pyro
import pyro.distributions as dist
import torch


class Reduced:
    r"""The pair of a VAE with p(z) = N(0, I) and a mean-field guide, in terms of u = Q'z.

    The first layer sees z as W z alone. With W' = Q R and Q'Q = I, this is R'u, and u is N(0, I) as z is: p(x) is the
    same, and has no more latents than the layer has units. If z is N(m, diag(s²)) given x, u is N(Q'm, Q' diag(s²) Q).

    Args:
        vae: the VAE, with a decoder "mlp"; it is not changed.
    """

    def __init__(self, vae):
        self.vae, (first, *rest) = vae, vae.decoder.layers
        self.q, self.r = torch.linalg.qr(first.weight.detach().T)  # (latent_dim, units), (units, units)
        self.bias, self.rest = first.bias.detach(), torch.nn.Sequential(*rest)

    def model(self, obs):
        """p(x, u)."""
        with pyro.plate("data", len(obs), dim=-1):
            u = pyro.sample("u", dist.Normal(self.r.new_zeros(len(self.r)), 1.0).to_event(1))  # (batch, units)
            params = self.rest(u @ self.r + self.bias).unflatten(-1, self.vae.decoder.out_shape)
            pyro.sample("obs", self.vae.space.likelihood(params), obs=obs)

    def guide(self, obs):
        """q(u | x)."""
        posterior = self.vae.posterior(self.vae.hidden(obs)).base_dist
        covariance = (self.q.T * posterior.scale.square().unsqueeze(-2)) @ self.q  # (batch, units, units)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("u", dist.MultivariateNormal(posterior.loc @ self.q, covariance))
