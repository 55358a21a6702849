"""Draws of the latents given what was seen of each datum: by importance resampling, or by annealed HMC."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae import diagnostics, traces
from pyro_vae.annealing import anneal
from pyro_vae.estimators.ais import AnnealedImportanceSampling, Annealer
from pyro_vae.estimators.hmc import GeometricPath
from pyro_vae.estimators.proposals import Proposal, with_proposal
from pyro_vae.estimators.streaming import BLOCK_ROWS
from pyro_vae.latents import Latents
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.restoration.corruption import Corruption, flat_pixels, of_rows, rebuilt
from pyro_vae.traces import Pair

LAST_MOVES = 10  # at the posterior, after the last resampling
PRIOR_DRAWS = 256  # whose mean stands in for pixels that nobody saw
IMPUTATIONS = 5  # rounds in which the guide looks at what the model makes of its last guess
TAIL = 5  # tail weights from which k-hat says something


@dataclass(frozen=True)
class Draws:
    """Draws of all latents of each datum as unconstrained vectors, all of one weight.

    Attributes:
        u: shape (num_draws, n, dim).
        ess: effective number of particles (or chains) that they were drawn from, shape (n,).
        khat: Pareto shape of the importance weights, shape (n,), or None.
        how: in words.
    """

    u: Tensor
    ess: Tensor
    khat: Tensor | None
    how: str


def check_pixels(pair: Pair, args: tuple[Tensor, ...], corruption: Corruption) -> None:
    """Raise a ValueError that says why, unless p(x | z) consists of pixels of which `corruption` knows the law."""
    few = tuple(arg[:2] for arg in args)
    pixels = flat_pixels(traces.observation(pair, few))
    corruption.restored(pixels, corruption.seen_in(few[0]))


def seen_pair(pair: Pair, corruption: Corruption) -> Pair:
    """The pair of p(y, z) in place of p(x, z), y what was seen of x; its guide still looks at whole images."""

    def law(of_images: Any) -> Any:
        return of_rows(corruption.seen(flat_pixels(of_images)))

    return Pair(traces.with_observation(pair.model, law, corruption.seen_in), pair.guide, base=pair)


def filled(pair: Pair, args: tuple[Tensor, ...], missing: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments with a guess in place of missing pixels (*shape), for the guide to look at; log p does not see it.

    The guess begins at the mean of what the model draws and is then what the model makes of the guide's answer to it.
    """
    if missing is None:
        return args
    obs, *context = args
    rows = torch.arange(PRIOR_DRAWS) % len(obs)
    drawn = traces.simulate(pair, tuple(arg[rows] for arg in args))["obs"]
    guess = torch.where(missing, drawn.to(obs).mean(0), obs)
    for _ in range(IMPUTATIONS):
        guess = torch.where(missing, traces.reconstruct(pair, (guess, *context)).to(obs), guess)
    return (guess, *context)


