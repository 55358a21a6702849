"""A pair whose noise comes with the data, so that a datum has the same draws whichever process has it."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.data import Batch, Data
from pyro_vae.spaces import Real

NUM_DRAWS, DIM = 3, 2  # of each datum, of each draw


class FromNoise(dist.Normal):
    """N(loc, scale²) whose k-th draw of a datum is loc + scale ε_k, with ε of shape (n, NUM_DRAWS, DIM)."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale, validate_args=False)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        draws = self.noise.transpose(0, 1)  # (NUM_DRAWS, n, DIM)
        return self.loc + self.scale * (draws[: len(self.loc)] if self.loc.ndim == 3 else draws[0])


class Scored(FromNoise):
    """The same draws without their gradient: the score of the law takes its place."""

    has_rsample = False

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


class Model(nn.Module):
    """z ~ N(0, 1) or Laplace(0, 1), x | z ~ N(W z + b, σ²); the context is the noise of the guide."""

    def __init__(self, prior=dist.Normal):
        super().__init__()
        self.prior, self.linear = prior, nn.Linear(DIM, 3)
        self.log_scale, self.unused = nn.Parameter(torch.tensor(-0.3)), nn.Parameter(torch.zeros(2))

    def forward(self, obs, context):
        with pyro.plate("data", len(obs), dim=-1):
            z = pyro.sample("z", self.prior(obs.new_zeros(DIM), 1).to_event(1))
            pyro.sample("obs", dist.Normal(self.linear(z), self.log_scale.exp()).to_event(1), obs=obs)


class Guide(nn.Module):
    """z | x ~ N(A x + a, diag(c)²)."""

    def __init__(self, law=FromNoise):
        super().__init__()
        self.law, self.linear, self.log_scale = law, nn.Linear(3, DIM), nn.Parameter(torch.tensor([-0.7, 0.0]))
        with torch.no_grad():
            self.linear.weight[1] /= 10  # so that one dimension of z lies under a floor and the other above it

    def forward(self, obs, context):
        loc, noise = self.linear(obs), context.view(-1, NUM_DRAWS, DIM)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("z", self.law(loc, self.log_scale.exp().expand_as(loc), noise).to_event(1))


def made(law=FromNoise, prior=dist.Normal):
    """Model and guide in float64, always the same ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(4)
        return Model(prior).double(), Guide(law).double()


def data(num_train):
    """Real data, each with its noise as the context."""
    generator = torch.Generator().manual_seed(6)
    batches = [
        Batch(*(torch.randn(num, width, generator=generator).double() for width in (3, NUM_DRAWS * DIM)))
        for num in (num_train, 4, 2)
    ]
    return Data("noisy", Real((3,)), *batches)
