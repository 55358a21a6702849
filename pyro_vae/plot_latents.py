"""The picture of the latents: what each unit costs, which are active, and the aggregate posterior beside the prior."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots import BLUE, GREY, ORANGE
from pyro_vae.usage.latent_use import LatentUse
from pyro_vae.usage.rows import ACTIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 60  # units up to which the bars carry their names
LEAST_KL = 0.1  # top of the axis of KL, nats: units that cost nothing look like it
MASSES = (0.5, 0.95)  # of the prior inside its contours


def plot_latent_use(use: LatentUse, path: str | Path) -> Path:
    """Write the KL of each unit, the largest first, and the aggregate posterior q(z) beside the prior p(z).

    Left: the mean over the data of KL(q(u | x) || p(u)) with its 95% interval, active units in another colour; where
    it is unknown for a site, the variance A_u of all units on a log scale instead. Right: draws of q(z) in the two
    units that are used most, and of the prior the contours that hold 50% and 95%, or draws of it where it is no normal;
    with a single unit a histogram and the density.

    Args:
        use: what `latent_use` gave.
        path: PNG file to write.

    Returns:
        The path of the file.
    """
    _latents_figure(use).savefig(path, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    return Path(path)


def _latents_figure(use: LatentUse) -> "Figure":
    from matplotlib.figure import Figure

    wide = min(max(5.0, 0.19 * use.num_units), 12.0)  # inches
    picture = Figure(figsize=(wide + 4.6, 4.6), layout="constrained")
    bars, laws = picture.subplots(1, 2, width_ratios=[wide, 4.6])
    order = _draw_units(bars, use)
    if use.num_units == 1:
        _draw_histogram(laws, use)
    else:
        _draw_scatter(laws, use, int(order[0]), int(order[1]))
    for ax in (bars, laws):
        ax.spines[["top", "right"]].set_visible(False)
        for handle in ax.legend(loc="best", fontsize=8, framealpha=0.85).legend_handles:
            handle.set_alpha(1)  # draws are pale, so that many of them do not hide each other
    return picture


def _names(use: LatentUse) -> list[str]:
    return [name for site in use.latents for name in site.unit_names]


def _draw_units(ax: "Axes", use: LatentUse) -> np.ndarray:
    """One bar for each unit; the order of the units."""
    variance = np.concatenate([site.variance for site in use.latents])
    active = np.concatenate([site.active for site in use.latents])
    divergences = [(site.kl_per_unit, site.kl_per_unit_se) for site in use.latents if site.kl_per_unit is not None]
    if len(divergences) == len(use.latents):
        heights, errors = (np.concatenate(each) for each in zip(*divergences, strict=True))
        ax.set_ylabel(f"KL(q(u | x) || p(u)) (nats, mean over {use.num_data} data)")
    else:
        heights, errors = variance, np.concatenate([site.variance_se for site in use.latents])
        ax.set_ylabel(f"variance of E[u | x] over {use.num_data} data (squared unit of u)")
    order = np.argsort(-heights, kind="stable")
    if len(divergences) < len(use.latents):
        _to_log_scale(ax, heights)
    for chosen, color, words in ((True, BLUE, "active"), (False, GREY, "not active")):
        places = np.flatnonzero(active[order] == chosen)
        units = order[places]
        if len(units) == 0:  # matplotlib would show another colour for it in the legend
            continue
        label = f"{words}: {len(units)} of {use.num_units} units (A_u {'>' if chosen else '≤'} {ACTIVE:g})"
        ax.bar(places, heights[units], color=color, label=label, yerr=1.96 * errors[units], ecolor="#333333", width=0.8)
    if len(divergences) == len(use.latents):
        ax.set_ylim(0, max(1.18 * ax.get_ylim()[1], LEAST_KL))
    _name_units(ax, [_names(use)[unit] for unit in order])
    return order


def _to_log_scale(ax: "Axes", heights: np.ndarray) -> None:
    ax.set_yscale("log")
    ax.set_ylim(ACTIVE / 100, 30 * max(float(heights.max()), ACTIVE))  # room for the legend
    ax.axhline(ACTIVE, color=ORANGE, linewidth=0.9, linestyle="dashed", label=f"threshold {ACTIVE:g}")


def _name_units(ax: "Axes", names: list[str]) -> None:
    """Names below the bars, upright where there are many; none where they would not be legible."""
    ax.set_xlim(-0.8, len(names) - 0.2)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    if len(names) > NAMED:
        ax.set_xlabel(f"{len(names)} units, the largest first")
        return
    ax.set_xticks(range(len(names)), names, rotation=0 if len(names) <= 6 else 90, fontsize=8)
    ax.set_xlabel("unit")


def _prior(use: LatentUse) -> np.ndarray | None:
    """Mean and scale of p(u) of all units (2, units), if every site has a normal one."""
    priors = [site.prior for site in use.latents if site.prior is not None]
    return np.concatenate(priors, -1) if len(priors) == len(use.latents) else None


def _draw_scatter(ax: "Axes", use: LatentUse, first: int, second: int) -> None:
    draws, prior, pair = use.posterior_draws, _prior(use), [first, second]
    size: dict[str, Any] = {"s": 6 if len(draws) <= 3000 else 2, "linewidths": 0}
    if prior is None:
        ax.scatter(*use.prior_draws[:, pair].T, color=ORANGE, alpha=0.3, label="draws of the prior p(z)", **size)
    ax.scatter(*draws[:, pair].T, color=BLUE, alpha=0.3, label=f"{len(draws)} draws of q(z)", **size)
    if prior is not None:
        _draw_contours(ax, *prior[:, pair])
    names = _names(use)
    ax.set(xlabel=f"{names[first]}, used most", ylabel=f"{names[second]}, used second most")
    ax.set_aspect("equal", "datalim")


def _draw_contours(ax: "Axes", loc: np.ndarray, scale: np.ndarray) -> None:
    """Ellipses of two independent normals: a circle of radius √(-2 log(1 - mass)) in standard units."""
    angles = np.linspace(0, 2 * math.pi, 200)
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    for mass, style in zip(MASSES, ("solid", "dashed"), strict=True):
        points = loc + scale * circle * math.sqrt(-2 * math.log(1 - mass))
        ax.plot(*points.T, color=ORANGE, linestyle=style, linewidth=1.4, label=f"{100 * mass:g}% of the prior p(z)")


def _draw_histogram(ax: "Axes", use: LatentUse) -> None:
    draws, prior = use.posterior_draws[:, 0], _prior(use)
    ax.hist(draws, bins=50, density=True, color=BLUE, alpha=0.6, label=f"{len(draws)} draws of q(z)")
    if prior is None:
        line: dict[str, Any] = {"histtype": "step", "color": ORANGE, "linewidth": 1.4}
        ax.hist(use.prior_draws[:, 0], bins=50, density=True, label="draws of the prior p(z)", **line)
    else:
        loc, scale = prior[:, 0]
        low, high = min(draws.min(), loc - 3 * scale), max(draws.max(), loc + 3 * scale)
        grid = np.linspace(low, high, 400)
        density = np.exp(-0.5 * ((grid - loc) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
        ax.plot(grid, density, color=ORANGE, linewidth=1.4, label="prior p(z)")
    ax.set(xlabel=_names(use)[0], ylabel="density")
