"""One row of bounds: a model with its guide, and what it gains over another row in p(x) and in q(z | x)."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from pyro_vae.estimators.curve import Curve
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.rows import combine, flip


@dataclass(frozen=True)
class Figure:
    """A mean over the data with its errors, nats.

    Attributes:
        mean: mean over the data.
        mc_se: Monte Carlo standard error for exactly these data, √Σ s_n²/n.
        se: standard error over draws of the test set, sd/√n, Monte Carlo noise included; NaN for a single datum.
    """

    mean: float
    mc_se: float
    se: float


def figure(values: np.ndarray, variance: np.ndarray) -> Figure:
    """The mean of values of shape (n,), nats, each with its Monte Carlo variance."""
    count = len(values)
    se = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Figure(float(np.mean(values)), float(np.sqrt(np.sum(variance))) / count, se)


@dataclass(frozen=True, eq=False)
class BoundRow:
    """A model with a guide on the data.

    Attributes:
        name: of the entry.
        curve: ELBO and L_K of each datum.
        sampled: importance sampling with all particles of the curve; exact where there are no latents.
        best: best estimate of log p(x) of each datum.
        remark: why the default estimator was not annealing, or None.
        model: name of the first row whose model is the same object as this one's; `name` if it is the first itself.
    """

    name: str
    curve: Curve
    sampled: LogLikelihood
    best: LogLikelihood
    remark: str | None = None
    model: str = ""

    @property
    def elbo(self) -> np.ndarray:
        """ELBO of each datum, shape (n,), nats."""
        return self.curve.bounds[0]

    @property
    def gap(self) -> np.ndarray:
        """Gap of each datum, best - ELBO, shape (n,), nats: KL(q(z | x) || p(z | x)), up to the error of `best`."""
        return self.best.log_prob - self.elbo

    @property
    def gap_variance(self) -> np.ndarray:
        """Monte Carlo variance of `gap`, shape (n,); too large where `best` uses the particles of the curve."""
        return self.best.variance + self.curve.variance[0]

    @property
    def direction(self) -> str:
        """Where the true log p(x) and the true gap lie in expectation: "lower" if they are at least as estimated."""
        return self.best.direction

    @property
    def bounds(self) -> tuple[Figure, ...]:
        """Means of the curve, one for each K."""
        return tuple(map(figure, self.curve.bounds, self.curve.variance))

    def to_dict(self) -> dict[str, object]:
        """The figures as plain numbers and strings, nats; `low` and `high` of `best` hold for exactly these data."""
        interval = self.best.interval()
        best = asdict(figure(self.best.log_prob, self.best.variance))
        best |= {"estimator": self.best.estimator, "num_particles": self.best.num_particles}
        best |= {"direction": self.direction, "bias_bound": self.best.bias_bound, "warning": self.best.warning}
        best |= {"low": interval.low, "high": interval.high, "notes": list(self.best.notes)}
        curve = zip(self.curve.num_particles, self.bounds, strict=True)
        return {
            "name": self.name,
            "same_model_as": None if self.model == self.name else self.model,
            "elbo": asdict(self.bounds[0]),
            "bounds": [{"num_particles": size, **asdict(each)} for size, each in curve],
            "best": best,
            "gap": {**asdict(figure(self.gap, self.gap_variance)), "direction": self.direction},
            "seconds": self.best.seconds,
        }


@dataclass(frozen=True)
class Gain:
    """What a row gains over another, paired over the data, nats; positive is better.

    ELBO - ELBO' = [log p - log p'] + [gap' - gap]. Two rows with the same model object have the same p(x), so that
    `model` is 0 by construction and `guide` is all of `elbo`; `best` then shows the estimators' error.

    Attributes:
        name: of the row.
        against: of the other row.
        same_model: whether both hold the same model object.
        elbo: gain in ELBO, the sum of the next two.
        model: gain in log p(x): a better p(x).
        guide: what the gap is smaller by: a tighter q.
        best: difference of the best estimates; `model` unless `same_model`.
        direction: where the true gain in log p(x) lies in expectation: "exact", "unbiased", "lower" (at least
            `model`), "upper" or "unknown" (two bounds on the same side); for `guide` it is the other way round.
    """

    name: str
    against: str
    same_model: bool
    elbo: Figure
    model: Figure
    guide: Figure
    best: Figure
    direction: str

    def to_dict(self) -> dict[str, object]:
        """The figures as plain numbers and strings, nats."""
        return {**asdict(self), "guide_direction": flip(self.direction)}


def gain(row: BoundRow, other: BoundRow) -> Gain:
    """What `row` gains over `other`."""
    same = row.model == other.model
    elbo = figure(row.elbo - other.elbo, row.curve.variance[0] + other.curve.variance[0])
    best = figure(row.best.log_prob - other.best.log_prob, row.best.variance + other.best.variance)
    tighter = figure(other.gap - row.gap, row.gap_variance + other.gap_variance)
    return Gain(
        name=row.name,
        against=other.name,
        same_model=same,
        elbo=elbo,
        model=Figure(0.0, 0.0, 0.0) if same else best,
        guide=elbo if same else tighter,
        best=best,
        direction="exact" if same else combine(row.direction, flip(other.direction)),
    )
