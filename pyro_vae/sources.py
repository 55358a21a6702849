"""Images and labels as stored, and how they are read: .npz and .npy files, folders of images."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.checks import blocks
from pyro_vae.mapped import open_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GREY_MODES = ("1", "L", "I", "I;16", "F")


@dataclass(frozen=True, eq=False)
class Part:
    """Some images as stored, (n, height, width) or (n, channels, height, width), with their labels (n,).

    Args:
        what: what an error message calls the images.
        images: any integer, bool or float array; a memory-mapped one stays on disk.
        labels: whole numbers from 0, or None.
        rows: of a mapped array, those that the part consists of; all if None.
    """

    what: str
    images: np.ndarray
    labels: np.ndarray | None = None
    rows: np.ndarray | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether the images lie on disk."""
        return isinstance(self.images, np.memmap)

    def take(self, index: np.ndarray | slice) -> "Part":
        """The images and labels at `index`."""
        labels = None if self.labels is None else self.labels[index]
        if self.is_mapped:
            rows = np.arange(len(self.images)) if self.rows is None else self.rows
            return Part(self.what, self.images, labels, rows[index])
        return Part(self.what, self.images[index], labels)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as stored, before it is split, binarised or dequantised.

    Args:
        name: a short name for tables.
        parts: by name: train, valid and test; train and test; or all.
        levels: number of grey levels (values 0..levels-1), 2 for bits, None for real numbers.
        default: the space that is taken if none is asked for, "binary", "quantized" or "real"; "unclear" where one
            must be asked for.
    """

    name: str
    parts: dict[str, Part]
    levels: int | None
    default: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return next(iter(self.parts.values())).images.shape[1:]


def read_path(path: Path) -> Source:
    """The data set in an .npz or .npy file or in a folder; a ValueError names what is wrong and where."""
    if path.suffix == ".npy" or (path.is_dir() and any(path.glob("*.npy"))):
        return _source(path, open_arrays(path))
    return _folder(path) if path.is_dir() else _npz(path)


def read_whole(path: Path) -> tuple[Part, int | None]:
    """All images of a .npy file, an .npz file with one array or a folder, and their number of levels, unsplit."""
    source = _npy(path) if path.suffix == ".npy" else read_path(path)
    if list(source.parts) != ["all"]:
        raise ValueError(f"{path} must hold one array of images, found {', '.join(source.parts)}")
    return source.parts["all"], source.levels


def require(what: str, values: np.ndarray, is_good: "Callable[[np.ndarray], np.ndarray]", expected: str) -> None:
    """Raise a ValueError that names the first datum and value that `is_good` is False for, block by block."""
    for start, block in blocks(values):
        good = is_good(block)
        if not good.all():
            index = int(good.reshape(len(good), -1).all(1).argmin())
            value = block[index][~good[index]].flat[0]
            raise ValueError(f"{what} must hold {expected}, but datum {start + index} holds {value:g}")


def holds(parts: "Sequence[Part]", is_good: "Callable[[np.ndarray], np.ndarray]") -> bool:
    """Whether it is True for all values of all parts."""
    return all(bool(is_good(block).all()) for part in parts for _, block in blocks(part.images))


# arrays by name


def _npz(path: Path) -> Source:
    if path.suffix != ".npz":
        raise ValueError(f"{path} must be an .npz or .npy file or a folder of images")
    return _source(path, _npz_arrays(path))


def _source(path: Path, arrays: dict[str, np.ndarray]) -> Source:
    """Arrays train, (valid,) test with labels train_labels, ...; or one array with `labels`."""
    if "train" in arrays or "test" in arrays:
        names = _split_names(path, arrays)
        parts = {name: _part(path, arrays, name, f"{name}_labels") for name in names}
    else:
        parts = {"all": _part(path, arrays, _only_name(path, arrays), "labels")}
    _check_alike(list(parts.values()))
    levels, default = _meaning(list(parts.values()))
    return Source(path.resolve().name if path.is_dir() else path.stem, parts, levels, default)


def _npy(path: Path) -> Source:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a plain array of numbers: {error}") from error
    part = Part(f"array in {path}", _images(f"array in {path}", array))
    levels, default = _meaning([part])
    return Source(path.stem, {"all": part}, levels, default)


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK" and zipfile.is_zipfile(path)
    if not is_zip:
        raise ValueError(f"{path} must be an .npz archive of NumPy arrays, but it is no zip archive")
    with np.load(path, allow_pickle=False) as archive:
        return {name: _member(path, archive, name) for name in archive.files}


def _member(path: Path, archive: Any, name: str) -> np.ndarray:
    try:
        array = archive[name]
    except (ValueError, RuntimeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"array {name} in {path} must be a plain array of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} in {path} must be a NumPy array, got a file of another kind")
    return array


def _split_names(path: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    names: list[str] = [name for name in ("train", "valid", "test") if name in arrays]
    missing = [name for name in ("train", "test") if name not in arrays]
    if missing:
        raise ValueError(f"{path} must hold the arrays train and test, but {missing[0]} is missing")
    labels = [f"{name}_labels" for name in names]
    unknown = sorted(set(arrays) - {*names, *labels})
    if unknown:
        raise ValueError(f"{path} may hold only {', '.join(names + labels)}, found {', '.join(unknown)}")
    absent = [label for label in labels if label not in arrays]
    if 0 < len(absent) < len(labels):
        raise ValueError(f"{path} must hold labels for every split or for none, but {absent[0]} is missing")
    return names


def _only_name(path: Path, arrays: dict[str, np.ndarray]) -> str:
    names = sorted(set(arrays) - {"labels"})
    if len(names) != 1:
        found = ", ".join(sorted(arrays)) or "none"
        raise ValueError(f"{path} must hold the arrays train and test, or one array to split, found {found}")
    return names[0]


def _part(path: Path, arrays: dict[str, np.ndarray], name: str, label_name: str) -> Part:
    what = f"array {name} in {path}"
    images = _images(what, arrays[name])
    if label_name not in arrays:
        return Part(what, images)
    return Part(what, images, _labels(f"array {label_name} in {path}", arrays[label_name], len(images)))


def _images(what: str, images: np.ndarray) -> np.ndarray:
    if images.dtype.kind not in "buif":
        raise ValueError(f"{what} must hold bits, whole or real numbers, got dtype {images.dtype}")
    if images.ndim not in (3, 4):
        expected = "(n, height, width) or (n, channels, height, width)"
        raise ValueError(f"{what} must have shape {expected}, got {images.shape}")
    if images.size == 0:
        raise ValueError(f"{what} must hold at least one image, got shape {images.shape}")
    return channels_first(images)


def _labels(what: str, labels: np.ndarray, num_images: int) -> np.ndarray:
    if labels.shape != (num_images,):
        raise ValueError(f"{what} must have shape ({num_images},), got {labels.shape}")
    if labels.dtype.kind not in "ui":
        raise ValueError(f"{what} must hold whole numbers, got dtype {labels.dtype}")
    require(what, labels, lambda block: block >= 0, "whole numbers from 0")
    return labels.astype(np.int64)


def channels_first(images: np.ndarray) -> np.ndarray:
    """(n, h, w, c) as (n, c, h, w), if the last axis is 1 or 3 and the second is not; else unchanged."""
    is_last = images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3)
    return np.moveaxis(images, -1, 1) if is_last else images


def _check_alike(parts: "Sequence[Part]") -> None:
    first = parts[0].images
    for part in parts[1:]:
        for name, expected, found in (
            ("image shape", first.shape[1:], part.images.shape[1:]),
            ("dtype", first.dtype, part.images.dtype),
        ):
            if found != expected:
                raise ValueError(f"{part.what} must have {name} {expected} as {parts[0].what}, got {found}")


def _meaning(parts: "Sequence[Part]") -> tuple[int | None, str]:
    """Levels and default space of images of unknown origin: bits, whole numbers 0..255, or real numbers."""
    dtype, largest = parts[0].images.dtype, np.finfo(np.float32).max
    for part in parts if dtype.kind == "f" else ():
        require(part.what, part.images, lambda x: abs(x) <= largest, "finite numbers within float32")  # no NaN either
    if holds(parts, lambda x: (x == 0) | (x == 1)):
        return 2, "binary"
    if dtype.kind == "f":
        return None, "unclear" if holds(parts, lambda x: x == x.round()) else "real"
    for part in parts if dtype != np.uint8 else ():
        require(part.what, part.images, lambda x: (x >= 0) & (x <= 255), "whole numbers from 0 to 255")
    return 256, "quantized"


# folders of images


def _folder(path: Path) -> Source:
    """Images, or one folder of images per label, the labels numbered in the order of their names."""
    entries = _visible(path)
    folders = [entry for entry in entries if entry.is_dir()]
    if folders and len(folders) < len(entries):
        raise ValueError(f"{path} must hold images or one folder per label, found both")
    if {"train", "test"} <= {folder.name for folder in folders}:
        raise ValueError(f"{path} must hold one folder per label, found folders named train and test")
    groups = [_image_files(folder) for folder in folders or [path]]
    images = _stack([file for group in groups for file in group])
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups]) if folders else None
    part = Part(f"images in {path}", images, labels)
    levels, default = _meaning([part])
    return Source(path.resolve().name, {"all": part}, levels, default)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    files = _visible(folder)
    for file in files:
        if file.is_dir() or file.suffix.lower() not in IMAGE_SUFFIXES:
            expected = f"images only ({' '.join(IMAGE_SUFFIXES)})"
            raise ValueError(f"{folder} must hold {expected}, found {file.name}")
    if not files:
        raise ValueError(f"{folder} must hold images, found none")
    return files


def _stack(files: "Sequence[Path]") -> np.ndarray:
    """(n, h, w) or (n, 3, h, w)."""
    images = [_image(files[0])]
    for file in files[1:]:
        images.append(_image(file))
        (_, expected), (_, found) = images[0], images[-1]
        if found != expected:
            raise ValueError(f"{file} must be {expected} as {files[0]}, got {found}")
    stack = np.stack([pixels for pixels, _ in images])
    return np.moveaxis(stack, -1, 1) if stack.ndim == 4 else stack


def _image(file: Path) -> tuple[np.ndarray, str]:
    """The pixels, and their mode and size in words."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            mode, frames, pixels = image.mode, getattr(image, "n_frames", 1), np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    if mode not in (*GREY_MODES, "RGB"):
        raise ValueError(f"{file} must have mode {', '.join(GREY_MODES)} or RGB, got {mode}")
    if frames != 1:
        raise ValueError(f"{file} must hold one image, got {frames} frames")
    height, width = pixels.shape[:2]
    return pixels, f"{mode} with {height}x{width} pixels"
