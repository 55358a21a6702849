"""Models side by side on the same data: one row each, and the paired difference of every two."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae import intervals, tables
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.intervals import Clusters, StandardError
from pyro_vae.pairs import Pair, all_pairs
from pyro_vae.rows import Row, finite
from pyro_vae.tables import SYMBOLS

ENOUGH_CLUSTERS = 30  # below about this many, errors over clusters are themselves uncertain

__all__ = ["SYMBOLS", "Comparison", "Pair", "Row", "compare", "finite"]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Rows, best mean first, and every pair of them; all on the same data, space and quantity."""

    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    level: float
    clusters: Clusters

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

    @property
    def num_clusters(self) -> int | None:
        """Number of clusters of dependent data, or None if the data are independent."""
        return self.clusters.count if self.clusters.given else None

    def to_dict(self, *, data_name: str, beside: Sequence["Comparison"] = ()) -> dict[str, object]:
        """The contents of `comparison.json`.

        Args:
            data_name: name of the data set.
            beside: comparisons of other quantities, for example log p(x | label), that stand in the same file
                but are never paired with these rows.

        Returns:
            Keys `data`, `level`, `rows`, `pairs`, `remarks`, `sentences` and, if there are any, `beside`; nats; None
            for a number not finite. `low` and `high` of all pairs hold at once at `level`.
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
        place = "{space}, sha256 {sha256:.12}".format_map(self._data())
        title = f"{self.quantity} in nats (higher is better), mean over {self._size} in {place}"
        return "\n".join([tables.rows_table(self.rows, title), *tables.wrapped(self.remarks())])

    def pairs_table(self) -> str:
        """One line per pair as plain text, difference and interval in nats, and under it `sentences`."""
        if not self.pairs:
            return "One model, no pairs."
        table = tables.pairs_table(self.pairs, f"Paired differences of mean {self.quantity} in nats, {self._size}")
        remarks = tables.wrapped(tables.pair_remarks(self.pairs, self._unit))
        return "\n".join([table, *remarks, "", *tables.wrapped(self.sentences())]).rstrip()

    def sentences(self) -> list[str]:
        """What can be told apart; what cannot, and what it would take; and what the claims are about."""
        return tables.sentences(self.rows, self.pairs, self._unit)

    def report(self) -> str:
        """Both tables, with remarks and sentences; the first alone where there is one model."""
        return f"{self.table()}\n\n{self.pairs_table()}" if self.pairs else self.table()

    def remarks(self) -> list[str]:
        """What a reader must know beside the numbers: untrustworthy errors, few clusters, notes of the results."""
        effective = self.clusters.effective
        if self.num_clusters is None or effective >= ENOUGH_CLUSTERS:
            return tables.row_remarks(self.rows)
        sizes = "" if round(effective) == self.num_clusters else f", worth {effective:.0f} of one size"
        few = f"Note: {self.num_clusters} clusters{sizes}: errors from fewer than about {ENOUGH_CLUSTERS} are uncertain"
        return [few, *tables.row_remarks(self.rows)]

    @property
    def _size(self) -> str:
        clusters = f" in {self.num_clusters} clusters" if self.num_clusters else ""
        return f"{self.num_data} data{clusters}"

    @property
    def _unit(self) -> str:
        return "clusters" if self.clusters.given else "test data"

    def _group(self) -> dict[str, object]:
        return {
            "level": self.level,
            "rows": [row.to_dict() for row in self.rows],
            "pairs": [pair.to_dict() for pair in self.pairs],
            "remarks": [*self.remarks(), *(tables.pair_remarks(self.pairs, self._unit))],
            "sentences": self.sentences(),
        }

    def _data(self) -> dict[str, object]:
        result = self.rows[0].result
        clusters = {"num_clusters": self.num_clusters} if self.num_clusters else {}
        return {"space": str(result.space), "n_test": len(result), "sha256": result.digest, **clusters}


def compare(
    results: Mapping[str, LogLikelihood | Sequence[LogLikelihood]],
    *,
    train_seconds: Mapping[str, float] | None = None,
    level: float = 0.95,
    groups: Any = None,
    seed: int = 0,
) -> Comparison:
    r"""Set models side by side, with the paired difference mean(log p_a - log p_b) of every two.

    With d_n = log p_a(x_n) - log p_b(x_n) the interval is [mean d - B_b - q se, mean d + B_a + q se], where B bounds
    each bias (of an upper bound on the other side) and q is a t quantile. With more than two models q is raised by a
    max-T multiplier bootstrap, so that all intervals hold at once at `level`: among equal models, some two are falsely
    told apart with probability 1 - level at most.

    Args:
        results: model name to its result, or to a list of results of several fits of one recipe, which differ in the
            seed of the fit alone; all for the same data, space and quantity. The errors of a list are about the recipe:
            they hold the variance over fits.
        train_seconds: model name to seconds of its fits; models may be missing.
        level: probability that the intervals of all pairs hold; also the coverage of each row's interval on its own.
        groups: n labels, where the data are not independent: frames of one video, characters of one writer. Errors are
            then over clusters.
        seed: of the bootstrap.

    Returns:
        Rows with the best mean first and all pairs, nats; of a pair, `a` is the higher row.

    Raises:
        TypeError: a value is no `LogLikelihood`.
        ValueError: nothing to compare; results of different spaces, data or quantities, which are named; fits that were
            evaluated in different ways; groups that are not one label per datum or fewer than 2.

    Source: Chernozhukov, Chetverikov, Kato, "Gaussian approximations and multiplier bootstrap for maxima of sums of
    high-dimensional random vectors", 2013, arXiv:1212.6906. For clusters and fits see `pyro_vae.intervals`.
    """
    if not results:
        raise ValueError("results must hold at least one model, got an empty dict")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    fits = {model: _as_fits(model, value) for model, value in results.items()}
    _refuse_all_unlike(fits)
    clusters = intervals.clusters(len(next(iter(fits.values()))[0]), groups)
    seconds = train_seconds or {}
    rows = [_row(model, each, clusters, level, seconds.get(model)) for model, each in fits.items()]
    rows.sort(key=lambda row: (-row.mean, row.model))
    return Comparison(tuple(rows), all_pairs(rows, clusters, level, seed), level, clusters)


def _as_fits(model: str, value: LogLikelihood | Sequence[LogLikelihood]) -> tuple[LogLikelihood, ...]:
    fits = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not fits:
        raise ValueError(f"results[{model!r}] must hold at least one result, got an empty list")
    for fit in fits:
        if not isinstance(fit, LogLikelihood):
            raise TypeError(f"results[{model!r}] must be a LogLikelihood, got {type(fit).__name__}")
    return fits


def _row(
    model: str, fits: tuple[LogLikelihood, ...], clusters: Clusters, level: float, train_seconds: float | None
) -> Row:
    mean = np.mean([fit.log_prob for fit in fits], axis=0)  # (n,)
    parts = [(float(np.linalg.norm(intervals.influence(mean[:, None], clusters))), float(clusters.df))]
    if len(fits) > 1:
        sd = float(np.std([fit.mean for fit in fits], ddof=1))
        parts.append((sd / len(fits) ** 0.5, len(fits) - 1.0))
    shared = fits[0].shared_se if len(fits) == 1 else 0.0  # of several fits, the variance over fits holds it
    return Row(model, fits, StandardError(tuple(parts), shared), level, train_seconds)


def _refuse_all_unlike(fits: dict[str, tuple[LogLikelihood, ...]]) -> None:
    """Raise unless all results are the same quantity for the same data, and each model's fits were scored alike."""
    first = next(iter(fits))
    for model, each in fits.items():
        for fit in each:
            refuse_unlike(first, fits[first][0], model, fit)
            if _how(fit) != _how(each[0]):
                raise ValueError(f"fits of {model!r} must be evaluated in one way, got {_how(each[0])} and {_how(fit)}")


def refuse_unlike(a: str, left: LogLikelihood, b: str, right: LogLikelihood) -> None:
    """Raise unless both results are the same quantity for the same data."""
    apart = "masses over other values" if left.space.is_discrete == right.space.is_discrete else "a mass and a density"
    aspects = {
        "space": (f"{apart} have no common scale", _place(left), _place(right)),
        "quantity": ("they answer different questions", left.quantity, right.quantity),
        "number of data": ("every datum must have both", len(left), len(right)),
        "data": ("their SHA-256 differ", left.digest, right.digest),
    }
    for name, (why, mine, yours) in aspects.items():
        if mine != yours:
            raise ValueError(f"cannot compare {a!r} with {b!r}: {name} is {mine} for {a!r}, {yours} for {b!r}; {why}")


def _how(result: LogLikelihood) -> str:
    """The estimator with its settings, as far as the notes tell them; a rate of acceptance is no setting."""
    settings = [note.partition(", acceptance")[0] for note in result.notes if " steps " in note or "proposal:" in note]
    return "; ".join([f"{result.estimator} with {result.num_particles} particles", *settings])


def _place(result: LogLikelihood) -> str:
    return f"{result.space} of shape {result.space.shape}"
