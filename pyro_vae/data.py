"""Load, split, binarise, freeze, digest."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import blocks
from pyro_vae.datasets import read, split
from pyro_vae.mapped import Mapped, uniforms
from pyro_vae.sources import Part, Source, require
from pyro_vae.spaces import Binary, Labels, Quadrants, Quantized, Real, Space

SpaceName = Literal["binary", "quantized", "real"]
Binarization = Literal["dynamic", "static"]
TRAIN, VALID, TEST, SUBSET = range(1, 5)  # random streams of one seed; 0 draws the split
FLOAT_LEVELS = 256  # grey levels of a float array that is asked for as "quantized"
NOISE_CELLS = 4096  # of dequantisation noise: so coarse that float32 never rounds up to the next grey level


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Observations, what they are conditioned on, and their labels.

    Args:
        obs: observations, shape (n, *space.shape), float32; a tensor, or `Mapped`, whose rows lie on disk.
        context: what is given, shape (n, context.num_dims), or None.
        labels: class labels (n,), long, or None; for pictures and for `Data.given`, never scored.
        space: where the observations live, or None if unknown.
    """

    obs: Tensor
    context: Tensor | None = None
    labels: Tensor | None = None
    space: Space | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.obs, Tensor | Mapped):
            raise ValueError(f"obs must be a torch tensor, got {type(self.obs).__name__}")
        if self.obs.ndim == 0:
            raise ValueError("obs must have shape (batch, ...), got ()")
        for name, rows in (("context", self.context), ("labels", self.labels)):
            if rows is not None and rows.shape[:1] != self.obs.shape[:1]:
                raise ValueError(f"{name} must have one row per datum ({len(self)}), got {tuple(rows.shape)}")

    def __len__(self) -> int:
        return len(self.obs)

    def __repr__(self) -> str:
        context = "" if self.context is None else f", context {tuple(self.context.shape)}"
        return f"Batch(obs {tuple(self.obs.shape)}{context}, {self.space})"

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a model is called with: obs, and the context if there is one."""
        return (self.obs,) if self.context is None else (self.obs, self.context)

    @property
    def digest(self) -> str:
        """SHA-256 of exactly what is scored: obs, and the context if there is one.

        Shapes as text, values as little-endian float64: it depends on neither device nor float dtype.
        Computed anew at each call: a tensor that was changed in place has another digest.
        """
        sha = hashlib.sha256()
        for name, values in (("obs", self.obs), ("context", self.context)):
            if values is not None:
                sha.update(f"{name} {tuple(values.shape)}\n".encode())
                for _, chunk in blocks(values):
                    canonical = chunk.detach().cpu().double() + 0.0  # -0 is 0
                    sha.update(canonical.numpy().astype("<f8", order="C", copy=False).data)
        return sha.hexdigest()

    def to(self, device: torch.device | str | None) -> "Batch":
        """The same batch on another device."""
        return Batch(self.obs.to(device), _to(self.context, device), _to(self.labels, device), self.space)

    def subset(self, num: int, seed: int = 0) -> "Batch":
        """`num` data drawn at random without replacement, in their present order and in memory.

        Never the first `num`: files may be sorted by class.

        Args:
            num: how many, from 1 to the length of the batch.
            seed: of the draw; the same seed gives the same data.
        """
        if not 1 <= num <= len(self):
            raise ValueError(f"num must be from 1 to {len(self)}, got {num}")
        chosen = torch.randperm(len(self), generator=_generator(seed, SUBSET))[:num].sort().values
        index = chosen.to(self.obs.device)
        context = None if self.context is None else self.context[index]
        labels = None if self.labels is None else self.labels[index]
        return Batch(self.obs[index], context, labels, self.space)


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set, split and frozen.

    Args:
        name: a short name for tables.
        space: where the observations live.
        train: training data; with `intensity`, one draw of them.
        valid: validation data, for early stopping and choices.
        test: test data, for the final score only.
        context: what the contexts of the batches mean; None if nothing is given.
        intensity: P(pixel = 1) of the whole training images, if each epoch draws their bits anew; else None.
    """

    name: str
    space: Space
    train: Batch
    valid: Batch
    test: Batch
    context: Labels | Quadrants | None = None
    intensity: Tensor | None = None

    def __repr__(self) -> str:
        parts = f"{len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test"
        return f"Data({self.name}, {self.space} of shape {self.space.shape}, {parts}, given {self.context})"

    def epoch(self, generator: torch.Generator) -> Batch:
        """The training data of one epoch: bits drawn anew where binarisation is dynamic, else `train` itself.

        Given and missing pixels of an image come from one draw. It is made on the generator's device: a CPU
        generator gives the same bits wherever the data lie.
        """
        if self.intensity is None:
            return self.train
        bits = _draw_bits(self.intensity, generator)
        if isinstance(self.context, Quadrants):
            return _hide(replace(self.train, obs=bits, context=None), self.context, self.space)
        return replace(self.train, obs=bits)

    def given(self, what: Literal["label", "quadrants"], num: int = 1) -> "Data":
        """The same data conditioned on the label, or on a part of each image.

        Args:
            what: "label": the context is the one-hot label; p(c) from the training labels, one added to each
                count. "quadrants": the context is `num` quadrants as `space.to_unit` shows them, the
                observation is the row of missing pixels.
            num: quadrants that are given, 1, 2 or 3.

        Raises:
            ValueError: there are no labels, or something is given already.
        """
        if self.context is not None:
            raise ValueError(f"data must have no context yet, got data given {self.context}")
        if what == "label":
            return _given_label(self)
        if what == "quadrants":
            return _given_quadrants(self, num)
        raise ValueError(f"what must be 'label' or 'quadrants', got {what!r}")

    def to(self, device: torch.device | str | None) -> "Data":
        """The same data on another device."""
        train, valid, test = (batch.to(device) for batch in (self.train, self.valid, self.test))
        return replace(self, train=train, valid=valid, test=test, intensity=_to(self.intensity, device))


