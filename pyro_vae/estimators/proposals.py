"""Better proposals than the guide: a wider guide, a defensive mixture, a posterior refined for each datum."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.estimators.drawn import Draw, guide_of
from pyro_vae.estimators.refinement import refined as refined
from pyro_vae.estimators.widening import widen
from pyro_vae.randomness import derived_seed, systematic
from pyro_vae.traces import Pair, Program, Values

STREAM = 1  # of the seed of an estimate; its blocks have streams of two indices
SHARES = (0.6, 0.25, 0.1, 0.05)  # of the guide, the wider guides and the prior in the defensive mixture
PROPOSALS = ("overdispersed", "defensive", "refined")
FACTORS = (1.0, 1.5, 3.0)  # of the variance of the guides in it


class Proposal(Protocol):
    """What makes another pair of a pair: the same model, with a guide that covers the posterior better."""

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int) -> tuple[Pair, tuple[Tensor, ...]]:
        """The pair, and its arguments: those given, with further tensors (n, ...) behind them for its guide alone."""


def with_proposal(
    proposal: Proposal | None, pair: Pair, args: tuple[Tensor, ...], seed: int
) -> tuple[Pair, tuple[Tensor, ...], tuple[str, ...]]:
    """Pair and arguments with a proposal in place of the guide, if there is one, and what the notes say of it."""
    if proposal is None:
        return pair, args, ()
    if not callable(proposal):
        raise TypeError(f"proposal must be one of pv.{', pv.'.join(PROPOSALS)}, with its settings, got {proposal!r}")
    proposed, args = proposal(pair, args, derived_seed(seed, STREAM))
    return replace(proposed, base=pair), args, (f"proposal: {proposal}",)  # the new programs may hide its modules


@dataclass(frozen=True)
class Overdispersed:
    """See `overdispersed`."""

    factor: float

    def __str__(self) -> str:
        return f"overdispersed({self.factor:g})"

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int) -> tuple[Pair, tuple[Tensor, ...]]:
        guide = traces.with_laws(pair.guide, lambda site, law: widen(law, self.factor, site))
        laws = traces.laws(Pair(guide, guide), tuple(arg[:2] for arg in args))
        if all(law.support.is_discrete for law in laws.values()):
            raise ValueError(f"overdispersed() needs a continuous latent to widen, this pair has {sorted(laws)}")
        return Pair(pair.model, guide), args


def overdispersed(factor: float = 1.5) -> Overdispersed:
    """The guide with the variance of each of its laws multiplied.

    A guide fitted by the ELBO is narrower than the posterior, so that rare draws from its tails have huge weights; a
    wider one has tamer weights. Draws use the same random numbers at every factor. Discrete latents stay as they are.

    Args:
        factor: of the variance; `tune_overdispersion` finds one on validation data.

    Returns:
        A proposal for `importance_sampling` and `multilevel`.

    Raises:
        ValueError: if the factor is not positive; at use, for a law that cannot be widened.
    """
    if not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ValueError(f"factor must be a positive number, got {factor!r}")
    return Overdispersed(float(factor))


@dataclass(frozen=True)
class Defensive:
    """See `defensive`."""

    def __str__(self) -> str:
        return "defensive()"

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int) -> tuple[Pair, tuple[Tensor, ...]]:
        traces.check_density(pair, args, "the defensive mixture")
        laws = traces.laws(pair, tuple(arg[:2] for arg in args))
        event_dims = {name: law.event_dim for name, law in laws.items()}
        alone = len(laws) == 1 and all(law.batch_shape == args[0][:2].shape[:1] for law in laws.values())
        return Pair(pair.model, guide_of(partial(_draw_mixture, _Laws if alone else _Programs, pair, event_dims))), args


def defensive() -> Defensive:
    r"""The mixture .6 q + .25 q(variance x 1.5) + .1 q(variance x 3) + .05 p(z), with log q of all of it.

    A weight cannot be above 1/.6 of what it is under the guide, nor above p(x | z)/.05. The particles of a datum are
    shared out among the components by systematic sampling in random order: block by block the shares are met as nearly
    as they can be, while each particle on its own has exactly the law of the mixture, so that any part of the
    particles gives an unbiased estimate. On tiled data the components are drawn independently.

    Returns:
        A proposal for `importance_sampling` and `multilevel`; at use it raises a ValueError for a guide that has no
        log q(z | x) at given z, and for a law that cannot be widened.

    Source: Hesterberg, "Weighted average importance sampling and defensive mixture distributions", 1995; Owen, Zhou,
    "Safe and effective importance sampling", 2000.
    """
    return Defensive()


@dataclass(frozen=True)
class _Programs:
    """The components of the mixture for one call of its guide, by running the programs."""

    pair: Pair
    args: tuple[Tensor, ...]
    num_particles: int
    tiled: bool

    @property
    def guides(self) -> list[Program]:
        return [traces.with_laws(self.pair.guide, partial(_widened, factor)) for factor in FACTORS]

    def draw(self) -> list[Values]:
        """K draws of all latents from each component."""
        how = (self.args, self.num_particles, self.tiled)
        drawn = [traces.draw_latents(Pair(self.pair.model, guide), *how)[0] for guide in self.guides]
        return [*drawn, traces.draw_prior(self.pair, *how)]

    def log_density(self, values: Values) -> Tensor:
        """Log-density of each component, shape (components, num_particles, n), nats."""
        how = (self.args, values, self.num_particles, self.tiled)
        wide = [traces.log_density(guide, *how) for guide in self.guides]
        return torch.stack([*wide, traces.log_prior_and_likelihood(self.pair, *how)[0]])


class _Laws(_Programs):
    """The same for a pair with one latent site: its two laws are all that is needed, and no likelihood is computed."""

    @cached_property
    def site(self) -> str:
        return next(iter(traces.laws(self.pair, self.args)))

    @cached_property
    def laws(self) -> list[Any]:
        guide, prior = (traces.laws(pair, self.args) for pair in (Pair(self.pair.guide, self.pair.guide), self.pair))
        return [*(widen(guide[self.site], factor, self.site) for factor in FACTORS), prior[self.site]]

    def draw(self) -> list[Values]:
        shape = () if self.tiled else (self.num_particles,)
        # expanded and not `sample(shape)`: of a batch of mixtures Pyro's own takes the components of other data
        return [{self.site: law.expand((*shape, *law.batch_shape)).sample()} for law in self.laws]

    def log_density(self, values: Values) -> Tensor:
        rows = (self.num_particles, len(self.args[0]))
        return torch.stack([law.log_prob(values[self.site]).double().reshape(rows) for law in self.laws])


def _widened(factor: float, site: str, law: Any) -> Any:
    return law if factor == 1 else widen(law, factor, site)


def _draw_mixture(
    kind: type[_Programs],
    pair: Pair,
    event_dims: dict[str, int],
    args: tuple[Tensor, ...],
    num_particles: int,
    tiled: bool,
) -> Draw:
    """Draws of the mixture: every component is drawn, and one of them taken for each particle and datum."""
    components = kind(pair, args, num_particles, tiled)
    shares = torch.tensor(SHARES, dtype=torch.float64, device=args[0].device)
    chosen = systematic(shares, num_particles, len(args[0]))
    chosen = chosen.reshape(-1) if tiled else chosen
    drawn = components.draw()
    values = {name: _take(chosen, [draw[name] for draw in drawn], event_dim) for name, event_dim in event_dims.items()}

    def log_density(at: Values) -> Tensor:
        return (components.log_density(at) + shares.log()[:, None, None]).logsumexp(0)

    return Draw(values, log_density, event_dims)


def _take(chosen: Tensor, options: list[Tensor], event_dim: int) -> Tensor:
    """Of each row the value of the component that was chosen for it."""
    index = chosen.reshape(*chosen.shape, *[1] * event_dim)
    value = options[0]
    for component, option in enumerate(options[1:], start=1):
        value = torch.where(index == component, option, value)
    return value
