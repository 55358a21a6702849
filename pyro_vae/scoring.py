"""Images of the user's own: read into a run's space, scored, and ranked with the least likely first."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pyro_vae import sources
from pyro_vae.data import Batch
from pyro_vae.estimators.result import LogLikelihood
from pyro_vae.runs import Run
from pyro_vae.spaces import Binary, Labels, Quadrants, Real, Space

MAD_TO_SD = 1.4826  # of a normal law: its standard deviation over its median absolute deviation


@dataclass(frozen=True)
class Outlier:
    """One image in the ranking: its index, log p (nats), and its distance from the median in robust deviations."""

    index: int
    log_prob: float
    deviation: float


def rank(result: LogLikelihood) -> list[Outlier]:
    """The images, least likely first.

    The deviation is (log p - median)/(1.4826 MAD), MAD the median absolute deviation; NaN where MAD is 0, that is
    where more than half are alike.
    """
    log_prob = result.log_prob
    center = np.median(log_prob)
    spread = MAD_TO_SD * np.median(np.abs(log_prob - center))
    deviation = (log_prob - center) / spread if spread > 0 else np.full(len(log_prob), np.nan)
    order = np.argsort(log_prob, kind="stable")
    return [Outlier(int(i), float(log_prob[i]), float(deviation[i])) for i in order]


def write_ranking(ranking: Sequence[Outlier], path: Path) -> None:
    """Write the ranking as CSV: index, log_prob, deviation."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["index", "log_prob", "deviation"])
        writer.writeheader()
        writer.writerows(asdict(row) for row in ranking)


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
