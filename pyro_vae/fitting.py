"""`fit`: a model's parameters from data, by SVI, by the model's own maximum likelihood, or by a training of its own."""

import dataclasses
import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_vae import checkpoint, distributed, svi, traces
from pyro_vae.checks import check_choice
from pyro_vae.data import Data
from pyro_vae.estimators.evaluate import pick_device
from pyro_vae.history import History, write_rows
from pyro_vae.mapped import Mapped
from pyro_vae.traces import Program

OWN_WAYS = {"own": "own_training", "maximum_likelihood": "maximum_likelihood"}  # methods of a model, by name of a fit
METHODS = ("svi", *OWN_WAYS)


def fit(
    model: nn.Module,
    data: Data,
    *,
    guide: Program | nn.Module | None = None,
    method: str | None = None,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    seed: int = 0,
    initialize: bool | None = None,
    **settings: Any,
) -> History:
    """Fit a model in place: parameters with the best validation ELBO at the end.

    SVI maximises the ELBO, E_q [log p(x, z) - log q(z | x)], or another objective, by Adam on minibatches, no datum
    left out; selection sees the training and validation data only. A model with the method `maximum_likelihood` (EM,
    closed form) is fitted by it unless `method` says "svi", and one with the method `own_training` (contrastive
    divergence, squared errors, an adversary), to which neither an ELBO nor a likelihood leads, by that.

    Objectives: "elbo" (or "trace"), the default; "mean_field", with closed-form divergences; "beta", the ELBO that asks
    for `beta` or a schedule; "iwae", the importance weighted bound L_K; "renyi", the bound of order `alpha`; "dreg",
    L_K with doubly reparameterised gradients; "sticking_the_landing", the ELBO without the score term in its gradient;
    "free_bits", with a floor under the divergences. See `pyro_vae.objectives` for formulas and sources. All but "elbo"
    and "beta" need a guide whose draws are differentiable.

    Args:
        model: one of our models, or a torch module that is a Pyro model.
        data: where the batches come from; binary training data are redrawn each epoch if they are dynamic.
        guide: the guide of a model that has none of its own.
        method: "svi", "maximum_likelihood" or "own"; by default one of the latter where the model has it.
        device: where to compute; a GPU if there is one. Data and model stay there during the fit.
        out: directory for `checkpoint.pt` and `history.csv`.
        resume: go on from the checkpoint in `out`, on the CPU to bit-identical parameters.
        progress: show a bar with ELBO, images/s and the time left.
        seed: seed of everything random.
        initialize: for SVI, whether the model first starts from the training data (its method of that name sets
            output biases to the mean image, pseudo-inputs to images), whatever parameters it has. If None, only a model
            that was never fitted: a second fit by SVI goes on from the parameters of the first.
        **settings: for SVI the fields of `svi.Settings`: num_epochs, batch_size, learning_rate, schedule ("one_cycle",
            "cosine", "constant"), adam_eps, objective, num_particles (K), alpha (of "renyi", not 1), free_bits (the
            floor of "free_bits", nats per latent dimension), beta (weight of log p(z) - log q(z | x)), kl_schedule of
            that weight ("linear", "cyclical"), kl_warmup (epochs over which it rises, if linear), num_cycles (if
            cyclical), patience (epochs without a better validation ELBO), validate_every, and compile: False runs the
            pair as Pyro does, None as one graph of tensor operations where that pays, True as a graph that inductor has
            fused (10 to 50 seconds; other last digits). On the CPU None has the digits of False, and times decide; on a
            GPU it has others, and the number of steps decides, so that a seed has its digits. What cannot be a graph
            runs as it is, see `pyro_vae.compiled`. Otherwise passed on to the model's `maximum_likelihood` or
            `own_training`.

    Returns:
        The history, in nats per datum. `valid_elbo` is a lower bound on log p whatever the objective: L_K for "iwae"
        and "dreg", the Rényi bound for "renyi" (L_K if alpha < 0), the ELBO for the others, with no weight and no
        floor; by it the parameters are chosen. `train_elbo` is the same for the training data, and None where what was
        maximised is no bound: with a KL weight other than 1, free bits, or alpha < 0. Ctrl-C ends the fit early: the
        best parameters are kept and the status says "interrupted".

    Raises:
        NonFiniteLoss: at the first NaN or infinite loss, naming the step and the site.
        ValueError: for settings that make no sense, a guide that the objective cannot use, or a checkpoint of other
            settings.
    """
    ways = {
        "own": getattr(model, "own_training", None),
        "maximum_likelihood": getattr(model, "maximum_likelihood", None),
    }
    method = method or next((name for name, way in ways.items() if way is not None), "svi")
    check_choice("method", method, METHODS)
    kinds, own = getattr(model, "spaces", None), getattr(model, "space", data.space)
    if own != data.space or (kinds and not isinstance(data.space, kinds)):
        raise ValueError(
            f"{type(model).__name__} for {own} of shape {own.shape} cannot be fitted to data in {data.space} of shape "
            f"{data.space.shape}"
        )
    for name in ("train", "valid"):
        data.space.check(getattr(data, name).obs, f"{name} obs")
    if initialize is not None and (resume or method != "svi"):
        raise ValueError("initialize is for a new fit by SVI: other fits have their own start, a resumed fit none")
    if method != "svi":
        way = _checked_way(model, ways[method], method)
        return _by_its_own_way(model, way, method, data, pick_device(device), seed, progress, settings, out)
    traces.check_has_log_prob(model)  # without which there is no ELBO
    pair = traces.as_pair(model, guide)
    known = [field.name for field in dataclasses.fields(svi.Settings)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"fit has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    run = svi.Run(
        pair,
        data,
        svi.Settings(seed=seed, **settings),
        pick_device(device),
        None if out is None else Path(out),
    )
    return run.go(resume, progress, initialize)


