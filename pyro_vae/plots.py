"""Pictures of images, training and comparisons, as PNG files; no global state of matplotlib is touched."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_vae.comparison import Comparison
from pyro_vae.rows import Row, flip
from pyro_vae.tables import SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    Images = np.ndarray | Tensor

FAR = 12  # times the distance from the best to the median: such a model stands at the edge with an arrow
BLUE, ORANGE, GREY = "#1f5f99", "#c8641e", "#8a8a8a"
MARKERS = {"exact": "o", "lower": ">", "upper": "<", "unbiased": "D", "unknown": "s"}
MEANINGS = {
    "exact": "exact",
    "lower": "lower bound: truth is here or to the right",
    "upper": "upper bound: truth is here or to the left",
    "unbiased": "unbiased",
    "unknown": "side unknown",
}


def plot_images(
    images: "Images",
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write a grid of images.

    Args:
        images: shape (n, height, width) or (n, 3, height, width), values in [0, 1].
        path: PNG file to write.
        titles: one for each image.
        columns: images in a row; about √n by default.
        row_labels: one for each row.
        column_titles: one for each column.
        title: of the whole grid.

    Returns:
        The path of the file.
    """
    figure = _images_figure(_pixels(images), titles, columns, row_labels, title)
    if column_titles is not None:
        _check_number("column_titles", column_titles, columns or math.ceil(math.sqrt(len(images))))
        for ax, text in zip(figure.axes, column_titles, strict=False):
            ax.set_title(text, fontsize=8, pad=3)
    return _write(figure, path)


def plot_reconstructions(originals: "Images", reconstructions: "Images", path: str | Path) -> Path:
    """Write originals above the model's means, both (n, [3,] height, width) with values in [0, 1]."""
    pair = [_pixels(originals), _pixels(reconstructions)]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"reconstructions must have shape {pair[0].shape}, got {pair[1].shape}")
    labels = ["data", "model mean"]
    return _write(_images_figure(np.concatenate(pair), None, len(pair[0]), labels, None), path)


def plot_history(history_rows: Sequence[Mapping[str, Any]], path: str | Path, *, name: str = "ELBO") -> Path:
    """Write what SVI brings up (nats per image, higher is better) on training and validation data over the epochs.

    Args:
        history_rows: one mapping per epoch with keys `epoch`, `train_elbo`, `valid_elbo`; None or NaN where
            unknown.
        path: PNG file to write.
        name: of what the columns hold, where it is not the ELBO but another bound, or log p itself.

    Returns:
        The path of the file.
    """
    return _write(_history_figure(history_rows, name), path)


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write mean log p of each model with its intervals, and the paired differences to the best model.

    Left: the interval of each mean over draws of the test set (thin) and the Monte Carlo error for these data (thick),
    nats per datum; where a model was fitted several times, a small mark for each fit. Dotted intervals carry a warning.
    Right: the paired differences, whose intervals are narrower because both models saw the same data; they are those of
    `comparison.pairs`, which hold all at once. All intervals include the bounds on the bias and so need not be
    symmetric. Open markers are bounds; a triangle points to where the true value lies. A model far below the others
    stands at the left edge with an arrow, so that the intervals of the others stay visible.

    Returns:
        The path of the file.
    """
    return _write(_comparison_figure(comparison), path)


def _write(figure: "Figure", path: str | Path) -> Path:
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight", facecolor="white")
    return Path(path)


def _pixels(images: "Images") -> np.ndarray:
    """Images as an array (n, height, width) or (n, height, width, 3), clipped to [0, 1]."""
    array = np.asarray(images if isinstance(images, np.ndarray) else images.detach().cpu(), dtype=np.float64)
    shape = array.shape
    if array.ndim not in (3, 4) or (array.ndim == 4 and shape[1] not in (1, 3)) or 0 in shape:
        raise ValueError(f"images must have shape (n, height, width) or (n, 3, height, width), got {shape}")
    if array.ndim == 4:
        array = np.moveaxis(array, 1, -1) if shape[1] == 3 else array[:, 0]
    return np.clip(array, 0, 1)


def _images_figure(
    pixels: np.ndarray,
    titles: Sequence[str] | None,
    columns: int | None,
    row_labels: Sequence[str] | None,
    title: str | None,
) -> "Figure":
    from matplotlib.figure import Figure

    num_columns = columns or math.ceil(math.sqrt(len(pixels)))
    num_rows = math.ceil(len(pixels) / num_columns)
    _check_number("titles", titles, len(pixels))
    _check_number("row_labels", row_labels, num_rows)
    height = (1.0 if titles is None else 1.25) * num_rows  # inches
    figure = Figure(figsize=(num_columns, height))
    gaps = {"wspace": 0.06, "hspace": 0.06 if titles is None else 0.35}
    axes = figure.subplots(num_rows, num_columns, squeeze=False, gridspec_kw=gaps)
    for index, ax in enumerate(axes.flat):
        _draw_image(ax, pixels[index] if index < len(pixels) else None)
    for ax, text in zip(axes.flat, titles or (), strict=False):
        ax.set_title(text, fontsize=7, pad=2)
    for ax, label in zip(axes[:, 0], row_labels or (), strict=False):
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    if title is not None:
        figure.suptitle(title, fontsize=10, y=0.88 + (0.08 if titles is None else 0.22) / height, va="bottom")
    return figure


def _check_number(name: str, labels: Sequence[str] | None, number: int) -> None:
    if labels is not None and len(labels) != number:
        raise ValueError(f"{name} must hold {number} texts, got {len(labels)}")


def _draw_image(ax: "Axes", pixels: np.ndarray | None) -> None:
    """One image without ticks, in a thin frame; nothing at all for None."""
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=pixels is not None, linewidth=0.4, color=GREY)
    if pixels is not None:
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One column of numbers; NaN where the row has none. Text as read from a CSV file will do."""
    values = (row.get(key) for row in rows)
    return np.array([math.nan if value in (None, "") else float(value) for value in values])