def by_resampling(
    pair: Pair, args: tuple[Tensor, ...], num_draws: int, num_particles: int, proposal: Proposal | None, seed: int
) -> Draws:
    r"""Importance resampling: z_k from a proposal, w_k = p(y, z_k)/q(z_k), then draws from Σ_k w_k δ(z_k)/Σ w.

    Its error is that of the weights: where few particles are effective the draws repeat each other.

    Source: Rubin, "Using the SIR algorithm to simulate posterior distributions", 1988; Gelfand, Smith 1990.
    """
    tiled = not traces.broadcasts(pair, args)
    pair, args, notes = with_proposal(proposal, pair, args, seed)
    latents = _continuous(Latents(pair, args, tiled))
    parts: dict[str, list[Tensor]] = {"u": [], "ess": [], "khat": []}
    step = max(1, BLOCK_ROWS["cpu"] // num_particles)
    for start in range(0, len(args[0]), step):
        reseed(derived_seed(seed, start), args[0].device)
        some = tuple(arg[start : start + step] for arg in args)
        values, log_q = traces.draw_latents(pair, some, num_particles, tiled)
        log_weights = traces.log_joint(pair, some, values, num_particles, tiled) - log_q
        _check(log_weights, start)
        u = latents.pack(values, num_particles, len(some[0]))
        parts["u"].append(taken(u, resampled(log_weights, num_draws)))
        parts["ess"].append(diagnostics.effective_sample_size(log_weights))
        if (tail := diagnostics.tail_length(num_particles)) >= TAIL:
            parts["khat"].append(diagnostics.pareto_khat(log_weights.topk(tail + 1, dim=0).values))
    whole = {name: torch.cat(each, 1 if name == "u" else 0) for name, each in parts.items() if each}
    of = f", {notes[0]}" if notes else ", proposal: guide"
    return Draws(whole["u"], whole["ess"], whole.get("khat"), f"importance resampling of {num_particles} particles{of}")


def by_mcmc(pair: Pair, args: tuple[Tensor, ...], settings: AnnealedImportanceSampling, seed: int) -> Draws:
    """Sequential Monte Carlo from the prior to p(z | y) with HMC moves, and 10 more moves after the last resampling.

    One chain for each draw. Started at the prior, the chains find modes that no guide visits, and resampling along the
    way shares them out by their mass.
    """
    annealer = Annealer(replace(settings, start="prior", resample=True), pair, args, seed)
    latents = _continuous(annealer.latents)
    parts, effective, rates = [], [], []
    for start, stop in annealer.blocks():
        reseed(derived_seed(seed, start), args[0].device)
        some = tuple(arg[start:stop] for arg in args)
        path = _Kept(annealer.tuned(start, stop))
        weights = anneal(path, path.at(latents.draw_prior(some, settings.num_chains)), resample=True)
        _check(weights.log_weights, start)
        state = path.take(path.last, resampled(weights.log_weights, settings.num_chains))
        for _ in range(LAST_MOVES):
            state = path.move(state, path.num_steps)
        parts.append(state.u)
        effective.append(weights.ess)
        rates.append(float(torch.stack(path.inner.acceptance[-LAST_MOVES:]).mean()))
    how = f"HMC annealed from the prior in {settings.num_steps} steps, {settings.num_chains} chains"
    rate = f", acceptance at the end {sum(rates) / len(rates):.2f}"
    return Draws(torch.cat(parts, 1), torch.cat(effective), None, how + rate)


class _Kept:
    """A path that remembers the chains at which its last density was asked for: those that the weights belong to."""

    def __init__(self, inner: GeometricPath) -> None:
        self.inner, self.last = inner, None
        self.at: Callable[[Tensor], Any] = inner.at

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    def log_density(self, state: Any, step: int) -> Tensor:
        self.last = state
        return self.inner.log_density(state, step)

    def move(self, state: Any, step: int) -> Any:
        return self.inner.move(state, step)

    def take(self, state: Any, chains: Tensor) -> Any:
        return self.inner.take(state, chains)


def pixels_at(pair: Pair, args: tuple[Tensor, ...], u: Tensor) -> Any:
    """The laws of the pixels of images at latents u (R, n, dim), batch shape (R, n, D)."""
    latents = Latents(pair, args, tiled=True)
    law = traces.observation_at(pair, args, latents.unpack(u)[0], len(u), tiled=True)
    return rebuilt(flat_pixels(law), lambda values: values.unflatten(0, (len(u), len(args[0]))))


def _continuous(latents: Latents) -> Latents:
    if latents.num_states > 1 or not latents.sites:
        found = f"discrete ones with {latents.num_states} joint states" if latents.num_states > 1 else "none"
        raise ValueError(f"restoring by draws of the latents needs continuous ones, this pair has {found}")
    return latents


def resampled(log_weights: Tensor, num_draws: int) -> Tensor:
    """Indices (num_draws, n) drawn in proportion to the weights (K, n), systematically, in random order."""
    shares = torch.softmax(log_weights.double(), 0).cumsum(0)  # (K, n)
    steps = torch.arange(num_draws, device=shares.device)[:, None]
    points = (steps + torch.rand(1, shares.shape[1], dtype=shares.dtype, device=shares.device)) / num_draws
    index = torch.searchsorted(shares[:-1].T.contiguous(), points.T.contiguous(), right=True).T
    return index.gather(0, torch.rand(index.shape, device=index.device).argsort(0))


def taken(u: Tensor, index: Tensor) -> Tensor:
    """Of vectors (K, n, dim) those of an index (num_draws, n)."""
    return u.gather(0, index.unsqueeze(-1).expand(-1, -1, u.shape[-1]))


def _check(log_weights: Tensor, start: int) -> None:
    bad = (log_weights.isnan() | (log_weights == math.inf)).any(0) | (log_weights == -math.inf).all(0)
    if bool(bad.any()):
        raise ValueError(f"datum {start + int(bad.nonzero()[0])} has a weight that is not finite, or only weights of 0")
