"""Several models and guides on the same data: a better p(x) told apart from a tighter q(z | x)."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae import bound_tables, traces
from pyro_vae.bound_rows import BoundRow, Gain, gain
from pyro_vae.data import Batch
from pyro_vae.estimators.ais import Annealer, annealed_importance_sampling
from pyro_vae.estimators.curve import Curve, flat, sample_curve
from pyro_vae.estimators.estimate import Estimate, Estimator
from pyro_vae.estimators.evaluate import ESTIMATORS, log_likelihood
from pyro_vae.estimators.importance import importance_sampling
from pyro_vae.rows import finite
from pyro_vae.traces import Pair, Program

Entry = nn.Module | Program | tuple[nn.Module | Program, Program]


@dataclass(frozen=True, repr=False)
class Bounds:
    """One row for each model with its guide, in the order given; all on the same data.

    Attributes:
        rows: the rows.
        num_particles: the K of the curves, ascending, from 1 (the ELBO) to all particles of a datum.
    """

    rows: tuple[BoundRow, ...]
    num_particles: tuple[int, ...]

    def __repr__(self) -> str:
        return self.table()

    @property
    def quantity(self) -> str:
        """What was bounded: log p(x) or log p(x | label)."""
        return self.rows[0].best.quantity

    @property
    def num_data(self) -> int:
        """Number of data."""
        return len(self.rows[0].best)

    @property
    def highest(self) -> str:
        """Name of the row with the highest best estimate."""
        return max(self.rows, key=lambda row: row.best.mean).name

    def row(self, name: str) -> BoundRow:
        """The row of this name."""
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise ValueError(f"against must be one of the rows {', '.join(map(repr, found))}, got {name!r}")
        return found[name]

    def gains(self, against: str | None = None) -> tuple[Gain, ...]:
        """What each other row gains over the row `against` (the first by default), paired over the data, nats."""
        reference = self.rows[0] if against is None else self.row(against)
        return tuple(gain(row, reference) for row in self.rows if row is not reference)

    def table(self, against: str | None = None) -> str:
        """Bounds and gaps, gains over the row `against` (the first by default), and remarks, as plain text; nats."""
        return bound_tables.table(self.rows, self.gains(against), self.quantity)

    def remarks(self) -> list[str]:
        """What a reader must know beside the numbers."""
        return bound_tables.remarks(self.rows)

    def to_dict(self, against: str | None = None) -> dict[str, object]:
        """Keys `data`, `quantity`, `num_particles`, `rows`, `gains`, `remarks`; nats; None for no finite number."""
        result = self.rows[0].best
        return {
            "data": {"space": str(result.space), "n": len(result), "sha256": result.digest},
            "quantity": self.quantity,
            "num_particles": list(self.num_particles),
            "rows": [finite(row.to_dict()) for row in self.rows],
            "gains": [finite(each.to_dict()) for each in self.gains(against)],
            "remarks": self.remarks(),
        }

    def to_json(self, path: str | Path, against: str | None = None) -> Path:
        """Write `to_dict` to `path`; no NaN or infinity is ever written."""
        text = json.dumps(self.to_dict(against), indent=2, allow_nan=False, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")
        return Path(path)


def compare_bounds(
    pairs: Mapping[str, Entry],
    batch: Batch,
    *,
    num_particles: Sequence[int] = (1, 10, 100, 1000, 5000),
    best: Estimator | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Bounds:
    r"""ELBO, importance-weighted bounds and the best estimate of log p(x) of several model/guide pairs.

    With weights w_k = p(x, z_k)/q(z_k | x), z_k ~ q(z | x),

        ELBO = E log w <= L_K = E log (1/K) Σ_{k <= K} w_k <= log p(x),    log p(x) - ELBO = KL(q(z | x) || p(z | x)),

    so that a higher ELBO has two causes: ELBO_a - ELBO_b = [log p_a - log p_b] + [gap_b - gap_a], a better p(x) and a
    tighter q. Each datum gets max K particles, which give the ELBO and, in disjoint groups, every L_K; `best` stands
    for log p(x), so that gap = best - ELBO has the direction of `best`. Entries that hold the same model object have
    the same p(x) by construction: between these all of a gain in ELBO is the guide's.

    Args:
        pairs: name to a model, or to (model, guide) with a guide for our model or any Pyro model.
        batch: observations, shape (n, ...), and the context if the models have one; the same for all.
        num_particles: the K, strictly ascending, the last at least 2; the ELBO is K = 1 and always there.
        best: estimator of log p(x); by default `annealed_importance_sampling(100)` where the latents are continuous
            and the guide has a density, and `importance_sampling(max K)` elsewhere.
        seed: of the noise, the same for every entry, as in `log_likelihood`.
        device: where to compute; a GPU if there is one.
        progress: show a progress bar for each entry.

    Returns:
        A row for each entry, nats per datum, higher is better; ELBO and L_K bound log p(x) from below.

    Raises:
        TypeError: an entry that is no model or no (model, guide), or a `best` that is no estimator.
        ValueError: no pairs, K that are not ascending whole numbers, an ELBO that is not finite, or what
            `log_likelihood` refuses; a note names the entry.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, arXiv:1509.00519; Cremer, Li,
    Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018, arXiv:1801.03558.
    """
    sizes = _sizes(num_particles)
    entries = _entries(pairs)
    if not (best is None or (callable(best) and hasattr(best, "num_particles"))):
        raise TypeError(f"best must be one of pv.{', pv.'.join(ESTIMATORS)}, with its settings, got {best!r}")
    rows = []
    for name, (model, guide) in entries.items():
        try:
            rows.append(_row(name, model, guide, batch, _Scoring(sizes, best), seed, device, progress))
        except (TypeError, ValueError) as error:
            error.add_note(f"in the entry {name!r} of pairs")
            raise
    return Bounds(_with_sameness(rows, entries), sizes)


def _sizes(num_particles: Sequence[int]) -> tuple[int, ...]:
    """The K with 1 in front, checked."""
    sizes = tuple(num_particles) if isinstance(num_particles, Sequence | np.ndarray) else (num_particles,)
    whole = all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in sizes)
    if not (sizes and whole and sizes[0] >= 1 and all(a < b for a, b in itertools.pairwise(sizes))):
        expected = "whole numbers of at least 1 in ascending order, as in (1, 10, 100)"
        raise ValueError(f"num_particles must be {expected}, got {num_particles!r}")
    if sizes[-1] < 2:
        raise ValueError(f"the last of num_particles must be at least 2, or there are no errors, got {num_particles!r}")
    return tuple(int(size) for size in ((1,) if sizes[0] > 1 else ()) + sizes)


def _entries(pairs: Mapping[str, Entry]) -> dict[str, tuple[nn.Module | Program, Program | None]]:
    if not isinstance(pairs, Mapping):
        raise TypeError(f"pairs must be a dict of name to model or (model, guide), got {type(pairs).__name__}")
    if not pairs:
        raise ValueError("pairs must hold at least one model, got an empty dict")
    return {name: _entry(name, value) for name, value in pairs.items()}


def _entry(name: str, value: object) -> tuple[nn.Module | Program, Program | None]:
    """Model and guide of an entry; None for a model's own guide."""
    parts = value if isinstance(value, tuple) else (value,)
    if not (len(parts) in (1, 2) and all(callable(part) for part in parts)):
        found = f"({', '.join(type(part).__name__ for part in parts)})" if isinstance(value, tuple) else repr(value)
        raise TypeError(f"pairs[{name!r}] must be a model or (model, guide), both callable, got {found}")
    return parts[0], parts[1] if len(parts) == 2 else None


