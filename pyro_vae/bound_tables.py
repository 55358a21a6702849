"""Bounds and gains as plain text: two tables, a legend, remarks."""

from collections.abc import Sequence

import numpy as np

from pyro_vae.bound_rows import BoundRow, Figure, Gain, figure, gain
from pyro_vae.diagnostics import KHAT_SE
from pyro_vae.estimators.estimate import flags
from pyro_vae.estimators.result import FLAGGED_SHARE
from pyro_vae.rows import flip
from pyro_vae.tables import LEGEND, SYMBOLS, abbreviated, align, number, wrapped

WIDTH = 130  # of a table; columns beyond it go to a further table
NUM_SE = 3  # standard errors from which a difference is no noise

BOUNDS_LEGEND = """\
ELBO = E log w   L_K = E log mean of K weights   ELBO <= L_K <= log p(x), with Monte Carlo SE of at most {mc_se:.2g}
best: estimate of log p(x)   gap = best - ELBO = KL(q || posterior)   SE: over draws of the test set, MC included"""
GAINS_LEGEND = """\
ELBO = better p(x) (best estimates) + tighter q (gaps)   SE: paired over the data, Monte Carlo noise included
same p(x): one model object, so that by construction all of the gain is the guide's"""


def table(rows: Sequence[BoundRow], gains: Sequence[Gain], quantity: str) -> str:
    """Both tables and the remarks; nats."""
    result = rows[0].best
    place = f"mean over {len(result)} data in {result.space}, sha256 {result.digest:.12}"
    title = f"Bounds on {quantity} in nats (higher is better), {place}"
    mc_se = max(each.mc_se for row in rows for each in row.bounds)
    lines = [title, "", *_bounds_lines(rows), "", BOUNDS_LEGEND.format(mc_se=mc_se), LEGEND]
    if gains:
        lines += ["", f"Gains over {gains[0].against} in nats (positive is better)", "", *_gains_lines(gains)]
        lines += ["", GAINS_LEGEND]
    return "\n".join([*lines, *wrapped(remarks(rows))])


def _bounds_lines(rows: Sequence[BoundRow]) -> list[str]:
    sizes = rows[0].curve.num_particles
    head = ["", "ELBO", *(f"L_{size}" for size in sizes[1:]), "best", "MC SE", "SE", "by", "gap", "SE"]
    return _fitted([head, *map(_bounds_cells, rows)], "<" + ">" * (len(sizes) + 3) + "<>>")


def _bounds_cells(row: BoundRow) -> list[str]:
    best, gap, symbol = row.best, figure(row.gap, row.gap_variance), SYMBOLS[row.direction]
    by = abbreviated(best.estimator)
    return [
        row.name,
        *(number(each.mean, 2) for each in row.bounds),
        number(best.mean, 2, symbol=symbol),
        number(best.mc_se, 3),
        number(best.test_se, 3),
        f"{by} K={best.num_particles}" if best.num_particles else by,
        number(gap.mean, 3, symbol=symbol),
        number(gap.se, 3),
    ]


def _gains_lines(gains: Sequence[Gain]) -> list[str]:
    head = ["", "ELBO", "SE", "better p(x)", "SE", "tighter q", "SE", ""]
    return _fitted([head, *map(_gain_cells, gains)], "<>>>>>><")


def _gain_cells(gain: Gain) -> list[str]:
    cells = [gain.name, *_pair(gain.elbo, ""), *_pair(gain.model, SYMBOLS[gain.direction])]
    cells += _pair(gain.guide, SYMBOLS[flip(gain.direction)])
    return [*cells, "same p(x)" if gain.same_model else ""]


def _pair(value: Figure, symbol: str) -> list[str]:
    return [number(value.mean, 3, symbol=symbol), number(value.se, 3)]


def _fitted(cells: list[list[str]], sides: str) -> list[str]:
    """Aligned columns; where they are wider than `WIDTH` the rest follow below, again behind the names."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    stop = next((k for k in range(2, len(sides)) if sum(widths[: k + 1]) + 2 * k > WIDTH), len(sides))
    while stop < len(sides) and cells[0][stop].endswith("SE"):  # errors stay beside their figures
        stop -= 1
    lines = align([row[:stop] for row in cells], sides[:stop])
    if stop == len(sides):
        return lines
    return [*lines, "", *_fitted([[row[0], *row[stop:]] for row in cells], sides[0] + sides[stop:])]


def remarks(rows: Sequence[BoundRow]) -> list[str]:
    """What a reader must know beside the numbers: shared models, loose or untrustworthy estimates."""
    said = []
    for row in rows:
        said += [f"Note: {row.name}: {row.remark}"] if row.remark else []
        said += [f"Note: {row.name}, best: {row.best.warning}"] if row.best.warning else []
        said += _heavy(row) + _exceeded(row)
    for name in dict.fromkeys(row.model for row in rows):
        first, *others = (row for row in rows if row.model == name)
        said += [_shared(other, first) for other in others]
    return said


def _heavy(row: BoundRow) -> list[str]:
    """What k-hat says of the Monte Carlo error of the largest K."""
    result, label = row.sampled, f"L_{row.sampled.num_particles}"
    if result.direction == "exact" or result is row.best:
        return []
    if result.khat is None:
        return [f"Note: {row.name}: too few particles to check the Monte Carlo error of {label}"]
    share = float(np.mean(flags(result, KHAT_SE / len(result) ** 0.5)))  # as in `LogLikelihood.warning`
    text = f"the Monte Carlo error of {label} is not to be trusted for {share:.0%} of the data (k-hat)"
    return [f"Note: {row.name}: {text}"] if share > FLAGGED_SHARE else []


def _exceeded(row: BoundRow) -> list[str]:
    """A best estimate below a lower bound is not the best."""
    above = figure(row.sampled.log_prob - row.best.log_prob, row.sampled.variance + row.best.variance)
    if not above.mean > NUM_SE * above.mc_se or row.best.direction == "upper":
        return []
    text = (
        f"L_{row.sampled.num_particles} lies {above.mean:.3f} nats above best: a better estimator makes the gap wider"
    )
    return [f"Note: {row.name}: {text}"]


def _shared(row: BoundRow, first: BoundRow) -> str:
    """Rows with one model object: what differs between their best estimates is error."""
    difference = gain(row, first).best
    error = f"{difference.mean:.3f} nats (MC SE {difference.mc_se:.3f})"
    noise = abs(difference.mean) <= NUM_SE * difference.mc_se
    cause = "Monte Carlo error" if noise else "the slack of the estimator, which depends on q: trust the tighter one"
    return f"{row.name} and {first.name} hold one model, so p(x) is the same; best differs by {error}, {cause}."