def own_method(model: nn.Module | type[nn.Module]) -> str | None:
    """How `fit` fits a model (or one of this class) that has a way of its own: "own", "maximum_likelihood" or None."""
    return next((name for name, attribute in OWN_WAYS.items() if hasattr(model, attribute)), None)


def _checked_way(model: nn.Module, way: Any, method: str) -> Any:
    name = type(model).__name__
    if way is None:
        raise ValueError(f"{name} has no method {OWN_WAYS[method]}; fit it with method='svi'")
    if distributed.size() > 1:
        what = "a training of its own" if method == "own" else "maximum likelihood"
        raise ValueError(f"{name} is fitted by {what} in one process: start it without torchrun")
    return way


def _by_its_own_way(
    model: nn.Module,
    way: Any,
    method: str,
    data: Data,
    device: torch.device,
    seed: int,
    progress: bool,
    settings: dict[str, Any],
    out: str | Path | None,
) -> History:
    known, started = _check_settings(model, way, method, settings), time.perf_counter()
    with _bar(model, progress, "epoch" if method == "own" else "iteration") as bar:
        model.to(device)
        if method == "own":
            rows = _own_training(model, way, data, seed, bar, settings)
        else:
            rows = _maximum_likelihood(way, known, data, seed, bar, settings)
        svi.mark_fitted(model)
    return _finished(model, rows, started, out)


def _own_training(
    model: nn.Module, way: Any, data: Data, seed: int, bar: Any, settings: dict[str, Any]
) -> tuple[dict[str, float | None], ...]:
    """By `own_training(data, *, seed, progress, ...)`, which gives one row of named numbers for each epoch.

    A way that keeps the parameters of another epoch than the last one says in each row which is "best_epoch" so far.
    """

    def tick(row: dict[str, float | None]) -> None:
        known = {name: value for name, value in row.items() if value is not None}
        bad = [f"{name} is {value}" for name, value in known.items() if not math.isfinite(value)]
        if bad:
            raise svi.NonFiniteLoss(f"epoch {row['epoch']} of {type(model).__name__}: {', '.join(bad)}")
        bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in known.items()), refresh=False)
        bar.update()

    return tuple(way(data, seed=seed, progress=tick, **settings))


def _maximum_likelihood(
    way: Any, known: list[str], data: Data, seed: int, bar: Any, settings: dict[str, Any]
) -> tuple[dict[str, float | None], ...]:
    """By `maximum_likelihood(obs, ...)`, which gives the mean log p of the training data after each iteration."""

    def tick(iteration: int, objective: float) -> None:
        bar.set_postfix_str(f"train log p {objective:.3f}", refresh=False)
        bar.update()

    own = {name: value for name, value in {"seed": seed, "progress": tick}.items() if name in known}
    obs = data.train.obs
    if isinstance(obs, Mapped) and "batch_size" not in known:  # a model that needs all of them at once
        obs = obs[:]
    trace = way(obs, **own, **settings)  # which moves what it needs to the device
    return tuple({"epoch": i + 1, "train_log_prob": value} for i, value in enumerate(trace))


def _check_settings(model: nn.Module, way: Any, method: str, settings: dict[str, Any]) -> list[str]:
    """The names that a model's own way takes, after checking that it takes all that are given."""
    known = list(inspect.signature(way).parameters)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{type(model).__name__}.{OWN_WAYS[method]} has no setting {', '.join(unknown)}")
    return known


@contextmanager
def _bar(model: nn.Module, progress: bool, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc=type(model).__name__, unit=unit, disable=not progress, mininterval=1.0) as bar:
        yield bar


def _finished(
    model: nn.Module, rows: tuple[dict[str, float | None], ...], started: float, out: str | Path | None
) -> History:
    best = int(rows[-1].get("best_epoch") or len(rows)) if rows else 0  # a way that chooses among its epochs says so
    history = History(rows, best, None, "finished", time.perf_counter() - started)
    if out is not None:
        checkpoint.save(Path(out) / "checkpoint.pt", {"model": svi.on_cpu(model.state_dict())})
        write_rows(rows, Path(out) / "history.csv")
    return history
