"""`restore`: draws of missing or noisy pixels from the posterior, their mean, and log p(missing | given)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyro_vae import traces
from pyro_vae.chain_rule import ChainRule
from pyro_vae.checks import check_choice, check_count
from pyro_vae.data import Batch
from pyro_vae.estimators.ais import AnnealedImportanceSampling, annealed_importance_sampling
from pyro_vae.estimators.estimate import Estimator
from pyro_vae.estimators.evaluate import checked_space, pick_device, prepared
from pyro_vae.estimators.multilevel import multilevel
from pyro_vae.estimators.proposals import Proposal, refined
from pyro_vae.masks import GivenPixels
from pyro_vae.restoration import ways
from pyro_vae.restoration.corruption import Missing
from pyro_vae.restoration.task import Restoration, Task, corruption_of, space_of
from pyro_vae.spaces import Quadrants
from pyro_vae.traces import Program
from pyro_vae.uses import HOW


def restore(
    model: nn.Module | Program,
    batch: Batch,
    missing: Tensor | GivenPixels | None = None,
    *,
    noise: float | None = None,
    guide: Program | None = None,
    how: str | None = None,
    num_draws: int = 64,
    num_particles: int | None = None,
    proposal: Proposal | None = None,
    annealing: AnnealedImportanceSampling | None = None,
    estimator: Estimator | None = None,
    score: bool | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Restoration:
    r"""Restore missing or noisy pixels by the posterior of a fitted model, p(x | y) = ∫ p(x | y, z) p(z | y) dz.

    Independent pixels, mixtures and PPCA give it in closed form, by Bayes' rule for components and normal laws. A
    CVAE that is given these very pixels answers by itself. A chain-rule model draws the missing pixels in its order,
    weighted by the given ones that come later. Any other pair with continuous latents and independent pixels given
    them draws z from p(z | y): by importance resampling from a Gaussian that is refined for each image, or by HMC
    annealed from the prior, which also finds modes far from the guide's.

    Held-out log p(missing | given) = log p(x) - log p(given pixels). It is exact where both are, an upper bound in
    expectation for an exact p(x) and a chain that had to be weighted, and unbiased for a pair with latents, both parts
    being multilevel estimates; two lower bounds differ by nobody knows what, so that such an estimator is refused.

    Args:
        model: one of our models, or a Pyro model as for `log_likelihood`.
        batch: whole images (n, *shape), with label contexts if the model is given labels. Under the mask they hold the
            truth; if it is unknown, anything in their space, and `score` False.
        missing: True where a pixel is missing, shape (*shape); or the given pixels as `pv.Quadrants`.
        noise: instead, what all pixels suffered: the standard deviation of normal noise (Real), P(flip) (Binary).
        guide: of a Pyro model that is not one of ours.
        how: "resampling" (the default) or "mcmc", for draws of latents.
        num_draws: restored images for each image; of "mcmc" also the chains.
        num_particles: of which latents are resampled, or walks of a chain rule; 1000 by default.
        proposal: of the particles of latents, in place of `refined()`.
        annealing: steps and leapfrog steps of "mcmc"; by default 200 steps of 10.
        estimator: where there are latents, of log p(x) and log p(given), or of a CVAE's own log p(missing | given); by
            default `multilevel(500, proposal=refined())`.
        score: whether to estimate log p(missing | given); by default where pixels are missing, and with noise there
            is none.
        seed: of everything random.
        device: where to compute; a GPU if there is one.
        progress: show a progress bar of estimates of log p, and of walks through the pixels.

    Returns:
        Draws, means and log p, per image.

    Raises:
        ValueError: neither or both of `missing` and `noise`; pixels or latents of a kind that cannot be restored; a
            model given other quadrants than these; a setting that the way to the answer would ignore.

    Source: Rezende, Mohamed, Wierstra, "Stochastic backpropagation and approximate inference in deep generative
    models", 2014, arXiv:1401.4082 (imputation); Mattei, Frellsen, "MIWAE", 2019, arXiv:1812.02633 (importance
    resampling of missing pixels).
    """
    check_choice("how", how or HOW[0], HOW)
    check_count("num_draws", num_draws)
    check_count("num_particles", num_particles or 1000, least=2)
    space_of(batch)
    corruption = corruption_of(batch, missing, noise)
    if score and not isinstance(corruption, Missing):
        raise ValueError("score=True asks for log p(missing | given), and with noise no pixels are missing")
    score = isinstance(corruption, Missing) if score is None else score
    settings: dict[str, object] = {
        "how": how,
        "num_particles": num_particles,
        "proposal": proposal,
        "annealing": annealing,
        "estimator": estimator,
    }
    if how == "mcmc":
        _refuse(settings, ("num_particles", "proposal"), "mcmc has chains, as many as num_draws, and no particles")
    else:
        _refuse(settings, ("annealing",), "it goes with how='mcmc'")
    if not score:
        _refuse(settings, ("estimator",), "it is of log p(missing | given), which is not asked for")
    scorer = estimator or multilevel(500, proposal=refined())
    task = Task(model, batch, corruption, guide, num_draws, scorer, score, seed, pick_device(device), progress)
    if isinstance(getattr(model, "context", None), Quadrants):
        own = "the model is of p(missing | given) and draws from it"
        _refuse(settings, ("how", "num_particles", "proposal", "annealing"), own)
        return ways.given_quadrants(task)
    checked_space(model, batch)
    with prepared(model, batch, guide, task.device, seed) as (pair, args):
        latent = traces.matching_sites(pair, tuple(arg[:2] for arg in args))
        if latent:
            steps = annealing or annealed_importance_sampling(200)
            chains = replace(steps, num_chains=num_draws, proposal=None) if how == "mcmc" else None
            return ways.by_latents(task, pair, args, num_particles or 1000, proposal or refined(), chains)
    _refuse(settings, ("how", "proposal", "annealing", "estimator"), "the model has no latents")
    exact = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
    with prepared(exact, batch, guide, task.device, seed) as (pair, args):
        law = traces.observation(pair, tuple(arg[:2] for arg in args))
        if isinstance(law, ChainRule):
            return ways.by_walk(task, pair, args, num_particles or 1000)
        _refuse(settings, ("num_particles",), "the answer is known in closed form")
        return ways.in_closed_form(task, pair, args)


def _refuse(settings: Mapping[str, object], names: Sequence[str], why: str) -> None:
    """Raise a ValueError that names those of some settings that were given, and would be ignored."""
    if given := [name for name in names if settings[name] is not None]:
        raise ValueError(f"{' and '.join(given)} would be ignored: {why}")
