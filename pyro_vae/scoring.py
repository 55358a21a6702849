"""Images of the user's own: read into a run's space, and ranked with the outliers first; whom to compare them with."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pyro_vae import sources
from pyro_vae.checks import check_choice
from pyro_vae.conformal import false_discoveries
from pyro_vae.data import Batch
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.randomness import derived_seed
from pyro_vae.runs import Run
from pyro_vae.spaces import Binary, Labels, Quadrants, Real, Space

CALIBRATION = 61  # stream of the seed
MAD_TO_SD = 1.4826  # of a normal law: its standard deviation over its median absolute deviation


@dataclass(frozen=True)
class Outlier:
    """One image in the ranking.

    Attributes:
        index: of the image.
        log_prob: log p, nats.
        deviation: distance of log p from the median in robust standard deviations.
        score: higher is more of an outlier.
        p_value: conformal p-value of the score, or None.
        flagged: whether it is flagged at the rate of false discoveries asked for, or None.
    """

    index: int
    log_prob: float
    deviation: float
    score: float
    p_value: float | None = None
    flagged: bool | None = None


def rank(
    result: LogLikelihood,
    scores: np.ndarray | None = None,
    p_values: np.ndarray | None = None,
    level: float = 0.1,
) -> list[Outlier]:
    """The images, the highest score first: -log p unless told.

    The deviation is (log p - median)/(1.4826 MAD), MAD the median absolute deviation; NaN where MAD is 0, that is
    where more than half are alike. `level` is the rate of false discoveries at which p-values flag an image.
    """
    log_prob = result.log_prob
    center = np.median(log_prob)
    spread = MAD_TO_SD * np.median(np.abs(log_prob - center))
    deviation = (log_prob - center) / spread if spread > 0 else np.full(len(log_prob), np.nan)
    scores = -log_prob if scores is None else scores
    flagged = None if p_values is None else false_discoveries(p_values, level)

    def row(i: int) -> Outlier:
        figures = int(i), float(log_prob[i]), float(deviation[i]), float(scores[i])
        if p_values is None or flagged is None:
            return Outlier(*figures)
        return Outlier(*figures, float(p_values[i]), bool(flagged[i]))

    return [row(i) for i in np.argsort(-scores, kind="stable")]


def write_ranking(ranking: Sequence[Outlier], path: Path) -> None:
    """Write the ranking as CSV: index, log_prob, deviation, score, and p_value and flagged if they are known."""
    rows = [{name: value for name, value in asdict(row).items() if value is not None} for row in ranking]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def calibration_data(run: Run, which: str, num: int, seed: int) -> Batch:
    """Inliers to calibrate p-values on: a seeded random part of a run's test or validation data.

    Test data had no part in the fit, so that p-values of other data of their kind are uniform. Validation data chose
    the epoch of a model fitted by gradients, whose p-values then come out a little too small.
    """
    check_choice("calibrate", which, ("test", "valid"))
    batch = run.data.test if which == "test" else run.data.valid
    return batch if num >= len(batch) else batch.subset(num, derived_seed(seed, CALIBRATION))


def check_same_way(images: LogLikelihood, calibration: LogLikelihood) -> None:
    """Raise a ValueError unless log p of both was had in the same way: else their scores are not exchangeable."""
    ways = [f"{each.estimator} ({each.direction}, {each.num_particles} particles)" for each in (images, calibration)]
    if ways[0] != ways[1]:
        raise ValueError(f"p-values need one way to log p, got {ways[0]} for the images, {ways[1]} for the calibration")


def num_shared(batch: Batch, calibration: Batch) -> int:
    """How many images of a batch are among those of the calibration, bit for bit."""
    known = {row.numpy().tobytes() for row in calibration.obs[:].cpu().contiguous()}
    return sum(row.numpy().tobytes() in known for row in batch.obs[:].cpu().contiguous())


def read_batch(path: Path, run: Run, *, binarize: bool = False, seed: int = 0) -> Batch:
    """Images of a file or folder as a batch in the space of a run.

    Args:
        path: a .npy file, an .npz file with one array (and perhaps `labels`), or a folder of images.
        run: whose model will score them.
        binarize: draw bits from grey levels, P(1) = x / 255 for whole numbers and x for floats in [0, 1].
        seed: of the bits.

    Raises:
        ValueError: names the file and the array, what was expected and what was found; values are never changed to
            fit the space unless `binarize` asks for it.
    """
    part, levels = sources.read_whole(path)
    space, context = run.data.space, run.data.context
    values = torch.from_numpy(np.array(part.images, dtype=np.float32, order="C"))
    if binarize:
        values = _bits(values, levels, space, part.what, seed)
    if isinstance(context, Quadrants):
        replace(space, shape=context.image_shape).check(values, part.what)
        _check_scale(values, space, part.what)
        given, missing = context.split(values)
        return Batch(missing, space.to_unit(given), space=space)
    space.check(values, part.what)
    _check_scale(values, space, part.what)
    return Batch(values, _one_hot(part, context), space=space)


def _check_scale(values: torch.Tensor, space: Space, what: str) -> None:
    """Grey levels enter `Real` as (x + u) / levels: raw levels are no such numbers, though they are real."""
    if isinstance(space, Real) and space.levels is not None and not bool(((values >= 0) & (values < 1)).all()):
        value = float(values[(values < 0) | (values >= 1)][0])
        expected = f"numbers in [0, 1), grey levels as (x + u) / {space.levels}"
        raise ValueError(f"{what} must hold {expected}, for {space}, found {value:g}")


def _bits(values: torch.Tensor, levels: int | None, space: object, what: str, seed: int) -> torch.Tensor:
    if not isinstance(space, Binary):
        raise ValueError(f"binarize is for models of bits; this one lives in {space}")
    intensity = values if levels is None else values / (levels - 1)
    if not bool(((intensity >= 0) & (intensity <= 1)).all()):
        raise ValueError(f"{what} must hold probabilities in [0, 1] to draw bits from, found values outside")
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(intensity.shape, generator=generator) < intensity).float()


def _one_hot(part: sources.Part, context: Labels | Quadrants | None) -> torch.Tensor | None:
    if not isinstance(context, Labels):
        return None
    if part.labels is None:
        raise ValueError(f"{part.what} has no labels, and the model is given labels")
    if part.labels.max() >= context.num_dims:
        raise ValueError(f"labels of {part.what} must be below {context.num_dims}, found {part.labels.max()}")
    return torch.nn.functional.one_hot(torch.from_numpy(part.labels).long(), context.num_dims).float()
