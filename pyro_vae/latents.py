"""The latents of a pair as one unconstrained vector per datum, and back; small discrete ones are summed out."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae import traces
from pyro_vae.traces import Pair, Program, Values

MAX_STATES = 4096  # joint states of the discrete latents that are still enumerated


@dataclass(frozen=True)
class _Site:
    """A continuous latent site: its bijection from the reals and the shapes of one datum's value."""

    name: str
    transform: Any
    left: tuple[int, ...]  # of plates left of the data
    free: tuple[int, ...]  # event shape before the bijection
    event: tuple[int, ...]  # and after it

    @property
    def size(self) -> int:
        return math.prod(self.left) * math.prod(self.free)


class Latents:
    r"""Unconstrained coordinates u of the continuous latents z = T(u) of a pair, and their densities.

    A log-density in u is log p(x, T(u)) + log |det dT/du|. Discrete latents with few joint states are summed out of
    every density; pairs whose discrete latents have more than 4096 joint states are refused.

    Args:
        pair: model and guide.
        args: obs (n, ...) and, if the model has one, context; two data are looked at.
        tiled: how the programs are run, see `traces.log_weights`.

    Attributes:
        dim: length of u for one datum.
        num_states: joint states of the discrete latents, 1 where there are none.
    """

    def __init__(self, pair: Pair, args: tuple[Tensor, ...], tiled: bool) -> None:
        self.pair, self.tiled = pair, tiled
        few = tuple(arg[:2] for arg in args)
        laws = traces.laws(pair, few)
        discrete = {name: law for name, law in laws.items() if law.support.is_discrete}
        self.sites = [_site(name, law) for name, law in laws.items() if name not in discrete]
        self.event_dims = {name: law.event_dim for name, law in laws.items()}
        self.states = _joint_states(discrete, few[0].shape[0])
        self.num_states = len(self.states)
        self.dim = sum(site.size for site in self.sites)

    def pack(self, values: Values, num_particles: int, num_data: int) -> Tensor:
        """Values of the continuous sites as vectors u (num_particles, n, dim)."""
        parts = []
        for site in self.sites:
            free = site.transform.inv(values[site.name])
            rows = free.ndim - len(site.free) - 1  # where the data lie
            if self.tiled:
                free = free.movedim(rows, 0)
            parts.append(free.reshape(num_particles, num_data, site.size))
        return torch.cat(parts, -1)

    def pack_one(self, values: Values, num_data: int) -> Tensor:
        """Values drawn without particles, one for each datum, as vectors u (n, dim)."""
        parts = []
        for site in self.sites:
            free = site.transform.inv(values[site.name])
            parts.append(free.movedim(len(site.left), 0).reshape(num_data, site.size))
        return torch.cat(parts, -1)

    def unpack(self, u: Tensor) -> tuple[Values, Tensor]:
        """Values of the continuous sites, as the programs expect them, and log |det dT/du| (num_particles, n)."""
        num_particles, num_data = u.shape[:2]
        values, log_det = {}, torch.zeros(num_particles, num_data, dtype=torch.float64, device=u.device)
        for site, part in zip(self.sites, u.split([site.size for site in self.sites], -1), strict=True):
            if self.tiled:
                free = part.reshape(-1, *site.left, *site.free).movedim(0, len(site.left))
            else:
                free = part.reshape(num_particles, num_data, *site.free)
            value = site.transform(free)
            jacobian = site.transform.log_abs_det_jacobian(free, value)
            jacobian = jacobian.reshape(*free.shape[: free.ndim - len(site.free)], -1).sum(-1)
            if self.tiled:
                jacobian = jacobian.reshape(-1, num_particles * num_data).sum(0).reshape(num_particles, num_data)
            values[site.name], log_det = value, log_det + jacobian
        return values, log_det

    def log_joint(self, args: tuple[Tensor, ...], u: Tensor) -> Tensor:
        """Log p(x_n, T(u)) + log |det dT/du|, shape (num_particles, n), nats."""
        return self._density(self.pair.model, args, u, "model")

    def log_guide(self, args: tuple[Tensor, ...], u: Tensor) -> Tensor:
        """Log q(T(u) | x_n) + log |det dT/du|, shape (num_particles, n), nats."""
        return self._density(self.pair.guide, args, u, "guide")

    def log_prior_and_joint(self, args: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(T(u)) and log p(x_n, T(u)), each with log |det dT/du|; shapes (num_particles, n), nats."""
        values, log_det = self.unpack(u)
        parts = [
            traces.log_prior_and_likelihood(self.pair, args, {**values, **state}, len(u), self.tiled)
            for state in self._states(u)
        ]
        prior = torch.stack([part[0] for part in parts]).logsumexp(0)
        joint = torch.stack([part[0] + part[1] for part in parts]).logsumexp(0)
        return prior + log_det, joint + log_det

    def draw_guide(self, args: tuple[Tensor, ...], num_particles: int) -> Tensor:
        """Vectors u (num_particles, n, dim) from the guide."""
        values, _ = traces.draw_latents(self.pair, args, num_particles, self.tiled)
        return self.pack(values, num_particles, len(args[0]))

    def draw_prior(self, args: tuple[Tensor, ...], num_particles: int) -> Tensor:
        """Vectors u (num_particles, n, dim) from the prior."""
        values = traces.draw_prior(self.pair, args, num_particles, self.tiled)
        return self.pack(values, num_particles, len(args[0]))

    def log_evidence(self, args: tuple[Tensor, ...]) -> Tensor:
        """Log p(x_n) = logsumexp over the joint states of a pair with discrete latents only, shape (n,), nats."""
        if self.sites:
            raise ValueError(
                f"the latents {[site.name for site in self.sites]} are continuous and cannot be enumerated"
            )
        parts = [
            traces.log_joint(self.pair, args, state, 1, self.tiled)[0]
            for state in self._states(args[0].new_empty(1, len(args[0]), 0))
        ]
        return torch.stack(parts).logsumexp(0)

    def _density(self, program: Program, args: tuple[Tensor, ...], u: Tensor, name: str) -> Tensor:
        values, log_det = self.unpack(u)
        parts = [
            traces.log_density(program, args, {**values, **state}, len(u), self.tiled, name)
            for state in self._states(u)
        ]
        return torch.stack(parts).logsumexp(0) + log_det

    def _states(self, u: Tensor) -> Iterator[Values]:
        """Every joint state of the discrete latents, expanded to the rows of `u`."""
        rows = (u.shape[0] * u.shape[1],) if self.tiled else tuple(u.shape[:2])
        for state in self.states:
            yield {name: value.to(u.device).expand(*rows, *value.shape) for name, value in state.items()}


def _site(name: str, law: Any) -> _Site:
    """The site of one law; its batch shape is (*left, data)."""
    transform = _bijection(name, law.support)
    free = tuple(transform.inverse_shape(torch.Size(law.event_shape)))
    return _Site(name, transform, tuple(law.batch_shape[:-1]), free, tuple(law.event_shape))


def _bijection(name: str, support: Any) -> Any:
    """From the reals to a support; a mixture lives where its components do."""
    if type(support).__name__.endswith("MixtureSameFamilyConstraint"):
        support = support.base_constraint
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(f"site {name!r} has the support {support}, which has no bijection from the reals") from error


def _joint_states(laws: dict[str, Any], num_data: int) -> list[Values]:
    """All joint states of discrete laws, each {site: value of one datum}; [{}] for none."""
    supports = {}
    for name, law in laws.items():
        if law.batch_shape != (num_data,):
            raise ValueError(f"discrete site {name!r} must lie in the plate of the data alone, got {law.batch_shape}")
        supports[name] = _support(name, law)
    sizes = {name: len(support) for name, support in supports.items()}
    if math.prod(sizes.values()) > MAX_STATES:
        raise ValueError(
            f"the discrete latents have {math.prod(sizes.values())} joint states ({sizes}), too many to be summed out "
            f"(at most {MAX_STATES}); use importance_sampling(num_particles=...)"
        )
    return [dict(zip(supports, state, strict=True)) for state in itertools.product(*supports.values())]


def _support(name: str, law: Any) -> list[Tensor]:
    """The values that one datum's discrete latent may take."""
    base = getattr(law, "base_dist", law)
    extra = law.event_dim - base.event_dim  # dimensions that `to_event` made one event
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"site {name!r} is discrete and its law {type(base).__name__} has no finite support to be summed over; use "
            "importance_sampling(num_particles=...)"
        ) from error
    singles = list(values.reshape(len(values), *base.event_shape))
    shape = law.event_shape[:extra]
    count = math.prod(shape)
    if len(singles) ** count > MAX_STATES:
        raise ValueError(
            f"site {name!r} has {len(singles)}^{count} states, too many to be summed out (at most {MAX_STATES}); use "
            "importance_sampling(num_particles=...)"
        )
    return [
        torch.stack(state).reshape((*shape, *base.event_shape)) for state in itertools.product(singles, repeat=count)
    ]