def load_data(
    name: str | Path,
    *,
    space: SpaceName | None = None,
    root: str | Path | None = None,
    seed: int = 0,
    binarization: Binarization = "dynamic",
) -> Data:
    """Load, split and freeze a data set. Nothing is dropped, clipped or rescaled in silence.

    Names: "digits" (scikit-learn) and torchvision's "mnist", "fashion_mnist", "kmnist", "emnist" (balanced,
    upright), "omniglot" (28x28, ink is 1; no test character occurs in training), "usps", "svhn", "cifar10".
    Paths: an .npz file with arrays train, test and perhaps valid (and train_labels, ...) or with one array
    (and labels), of shape (n, h, w), (n, c, h, w), or (n, h, w, c) with c = 1 or 3; or a folder of images of
    one size and mode, or of one such folder per label. For data larger than memory, a folder with these arrays
    as .npy files (train.npy, ..., what an .npz holds when it is unpacked) or one .npy file: images stay on disk,
    and rows become float32 when a batch needs them. What is drawn for a pixel is then a hash of seed, image and
    place: other bits than those of the same arrays in an .npz file, of the same law.

    Splits of the source are kept. MNIST, Fashion-MNIST and KMNIST give their last 10,000 training images to
    validation. Else `seed` draws what is missing: a tenth of the training images for validation; of a source
    without splits a fifth for test and a tenth for validation.

    Args:
        name: one of the names, or a path.
        space: "binary": grey levels x are bits with P(1) = x / (levels - 1), floats are probabilities.
            "quantized": grey levels. "real": floats as they are, grey levels x as (x + u) / levels with one
            stored uniform draw. None: bits binary, whole numbers quantized, floats real; but torchvision's
            grey sets binary.
        root: folder of the torchvision sets ("data" if None), downloaded into it where missing.
        seed: of the split and of every draw; each part has its own stream.
        binarization: "dynamic": `Data.epoch` draws the training bits anew. "static": one draw. Validation and
            test bits are drawn once, bits in the file never.

    Returns:
        The data; observations float32, labels long.

    Raises:
        ValueError, FileNotFoundError: names the file and the array, what was expected and what was found.

    Source: Salakhutdinov, Murray, "On the quantitative analysis of deep belief networks", 2008 (ICML).
    """
    _check_choice("space", space, (None, *get_args(SpaceName)))
    _check_choice("binarization", binarization, get_args(Binarization))
    source = read(name, root)
    if space is None and source.default == "unclear":
        raise ValueError(f"{name} holds whole numbers as floats: say space='quantized' for grey levels or 'real'")
    chosen = _space(source, space or cast("SpaceName", source.default))
    parts = split(source, seed)
    train, valid, test = (
        _batch(part, chosen, source.levels, _generator(seed, stream))
        for part, stream in zip(parts, (TRAIN, VALID, TEST), strict=True)
    )
    is_redrawn = isinstance(chosen, Binary) and source.levels != 2 and binarization == "dynamic"
    intensity = _intensity(parts[0], source.levels) if is_redrawn else None
    return Data(source.name, chosen, train, valid, test, intensity=intensity)


