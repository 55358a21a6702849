"""`restore`: draws of missing or noisy pixels from the posterior, their mean, and log p(missing | given)."""

import copy
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
    how: str = "resampling",
    num_draws: int = 64,
    num_particles: int = 1000,
    proposal: Proposal | None = None,
    annealing: AnnealedImportanceSampling | None = None,
    estimator: Estimator | None = None,
    score: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
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
        how: "resampling" or "mcmc", for models with latents.
        num_draws: restored images for each image; of "mcmc" also the chains.
        num_particles: of which they are resampled.
        proposal: of the particles, in place of `refined()`.
        annealing: steps and leapfrog steps of "mcmc"; by default 200 steps of 10.
        estimator: of log p(x) and log p(given), by default `multilevel(500, proposal=refined())`.
        score: whether to estimate log p(missing | given).
        seed: of everything random.
        device: where to compute; a GPU if there is one.

    Returns:
        Draws, means and log p, per image.

    Raises:
        ValueError: neither or both of `missing` and `noise`; pixels or latents of a kind that cannot be restored; a
            model given other quadrants than these.

    Source: Rezende, Mohamed, Wierstra, "Stochastic backpropagation and approximate inference in deep generative
    models", 2014, arXiv:1401.4082 (imputation); Mattei, Frellsen, "MIWAE", 2019, arXiv:1812.02633 (importance
    resampling of missing pixels).
    """
    check_choice("how", how, HOW)
    check_count("num_draws", num_draws)
    check_count("num_particles", num_particles, least=2)
    space_of(batch)
    corruption = corruption_of(batch, missing, noise)
    scorer = estimator or multilevel(500, proposal=refined())
    score = score and isinstance(corruption, Missing)
    task = Task(model, batch, corruption, guide, num_draws, scorer, score, seed, pick_device(device))
    if isinstance(getattr(model, "context", None), Quadrants):
        return ways.given_quadrants(task)
    checked_space(model, batch)
    with prepared(model, batch, guide, task.device, seed) as (pair, args):
        latent = traces.matching_sites(pair, tuple(arg[:2] for arg in args))
        if latent:
            steps = annealing or annealed_importance_sampling(200)
            chains = replace(steps, num_chains=num_draws, proposal=None) if how == "mcmc" else None
            return ways.by_latents(task, pair, args, num_particles, proposal or refined(), chains)
    exact = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
    with prepared(exact, batch, guide, task.device, seed) as (pair, args):
        law = traces.observation(pair, tuple(arg[:2] for arg in args))
        if isinstance(law, ChainRule):
            return ways.by_walk(task, pair, args, num_particles)
        return ways.in_closed_form(task, pair, args)