class _Scoring:
    """The estimator of one entry: the curve first, which it keeps, then the best estimate, which it returns."""

    def __init__(self, sizes: tuple[int, ...], best: Estimator | None) -> None:
        self.sizes, self.best = sizes, best
        self.num_particles = sizes[-1]
        self.curve: Curve | None = None
        self.sampled: Estimate | None = None
        self.remark: str | None = None

    def __call__(self, pair: Pair, args: tuple[Tensor, ...], seed: int, progress: Callable[[int], object]) -> Estimate:
        best = self.best or self._choice(pair, args)
        enough = best == importance_sampling(self.num_particles)  # the same seed would give the same digits again
        ticks = (progress,) if enough else ()  # the bar is that of the slower part
        self.curve, self.sampled = sample_curve(self.sizes, pair, args, seed, *ticks)
        return self.sampled if enough else best(pair, args, seed, progress)

    def _choice(self, pair: Pair, args: tuple[Tensor, ...]) -> Estimator:
        """Annealing where it can be done."""
        annealing = annealed_importance_sampling(100)
        try:
            Annealer(annealing, pair, args, 0)
        except (ValueError, NotImplementedError) as error:  # the latter where a support has no bijection
            self.remark = f"best is importance sampling: {error or type(error).__name__}"
            return importance_sampling(self.num_particles)
        return annealing


def _row(
    name: str,
    model: nn.Module | Program,
    guide: Program | None,
    batch: Batch,
    scoring: _Scoring,
    seed: int,
    device: str | torch.device | None,
    progress: bool,
) -> BoundRow:
    how: dict[str, Any] = {"estimator": scoring, "seed": seed, "device": device, "progress": progress}
    result = log_likelihood(model, batch, guide=guide, marginal=False, **how)
    if scoring.curve is None or scoring.sampled is None:  # no latent sites: log p(x) is exact, the estimator not asked
        return BoundRow(name, flat(scoring.sizes, result.log_prob), result, result)
    sampled = replace(result, **vars(scoring.sampled))
    return BoundRow(name, scoring.curve, sampled, result, scoring.remark)


def _with_sameness(
    rows: Sequence[BoundRow], entries: Mapping[str, tuple[nn.Module | Program, Program | None]]
) -> tuple[BoundRow, ...]:
    """Each row with the name of the first row whose model is the same object."""
    models = {name: traces.as_pair(*entry).model for name, entry in entries.items()}
    same = {name: next(other for other in models if models[other] == model) for name, model in models.items()}
    return tuple(replace(row, model=same[row.name]) for row in rows)
