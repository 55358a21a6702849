"""What every estimator gives back: log p of each datum with its errors, direction and diagnostics."""

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyro_vae import spaces
from pyro_vae.spaces import Space

Direction = Literal["exact", "lower", "upper", "unbiased"]
DIRECTIONS = ("exact", "lower", "upper", "unbiased")
ARRAYS = ("log_prob", "variance", "ess", "khat")
KHAT_LIMIT = 0.7  # above it, the variance of the weights is no guide to the error (Vehtari et al. 2015, 1507.02646)


@dataclass(frozen=True, eq=False, repr=False)
class LogLikelihood:
    """Held-out log p(x_n) of each datum n, in nats, higher is better.

    Attributes:
        log_prob: estimate of log p(x_n), shape (n,), nats.
        variance: Monte Carlo variance of each entry of `log_prob`, shape (n,), nats²; zeros where exact.
        direction: "exact"; "lower" or "upper" if the expectation of the estimate bounds log p from there; "unbiased"
            if the leading bias is removed and neither side is promised.
        estimator: name of the estimator.
        num_particles: particles spent on each datum; 0 where exact.
        space: the space in which the data lie.
        digest: SHA-256 of exactly the data that were scored.
        seed: seed of the estimator's noise.
        seconds: wall-clock seconds of the estimate.
        ess: effective sample size of the importance weights, shape (n,), or None.
        khat: Pareto shape of the largest weights, shape (n,), or None; above 0.7 the error is not to be trusted.
        doubling_bias: estimate of the bias of `mean` that is left, from halving the particles, nats, or None.
        doubling_ratio: the ratio that it rests on; about 0.5 is healthy, above 0.8 the estimate is not.
        given: what the model conditions on ("label", "quadrants(1)"), or None for log p(x).
        notes: what a reader must know beside the numbers, for example that a block was halved for want of memory.
        marginal: for a model given labels, the result for log p(x) = logsumexp_c [log p(c) + log p(x | c)].
    """

    log_prob: np.ndarray
    variance: np.ndarray
    direction: Direction
    estimator: str
    num_particles: int
    space: Space
    digest: str
    seed: int
    seconds: float
    ess: np.ndarray | None = None
    khat: np.ndarray | None = None
    doubling_bias: float | None = None
    doubling_ratio: float | None = None
    given: str | None = None
    notes: tuple[str, ...] = ()
    marginal: "LogLikelihood | None" = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        for name in ARRAYS:
            values = getattr(self, name)
            if values is not None and values.shape != (len(self),):
                raise ValueError(f"{name} must have shape ({len(self)},), got {values.shape}")
        bad = np.flatnonzero(~np.isfinite(self.log_prob))
        if len(bad):
            raise ValueError(f"log_prob of datum {bad[0]} is {self.log_prob[bad[0]]} ({len(bad)} such data)")

    def __len__(self) -> int:
        return len(self.log_prob)

    def __repr__(self) -> str:
        return (
            f"LogLikelihood(mean {self.quantity} {self.mean:.3f} nats ({self.direction}), {self.estimator}, "
            f"n {len(self)}, {self.space})"
        )

    @property
    def mean(self) -> float:
        """Mean log p over the data, nats."""
        return float(np.mean(self.log_prob))

    @property
    def mc_se(self) -> float:
        """Monte Carlo standard error of `mean` for this fixed test set, sqrt(Σ s_n²)/n, nats."""
        return float(np.sqrt(np.sum(self.variance)) / len(self))

    @property
    def test_se(self) -> float:
        """Standard error of `mean` over draws of the test set, sd(log p)/√n, nats; Monte Carlo noise included."""
        return float(np.std(self.log_prob, ddof=1) / math.sqrt(len(self))) if len(self) > 1 else math.nan

    @property
    def bits_per_dim(self) -> float | None:
        """Bits per dimension of the grey levels, or None where the space has none."""
        return self.space.bits_per_dim(self.mean)

    @property
    def khat_limit(self) -> float:
        """The k-hat up to which the errors may be trusted, min(1 - 1/log10 K, 0.7)."""
        return min(1 - 1 / math.log10(self.num_particles), KHAT_LIMIT) if self.num_particles > 1 else KHAT_LIMIT

    @property
    def frac_khat_high(self) -> float | None:
        """Share of the data whose k-hat is above 0.7, or None without k-hat."""
        return None if self.khat is None else float(np.mean(self.khat > KHAT_LIMIT))

    @property
    def quantity(self) -> str:
        """What was estimated, in symbols: log p(x) or log p(x | label)."""
        return "log p(x)" if self.given is None else f"log p(x | {self.given})"

    def summary(self) -> dict[str, object]:
        """The figures of the whole data set, as plain numbers and strings."""
        return {
            "quantity": self.quantity,
            "estimator": self.estimator,
            "num_particles": self.num_particles,
            "direction": self.direction,
            "mean_log_prob": self.mean,
            "mc_se": self.mc_se,
            "test_se": self.test_se if len(self) > 1 else None,
            "bits_per_dim": self.bits_per_dim,
            "seconds": self.seconds,
            "frac_khat_above_0.7": self.frac_khat_high,
            "khat_limit": self.khat_limit,
            "doubling_bias": self.doubling_bias,
            "doubling_ratio": self.doubling_ratio,
            "n": len(self),
            "space": str(self.space),
            "sha256": self.digest,
            "seed": self.seed,
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> None:
        """Write the result to an npz file that `LogLikelihood.load` reads back, digit for digit."""
        with open(path, "wb") as file:  # a bare path would get ".npz" behind it, and `load` not find it
            np.savez(file, **_to_arrays(self))

    @staticmethod
    def load(path: str | Path) -> "LogLikelihood":
        """Read what `save` wrote; a ValueError if the file is another npz."""
        with np.load(path, allow_pickle=False) as file:
            if "meta" not in file.files:
                raise ValueError(f"{path} must be a saved result, found the arrays {', '.join(file.files)}")
            return _from_arrays({name: file[name] for name in file.files})

    def to_csv(self, path: str | Path) -> None:
        """Write one row per datum: its index, log_prob, variance and, where there are any, ess and khat."""
        names = [name for name in ARRAYS if getattr(self, name) is not None]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", *names])
            for index, row in enumerate(zip(*(getattr(self, name).tolist() for name in names), strict=True)):
                writer.writerow([index, *(repr(value) for value in row)])


def _to_arrays(result: LogLikelihood) -> dict[str, Any]:
    """Arrays as they are, all else as one JSON text under `meta`; the marginal with a prefix."""
    arrays: dict[str, Any] = {name: getattr(result, name) for name in ARRAYS if getattr(result, name) is not None}
    meta = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in (*ARRAYS, "marginal")}
    meta["space"] = {"kind": type(result.space).__name__, **dataclasses.asdict(result.space)}
    arrays["meta"] = np.array(json.dumps(meta))
    if result.marginal is not None:
        arrays |= {f"marginal_{name}": array for name, array in _to_arrays(result.marginal).items()}
    return arrays


def _from_arrays(arrays: dict[str, np.ndarray]) -> LogLikelihood:
    prefix = "marginal_"
    inner = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    meta = json.loads(str(arrays["meta"]))
    space = meta.pop("space")
    kind = getattr(spaces, space.pop("kind"))
    meta["space"] = kind(**{**space, "shape": tuple(space["shape"])})
    meta["notes"] = tuple(meta["notes"])
    values: dict[str, Any] = {name: arrays[name] for name in ARRAYS if name in arrays}
    return LogLikelihood(**values, **meta, marginal=_from_arrays(inner) if inner else None)