def _check_choice(what: str, got: str | None, choices: tuple[str | None, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {got!r}")


def _space(source: Source, kind: SpaceName) -> Space:
    """The space asked for, once the stored values are known to have a meaning there."""
    for part in source.parts.values() if source.levels is None else ():
        if kind == "binary":
            require(part.what, part.images, lambda x: (x >= 0) & (x <= 1), "probabilities in [0, 1]")
        if kind == "quantized":
            expected = f"whole numbers from 0 to {FLOAT_LEVELS - 1}"
            require(part.what, part.images, lambda x: (x >= 0) & (x < FLOAT_LEVELS) & (x == x.round()), expected)
    if kind == "binary":
        return Binary(source.shape)
    if kind == "quantized":
        return Quantized(source.shape, source.levels or FLOAT_LEVELS)
    return Real(source.shape, source.levels)


def _generator(seed: int, stream: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _batch(part: Part, space: Space, levels: int | None, generator: torch.Generator) -> Batch:
    if isinstance(space, Binary) and not (part.is_mapped and levels == 2):
        obs = _draw_bits(_intensity(part, levels), generator)  # bits stay: their probability is 0 or 1
    elif isinstance(space, Real) and levels is not None:
        obs = _dequantize(_values(part), levels, generator)
    else:
        obs = _values(part)
    labels = None if part.labels is None else torch.tensor(part.labels)
    return Batch(obs, labels=labels, space=space)


def _values(part: Part) -> Tensor:
    if part.is_mapped:
        rows = range(len(part.images)) if part.rows is None else part.rows
        return cast(Tensor, Mapped(part.images, rows))  # whoever indexes it gets tensors
    return torch.from_numpy(np.array(part.images, dtype=np.float32, order="C"))


def _intensity(part: Part, levels: int | None) -> Tensor:
    """P(pixel = 1): grey levels as fractions of the brightest, or the probabilities that the part holds."""
    values = _values(part)
    if isinstance(values, Mapped):
        return values if levels is None else values.then(lambda x, rows: x.div_(levels - 1))
    return values if levels is None else values.div_(levels - 1)


def _draw_bits(intensity: Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(intensity, Mapped):
        seed = _seed(generator)
        return intensity.then(lambda p, rows: uniforms(seed, rows, p.shape[1:].numel()).view_as(p).lt_(p))
    uniform = torch.rand(intensity.shape, generator=generator, device=generator.device)
    return uniform.to(intensity.device).lt_(intensity)  # in place: 1.0 where u < p


def _dequantize(values: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """(x + u) / levels; u is the middle of a random cell of [0, 1), so that floor(y * levels) is x."""
    if isinstance(values, Mapped):
        seed = _seed(generator)
        return values.then(lambda x, rows: _between(x, uniforms(seed, rows, x.shape[1:].numel()).view_as(x), levels))
    return _between(values, torch.rand(values.shape, generator=generator), levels)


def _between(values: Tensor, uniform: Tensor, levels: int) -> Tensor:
    noise = uniform.mul_(NOISE_CELLS).floor_().add_(0.5).div_(NOISE_CELLS)
    return noise.add_(values).div_(levels)


def _seed(generator: torch.Generator) -> int:
    """A seed for the draws of all images on disk, wherever they will be made."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def _given_label(data: Data) -> Data:
    labels = [batch.labels for batch in (data.train, data.valid, data.test) if batch.labels is not None]
    if len(labels) != 3:
        raise ValueError(f"data given the label must have labels, got none for {data.name}")
    num_classes = 1 + max(int(each.max()) for each in labels)
    counts = torch.bincount(labels[0], minlength=num_classes).double() + 1
    context = Labels(tuple((counts / counts.sum()).log().tolist()))
    one_hot = [torch.nn.functional.one_hot(each, num_classes).float() for each in labels]
    batches = (data.train, data.valid, data.test)
    train, valid, test = (replace(b, context=c) for b, c in zip(batches, one_hot, strict=True))
    return replace(data, train=train, valid=valid, test=test, context=context)


def _given_quadrants(data: Data, num: int) -> Data:
    context = Quadrants(num, data.space.shape)
    num_missing = data.space.num_dims - context.num_dims
    if not 0 < num_missing < data.space.num_dims:
        raise ValueError(f"an image in quadrants must be at least 2x2 pixels, got shape {data.space.shape}")
    space = replace(data.space, shape=(num_missing,))
    train, valid, test = (_hide(batch, context, space) for batch in (data.train, data.valid, data.test))
    return replace(data, space=space, train=train, valid=valid, test=test, context=context)


def _hide(batch: Batch, context: Quadrants, space: Space) -> Batch:
    """Whole images as given pixels (context) and missing ones (obs)."""
    if isinstance(batch.obs, Mapped):
        given = batch.obs.then(lambda images, rows: space.to_unit(context.split(images)[0]))
        return Batch(batch.obs.then(lambda images, rows: context.split(images)[1]), given, batch.labels, space)
    given, missing = context.split(batch.obs)
    return Batch(missing, space.to_unit(given), batch.labels, space)


def _to(values: Tensor | None, device: torch.device | str | None) -> Tensor | None:
    return None if values is None else values.to(device)