def _history_figure(history_rows: Sequence[Mapping[str, Any]], name: str = "ELBO") -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history_rows:
        raise ValueError("history_rows must hold at least one epoch, got none")
    epochs = _column(history_rows, "epoch")
    curves = {
        "training": _column(history_rows, "train_elbo"),
        "validation": _column(history_rows, "valid_elbo"),
    }
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    for (part, elbo), colour in zip(curves.items(), (GREY, BLUE), strict=True):
        known = np.isfinite(elbo)
        if known.any():
            marker = "." if known.sum() < 30 else ""
            ax.plot(epochs[known], elbo[known], color=colour, label=part, marker=marker)
    chosen = "validation" if np.isfinite(curves["validation"]).any() else "training"
    _mark_best(ax, epochs, curves[chosen])
    _focus(ax, np.concatenate(list(curves.values())))
    ax.set(xlabel="epoch", ylabel=f"{name} (nats per image)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    ax.legend(loc="best")
    return figure


def _mark_best(ax: "Axes", epochs: np.ndarray, elbo: np.ndarray) -> None:
    """A ring around the highest point and a line down from it; nothing if no point is known."""
    if np.isfinite(elbo).any():
        best = int(np.nanargmax(elbo))
        label = f"best: {elbo[best]:.2f} at epoch {epochs[best]:g}"
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 8,
            "markerfacecolor": "none",
            "linestyle": "none",
        }
        ax.plot(epochs[best], elbo[best], color=ORANGE, label=label, zorder=4, **ring)
        ax.axvline(epochs[best], color=ORANGE, linewidth=0.8, linestyle=":")


def _focus(ax: "Axes", elbo: np.ndarray) -> None:
    """Leave the steep first epochs below the frame, so that they do not squash the rest."""
    known = elbo[np.isfinite(elbo)]
    if len(known) == 0:
        return
    top, low = known.max(), np.quantile(known, 0.15)
    bottom = max(known.min(), low - 0.5 * (top - low))
    margin = 0.06 * (top - bottom) or 1.0
    ax.set_ylim(bottom - margin, top + margin)
    if known.min() < bottom - margin:
        ax.set_title(f"lowest values, from {known.min():.1f}, below the frame", loc="left", fontsize=8)


class _Dot(NamedTuple):
    """One estimate with its interval; `inner` is the thick bar; NaN for none. `fits` are smaller marks."""

    line: int
    x: float
    outer: tuple[float, float]
    inner: tuple[float, float]
    direction: str
    fits: tuple[float, ...] = ()
    warned: bool = False


NOTHING = (math.nan, math.nan)


