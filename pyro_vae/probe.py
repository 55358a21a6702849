"""A linear classifier on codes: what a class can be told by from them, and which codes tell it better."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C that are tried, the inverse of the weight of ‖w‖²/2
MAX_ITERATIONS = 5_000  # of L-BFGS


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of codes, scored on test data that chose nothing of it.

    Attributes:
        correct: whether each test datum was given its label, shape (n,).
        low: lower end of the exact (Clopper-Pearson) interval of the accuracy, over draws of the test set.
        high: its upper end.
        level: its coverage, at least.
        strength: C, by the accuracy on validation data.
        valid_accuracy: the accuracy there, of which C is the best.
        labels: of the test data, shape (n,).
    """

    correct: np.ndarray
    low: float
    high: float
    level: float
    strength: float
    valid_accuracy: float
    labels: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the test data that were given their label."""
        return float(self.correct.mean())

    def __repr__(self) -> str:
        ends = f"[{self.low:.3f}, {self.high:.3f}]"
        return f"Probe(accuracy {self.accuracy:.3f} {ends}, {len(self.correct)} test data, C {self.strength:g})"


@dataclass(frozen=True)
class ProbePair:
    """Two probes on the same test data.

    Attributes:
        a: name of the one.
        b: name of the other.
        difference: accuracy of a minus that of b.
        only_a: test data that a alone was right about.
        only_b: test data that b alone was right about.
        p_value: of the exact McNemar test that both are right equally often.
        adjusted: the same, adjusted for all pairs by Holm's method.
    """

    a: str
    b: str
    difference: float
    only_a: int
    only_b: int
    p_value: float
    adjusted: float


def linear_probe(
    codes: Sequence[Any],
    labels: Sequence[Any],
    *,
    strengths: Sequence[float] = STRENGTHS,
    level: float = 0.95,
) -> Probe:
    r"""Multinomial logistic regression on codes, log p(c | z) = w_c'z + b_c - log Σ_c' exp(w_c''z + b_c').

    Each entry of a code has the mean and the standard deviation of the training data taken out of it. The weights
    minimise C Σ_n -log p(c_n | z_n) + ‖w‖²/2 on the training data; C is the one with the best accuracy on validation
    data (the least of these, if several are alike); test data are seen once.

    Args:
        codes: of training, validation and test data, three arrays or tensors (n, ...); what is more than a row is made
            one, so that images will do.
        labels: theirs, three arrays or tensors of whole numbers (n,).
        strengths: the C that are tried.
        level: of the interval.

    Returns:
        The accuracy on the test data with its interval, and on which of them it was right.

    Raises:
        ValueError: not three of each, rows that do not match, a code that is not finite, a single class, or C that are
            not positive.

    Source: Clopper, Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934
    (Biometrika); Alain, Bengio, "Understanding intermediate layers using linear classifier probes", 2016,
    arXiv:1610.01644.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, classes = _checked(codes, labels)
    if not strengths or not all(math.isfinite(each) and each > 0 for each in strengths):
        raise ValueError(f"strengths must be positive numbers, got {strengths!r}")
    fitted = {}
    for strength in sorted(strengths):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=MAX_ITERATIONS))
        fitted[strength] = classifier.fit(rows[0], classes[0])
    valid = {strength: float(each.score(rows[1], classes[1])) for strength, each in fitted.items()}
    best = max(valid, key=lambda strength: valid[strength])  # the first, and so the least, of those that are alike
    correct = fitted[best].predict(rows[2]) == classes[2]
    low, high = binomial_interval(int(correct.sum()), len(correct), level)
    return Probe(correct, low, high, level, best, valid[best], classes[2])


def binomial_interval(successes: int, trials: int, level: float) -> tuple[float, float]:
    """The exact interval of a probability (Clopper, Pearson), whose coverage is at least `level`."""
    from scipy.special import betaincinv

    tail, rest = (1 - level) / 2, trials - successes
    low = float(betaincinv(successes, rest + 1, tail)) if successes else 0.0
    return low, float(betaincinv(successes + 1, rest, 1 - tail)) if rest else 1.0


def compare_probes(probes: Mapping[str, Probe]) -> list[ProbePair]:
    """Every two probes on the same test data, with an exact test, the better one as a, the largest differences first.

    Where both classifiers are right equally often, each datum that just one of them is right about is either's with
    probability ½. The p-values are about these classifiers as they were fitted, over draws of the test set.

    Raises:
        ValueError: fewer than two probes, or probes of other test data.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947
    (Psychometrika); Holm, "A simple sequentially rejective multiple test procedure", 1979 (Scandinavian Journal of
    Statistics).
    """
    names = list(probes)
    if len(names) < 2:
        raise ValueError(f"probes must hold at least 2, got {len(names)}")
    for name in names[1:]:
        if not np.array_equal(probes[name].labels, probes[names[0]].labels):
            raise ValueError(f"probes must be of the same test data, but the labels of {name} and {names[0]} differ")
    ranked = sorted(names, key=lambda name: -probes[name].accuracy)
    pairs = [_pair(a, b, probes) for a, b in itertools.combinations(ranked, 2)]
    adjusted = holm([pair.p_value for pair in pairs])
    pairs = [ProbePair(**{**vars(pair), "adjusted": each}) for pair, each in zip(pairs, adjusted, strict=True)]
    return sorted(pairs, key=lambda pair: -pair.difference)


def _pair(a: str, b: str, probes: Mapping[str, Probe]) -> ProbePair:
    only_a = int((probes[a].correct & ~probes[b].correct).sum())
    only_b = int((probes[b].correct & ~probes[a].correct).sum())
    p_value = mcnemar(only_a, only_b)
    return ProbePair(a, b, (only_a - only_b) / len(probes[a].correct), only_a, only_b, p_value, p_value)


def mcnemar(only_a: int, only_b: int) -> float:
    """P(|A - n/2| >= |only_a - n/2|) for A ~ Binomial(n, ½), n = only_a + only_b; 1 if n is 0."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several: the i-th smallest of m times m - i + 1, and never below the one before."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _checked(codes: Sequence[Any], labels: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows (n, code_dim) in float64 and labels (n,) of the three parts."""
    parts = ("training", "validation", "test")
    if len(codes) != 3 or len(labels) != 3 or any(each is None for each in (*codes, *labels)):
        raise ValueError("codes and labels must be of training, validation and test data, three arrays each")
    rows = [np.asarray(each, dtype=np.float64).reshape(len(each), -1) for each in codes]
    classes = [np.asarray(each) for each in labels]
    for what, part, label in zip(parts, rows, classes, strict=True):
        if label.shape != (len(part),) or not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"{what} labels must be whole numbers of shape ({len(part)},), got {label.dtype} of shape {label.shape}"
            )
        if part.shape[1] != rows[0].shape[1]:
            raise ValueError(f"{what} codes must have {rows[0].shape[1]} entries, as in training, got {part.shape[1]}")
        if not np.isfinite(part).all():
            raise ValueError(f"{what} codes must be finite, found NaN or an infinity")
    if len(np.unique(classes[0])) < 2:
        raise ValueError(f"training labels must hold at least 2 classes, got {np.unique(classes[0])}")
    return rows, classes
