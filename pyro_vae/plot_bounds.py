"""The picture of bounds over the number of particles: how fast each guide's L_K climbs to log p(x)."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from pyro_vae.bound_rows import BoundRow, figure
from pyro_vae.bound_rows import Figure as Mean
from pyro_vae.bounds import Bounds
from pyro_vae.tables import SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which white paper swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("solid", "dashdot", (0, (4, 1)))  # for more lines than colours
MARKERS = {"exact": "o", "lower": "^", "upper": "v", "unbiased": "D"}
MEANINGS = {
    "exact": "exact",
    "lower": "lower bound: the true value is here or above",
    "upper": "upper bound: the true value is here or below",
    "unbiased": "unbiased",
}
STEP = 1.35  # from one best estimate to the next, on the axis of K
CROWDED = 4  # times the widest gap, from which the common scale is too coarse for the curves
WIDE = 35  # characters of a name, from which the legend has one column


def plot_bound_curves(bounds: Bounds, path: str | Path, *, level: float = 0.95) -> Path:
    """Write L_K over K for each row, from the ELBO at K = 1, with the best estimate of log p(x) as a dashed line.

    All errors are Monte Carlo errors for exactly these data: the noise over draws of the test set is one and the same
    for all rows and would hide what lies between them; the paired errors of differences are those of `bounds.gains()`.
    Where log p(x) of the rows lies so far apart that the curves are flat on its scale, a second panel shows what is
    left from each L_K to the row's own best estimate; a difference, and so with its paired error over the test set.
    The band of the best estimate includes its bias bound. To the right of the curves its marker points to the side on
    which the truth lies. Rows with the same model object have the same log p(x), and so should their dashed lines.

    Args:
        bounds: what `compare_bounds` gave.
        path: PNG file to write.
        level: of the error bars and bands.

    Returns:
        The path of the file.
    """
    _bounds_figure(bounds, level).savefig(path, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    return Path(path)


def _bounds_figure(bounds: Bounds, level: float = 0.95) -> "Figure":
    from matplotlib.figure import Figure

    rows = bounds.rows
    count = 2 if _far_apart(rows) else 1
    picture = Figure(figsize=(7.5 + 4.5 * (count - 1), 4.6 + 0.2 * len(rows)), layout="constrained")  # inches
    panels = picture.subplots(1, count, squeeze=False)[0]
    _draw_bounds(panels[0], bounds, level)
    if count == 2:
        _draw_rests(panels[1], rows, level)
    for ax in panels:
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    _legend(picture, panels[0], rows, level)
    return picture


def _far_apart(rows: Sequence[BoundRow]) -> bool:
    """Whether the curves are flat on the scale that holds them all."""
    whole = max(row.best.mean for row in rows) - min(float(row.elbo.mean()) for row in rows)
    return whole > CROWDED * max(float(row.gap.mean()) for row in rows) > 0


def _style(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS) % len(STYLES)]}


def _draw_bounds(ax: "Axes", bounds: Bounds, level: float) -> None:
    """Every curve, and to its right every best estimate."""
    rows, sizes = bounds.rows, bounds.num_particles
    places = [sizes[-1] * 1.8 * STEP**place for place in range(len(rows))]
    for place, row in enumerate(rows):
        _draw_curve(ax, row, row.bounds, [each.mc_se for each in row.bounds], _style(place), level)
        _draw_best(ax, row, COLOURS[place % len(COLOURS)], level, places[place])
    _scale(ax, sizes, {math.sqrt(places[0] * places[-1]): "best\nestimate"})
    ax.axvline(sizes[-1] * 1.35, color="#8a8a8a", linewidth=0.6)
    ax.set_xlim(0.75, places[-1] * STEP)
    ax.set_ylabel(f"bound on {bounds.quantity}\n(nats per datum, mean over {bounds.num_data} data)")


def _draw_rests(ax: "Axes", rows: Sequence[BoundRow], level: float) -> None:
    """What is left from L_K to the row's own best estimate, paired over the data."""
    for place, row in enumerate(rows):
        rests = [
            figure(row.best.log_prob - bound, row.best.variance + variance)
            for bound, variance in zip(row.curve.bounds, row.curve.variance, strict=True)
        ]
        _draw_curve(ax, row, rests, [each.se for each in rests], _style(place), level)
    _scale(ax, rows[0].curve.num_particles, {})
    ax.axhline(0, color="#8a8a8a", linewidth=0.6)
    ax.set_ylabel(f"best estimate - bound (nats per datum)\n{100 * level:g}% over draws of the test set, paired")


