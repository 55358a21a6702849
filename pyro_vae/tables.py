"""A comparison as plain text: the table of the rows, that of the pairs, remarks, and sentences."""

import math
import textwrap
from collections.abc import Sequence

from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.intervals import suffices_for_max_t
from pyro_vae.pairs import ENOUGH_FITS, Pair
from pyro_vae.rows import Row

SYMBOLS = {"exact": "=", "lower": "≥", "upper": "≤", "unbiased": "~", "unknown": "?"}
LEGEND = "= exact   ≥ at least this (lower bound)   ≤ at most this (upper bound)   ~ unbiased   ? side unknown"
INTERVAL = "interval: for the population mean, with its bias bound, each row alone; ? not to be trusted, see the notes"
WIDTH = 120  # of sentences; tables are as wide as they need to be
SHORT = {
    "annealed_importance_sampling": "AIS",
    "importance_sampling": "IS",
    "sequential_monte_carlo": "SMC",
    "reverse_annealing": "RAISE",
}


def rows_table(rows: Sequence[Row], title: str) -> str:
    """One line per model; nats, with a legend."""
    several = any(len(row.fits) > 1 for row in rows)
    timed = any(row.train_seconds is not None for row in rows)  # where models are not fitted too, nobody knows
    level = f"{100 * rows[0].level:g}%"
    head = ["model", "estimator", "mean log p", f"{level} interval", "MC SE", "test SE", "bits/dim", "k-hat>0.7"]
    head += [*(["fits", "sd fits"] * several), *(["fit s"] * timed), "eval s"]
    lines = align([head, *(_row_cells(row, several, timed) for row in rows)], "<<" + ">" * (len(head) - 2))
    return "\n".join([title, "", *lines, "", LEGEND, _abbreviations(rows)])


def _row_cells(row: Row, several: bool, timed: bool) -> list[str]:
    result, share = row.result, row.frac_khat_high
    name = abbreviated(result.estimator)
    fits = [f"{len(row.fits)} fits" if len(row.fits) > 1 else "1 fit", number(row.fit_sd, 3)]
    return [
        row.model,
        f"{name} K={result.num_particles}" if result.num_particles else name,
        _mean(row),
        _range(row.interval.low, row.interval.high, 2) + ("?" if row.warning else ""),
        number(row.mc_se, 3),
        number(row.test_se, 3),
        number(row.bits_per_dim, 3, symbol=SYMBOLS[row.bits_direction]),
        "—" if share is None else f"{share:.1%}",
        *(fits if several else []),
        *([number(row.train_seconds, 1)] if timed else []),
        number(row.seconds, 1),
    ]


def _mean(row: Row) -> str:
    """The mean behind the symbol of its side, or both sides where the lower one is known too."""
    both = row.result.bracket if len(row.fits) == 1 else None
    if both is None or both.gap < 0:
        return number(row.mean, 2, symbol=SYMBOLS[row.direction])
    return _range(both.lower, row.mean, 2)


def abbreviated(estimator: str) -> str:
    """An estimator's name with the initials of `SHORT` in it."""
    for name, short in SHORT.items():  # the longer name first
        estimator = estimator.replace(name, short)
    return estimator


def _abbreviations(rows: Sequence[Row]) -> str:
    used = {
        short: name
        for name, short in SHORT.items()
        if any(short in abbreviated(r.result.estimator).split("_") for r in rows)
    }
    words = [f"{short} {name.replace('_', ' ')}" for short, name in used.items()]
    return "   ".join([*words, INTERVAL])


def pairs_table(pairs: Sequence[Pair], title: str) -> str:
    """One line per pair: difference, interval (nats) and what may be said of it."""
    head = ["a", "b", "a - b", "SE", "MC SE", f"{100 * pairs[0].level:g}% interval", ""]
    lines = align([head, *map(_pair_cells, pairs)], "<<>>>><")
    return "\n".join([title, "", *lines, "", LEGEND])


def _pair_cells(pair: Pair) -> list[str]:
    difference = number(pair.difference, 3, symbol=SYMBOLS[pair.direction])
    interval = _range(pair.low, pair.high, 3)
    return [pair.a, pair.b, difference, number(pair.se, 3), number(pair.mc_se, 3), interval, pair.words("a", "b")]


