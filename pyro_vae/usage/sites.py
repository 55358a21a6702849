"""Draws of continuous latents from the guide, with the laws that they came from, as rows of units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae import traces
from pyro_vae.traces import Pair, Program, Values

TRIED = 3  # particles of each datum that a site is judged by
NO_MEAN = (NotImplementedError, AttributeError)  # of a law that cannot tell its mean


@dataclass(frozen=True)
class Site:
    """A continuous latent site; its numbers for one datum are its units.

    Attributes:
        name: of the site.
        left: sizes of plates left of the data.
        event: event shape of one draw.
        has_mean: whether the mean of q(u | x) is known, so that it need not be estimated.
        reason: why KL(q || p) of each unit is not known in closed form, or None if it is.
        is_auxiliary: whether it is the guide's own and no latent of the model.
    """

    name: str
    left: tuple[int, ...]
    event: tuple[int, ...]
    has_mean: bool
    reason: str | None
    is_auxiliary: bool = False

    @property
    def num_units(self) -> int:
        return math.prod(self.left) * math.prod(self.event)

    def rows(self, value: Tensor, num_particles: int) -> Tensor:
        """A value of the site as (num_particles, n, num_units)."""
        return value.movedim(len(self.left), 0).reshape(num_particles, -1, self.num_units)

    def value(self, rows: Tensor, tiled: bool) -> Tensor:
        """The way back from (num_particles, n, num_units) to what the programs expect."""
        if not tiled:
            return rows.reshape(*rows.shape[:2], *self.event)
        return rows.reshape(-1, *self.left, *self.event).movedim(0, len(self.left))


@dataclass(frozen=True)
class Draws:
    """K draws of every latent for each datum; log-densities have shape (num_particles, n), nats.

    Attributes:
        values: of each site, as the programs gave them.
        posteriors: the law of each site in the guide.
        priors: its law in the model.
        log_q: log q(z_k | x_n).
        log_prior: log p(z_k).
        log_likelihood: log p(x_n | z_k).
    """

    values: Values
    posteriors: Mapping[str, Any]
    priors: Mapping[str, Any]
    log_q: Tensor
    log_prior: Tensor
    log_likelihood: Tensor

    def mean(self, site: Site) -> Tensor:
        """E[u | x] by the law of q, shape (num_particles, n, num_units)."""
        value = self.values[site.name]
        return site.rows(self.posteriors[site.name].mean.expand(value.shape), len(self.log_q)).double()

    def log_ratio(self, site: Site) -> Tensor:
        """Log q - log p of one site, shape (num_particles, n), nats."""
        return _log_ratio(self, site.name)

    def divergence(self, site: Site) -> Tensor:
        """KL(q(u_j | x) || p(u_j)) of each unit, shape (n, num_units), nats."""
        posterior, prior = traces.innermost(self.posteriors[site.name]), traces.innermost(self.priors[site.name])
        kl = kl_divergence(posterior, prior).expand(self.values[site.name].shape)
        return site.rows(kl, len(self.log_q))[0].double()

    def prior_normal(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """Mean and scale of p(u_j), each (n, num_units), where it is a normal that is the same at all draws."""
        law = traces.independent_normals(self.priors[site.name])
        if law is None:
            return None
        loc, scale = (
            site.rows(each.expand(self.values[site.name].shape), len(self.log_q)) for each in (law.loc, law.scale)
        )
        return (loc[0], scale[0]) if _same(loc) and _same(scale) else None


def draw(pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> Draws:
    """K draws of every latent from the guide, for each datum."""
    posteriors: dict[str, Any] = {}
    priors: dict[str, Any] = {}
    kept = Pair(_keeping(pair.model, priors), _keeping(pair.guide, posteriors))
    values, log_q = traces.draw_latents(kept, args, num_particles, tiled)
    terms = traces.log_prior_and_likelihood(kept, args, values, num_particles, tiled)
    return Draws(values, posteriors, priors, log_q, *terms)


def _keeping(program: Program, laws: dict[str, Any]) -> Program:
    """The same program, which leaves the law of every latent site in `laws`."""

    def keep(name: str, law: Any) -> Any:
        laws[name] = law
        return law

    return traces.with_laws(program, keep)


def find_sites(pair: Pair, args: tuple[Tensor, ...], tiled: bool) -> list[Site]:
    """The latent sites of a pair, in the order of the guide; two data are looked at.

    Raises:
        ValueError: there are none, one is discrete, or their laws are not all that is added up (a mask).
    """
    few = tuple(arg[:2] for arg in args)
    if not traces.matching_sites(pair, few):
        raise ValueError("the use of latents needs a model with latent sites, and this one has none")
    draws = draw(pair, few, TRIED, tiled)
    for name, law in draws.posteriors.items():
        if law.support.is_discrete:
            found = f"site {name!r} is discrete ({type(traces.innermost(law)).__name__})"
            raise ValueError(f"the use of latents is measured for continuous sites only, and {found}")
    total = torch.stack([_log_ratio(draws, name) for name in draws.values]).sum(0)
    if not torch.allclose(total, draws.log_q - draws.log_prior, rtol=1e-3, atol=1e-2):
        raise ValueError("log q(z | x) - log p(z) is not the sum over the laws of the latent sites: is one masked?")
    own = traces.auxiliary_sites(pair, few)
    return [replace(_site(draws, name, tiled), is_auxiliary=name in own) for name in draws.values]


def _site(draws: Draws, name: str, tiled: bool) -> Site:
    law, value = draws.posteriors[name], draws.values[name]
    num_rows = 1 if tiled else 2  # dimensions of particles and data
    left = tuple(value.shape[: value.ndim - law.event_dim - num_rows])
    site = Site(name, left, tuple(value.shape[value.ndim - law.event_dim :]), has_mean=False, reason=None)
    return Site(name, site.left, site.event, _has_mean(draws, site), _reason(draws, site))


def _has_mean(draws: Draws, site: Site) -> bool:
    """Whether the law tells its mean, and the same one whatever the other sites are."""
    try:
        mean = draws.mean(site)
    except NO_MEAN:
        return False
    return bool(mean.isfinite().all()) and _same(mean)


def _reason(draws: Draws, site: Site) -> str | None:
    for words, laws in (("q(z | x)", draws.posteriors), ("p(z)", draws.priors)):
        law, kind = traces.independent_normals(laws[site.name]), type(traces.innermost(laws[site.name])).__name__
        if law is None:
            return f"{words} does not consist of independent normals ({kind})"
        if not all(_same(site.rows(p.expand(draws.values[site.name].shape), TRIED)) for p in (law.loc, law.scale)):
            return f"{words} depends on other latents"
    return None


def _same(rows: Tensor) -> bool:
    """Whether all particles (num_particles, n, ...) have the same numbers."""
    return torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=1e-7)


def _log_ratio(draws: Draws, name: str) -> Tensor:
    value = draws.values[name]
    ratio = (draws.posteriors[name].log_prob(value) - draws.priors[name].log_prob(value)).double()
    return ratio.reshape(-1, draws.log_q.numel()).sum(0).reshape(draws.log_q.shape)