def _scale(ax: "Axes", sizes: Sequence[int], further: dict[float, str]) -> None:
    """K on a log scale, with a tick at every K of the curves."""
    ticks: dict[float, str] = {1: "1\nELBO", **{size: f"{size:,}" for size in sizes[1:]}, **further}
    ax.set_xscale("log")
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()
    ax.set_xlabel("particles K")


def _draw_curve(
    ax: "Axes", row: BoundRow, figures: Sequence[Mean], errors: Sequence[float], style: dict[str, Any], level: float
) -> None:
    z = NormalDist().inv_cdf((1 + level) / 2)
    means, arms = [each.mean for each in figures], [z * error for error in errors]
    options: dict[str, Any] = {"marker": ".", "markersize": 5, "linewidth": 1.4, "capsize": 2.5, "zorder": 3}
    ax.errorbar(row.curve.num_particles, means, yerr=arms, label=_label(row), **options, **style)


def _draw_best(ax: "Axes", row: BoundRow, color: str, level: float, x: float) -> None:
    """A dashed line with its band, and at `x` the marker with its error bar."""
    best = row.best
    interval = best.interval(level)
    ax.axhspan(interval.low, interval.high, color=color, alpha=0.12, linewidth=0, zorder=1)
    ax.axhline(best.mean, color=color, linestyle="dashed", linewidth=0.9, zorder=2)
    arms = [[best.mean - interval.low], [interval.high - best.mean]]
    bar = ax.errorbar(x, best.mean, yerr=arms, color=color, linewidth=1.4, capsize=3, zorder=4)
    bar[2][0].set_linestyle("dotted" if best.warning else "solid")
    ax.plot(x, best.mean, color=color, zorder=5, **_marker(best.direction))


def _marker(direction: str) -> dict[str, Any]:
    """Filled for "exact" and "unbiased", open for a bound."""
    face = {} if direction in ("exact", "unbiased") else {"mfc": "white"}
    return {"marker": MARKERS[direction], "markersize": 7, "linestyle": "none", **face}


def _label(row: BoundRow) -> str:
    gap = figure(row.gap, row.gap_variance)
    error = f", SE {gap.se:.3f}" if math.isfinite(gap.se) else ""
    return f"{row.name}: gap {SYMBOLS[row.direction]} {gap.mean:.3f}{error}"


def _legend(picture: "Figure", ax: "Axes", rows: Sequence[BoundRow], level: float) -> None:
    """Below the picture: the rows with their gaps, then what the marks mean."""
    from matplotlib.lines import Line2D

    curves, grey = ax.get_legend_handles_labels()[0], "#555555"
    used = dict.fromkeys(row.direction for row in rows)
    marks = [Line2D([], [], color=grey, label=f"best: {MEANINGS[each]}", **_marker(each)) for each in used]
    bars = f"{100 * level:g}% Monte Carlo error for these data, bias bound included"
    marks.append(Line2D([], [], color=grey, label=bars, marker="|", markersize=9, linestyle="none"))
    if any(row.best.warning for row in rows):
        marks.append(Line2D([], [], color=grey, linestyle="dotted", label="not to be trusted, see the remarks"))
    columns = 1 if len(picture.axes) == 1 and max(len(row.name) for row in rows) > WIDE else 2
    picture.legend(handles=[*curves, *marks], loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
