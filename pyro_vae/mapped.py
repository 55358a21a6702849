"""Images that stay on disk: memory-mapped .npy arrays, whose rows become tensors when they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import blocks

STEPS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64

Step = Callable[[Tensor, np.ndarray], Tensor]
Index = slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor  # of some of the rows
CHOOSING = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)  # uint8 is a mask to torch alone


@dataclass(frozen=True, eq=False)
class Mapped:
    """Rows of an array on disk, in the place of a float32 tensor: indexing reads, converts and draws those asked for.

    Args:
        array: as stored, (rows on disk, ...).
        rows: which of them, in this order.
        steps: what is done with values read, float32 (k, ...), given the numbers (k,) of their rows on disk.
        device: where the values go.
        dtype: what they are there.
    """

    array: np.ndarray
    rows: range | np.ndarray
    steps: tuple[Step, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | Index) -> Tensor:
        """One row, or the rows (k, ...) that `take` would leave on disk."""
        some: Any = index
        if not isinstance(index, slice) and np.ndim(some) == 0:
            return self[[some]][0]
        rows = self.take(some).rows
        parts = [self._read(part) for _, part in blocks(rows)] or [self._read(rows)]
        return (torch.cat(parts) if len(parts) != 1 else parts[0]).to(self.device, self.dtype)

    def _read(self, rows: range | np.ndarray) -> Tensor:
        at: Any = rows
        if isinstance(rows, range):
            rows = np.arange(rows.start, rows.stop, rows.step)
            at = slice(at.start, at.stop, at.step) if at.step > 0 else rows  # a slice down to row 0 has no such end
        values = torch.from_numpy(np.array(self.array[at], dtype=np.float32, order="C"))
        for step in self.steps:
            values = step(values, rows)
        return values

    def take(self, index: Index) -> "Mapped":
        """Some of the rows, still on disk, as torch would choose them.

        Args:
            index: a slice, or a list, an array or a tensor, of numbers (k,), those below 0 from the end, or a mask
                (n,) of True and False.

        Raises:
            IndexError: a number that no row has, or a mask of another length.
            TypeError: anything else, such as an index of several axes.
            ValueError: a slice that goes backwards.
        """
        if isinstance(index, slice):
            if index.step is not None and index.step < 1:
                raise ValueError(f"the step of a slice of rows must be 1 or more, got {index.step}")
            return replace(self, rows=self.rows[index])
        numbers, rows = self._numbers(index), self.rows
        at = rows.start + rows.step * numbers if isinstance(rows, range) else rows[numbers]
        return replace(self, rows=at)

    def _numbers(self, index: Any) -> np.ndarray:
        """The places (k,) among the rows, from 0 on, that an index means."""
        found = _as_tensor(index)
        if found is None or found.ndim != 1 or (found.dtype not in CHOOSING and found.numel()):
            what = f"{found.dtype} of shape {tuple(found.shape)}" if found is not None else repr(index)
            raise TypeError(
                "rows are chosen by a whole number, a slice, or a list, an array or a tensor (k,) of whole numbers or "
                f"of True and False, got {what}"
            )
        size = len(self)
        if found.dtype == torch.bool:
            if len(found) != size:
                raise IndexError(f"a mask must have an entry for each of the {size} rows, got {len(found)}")
            return found.nonzero()[:, 0].numpy()
        numbers = found.long().numpy()
        outside = numbers[(numbers < -size) | (numbers >= size)]
        if len(outside):
            raise IndexError(f"of {size} rows the numbers go from {-size} to {size - 1}, got {outside[0]}")
        return np.where(numbers < 0, numbers + size, numbers)

    def split(self, size: int) -> Iterator[Tensor]:
        """Blocks of rows in turn, read when they are asked for."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def then(self, step: Step) -> "Mapped":
        """The same rows, with one thing more done to them."""
        return replace(self, steps=(*self.steps, step))

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None = None) -> "Mapped":
        """The same rows for another device, where they go when they are read."""
        return replace(self, device=torch.device(device or self.device), dtype=dtype or self.dtype)

    @cached_property
    def shape(self) -> torch.Size:
        """As of the tensor of all rows."""
        return torch.Size((len(self), *self[:1].shape[1:]))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Whatever is stored, the values asked for are."""
        return self.dtype.is_floating_point


def _as_tensor(index: Any) -> Tensor | None:
    """An index on the CPU; None for what holds no numbers, and for a tuple, which to torch means several axes."""
    try:
        return None if isinstance(index, tuple) else torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # as torch says of words, of None, and of lists that are no array
        return None


def uniforms(seed: int, rows: np.ndarray, num: int) -> Tensor:
    """Uniform numbers in [0, 1), shape (len(rows), num), of which each row has its own.

    They are hashes of (seed, row, place), 24 bits each: it does not matter who asks for them, and in what order.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014 (OOPSLA), as SplitMix64.
    """
    step, first, second = (np.uint64(number) for number in STEPS)
    places = rows.astype(np.uint64)[:, None] * np.uint64(num) + np.arange(1, num + 1, dtype=np.uint64)
    state: Any = places * step + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * first
    state = (state ^ (state >> np.uint64(27))) * second
    state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(40)).astype(np.float32)).mul_(2.0**-24)


def open_arrays(path: Path) -> dict[str, np.ndarray]:
    """The .npy files of a folder by name, or one, mapped into memory and not read."""
    if path.is_file():
        return {path.stem: _open(path)}
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    others = [entry.name for entry in entries if entry.suffix != ".npy"]
    if others:
        raise ValueError(f"{path} must hold .npy files only, found {others[0]}")
    return {entry.stem: _open(entry) for entry in entries}


def _open(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        why = "it is no .npy file, or holds Python objects" if "pickle" in str(error) else str(error)
        raise ValueError(f"{path} must be a plain array of numbers: {why}") from error
    if not isinstance(array, np.memmap):
        raise ValueError(f"{path} must be a single array, found an archive")
    if array.ndim > 1 and not array.flags.c_contiguous:
        raise ValueError(f"{path} must be stored row by row (C order), found Fortran order: each image lies scattered")
    return array
