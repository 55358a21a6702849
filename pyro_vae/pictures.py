"""Pictures of a fitted run: samples, reconstructions, curves of the fit; what the model draws, as images in [0, 1]."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae import plots, traces
from pyro_vae.data import Batch
from pyro_vae.objectives import SEVERAL
from pyro_vae.randomness import own_randomness
from pyro_vae.runs import Run
from pyro_vae.settings import Settings
from pyro_vae.spaces import Labels, Quadrants

COLUMNS = 8


def draw_samples(
    run: Run, *, num: int = 8, seed: int = 0, labels: Sequence[int] | None = None, device: str | None = None
) -> dict[str, Tensor]:
    """Draws from the model, {"obs": observations, and "given": what they were conditioned on, if anything}.

    Args:
        run: the fitted run.
        num: how many; given labels, of each class (or of `labels` alone); given quadrants, of each of 8 images.
        seed: of the draws and of the choice of images.
        labels: some classes, for a model given labels.
        device: where to draw; the CPU if None.

    Raises:
        ValueError: the model has no p(x) to draw from, or no such label.
    """
    traces.check_has_log_prob(run.model)
    context = _contexts(run, num, seed, labels)
    rows = num if context is None else len(context)
    template = torch.zeros(rows, *run.data.space.shape)
    args = (template,) if context is None else (template, context)
    place = torch.device(device or "cpu")
    with own_randomness(seed, place):
        run.model.to(place)
        obs = traces.simulate(run.pair, tuple(arg.to(place) for arg in args))["obs"].cpu()
        run.model.to("cpu")
    return {"obs": obs} if context is None else {"obs": obs, "given": context}


def _contexts(run: Run, num: int, seed: int, labels: Sequence[int] | None) -> Tensor | None:
    context = run.data.context
    if labels is not None and not isinstance(context, Labels):
        what = "p(x) alone" if context is None else f"p(x | {context})"
        raise ValueError(
            f"a label needs a model that is given labels; {run.config.model} is of {what}, which draws from all "
            "classes at once: fit one of p(x | label), as in train --model cvae --given label"
        )
    if isinstance(context, Labels):
        wrong = [label for label in labels or () if not 0 <= label < context.num_dims]
        if wrong:
            raise ValueError(f"label must be from 0 to {context.num_dims - 1}, got {', '.join(map(str, wrong))}")
        classes = range(context.num_dims) if labels is None else labels
        return torch.eye(context.num_dims)[torch.tensor(list(classes)).repeat_interleave(num)]
    if isinstance(context, Quadrants):
        few = run.data.valid.subset(min(COLUMNS, len(run.data.valid)), seed).context
        return None if few is None else few.repeat_interleave(num, 0)
    return None


def images(run: Run, obs: Tensor, given: Tensor | None) -> Tensor:
    """Observations as pictures (n, *image shape) in [0, 1]; given quadrants are put back in their place."""
    unit = run.data.space.to_unit(obs)
    context = run.data.context
    return context.join(given, unit) if isinstance(context, Quadrants) and given is not None else unit


def plot_samples(run: Run, drawn: dict[str, Tensor], path: Path, *, num: int = 8, seed: int = 0) -> Path:
    """A grid of what `draw_samples` gave; one row per class or per validation image where the model is conditional."""
    obs, given = drawn["obs"], drawn.get("given")
    pictures = images(run, obs, given)
    columns, row_labels, title = num, None, f"samples of {run.config.model}, {run.data.name}"
    if isinstance(run.data.context, Labels):
        row_labels = [f"class {int(row.argmax())}" for row in given[::num]] if given is not None else None
    elif isinstance(run.data.context, Quadrants) and given is not None:
        pictures, columns = _beside_truth(run, run.data.context.mask(), pictures, num, seed), num + 2
        title += f": what is given, the truth, {num} {'draw' if num == 1 else 'draws'}"
    else:
        columns = min(COLUMNS, num)
    return plots.plot_images(pictures.numpy(), path, columns=columns, row_labels=row_labels, title=title)


def _beside_truth(run: Run, mask: Tensor, pictures: Tensor, num: int, seed: int) -> Tensor:
    """The given part of each image (what is missing in grey) and the whole of it before the draws."""
    few = run.data.valid.subset(len(pictures) // num, seed)
    truth = images(run, few.obs, few.context)
    given = torch.where(mask, truth, torch.full_like(truth, 0.5))
    rows = [torch.stack(pair) for pair in zip(given, truth, strict=True)]
    draws = pictures.split(num)
    return torch.cat([part for pair in zip(rows, draws, strict=True) for part in pair])


def plot_reconstructions(run: Run, path: Path, *, num: int = 10, seed: int = 0) -> Path:
    """Validation images above the mean of p(x | z) at one draw z from the guide, or what an autoencoder makes of them.

    The latter is the model's own method `reconstruct(obs)`, in unit scale.
    """
    few: Batch = run.data.valid.subset(min(num, len(run.data.valid)), seed)
    own: Any = getattr(run.model, "reconstruct", None)
    with own_randomness(seed), torch.no_grad():
        means = own(few.obs) if own else images(run, traces.reconstruct(run.pair, few.arguments), few.context)
    return plots.plot_reconstructions(images(run, few.obs, few.context), means, path)


def has_latents(run: Run) -> bool:
    """Whether the model has latent sites, so that log p(x) is more than its ELBO."""
    few: Batch = run.data.valid.subset(min(2, len(run.data.valid)))
    return bool(traces.latent_sites(run.pair, few.arguments)[0])


def validated_quantity(run: Run) -> str:
    """What `valid_elbo` of a fit by SVI holds: log p itself without latents, else the ELBO or a tighter bound."""
    if not has_latents(run):
        return "log p(x)" if run.data.context is None else f"log p(x | {run.data.context})"
    fit = run.config.fit
    if fit.get("objective") not in SEVERAL:
        return "ELBO"
    alpha = fit.get("alpha", Settings.alpha)
    is_renyi = fit["objective"] == "renyi" and alpha >= 0  # below 0 data are validated by the other, see `fit`
    bound = f"Rényi bound (alpha {alpha:g})" if is_renyi else "importance weighted bound"
    return f"{bound} of {fit['num_particles']} particles"


def plot_history(run: Run, path: Path) -> Path | None:
    """The curves of what was fitted, see `validated_quantity`, if the run was fitted by SVI."""
    with open(run.path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return plots.plot_history(rows, path, name=validated_quantity(run)) if rows and "valid_elbo" in rows[0] else None


def plot_run(run: Run) -> list[Path]:
    """All pictures that the run allows, written into its directory."""
    if traces.lacks_log_prob(run.model) is not None:
        return [plot_reconstructions(run, run.path / "reconstructions.png")]
    paths = [plot_samples(run, draw_samples(run), run.path / "samples.png")]
    if has_latents(run):
        paths.append(plot_reconstructions(run, run.path / "reconstructions.png"))
    curve = plot_history(run, run.path / "elbo.png")
    return paths if curve is None else [*paths, curve]
