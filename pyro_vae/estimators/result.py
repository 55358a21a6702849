"""What every estimator gives back: log p of each datum with its errors, direction and diagnostics."""

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from pyro_vae import diagnostics, spaces
from pyro_vae.estimators.estimate import (
    ARRAYS,
    CHAINS,
    DIRECTIONS,
    MIN_CHAINS,
    RAISE,
    Bracket,
    Certificate,
    Estimate,
    PrecisionError,
    flags,
    pooled,
)
from pyro_vae.log_partition import Constant
from pyro_vae.spaces import Space

PARTS: dict[str, Any] = {  # dataclasses, by field
    "certificate": Certificate,
    "precision_error": PrecisionError,
    "constant": Constant,
    "bracket": Bracket,
}
PRECISION_LIMIT = 1e-3  # nats, up to which shorter numbers may move a mean
FLAGGED_SHARE = 0.1  # share of data with a bad diagnostic from which the error of their mean is not to be trusted


@dataclass(frozen=True)
class Interval:
    """An interval for a mean log p, nats; where `warning` is not None it must not be taken as one."""

    low: float
    high: float
    level: float
    warning: str | None = None

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogLikelihood(Estimate):
    """Held-out log p(x_n) of each datum n, in nats, higher is better: an `Estimate` that says of what.

    Attributes:
        space: the space in which the data lie.
        digest: SHA-256 of exactly the data that were scored.
        seed: seed of the estimator's noise.
        seconds: wall-clock seconds of the estimate.
        given: what the model conditions on ("label", "quadrants(1)"), or None for log p(x).
        marginal: for a model given labels, the result for log p(x) = logsumexp_c [log p(c) + log p(x | c)].
    """

    space: Space
    digest: str
    seed: int
    seconds: float
    given: str | None = None
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
        """Monte Carlo standard error of `mean` for this fixed test set, nats: sqrt(Σ s_n²)/n for independent errors.

        What all data share, s_0² of every s_n², is not divided by n: sqrt(Σ (s_n² - s_0²)/n² + s_0²).
        """
        own = max(0.0, float(np.sum(self.variance - self.shared_variance)))
        return math.hypot(math.sqrt(own) / len(self), self.shared_se)

    @property
    def shared_se(self) -> float:
        """Standard error that all data have in common, that of log Z for an energy model, nats; 0 for others."""
        return math.sqrt(self.shared_variance)

    @property
    def test_se(self) -> float:
        """Standard error of `mean` over draws of the test set, sd(log p)/√n, nats; Monte Carlo noise included.

        An error that all data share does not show in their scatter, and is added: √(sd²/n + s_0²).
        """
        if len(self) < 2:
            return math.nan
        return math.hypot(float(np.std(self.log_prob, ddof=1) / math.sqrt(len(self))), self.shared_se)

    @property
    def bits_per_dim(self) -> float | None:
        """Bits per dimension of the grey levels, or None where the space has none."""
        return self.space.bits_per_dim(self.mean)

    @property
    def khat_limit(self) -> float:
        """The k-hat up to which the errors may be trusted, min(1 - 1/log10 K, 0.7)."""
        return diagnostics.khat_limit(self.khat_particles or self.num_particles)

    @property
    def frac_khat_high(self) -> float | None:
        """Share of the data whose k-hat is above 0.7, or None without k-hat."""
        return None if self.khat is None else float(np.mean(self.khat > diagnostics.KHAT_LIMIT))

    @property
    def flagged(self) -> np.ndarray:
        """Whether the Monte Carlo error of each datum is not to be trusted, booleans (n,); see `flags` and `pooled`."""
        return pooled(flags(self))

    @property
    def warning(self) -> str | None:
        """Why the error of `mean` is not to be trusted, or None if nothing speaks against it.

        It is not where shorter numbers move it, where a certificate was withheld, where annealing has none (its own
        weights do not tell its bias), or the diagnostic is bad for more than a tenth of the data. Since k-hat is noisy,
        a datum counts as bad if k-hat plus 2/√n of its standard errors is above the limit: many data need no further
        margin.
        """
        if self.direction == "exact":
            return None
        shift = self.precision_error
        # Rounding scatters from datum to datum: the mean over few counts only as far as its error does not explain it.
        if shift is not None and not abs(shift.mean) < PRECISION_LIMIT + 2 * (shift.se or 0.0):
            return f"{shift.precision} moves the mean by {shift.mean:+.2g} nats"
        if self.constant is not None:  # what log Z may lack is in the bracket, where there is one
            if self.bracket is not None and self.bracket.is_inverted:
                return "the lower side lies above the upper one: more steps of annealing, for log Z and backwards"
            return None if self.bracket is not None else self.constant.warning
        if self.certificate is not None and not self.certificate.granted:
            return f"no certificate: {self.certificate.reason}"
        if self.khat is None and self.bad is None and self.estimator not in CHAINS:
            return f"{self.num_particles} particles are too few to check the Monte Carlo error"
        if self.estimator == RAISE:
            return "RAISE bounds the law of its annealing sampler, which for data unlike the model's may lie above p(x)"
        share = float(np.mean(flags(self, diagnostics.KHAT_SE / math.sqrt(len(self)))))
        if share > FLAGGED_SHARE:
            return f"the Monte Carlo error is not to be trusted for {share:.0%} of the data ({self._sign})"
        if self.doubling_ratio is not None and self.doubling_ratio > diagnostics.RATIO_LIMIT:
            gains = f"gains in ratio {self.doubling_ratio:.2f}, 0.5 is healthy"
            return f"doubling the particles still moves the mean ({gains})"
        annealed = 1.0 if self.estimator in CHAINS else self.shares.get("annealed", 0.0)
        if annealed > FLAGGED_SHARE and self.certificate is None:
            return "how low annealing is, is not known without a certificate (sandwich, --certify)"
        return None if self.bias_bound is not None else "no bound on the bias of the mean is known"

    @property
    def _sign(self) -> str:
        if self.khat is not None:
            return f"k-hat > {self.khat_limit:.2g}"
        if self.estimator in CHAINS and self.num_particles < MIN_CHAINS:
            return f"{self.num_particles} chains, where {MIN_CHAINS} are needed to tell"
        return "few effective chains" if self.estimator in CHAINS else "k-hat or effective chains"

    def interval(self, level: float = 0.95) -> Interval:
        """Interval for the mean of exactly these data, [mean - z mc_se, mean + B + z mc_se], B the bias bound."""
        return self._interval(self.mc_se, level)

    def population_interval(self, level: float = 0.95) -> Interval:
        """Interval for the mean of the population that the data were drawn from: z test_se in place of z mc_se."""
        return self._interval(self.test_se, level)

    def _interval(self, se: float, level: float) -> Interval:
        half, bias = NormalDist().inv_cdf((1 + level) / 2) * se, self.bias_bound or 0.0
        below, above = (bias, 0.0) if self.direction == "upper" else (0.0, bias)
        return Interval(self.mean - below - half, self.mean + above + half, level, self.warning)

    def datum_intervals(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Ends (n,) of an interval for each log p(x_n), log_prob ± z √variance, to be trusted where not `flagged`.

        Flags need many data to be sure: of a single datum that is not flagged, the weights may still be heavy by luck.
        """
        half = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(self.variance)
        return self.log_prob - half, self.log_prob + half

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
            **({"shared_se": self.shared_se} if self.shared_variance else {}),
            "bits_per_dim": self.bits_per_dim,
            "seconds": self.seconds,
            "frac_khat_above_0.7": self.frac_khat_high,
            "khat_limit": None if self.khat is None else self.khat_limit,
            "bias_bound": self.bias_bound,
            "warning": self.warning,
            "doubling_bias": self.doubling_bias,
            "doubling_ratio": self.doubling_ratio,
            "n": len(self),
            "space": str(self.space),
            "sha256": self.digest,
            "seed": self.seed,
            "notes": list(self.notes),
            **({"shares": dict(self.shares)} if self.shares else {}),
            **{name: dataclasses.asdict(part) for name in PARTS if (part := getattr(self, name))},
        }

    def save(self, path: str | Path) -> None:
        """Write the result to an npz file that `LogLikelihood.load` reads back, digit for digit."""
        with open(path, "wb") as file:  # a bare path would get ".npz" behind it, and `load` not find it
            np.savez(file, **to_arrays(self))

    @staticmethod
    def load(path: str | Path) -> "LogLikelihood":
        """Read what `save` wrote; a ValueError if the file is another npz."""
        with np.load(path, allow_pickle=False) as file:
            if "meta" not in file.files:
                raise ValueError(f"{path} must be a saved result, found the arrays {', '.join(file.files)}")
            return from_arrays({name: file[name] for name in file.files})

    def to_csv(self, path: str | Path) -> None:
        """Write one row per datum: its index, log_prob, variance and the diagnostics that there are.

        Where all data share an error, its variance, which is a part of each `variance`, stands in a column of its own.
        """
        names = [name for name in ARRAYS if getattr(self, name) is not None]
        shared = {"shared_variance": repr(self.shared_variance)} if self.shared_variance else {}
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", *names, *shared])
            for index, row in enumerate(zip(*(getattr(self, name).tolist() for name in names), strict=True)):
                values = [repr(int(v) if isinstance(v, bool) else v) for v in row]
                writer.writerow([index, *values, *shared.values()])


def to_arrays(result: LogLikelihood) -> dict[str, Any]:
    """Arrays as they are, all else as one JSON text under `meta`; the marginal with a prefix."""
    arrays: dict[str, Any] = {name: getattr(result, name) for name in ARRAYS if getattr(result, name) is not None}
    meta = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in (*ARRAYS, "marginal")}
    meta |= {name: dataclasses.asdict(meta[name]) if meta[name] else None for name in PARTS}
    meta["space"] = {"kind": type(result.space).__name__, **dataclasses.asdict(result.space)}
    arrays["meta"] = np.array(json.dumps(meta))
    if result.marginal is not None:
        arrays |= {f"marginal_{name}": array for name, array in to_arrays(result.marginal).items()}
    return arrays


def from_arrays(arrays: dict[str, np.ndarray]) -> LogLikelihood:
    """What `to_arrays` gave, digit for digit."""
    prefix = "marginal_"
    inner = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    meta = json.loads(str(arrays["meta"]))
    space = meta.pop("space")
    meta["space"] = getattr(spaces, space.pop("kind"))(**{**space, "shape": tuple(space["shape"])})
    meta["notes"] = tuple(meta["notes"])
    meta |= {name: kind(**meta[name]) for name, kind in PARTS.items() if meta.get(name)}
    values: dict[str, Any] = {name: arrays[name] for name in ARRAYS if name in arrays}
    return LogLikelihood(**values, **meta, marginal=from_arrays(inner) if inner else None)
