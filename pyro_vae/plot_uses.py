"""Pictures of what a fitted model is used for: restored images, traversals, outlier scores; as PNG files."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.data import Batch
from pyro_vae.plots import BLUE, GREY, ORANGE
from pyro_vae.spaces import Labels, Quadrants, Space
from pyro_vae.traversal import Traversal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_vae.restoration.task import Restoration
    from pyro_vae.roc import Auroc

UNSEEN = (0.42, 0.58, 0.78)  # colour of a missing pixel, which no grey is
MAX_IMAGES, MAX_DRAWS = 10, 5  # in a picture
COLOURS = (BLUE, ORANGE, "#4b8b3b", "#8a4fae", "#b03a48", "#3f9a9a", "#7a6a2f")


def plot_restoration(found: "Restoration", seen: Batch, truth: Tensor | None, path: str | Path) -> Path:
    """Write, for each of a few images, what was seen (missing pixels in blue), the mean, draws, and the truth."""
    few, draws = min(MAX_IMAGES, len(seen)), min(MAX_DRAWS, len(found.draws))
    unit = _unit(seen.space)
    shown = [_coloured(unit(seen.obs[:few]), found.missing), _coloured(unit(found.mean[:few]))]
    shown += [_coloured(unit(draw[:few])) for draw in found.draws[:draws]]
    titles = ["seen", "mean", *(f"draw {k + 1}" for k in range(draws))]
    if truth is not None:
        shown, titles = [*shown, _coloured(unit(truth[:few]))], [*titles, "truth"]
    pictures = torch.stack(shown, 1).flatten(0, 1)  # one row for each image
    return plots.plot_images(pictures, path, columns=len(shown), column_titles=titles)


def plot_traversal(found: Traversal, batch: Batch, path: str | Path, context: Labels | Quadrants | None = None) -> Path:
    """Write a row for each latent, its images from the lowest to the highest value, and how much it is used."""
    images = _whole(found.images.flatten(0, 1), batch, 0, context)
    used = "KL" if found.kind.startswith("KL") else "var"
    labels = [f"z[{unit}]  {used} {value:.2f}" for unit, value in zip(found.units, found.used, strict=True)]
    ends = ["1%", *[""] * (found.values.shape[1] - 2), "99%"]
    return plots.plot_images(images, path, columns=len(ends), row_labels=labels, column_titles=ends)


def plot_way(
    images: Tensor,
    batch: Batch,
    ends: tuple[int, int],
    way: str,
    path: str | Path,
    context: Labels | Quadrants | None = None,
) -> Path:
    """Write the images on the way between two codes, with the data that these are the codes of at either end."""
    unit = _unit(batch.space)
    data = [_whole(unit(batch.obs[end : end + 1]), batch, end, context) for end in ends]
    shown = torch.cat([data[0], _whole(images, batch, ends[0], context), data[1]])
    titles = ["datum", *(f"{t:.2f}" for t in np.linspace(0, 1, len(images))), "datum"]
    return plots.plot_images(
        shown, path, columns=len(shown), column_titles=titles, title=f"{way} interpolation of codes"
    )


def plot_outliers(
    areas: Mapping[str, Mapping[str, "Auroc"]], p_values: Mapping[str, np.ndarray], path: str | Path
) -> Path:
    """Write the AUROC of every score for every kind of outlier, with intervals, and the law of p-values of inliers.

    Args:
        areas: {kind of outlier: {score: Auroc}}.
        p_values: {score: conformal p-values of held-out inliers}; their empirical law beside that of uniform ones.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(areas.values())))
    figure = Figure(figsize=(10, 1.6 + 0.22 * len(names) * len(areas)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_areas(left, areas, names)
    _draw_laws(right, p_values, {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)})
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    return Path(path)


def _draw_areas(ax: "Axes", areas: Mapping[str, Mapping[str, "Auroc"]], names: list[str]) -> None:
    step = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [of_kind[name] for of_kind in areas.values()]
        height = np.arange(len(found)) - 0.4 + step * (place + 0.5)
        value = np.array([each.value for each in found])
        arms = [value - [each.low for each in found], [each.high for each in found] - value]
        style: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2}
        ax.errorbar(value, height, xerr=arms, color=COLOURS[place % len(COLOURS)], label=name, **style)
    ax.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    for between in range(1, len(areas)):
        ax.axhline(between - 0.5, color=GREY, linewidth=0.4)
    ax.set_yticks(range(len(areas)), list(areas))
    ax.set(xlim=(-0.02, 1.02), ylim=(len(areas) - 0.5, -0.5))
    ax.set_xlabel("AUROC with 95% interval (0.5: chance; below: outliers look more typical)")
    ax.grid(axis="x", alpha=0.3)


def _draw_laws(ax: "Axes", p_values: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> None:
    for name, values in p_values.items():
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        ax.step(ordered, share, where="post", color=colours.get(name, BLUE), linewidth=1)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    count = min(len(values) for values in p_values.values())
    band = math.sqrt(math.log(2 / 0.05) / (2 * count))  # Dvoretzky, Kiefer, Wolfowitz, Massart
    ax.fill_between([0, 1], [-band, 1 - band], [band, 1 + band], color=GREY, alpha=0.15, linewidth=0)
    ax.set(
        xlim=(0, 1), ylim=(0, 1), xlabel=f"conformal p-value of {count} held-out inliers", ylabel="share at or below"
    )
    ax.grid(alpha=0.3)


def _unit(space: Space | None) -> Any:
    return (lambda values: values) if space is None else space.to_unit


def _coloured(images: Tensor, missing: Tensor | None = None) -> Tensor:
    """Images as red, green and blue (n, 3, height, width), with missing pixels in a colour of their own."""
    whole = images if images.ndim == 4 else images.unsqueeze(1)
    whole = whole.expand(-1, 3, -1, -1).clamp(0, 1).clone()
    if missing is not None:
        flat = missing if missing.ndim == 2 else missing.any(0)
        for channel, value in enumerate(UNSEEN):
            whole[:, channel][:, flat] = value
    return whole


def _whole(images: Tensor, batch: Batch, index: int, context: Labels | Quadrants | None) -> Tensor:
    """Images in the unit range; given quadrants of a datum are put back into their place."""
    if not isinstance(context, Quadrants) or batch.context is None:
        return images
    return context.join(batch.context[index].expand(len(images), -1), images)
