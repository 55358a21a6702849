"""`log_likelihood`: one call for every estimator and every model/guide pair, which leaves the model as it was."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae import distributed, spaces, traces
from pyro_vae.estimators.estimate import Estimate, Estimator, flags
from pyro_vae.estimators.importance import ImportanceSampling, importance_sampling
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.estimators.reverse import without_latents
from pyro_vae.randomness import derived_seed, own_randomness
from pyro_vae.traces import Pair, Program

if TYPE_CHECKING:
    from pyro_vae.data import Batch

ESTIMATORS = ("exact", "importance_sampling", "multilevel", "annealed_importance_sampling", "router", "sandwich")
LABEL_SHARE = 0.01  # of p(x): a label with less says nothing of the tail of the sum


def log_likelihood(
    model: nn.Module | Program,
    batch: "Batch",
    *,
    guide: Program | None = None,
    estimator: Estimator | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
    marginal: bool = True,
) -> LogLikelihood:
    """Held-out log p(x_n) of each datum, with errors, direction and diagnostics.

    A model that conditions on class labels gives log p(x | label), and `result.marginal` holds log p(x) = logsumexp_c
    [log p(c) + log p(x | c)]: the datum's own label keeps all its particles, the other labels share as many again.
    Every p(x | c) is estimated without bias, so the logarithm of their sum is a lower bound in expectation however
    the particles are divided.

    Parameters, buffers, train/eval mode and device of the pair's modules and the global random state are left as they
    were. Modules that a plain function finds in its globals cannot be seen: put those into eval mode yourself.

    Args:
        model: one of our models, or any Pyro model called as `model(obs)` or `model(obs, context)`, with every site
            in a plate "data" at dim -1 and the data at the site "obs".
        batch: the observations, shape (n, ...), and the context if the model has one.
        guide: the guide of a Pyro model that is not one of ours.
        estimator: `exact()`, `importance_sampling(...)`, `multilevel(...)`, `annealed_importance_sampling(...)`,
            `router(...)` or `sandwich(...)`; by default exact where there are no latent sites and importance sampling
            with 5,000 particles elsewhere.
        seed: seed of the noise; the same seed gives the same digits on the same kind of device.
        device: where to compute; a GPU if there is one, or for plain functions where `batch` lies.
        progress: show a progress bar.
        marginal: for a model given labels, whether to estimate log p(x) beside log p(x | label).

    Returns:
        Per-datum log p in nats, higher is better; its direction says which side of the truth it lies on.

    Raises:
        ValueError: if the model has no p(x), model and guide differ in their latent sites, a site is scaled or not per
            datum, or a weight is NaN or infinite.
    """
    traces.check_has_log_prob(model)
    space = checked_space(model, batch)
    if not (estimator is None or (callable(estimator) and hasattr(estimator, "num_particles"))):
        raise TypeError(f"estimator must be one of pv.{', pv.'.join(ESTIMATORS)}, with its settings, got {estimator!r}")
    started = time.perf_counter()
    with prepared(model, batch, guide, device, seed) as (pair, args):
        latent = traces.matching_sites(pair, tuple(arg[:2] for arg in args))
        estimator = estimator or importance_sampling() if latent else without_latents(estimator, pair, args)
        space = space or _space_of(pair, args)
        _check_measure(pair, args, space)
        with progress_bar(len(batch), progress) as tick:
            estimate = estimator(pair, args, seed, tick)
        seconds = time.perf_counter() - started
        labels = getattr(model, "context", None)
        whole = None
        if marginal and isinstance(labels, spaces.Labels):
            whole = LogLikelihood(
                **vars(_marginal(estimate, estimator, pair, args, labels, seed, progress)),
                space=space,
                seed=seed,
                seconds=time.perf_counter() - started,
                digest=replace(batch, context=None).digest,
            )
    given = None if batch.context is None else str(labels or "context")
    return LogLikelihood(
        **vars(estimate),
        space=space,
        seed=seed,
        seconds=seconds,
        digest=batch.digest,
        given=given,
        marginal=whole,
    )


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _check_measure(pair: Pair, args: tuple[Tensor, ...], space: spaces.Space) -> None:
    """Raise a ValueError for a density on data that are scored by masses, or the other way round."""
    try:
        is_discrete = traces.observation(pair, tuple(arg[:2] for arg in args)).support.is_discrete
    except NotImplementedError:  # a law that does not tell its support; ours are built by their space
        return
    if is_discrete != space.is_discrete:
        found, expected = ("a mass", "a density") if is_discrete else ("a density", "a mass")
        raise ValueError(f"the law at site 'obs' has {found}, but data in {space} need {expected}")


def checked_space(model: object, batch: "Batch") -> spaces.Space | None:
    """The space of model and batch, if either states one, after checking that they belong together."""
    if not hasattr(batch, "obs"):
        raise TypeError(f"batch must be a Batch, as in pv.Batch(obs) of a tensor obs, got {type(batch).__name__}")
    own, kinds = getattr(model, "space", None), getattr(model, "spaces", None)
    if kinds and batch.space is not None and not isinstance(batch.space, kinds):
        raise ValueError(f"{type(model).__name__} lives in {_names(kinds)}, not in {batch.space}")
    if own is not None and batch.space is not None and own != batch.space:
        raise ValueError(
            f"the model lives in {own} of shape {own.shape}, the data in {batch.space} of shape {batch.space.shape}"
        )
    if own is not None and (getattr(model, "context", None) is None) != (batch.context is None):
        context = getattr(model, "context", None)
        expected, found = ("none", "one") if batch.context is not None else (str(context), "none")
        raise ValueError(f"the context of the model is {expected}, but the batch has {found}")
    space = batch.space or own
    if space is not None:
        space.check(batch.obs)
    return space


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; a GPU if none was and there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _arguments(pair: Pair, batch: "Batch", device: torch.device) -> tuple[Tensor, ...]:
    """Obs and context on the device; floating point ones in the precision of the parameters."""
    dtype = next((p.dtype for root in pair.modules for p in root.parameters() if p.is_floating_point()), None)
    return tuple(arg.to(device, dtype if arg.is_floating_point() else None) for arg in batch.arguments)


@contextmanager
def prepared(
    model: nn.Module | Program,
    batch: "Batch",
    guide: Program | None,
    device: str | torch.device | None,
    seed: int,
) -> Iterator[tuple[Pair, tuple[Tensor, ...]]]:
    """The pair and what it is called with, on the device and as `_untouched` says."""
    pair = traces.as_pair(model, guide)
    # What a plain function reads from outside cannot be moved, so it runs where its data lie.
    place = pick_device(device if device is not None or pair.modules else batch.obs.device)
    with _untouched(pair, place, seed):
        yield pair, _arguments(pair, batch, place)


@contextmanager
def _untouched(pair: Pair, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, own random numbers, on `device`; all of it undone at the end."""
    modules = [module for root in pair.modules for module in root.modules()]
    training = [module.training for module in modules]
    trained = [parameter for root in pair.modules for parameter in root.parameters() if parameter.requires_grad]
    homes = [next((p.device for p in root.parameters()), device) for root in pair.modules]
    try:
        store = pyro.get_param_store()
        with (
            store.scope(store.get_state()),  # what a run enters there is gone at the end
            torch.no_grad(),
            own_randomness(seed, device),
            pyro.validation_enabled(False),
            _full_precision(device),
        ):
            for root in pair.modules:
                root.eval().to(device)
            for parameter in trained:  # gradients with respect to latents need not pass through these
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for root, home in zip(pair.modules, homes, strict=True):
            root.to(home)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions in float32 proper: cudnn takes shorter numbers unless told."""
    before = torch.backends.cudnn.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int], object]]:
    """What estimators call with the number of data that are done, shown as a bar by the first process."""
    from tqdm import tqdm

    with tqdm(
        total=total, unit="datum", desc="log p", disable=not (show and distributed.is_first()), mininterval=1.0
    ) as bar:
        yield bar.update


def _space_of(pair: Pair, args: tuple[Tensor, ...]) -> spaces.Space:
    """The space that the support of the site "obs" implies, for a Pyro pair that states none."""
    support = traces.observation(pair, tuple(arg[:2] for arg in args)).support
    shape = tuple(args[0].shape[1:])
    base = getattr(support, "base_constraint", support)
    if not support.is_discrete:
        return spaces.Real(shape)
    if type(base).__name__ == "_Boolean":
        return spaces.Binary(shape)
    top = getattr(base, "upper_bound", None)
    if top is None:
        raise ValueError(f"the support {support} of site 'obs' is no known space; give the batch a space")
    return spaces.Quantized(shape, levels=int(torch.as_tensor(top).max()) + 1)


def _marginal(
    own: Estimate,
    estimator: Estimator,
    pair: Pair,
    args: tuple[Tensor, ...],
    labels: spaces.Labels,
    seed: int,
    progress: bool,
) -> Estimate:
    """Log p(x) = logsumexp_c [log p(c) + log p(x | c)], and its variance Σ_c r_c² s_c² with r_c = p(c | x).

    Only estimates that are unbiased for p(x | c) may be added up, as those are that bound its logarithm from below;
    where the estimator is another, a datum's own label, which holds most of the sum, is scored again by importance
    sampling with the same proposal. The other labels share as many particles again, drawn from the guide.
    """
    obs, context = args
    num_others = labels.num_dims - 1
    log_prior = torch.tensor(labels.log_prob, dtype=torch.float64)
    own_label = context.argmax(-1).cpu()
    plain = replace(estimator, jackknife=False) if isinstance(estimator, ImportanceSampling) else importance_sampling()
    if own.direction == "unbiased":
        inner = getattr(estimator, "estimator", estimator)  # what a certificate was asked for
        own = replace(plain, proposal=getattr(inner, "proposal", None))(pair, args, seed, lambda num: None)
        own = replace(
            own, notes=(f"scored by importance sampling, as {type(inner).__name__} cannot be summed", *own.notes)
        )
    share = max(2, plain.num_particles // max(1, num_others))
    others = estimator if own.direction == "exact" else replace(plain, num_particles=share, proposal=None)
    estimates, log_priors = [own], [log_prior[own_label]]
    with progress_bar(len(obs) * num_others, progress) as tick:
        for shift in range(1, num_others + 1):
            label = (own_label + shift) % labels.num_dims
            other = torch.nn.functional.one_hot(label, labels.num_dims).to(context)
            estimates.append(others(pair, (obs, other), derived_seed(seed, shift), tick))
            log_priors.append(log_prior[label])
    return _sum_over_labels(estimates, torch.stack(log_priors).numpy())


def _sum_over_labels(estimates: list[Estimate], log_priors: np.ndarray) -> Estimate:
    """The marginal of estimates of log p(x | c), one per label; diagnostics are the worst of labels with a share."""
    joint = log_priors + np.stack([e.log_prob for e in estimates])  # (num_classes, n)
    top = joint.max(0)
    log_prob = top + np.log(np.exp(joint - top).sum(0))
    share = np.exp(joint - log_prob)
    variance = (share**2 * np.where(share > 0, np.stack([e.variance for e in estimates]), 0.0)).sum(0)
    khats = [e.khat for e in estimates if e.khat is not None]
    khat = np.where(share > LABEL_SHARE, np.stack(khats), -np.inf).max(0) if len(khats) == len(estimates) else None
    bad = None
    if khat is None and estimates[0].direction != "exact":
        bad = (np.stack([flags(e) for e in estimates]) & (share > LABEL_SHARE)).any(0)
    return replace(
        estimates[0],
        log_prob=log_prob,
        variance=variance,
        num_particles=sum(e.num_particles for e in estimates),
        ess=None,
        khat=khat,
        khat_particles=estimates[0].khat_particles or estimates[0].num_particles,
        elbo=None,
        spread=None,
        bad=bad,
        bias_bound=_marginal_bias(estimates, share),
        doubling_bias=None,
        doubling_ratio=None,
        certificate=None,
        notes=tuple(dict.fromkeys(note for e in estimates for note in e.notes)),
    )


def _marginal_bias(estimates: list[Estimate], share: np.ndarray) -> float | None:
    """Half the mean variance of log p(x), or the bounds of the labels by their shares if that is more.

    None where a label's estimate has no bound.
    """
    if any(e.bias_bound is None for e in estimates):
        return None
    variances = np.where(share > 0, np.stack([e.variance for e in estimates]), 0.0)
    own = sum(float(weight) * (e.bias_bound or 0.0) for weight, e in zip(share.mean(1), estimates, strict=True))
    return max(float((share**2 * variances).sum(0).mean() / 2), own)
