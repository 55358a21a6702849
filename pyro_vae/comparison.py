"""Models side by side on the same data: one row each, and the paired difference of every two."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import numpy as np

from pyro_vae.diagnostics import RATIO_LIMIT
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.spaces import Real

SYMBOLS = {"exact": "=", "lower": "≥", "upper": "≤", "unbiased": "~", "unknown": "?"}
LEGEND = "= exact   ≥ at least this (lower bound)   ≤ at most this (upper bound)   ~ unbiased   ? side unknown"
KHAT_SHARE_LIMIT = 0.05  # share of data with k-hat > 0.7 from which a row is remarked upon
OF_THE_GROUP = ("n", "space", "sha256")  # entries of a result's summary that all rows have in common


@dataclass(frozen=True)
class Row:
    """One model: its name, its result and the seconds that its fit took (None if unknown)."""

    model: str
    result: LogLikelihood
    train_seconds: float | None = None

    @property
    def bits_direction(self) -> str:
        """The side on which the true bits/dim of the grey levels lie.

        A lower bound on log p is an upper bound on bits/dim. For dequantised data (`Real` with levels) the
        density itself bounds the grey levels' log P from below, a second bound of the same kind.
        """
        dequantised = isinstance(self.result.space, Real)
        return flip(combine(self.result.direction, "lower" if dequantised else "exact"))

    def to_dict(self) -> dict[str, object]:
        """The figures under the keys of `comparison.json`; None for what is not a finite number."""
        summary = {key: value for key, value in self.result.summary().items() if key not in OF_THE_GROUP}
        mine = {"bits_per_dim_direction": self.bits_direction, "train_seconds": self.train_seconds}
        return finite({"model": self.model, **summary, **mine})


@dataclass(frozen=True)
class Pair:
    """Paired difference of two models on the same data, nats per datum.

    With d_n = log p_a(x_n) - log p_b(x_n), a having the higher mean: `difference` = mean d; `se` = sd(d)/√n
    over draws of the test set (with the Monte Carlo noise of both; NaN for a single datum); [low, high] =
    difference ± z se, a normal interval with coverage `level` for this pair alone.

    `direction` tells where the true difference lies in expectation, apart from the sampling error:
    "exact"; "unbiased"; "lower": at least `difference`; "upper": at most `difference`; "unknown": two bounds
    on the same side, whose gaps pull against each other, or a bound beside an unbiased estimate.
    """

    a: str
    b: str
    difference: float
    se: float
    low: float
    high: float
    direction: str
    level: float

    @property
    def verdict(self) -> str:
        """What the interval and the direction allow one to say, as a sentence."""
        if math.isnan(self.se):
            return "one datum gives no interval"
        if self.low <= 0 <= self.high:
            return f"{self.a} and {self.b} cannot be told apart"
        caveat = {
            "upper": ", as estimated: the true difference may be smaller",
            "unknown": ", as estimated: the directions leave the true difference open",
        }
        return f"{self.a} above {self.b}{caveat.get(self.direction, '')}"


@dataclass(frozen=True, repr=False)
class Comparison:
    """Rows, best mean first, and every pair of them; all on the same data, space and quantity."""

    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    level: float = 0.95

    def __repr__(self) -> str:
        return self.table()

    @property
    def quantity(self) -> str:
        """What was estimated: log p(x) or log p(x | label)."""
        return self.rows[0].result.quantity

    @property
    def num_data(self) -> int:
        """Number of data that were scored."""
        return len(self.rows[0].result)

    def to_dict(self, *, data_name: str, beside: Sequence["Comparison"] = ()) -> dict[str, object]:
        """The contents of `comparison.json`.

        Args:
            data_name: name of the data set.
            beside: comparisons of other quantities, for example log p(x | label), that stand in the same file
                but are never paired with these rows.

        Returns:
            Keys `data`, `rows`, `pairs` and, if there are any, `beside`; nats; None for a number not finite.
        """
        contents: dict[str, object] = {"data": {"name": data_name, **self._data()}, **self._group()}
        if beside:
            contents["beside"] = [{"quantity": c.quantity, **c._data(), **c._group()} for c in beside]
        return contents

    def to_json(self, path: str | Path, *, data_name: str, beside: Sequence["Comparison"] = ()) -> Path:
        """Write `to_dict` to `path`; no NaN or infinity is ever written."""
        contents = self.to_dict(data_name=data_name, beside=beside)
        text = json.dumps(contents, indent=2, allow_nan=False, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")
        return Path(path)

    def table(self) -> str:
        """One line per model as plain text; nats, with a legend of the directions and what to beware of."""
        head = [
            "model",
            "estimator",
            "mean log p",
            "MC SE",
            "test SE",
            "bits/dim",
            "k-hat>0.7",
            "fit s",
            "eval s",
        ]
        data = "{n_test} data in {space}, sha256 {sha256:.12}".format_map(self._data())
        title = f"{self.quantity} in nats (higher is better), mean over {data}"
        lines = _align([head, *(_cells(row) for row in self.rows)], "<<>>>>>>>")
        return "\n".join([title, "", *lines, "", LEGEND, *self.remarks()])

    def pairs_table(self) -> str:
        """One line per pair as plain text: difference, interval (nats) and what may be said of it."""
        if not self.pairs:
            return "One model, no pairs."
        level = f"{100 * self.level:g}%"
        head = ["a", "b", "a - b", "SE", f"{level} interval", ""]
        lines = _align([head, *(_pair_cells(pair) for pair in self.pairs)], "<<>>><")
        title = f"Paired differences of mean {self.quantity} in nats, {self.num_data} data"
        alone = [f"Each interval covers at {level} on its own, not all {len(self.pairs)} at once."]
        return "\n".join([title, "", *lines, "", LEGEND, *(alone * (len(self.pairs) > 1))])

    def remarks(self) -> list[str]:
        """What a reader must know beside the numbers: untrustworthy errors and the notes of the results."""
        remarks = []
        for row in self.rows:
            khat, limit = row.result.khat, row.result.khat_limit
            share = 0.0 if khat is None else float(np.mean(khat > limit))
            if khat is None and row.result.num_particles:
                remarks.append(
                    f"Note: {row.result.num_particles} particles are too few to check the error of {row.model}"
                )
            if share > KHAT_SHARE_LIMIT:
                text = f"the Monte Carlo error of {row.model} is not to be trusted for {share:.0%} of the data"
                remarks.append(f"Note: {text} (k-hat > {limit:.2g})")
            ratio = row.result.doubling_ratio
            if ratio is not None and ratio > RATIO_LIMIT:
                text = f"doubling the particles still moves the mean of {row.model}"
                remarks.append(f"Note: {text} (gains in ratio {ratio:.2f}, 0.5 is healthy)")
            remarks += [f"Note on {row.model}: {note}" for note in row.result.notes]
        return remarks

    def _group(self) -> dict[str, object]:
        pairs = [finite(asdict(pair)) for pair in self.pairs]
        return {"rows": [row.to_dict() for row in self.rows], "pairs": pairs, "remarks": self.remarks()}

    def _data(self) -> dict[str, object]:
        result = self.rows[0].result
        return {"space": str(result.space), "n_test": len(result), "sha256": result.digest}


def compare(
    results: dict[str, LogLikelihood], *, train_seconds: dict[str, float] | None = None, level: float = 0.95
) -> Comparison:
    """Set models side by side, with the paired difference mean(log p_a - log p_b) of every two.

    Args:
        results: model name to result; all for the same data, space and quantity.
        train_seconds: model name to seconds of its fit; models may be missing.
        level: coverage of each paired interval.

    Returns:
        Rows with the best mean first and all pairs, nats; of a pair, `a` is the higher row.

    Raises:
        TypeError: a value is no `LogLikelihood`.
        ValueError: nothing to compare, or results of different spaces, data or quantities; names both.
    """
    if not results:
        raise ValueError("results must hold at least one model, got an empty dict")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    for model, result in results.items():
        if not isinstance(result, LogLikelihood):
            raise TypeError(f"results[{model!r}] must be a LogLikelihood, got {type(result).__name__}")
    first, *others = results
    for other in others:
        _refuse_unlike(first, results[first], other, results[other])
    seconds = train_seconds or {}
    rows = [Row(model, result, seconds.get(model)) for model, result in results.items()]
    rows.sort(key=lambda row: (-row.result.mean, row.model))
    return Comparison(tuple(rows), tuple(_pair(a, b, level) for a, b in combinations(rows, 2)), level)


def flip(direction: str) -> str:
    """The direction of minus an estimate."""
    return {"lower": "upper", "upper": "lower"}.get(direction, direction)


def combine(first: str, second: str) -> str:
    """The direction of the sum of two estimates.

    "exact" is neutral; like bounds add up to the same bound; a lower and an upper bound add up to "unknown".
    An "unbiased" estimate promises no side, so that beside a bound it leaves "unknown" too.
    """
    if first == second or second == "exact":
        return first
    return second if first == "exact" else "unknown"


def _refuse_unlike(a: str, left: LogLikelihood, b: str, right: LogLikelihood) -> None:
    """Raise unless both results are the same quantity for the same data."""
    aspects = {
        "space": ("a mass and a density have no common scale", _place(left), _place(right)),
        "quantity": ("they answer different questions", left.quantity, right.quantity),
        "number of data": ("every datum must have both", len(left), len(right)),
        "data": ("their SHA-256 differ", left.digest, right.digest),
    }
    for name, (why, mine, yours) in aspects.items():
        if mine != yours:
            raise ValueError(f"cannot compare {a!r} with {b!r}: {name} is {mine} for {a!r}, {yours} for {b!r}; {why}")


def _place(result: LogLikelihood) -> str:
    return f"{result.space} of shape {result.space.shape}"


def _pair(a: Row, b: Row, level: float) -> Pair:
    gain = a.result.log_prob - b.result.log_prob  # (n,)
    difference = float(np.mean(gain))
    se = float(np.std(gain, ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else math.nan
    half = NormalDist().inv_cdf((1 + level) / 2) * se
    direction = combine(a.result.direction, flip(b.result.direction))
    return Pair(a.model, b.model, difference, se, difference - half, difference + half, direction, level)


def finite(values: dict[str, object]) -> dict[str, object]:
    """The same dictionary with None in place of NaN and infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _number(value: float | None, digits: int, *, symbol: str = "") -> str:
    """A number to so many decimals behind its symbol; a dash where there is none."""
    if value is None or math.isnan(value):
        return "—"
    return f"{symbol} {value:.{digits}f}".strip()


def _cells(row: Row) -> list[str]:
    """One line of `Comparison.table`."""
    result, share = row.result, row.result.frac_khat_high
    return [
        row.model,
        f"{result.estimator} K={result.num_particles}" if result.num_particles else result.estimator,
        _number(result.mean, 2, symbol=SYMBOLS[result.direction]),
        _number(result.mc_se, 3),
        _number(result.test_se, 3),
        _number(result.bits_per_dim, 3, symbol=SYMBOLS[row.bits_direction]),
        "—" if share is None else f"{share:.1%}",
        _number(row.train_seconds, 1),
        _number(result.seconds, 1),
    ]


def _pair_cells(pair: Pair) -> list[str]:
    """One line of `Comparison.pairs_table`."""
    interval = f"[{pair.low:.3f}, {pair.high:.3f}]" if math.isfinite(pair.se) else "—"
    difference = _number(pair.difference, 3, symbol=SYMBOLS[pair.direction])
    return [pair.a, pair.b, difference, _number(pair.se, 3), interval, pair.verdict]


def _align(rows: list[list[str]], sides: str) -> list[str]:
    """Cells in columns with a rule under the head; `sides` holds < (left) or > (right) for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    lines = ["  ".join(forms).format(*row).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
