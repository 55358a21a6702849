"""The ways to restore: a model's own answer, a closed form, a walk through the pixels, draws of the latents."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae import traces
from pyro_vae.estimators.ais import AnnealedImportanceSampling
from pyro_vae.estimators.evaluate import log_likelihood, prepared, progress_bar
from pyro_vae.estimators.proposals import Proposal
from pyro_vae.randomness import derived_seed, reseed
from pyro_vae.restoration import closed_form, posterior
from pyro_vae.restoration.chain_rule import Walk, walk
from pyro_vae.restoration.corruption import Missing
from pyro_vae.restoration.differences import difference, exact_estimate, from_walk
from pyro_vae.restoration.task import Restoration, Task, hidden_batch
from pyro_vae.traces import Pair

DRAWS, WHOLE, GIVEN = 31, 32, 33  # streams of the seed
ROWS = 64  # data that are restored together

Args = tuple[Tensor, ...]


def given_quadrants(task: Task) -> Restoration:
    """A model of p(missing | given) for one mask: its own draws, its own log p."""
    context: Any = getattr(task.model, "context", None)
    if not isinstance(task.corruption, Missing) or not torch.equal(task.given.mask(), context.mask()):
        raise ValueError(f"the model restores what is missing beside {context}, and nothing else")
    hidden, started, result = hidden_batch(task.batch, context), time.perf_counter(), None
    if task.score:
        latent = traces.latent_sites(traces.as_pair(task.model, task.guide), hidden.subset(1).arguments)[0]
        how: dict[str, Any] = {
            "guide": task.guide,
            "seed": task.seed,
            "device": task.device,
            "progress": task.progress,
        }
        result = log_likelihood(task.model, hidden, estimator=task.estimator if latent else None, **how)
        result = replace(result, seconds=time.perf_counter() - started)
    draws, means = [], []
    with prepared(task.model, hidden, task.guide, task.device, task.seed) as (pair, args):
        for some in _blocks(task, args):
            many = tuple(arg.repeat(task.num_draws, 1) for arg in some)
            drawn = traces.simulate(pair, many)
            latents = {name: value for name, value in drawn.items() if name != "obs"}
            law = traces.observation_at(pair, many, latents, 1, tiled=True)
            draws.append(drawn["obs"].unflatten(0, (task.num_draws, -1)))
            means.append(law.mean.unflatten(0, (task.num_draws, -1)).mean(0))
    words = f"drawn from p(missing | {context}), which is what the model is of"
    return task.restoration(torch.cat(draws, 1), torch.cat(means), words, log_prob=result)


def in_closed_form(task: Task, pair: Pair, args: Args) -> Restoration:
    """A law of independent pixels, a mixture of such laws, or of normal ones: see `closed_form`."""
    started, draws, means, log_probs = time.perf_counter(), [], [], []
    for some in _blocks(task, args):
        law, seen = traces.observation(pair, some), task.corruption.seen_in(some[0])
        found = closed_form.restored(law, task.corruption, seen)
        draws.append(found.draw(task.num_draws))
        means.append(found.mean())
        log_probs.append(found.log_prob(task.corruption.hidden_in(some[0])).double())
    result = None
    if task.score:
        result = task.log_likelihood(exact_estimate(torch.cat(log_probs).cpu().numpy()), started)
    return task.restoration(torch.cat(draws, 1), torch.cat(means), "drawn exactly", log_prob=result)


def by_walk(task: Task, pair: Pair, args: Args, num_particles: int) -> Restoration:
    """A chain-rule model: missing pixels in its order, weighted by the given ones."""
    if not isinstance(task.corruption, Missing):
        raise ValueError("a chain-rule model restores missing pixels, and noise by no closed form that is known here")
    started, missing = time.perf_counter(), ~task.given.mask().flatten()
    draws, means, log_probs, walks = [], [], [], []
    with progress_bar(len(args[0]), task.progress) as tick:
        for some in _blocks(task, args):
            law, rows = traces.observation(pair, some), some[0].flatten(1)
            found = walk(law, rows, missing, num_particles)
            chosen = posterior.resampled(found.log_weights, task.num_draws)
            hidden = found.images[..., missing]
            draws.append(posterior.taken(hidden, chosen))
            means.append(torch.einsum("kn,knh->nh", found.log_weights.softmax(0).to(hidden), hidden))
            log_probs.append(law.log_prob(some[0]).double())
            walks.append(found)
            tick(len(rows))
    weights = torch.cat([each.log_weights for each in walks], 1)
    whole = Walk(weights.new_empty(0), weights, walks[0].is_exact)
    estimate = from_walk(torch.cat(log_probs), whole)
    result = task.log_likelihood(estimate, started) if task.score else None
    how = "drawn exactly, pixel after pixel" if whole.is_exact else f"{num_particles} weighted walks through the pixels"
    found_of = {"ess": estimate.ess, "khat": estimate.khat}
    return task.restoration(torch.cat(draws, 1), torch.cat(means), how, log_prob=result, **found_of)


def by_latents(
    task: Task,
    pair: Pair,
    args: Args,
    num_particles: int,
    proposal: Proposal | None,
    annealing: AnnealedImportanceSampling | None,
) -> Restoration:
    """Draws z ~ p(z | y) by resampling, or by annealing if that is given; then x ~ p(x | y, z)."""
    started = time.perf_counter()
    posterior.check_pixels(pair, args, task.corruption)
    seen = posterior.seen_pair(pair, task.corruption)
    reseed(derived_seed(task.seed, DRAWS), args[0].device)
    whole_mask = None if task.missing is None else task.missing.to(args[0].device)
    guessed = posterior.filled(pair, args, whole_mask)
    seed = derived_seed(task.seed, DRAWS, 1)
    if annealing is None:
        found = posterior.by_resampling(seen, guessed, task.num_draws, num_particles, proposal, seed)
    else:
        found = posterior.by_mcmc(seen, guessed, annealing, seed)
    draws, means = [], []
    for start, some in zip(range(0, len(args[0]), ROWS), _blocks(task, args), strict=True):
        pixels = posterior.pixels_at(pair, some, found.u[:, start : start + ROWS])
        hidden = task.corruption.restored(pixels, task.corruption.seen_in(some[0]))
        draws.append(hidden.sample())
        means.append(hidden.mean.mean(0))
    result = None
    if task.score:
        with progress_bar(2 * len(args[0]), task.progress) as tick:
            estimate = difference(
                task.estimator(pair, args, derived_seed(task.seed, WHOLE), tick),
                lambda: task.estimator(seen, guessed, derived_seed(task.seed, GIVEN), tick),
            )
        result = task.log_likelihood(estimate, started)
    figures = {"ess": found.ess.cpu().numpy(), "khat": None if found.khat is None else found.khat.cpu().numpy()}
    return task.restoration(torch.cat(draws, 1), torch.cat(means), found.how, log_prob=result, **figures)


def _blocks(task: Task, args: Args) -> Iterator[Args]:
    """A few data at a time, each block with random numbers of its own."""
    for start in range(0, len(args[0]), ROWS):
        reseed(derived_seed(task.seed, DRAWS, 2, start), args[0].device)
        yield tuple(arg[start : start + ROWS] for arg in args)