def row_remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader must know beside the numbers: untrustworthy errors, stages, certificates, notes."""
    remarks = []
    for row in rows:
        if row.warning is not None:
            remarks.append(f"Note: {row.model}: {row.warning}")
        remarks += _repeated(row)
        for place, fit in enumerate(row.fits, start=1):
            name = row.model if len(row.fits) == 1 else f"{row.model}, fit {place}"
            remarks += [
                f"Note on {name}: {text}" for text in (*_stages(fit), *_certificate(fit), *_log_z(fit), *fit.notes)
            ]
    return remarks


def _repeated(row: Row) -> list[str]:
    """Fits that are one and the same have no variance to speak of, and most often one seed."""
    different = {fit.log_prob.tobytes() for fit in row.fits}
    if len(different) == len(row.fits):
        return []
    found = f"of {len(row.fits)} fits {len(different)} {'is' if len(different) == 1 else 'are'} different"
    return [f"Note: {row.model}: {found}: nothing in its fit is random, or seeds were used twice"]


def _stages(fit: LogLikelihood) -> list[str]:
    """For example "router: 62% importance sampling, 30% refined, 8% annealed"."""
    shares = [f"{share:.0%} {stage.replace('_', ' ')}" for stage, share in fit.shares.items()]
    return [f"{fit.estimator.replace('_', ' ')}: {', '.join(shares)}"] if shares else []


def _certificate(fit: LogLikelihood) -> list[str]:
    """Why it is withheld stands in the warning of the result."""
    check = fit.certificate
    if check is None:
        return []
    gap = f"gap {check.gap:.3f} ± {check.gap_se:.3f} nats"
    return [f"certificate granted, {gap}: {check.reason}" if check.granted else f"certificate withheld, {gap}"]


def _log_z(fit: LogLikelihood) -> list[str]:
    """For example "log Z 493.210 ± 0.020 nats, shared by all data; over 4 seeds and a doubled schedule within 0.05"."""
    constant, both = fit.constant, fit.bracket
    if constant is None or constant.is_exact:
        return []
    how = f"T = {constant.num_steps:,.0f}, {constant.num_repeats:.0f} x {constant.num_chains:.0f} chains"
    tried = "" if math.isnan(constant.drift) else f"; seeds and schedules within {constant.drift:.3f}"
    lines = [f"log Z {constant.log_z:.3f} ± {constant.se:.3f} nats, an error that all data share ({how}){tried}"]
    if both is not None:
        error = "" if both.gap_se is None else f" ± {both.gap_se:.2f}"
        where = f"reverse annealing of {both.num_data} of the data"
        lines.append(f"mean log p between {both.lower:.2f} and {fit.mean:.2f} nats: gap {both.gap:.2f}{error}, {where}")
    return lines


def pair_remarks(pairs: Sequence[Pair], unit: str) -> list[str]:
    """Which intervals are rough because the differences are skewed."""
    skewed = [pair for pair in pairs if pair.is_skewed]
    if not skewed:
        return []
    worst = max(abs(pair.skewness) for pair in skewed)
    names = ", ".join(f"{pair.a} - {pair.b}" for pair in skewed)
    enough = f"{pairs[0].count:,} {unit}, a normal law asks for 25 γ²"
    return [f"Note: skewed or heavy-tailed differences, |γ| up to {worst:.1f} ({enough}), so rough intervals: {names}"]


def sentences(rows: Sequence[Row], pairs: Sequence[Pair], unit: str) -> list[str]:
    """What can be told apart, what cannot and what it would take, and what the claims are about."""
    if not pairs or math.isnan(pairs[0].se):
        return []
    sure = [pair for pair in pairs if pair.told_apart and pair.is_sure]
    unsure = [pair for pair in pairs if pair.told_apart and not pair.is_sure]
    rest = [pair for pair in pairs if not pair.told_apart]
    said = [f"Can be told apart: {_above(sure)}."] if sure else []
    said += [f"Only as estimated: {_above(unsure)}."] if unsure else []
    said += ["Cannot be told apart (what it would take, were the true difference the estimated one):"] if rest else []
    for pair in rest:
        said.append(f"- {pair.a} and {pair.b}{', as estimated' if pair.warning else ''}: {pair.wanted(unit)}.")
    reasons = dict.fromkeys(reason for pair in (*unsure, *rest) for reason in pair.warnings)
    said += [f"As estimated, since: {'; '.join(reasons)}."] if reasons else []
    return [*said, _scope(pairs, len(rows), unit), *about_fits(rows)]


def _above(pairs: Sequence[Pair]) -> str:
    """Pairs in the order of the rows as "a above b and c; b above c"."""
    lower: dict[str, list[str]] = {}
    for pair in pairs:
        lower.setdefault(pair.a, []).append(pair.b)
    return "; ".join(f"{a} above {_listed(names)}" for a, names in lower.items())


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _scope(pairs: Sequence[Pair], num_rows: int, unit: str) -> str:
    over = "clusters of the test set" if unit == "clusters" else "test sets"
    over += " and fits" if any(pair.fit_se is not None for pair in pairs) else ""
    where = f"at {100 * pairs[0].level:g}% over draws of {over}"
    if len(pairs) == 1:
        return f"The interval covers {where}."
    how = "max-T multiplier bootstrap" if suffices_for_max_t(pairs[0].count, num_rows) else "Bonferroni"
    return f"All {len(pairs)} intervals hold at once {where} ({how})."


def about_fits(rows: Sequence[Row]) -> list[str]:
    """Whether the claims are about fitted models or about the methods that fitted them."""
    single = [row.model for row in rows if len(row.fits) == 1]
    few = [f"{len(row.fits)} fits of {row.model}" for row in rows if 1 < len(row.fits) < ENOUGH_FITS]
    names = "each model" if len(single) == len(rows) else _listed(single) if single else ""
    said = (
        [f"One fit of {names}: what is said is about the model that it gave, not about the method."] if single else []
    )
    return said + ([f"{_listed(few)}: a claim about a method needs at least {ENOUGH_FITS}."] if few else [])


def wrapped(lines: Sequence[str]) -> list[str]:
    """Sentences cut to lines of `WIDTH`, what is cut off indented."""
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ")]


def number(value: float | None, digits: int, *, symbol: str = "") -> str:
    """A number to so many decimals behind its symbol; a dash where there is none."""
    if value is None or math.isnan(value):
        return "—"
    return f"{symbol} {value:.{digits}f}".strip()


def _range(low: float, high: float, digits: int) -> str:
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low + high) else "—"


def align(rows: list[list[str]], sides: str) -> list[str]:
    """Cells in columns with a rule under the head; `sides` holds < (left) or > (right) for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    lines = ["  ".join(forms).format(*row).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
