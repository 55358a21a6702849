"""Energy models, log p(x) = f(x) - log Z: their law over whole images, with log Z as an estimate that has an error."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.checks import check_count
from pyro_vae.contrastive import Row, persistent_contrastive_divergence
from pyro_vae.distributions import Shape
from pyro_vae.log_partition import Constant, Path, Repeated, repeated_log_partition
from pyro_vae.randomness import derived_seed
from pyro_vae.spaces import Binary, Space
from pyro_vae.traces import announce

if TYPE_CHECKING:
    from pyro_vae.data import Data

BLOCK_ROWS = 1024  # images in one pass where no gradient is recorded
MAX_DIMS = 20  # bits whose images are summed one by one
SAMPLE_STEPS, SAMPLE_MOVES = 1000, 200  # of annealing, and after it, for draws
LOG_Z_STREAM = 4  # of the seed of a fit, beside those of `randomness`


class Energy(TorchDistribution):
    r"""p(x) = exp f(x) / Z over images of bits, f and log Z those of an energy model.

    `sample` is approximate: it carries chains from independent bits to p(x) by annealing, and some moves beyond it.

    Args:
        model: the energy model; `log_prob` needs its log Z.
        batch_shape: leading shape of independent copies.
    """

    arg_constraints = {}  # noqa: RUF012 (as every law of torch has it)

    def __init__(self, model: "EnergyBased", batch_shape: Shape = ()) -> None:
        self.model = model
        super().__init__(torch.Size(batch_shape), torch.Size(model.space.shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Bits."""
        return constraints.independent(constraints.boolean, len(self.event_shape))

    @property
    def constant(self) -> Constant:
        """Log Z; a ValueError where there is none."""
        return self.model.constant()

    def expand(self, batch_shape: Shape, _instance: object = None) -> "Energy":
        return Energy(self.model, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """F(x) - log Z of (..., *shape), shape (...) with that of the batch, nats."""
        lead = value.shape[: value.ndim - len(self.event_shape)]
        if value.shape[len(lead) :] != self.event_shape:
            raise ValueError(f"value must have shape (..., {self.event_shape}), got {tuple(value.shape)}")
        log_prob = self.model.in_blocks(value.reshape(-1, *self.event_shape)).reshape(lead)
        log_prob = (log_prob.double() - self.constant.log_z).to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(lead, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Approximate draws, shape (*sample_shape, *batch_shape, *shape)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        path = self.model.path(SAMPLE_STEPS)
        state = path.start(shape.numel() // max(1, self.event_shape.numel()))
        for step in (*range(1, SAMPLE_STEPS + 1), *[SAMPLE_STEPS] * SAMPLE_MOVES):
            state = path.move(state, step)
        return path.values(state).reshape(shape)


class EnergyBased(nn.Module):
    r"""p(x) = exp f(x) / Z on bits: what a restricted Boltzmann machine and a network as an energy share.

    Log Z is a sum over all images, and its estimate by annealing is low in expectation, so that log p(x) is an upper
    bound there: by one error for all images. A fit ends with an estimate; parameters that change make it void.

    Args:
        space: where the observations live.

    Attributes:
        base_logits: of p_0, independent bits with the shares of the training data, where annealing starts; (*shape).
    """

    spaces = (Binary,)
    base_logits: Tensor
    constant_bits: Tensor

    def __init__(self, space: Space) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            raise ValueError(f"{type(self).__name__} lives on Binary, got {space}")
        self.space = space
        self.register_buffer("base_logits", torch.zeros(space.shape))
        # As bits, since a module that goes to another precision takes its floats along.
        nothing = torch.full((len(Constant.__dataclass_fields__),), math.nan, dtype=torch.float64)
        self.register_buffer("constant_bits", nothing.view(torch.int64))

    def log_unnormalized(self, obs: Tensor) -> Tensor:
        """F(x) of images (n, *shape), shape (n,), nats."""
        raise NotImplementedError

    def path(self, num_steps: int) -> Path:
        """From p_0, normalised, to exp f in `num_steps`, by kernels that leave each density invariant."""
        raise NotImplementedError

    def distribution(self) -> Energy:
        """p(x), with the estimate of log Z that there is."""
        return Energy(self)

    def model(self, obs: Tensor, context: None = None) -> None:
        """p(x)."""
        announce(self)
        with pyro.plate("data", len(obs), dim=-1):
            pyro.sample("obs", self.distribution(), obs=obs)

    def guide(self, obs: Tensor, context: None = None) -> None:
        """No latent sites: hidden units are summed out."""

    def initialize(self, obs: Tensor) -> None:
        """Refused: SVI would follow the gradient of f alone."""
        raise ValueError(
            f"{type(self).__name__} is not fitted by SVI, whose gradient lacks that of log Z: leave out method='svi', "
            "and it is fitted by contrastive divergence"
        )

    def in_blocks(self, obs: Tensor) -> Tensor:
        """F(x) of any number of images, (n,)."""
        parts = (obs,) if torch.is_grad_enabled() else obs.split(BLOCK_ROWS)
        return torch.cat([self.log_unnormalized(part) for part in parts])

    def constant(self) -> Constant:
        """Log Z; a ValueError where it was not estimated, or the parameters have changed since."""
        found = Constant(*self.constant_bits.view(torch.float64).tolist())
        name, summed = type(self).__name__, "sum_log_partition(), for few bits"
        call = f"call model.estimate_log_partition() first (or {summed}), or fit it with log_z_steps above 0"
        if math.isnan(found.log_z):
            raise ValueError(f"log p(x) of {name} needs log Z, which was not estimated yet: {call}")
        if not math.isclose(found.fingerprint, self._fingerprint(), rel_tol=1e-10, abs_tol=1e-12):
            raise ValueError(f"the parameters of {name} have changed since log Z was estimated: {call}")
        return found

    def estimate_log_partition(
        self,
        num_steps: int = 10_000,
        *,
        num_chains: int = 100,
        num_repeats: int = 4,
        doubled: bool = True,
        seed: int = 0,
        progress: Callable[[int], object] = lambda num: None,
    ) -> Repeated:
        """Estimate log Z by annealing from independent bits, and keep it: `log_likelihood` needs it.

        Args:
            num_steps: T.
            num_chains: chains of each estimate.
            num_repeats: estimates, from seeds of their own, that are averaged.
            doubled: whether to estimate it with 2 T steps too, as a check.
            seed: of everything random.
            progress: called with 1 after every step of annealing.

        Returns:
            All estimates; low in expectation, so that log p(x) comes out too high.
        """
        found = repeated_log_partition(
            self.path,
            num_steps=num_steps,
            num_chains=num_chains,
            num_repeats=num_repeats,
            doubled=doubled,
            seed=seed,
            device=self.base_logits.device,
            tick=progress,
        )
        how = {"num_steps": num_steps, "num_chains": num_chains, "num_repeats": num_repeats}
        self._keep(log_z=found.log_z, se=found.se, drift=found.drift, **how)
        return found

    @torch.no_grad()
    def sum_log_partition(self) -> float:
        """Log Z as the sum over all images of at most 20 bits, which is kept, and exact; nats."""
        if self.space.num_dims > MAX_DIMS:
            raise ValueError(f"at most {MAX_DIMS} bits can be summed, {self.space} has {self.space.num_dims}")
        self._keep(log_z=float(torch.logsumexp(self.in_blocks(self._all_images()).double(), 0)))
        return self.constant().log_z

    def _all_images(self) -> Tensor:
        numbers = torch.arange(2**self.space.num_dims, device=self.base_logits.device).unsqueeze(-1)
        bits = numbers.bitwise_right_shift(torch.arange(self.space.num_dims, device=numbers.device)).bitwise_and(1)
        return bits.to(self.base_logits.dtype).unflatten(-1, self.space.shape)

    def _keep(self, **figures: float) -> None:
        names = Constant.__dataclass_fields__
        values = [{**dict.fromkeys(names, 0.0), "fingerprint": self._fingerprint(), **figures}[name] for name in names]
        kept = torch.tensor(values, dtype=torch.float64).view(torch.int64)
        self.constant_bits.copy_(kept)

    @torch.no_grad()
    def _fingerprint(self) -> float:
        """A number that changes with any parameter: Σ θ_i cos(i + k), in float64 the same on every device."""
        total = 0.0
        for offset, each in enumerate([*self.parameters(), self.base_logits]):
            angles = torch.arange(each.numel(), dtype=torch.float64, device=each.device) + offset
            total += float(each.double().flatten() @ angles.cos())
        return total

    def own_training(
        self,
        data: "Data",
        *,
        seed: int,
        progress: Callable[[Row], None],
        num_epochs: int = 100,
        batch_size: int = 100,
        learning_rate: float = 5e-3,
        num_chains: int = 100,
        num_moves: int = 5,
        averaging: float = 0.999,
        log_z_steps: int = 2000,
        log_z_chains: int = 100,
    ) -> list[Row]:
        """Persistent contrastive divergence from p_0, then log Z; rows as there, the last with `log_z` and `log_z_se`.

        Args:
            data: training and validation data.
            seed: of everything random.
            progress: called with each epoch's row.
            num_epochs: passes over the training data; this and what follows: `persistent_contrastive_divergence`.
            batch_size: data per step.
            learning_rate: of Adam at its highest.
            num_chains: persistent chains.
            num_moves: moves of each chain per step.
            averaging: share of the parameters' running average that a step leaves.
            log_z_steps: T of the annealing that estimates log Z; 0 to leave it unknown.
            log_z_chains: its chains, for each of 4 seeds and a doubled schedule.
        """
        check_count("log_z_steps", log_z_steps, least=0)
        check_count("log_z_chains", log_z_chains)
        with torch.no_grad():
            train = data.train.obs[:].to(self.base_logits)
            self.base_logits.copy_(self.space.marginal_params(train).reshape(self.space.shape))
            self.start_from_base()
        rows = persistent_contrastive_divergence(
            self,
            data,
            seed=seed,
            progress=progress,
            num_epochs=num_epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            num_chains=num_chains,
            num_moves=num_moves,
            averaging=averaging,
        )
        self.complete_base(train)
        found = {"log_z": None, "log_z_se": None}
        rows = [{**row, **found} for row in rows]
        if log_z_steps:
            estimate = self.estimate_log_partition(
                log_z_steps, num_chains=log_z_chains, seed=derived_seed(seed, LOG_Z_STREAM)
            )
            rows[-1] |= {"log_z": estimate.log_z, "log_z_se": estimate.se}
        return rows

    def start_from_base(self) -> None:
        """Set what a fit starts from, once `base_logits` are those of the training data."""

    def complete_base(self, obs: Tensor) -> None:
        """Set what else annealing starts from, once the parameters are fitted to training data (n, *shape)."""

    def start_chains(self, num_chains: int) -> Tensor:
        """Where the chains of a fit begin: draws of p_0, (num_chains, *shape)."""
        path = self.path(1)
        return path.values(path.start(num_chains))

    def move_chains(self, obs: Tensor, num_moves: int) -> Tensor:
        """Chains (n, *shape) after moves of the kernel that leaves p(x) invariant."""
        path = self.path(1)
        state = path.at(obs)
        for _ in range(num_moves):
            state = path.move(state, 1)
        return path.values(state)