def _comparison_figure(comparison: Comparison) -> "Figure":
    from matplotlib.figure import Figure

    rows, differences = comparison.rows, _differences(comparison)
    names = [row.model if len(row.fits) == 1 else f"{row.model} ({len(row.fits)} fits)" for row in rows]
    size = (8.5 + 0.07 * max(map(len, names)), 2.1 + 0.5 * len(rows))  # inches
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2 if differences else 1, sharey=True, squeeze=False)[0]
    means = [_mean(line, row) for line, row in enumerate(rows)]
    _draw_dots(panels[0], means)
    panels[0].set_xlabel(f"mean {comparison.quantity} (nats per datum), {comparison.num_data} data")
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].set_ylim(len(rows) - 0.5, -0.7)
    if differences:
        panels[1].axvline(0, color=GREY, linewidth=1)
        panels[1].set_xlabel("difference to the best model (nats per datum), paired")
        _draw_dots(panels[1], differences, best=0.0)
        panels[1].annotate("best", (0, 0), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    _legend(figure, [*means, *differences], comparison)
    return figure


def _mean(line: int, row: Row) -> _Dot:
    fits = tuple(fit.mean for fit in row.fits) if len(row.fits) > 1 else ()
    outer, inner = row.interval, row.fixed_interval
    ends = (outer.low, outer.high), (inner.low, inner.high)
    return _Dot(line, row.mean, *ends, row.direction, fits, row.warning is not None)


def _differences(comparison: Comparison) -> list[_Dot]:
    """Each model minus the best one, so that better is to the right as in the other panel."""
    pairs = [pair for pair in comparison.pairs if pair.a == comparison.rows[0].model]
    return [
        _Dot(line, -pair.difference, (-pair.high, -pair.low), NOTHING, flip(pair.direction), (), not pair.is_sure)
        for line, pair in enumerate(pairs, start=1)
    ]


def _draw_dots(ax: "Axes", dots: Sequence[_Dot], best: float | None = None) -> None:
    """All estimates of one panel; those far below the median are replaced by an arrow at the left edge."""
    values = [dot.x for dot in dots] + ([] if best is None else [best])
    edge = max(values) - FAR * (max(values) - float(np.median(values)))
    for dot in dots:
        _draw_arrow(ax, dot) if dot.x < edge else _draw_dot(ax, dot)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(x=0.27)
    ax.locator_params(axis="x", nbins=6)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_dot(ax: "Axes", dot: _Dot) -> None:
    low, high = dot.outer
    if math.isfinite(low + high):
        arms = [[dot.x - low], [high - dot.x]]
        bar = ax.errorbar(dot.x, dot.line, xerr=arms, color=BLUE, linewidth=1.2, capsize=3, zorder=2)
        bar[2][0].set_linestyle("dotted" if dot.warned else "solid")
    if math.isfinite(sum(dot.inner)):
        ax.hlines(dot.line, *dot.inner, color=ORANGE, linewidth=5, zorder=3)
    ax.plot(dot.fits, [dot.line + 0.2] * len(dot.fits), "|", color=GREY, markersize=6, zorder=3)
    ax.plot(dot.x, dot.line, zorder=4, **_marker(dot.direction))
    style: dict[str, Any] = {"ha": "center", "va": "bottom", "textcoords": "offset points", "fontsize": 8}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85}
    ax.annotate(_text(dot), (dot.x, dot.line), (0, 7), bbox=box, zorder=3, **style)


def _draw_arrow(ax: "Axes", dot: _Dot) -> None:
    ax.annotate(f"← {_text(dot)}", (0.02, dot.line), xycoords=ax.get_yaxis_transform(), va="center", fontsize=8)


def _text(dot: _Dot) -> str:
    low, high = dot.outer
    interval = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low + high) else ""
    return f"{SYMBOLS[dot.direction]} {dot.x:.2f}{interval}"


def _marker(direction: str) -> dict[str, Any]:
    """Filled for "exact" and "unbiased", open for a bound."""
    face = BLUE if direction in ("exact", "unbiased") else "white"
    return {"marker": MARKERS[direction], "markersize": 5, "linestyle": "none", "color": BLUE, "mfc": face}


def _legend(figure: "Figure", dots: Sequence[_Dot], comparison: Comparison) -> None:
    """Below both panels: the bars and the markers that occur."""
    from matplotlib.lines import Line2D

    directions = {dot.direction for dot in dots}
    over = "clusters of the test set" if comparison.num_clusters else "draws of the test set"
    at_once = ", differences all at once" if len(comparison.pairs) > 1 else ""
    bars = [
        Line2D([], [], color=BLUE, linewidth=1.2, label=f"{100 * comparison.level:g}% over {over}{at_once}"),
        Line2D([], [], color=ORANGE, linewidth=5, label="Monte Carlo error and bias (may hide behind the marker)"),
    ]
    if any(dot.warned for dot in dots):
        text = "not to be trusted, see the remarks"
        bars.append(Line2D([], [], color=BLUE, linewidth=1.2, linestyle="dotted", label=text))
    if any(dot.fits for dot in dots):
        bars.append(Line2D([], [], color=GREY, marker="|", linestyle="none", label="single fits"))
    used = [name for name in MARKERS if name in directions]
    marks = [Line2D([], [], label=f"{SYMBOLS[name]} {MEANINGS[name]}", **_marker(name)) for name in used]
    figure.legend(handles=[*bars, *marks], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
