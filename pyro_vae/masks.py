"""Which pixels of an image are given and which are missing: as a mask, by name, and as two rows of pixels."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("top_left", "top_right", "bottom_left", "bottom_right", "top", "bottom", "left", "right")


class GivenPixels(ABC):
    """A part of the pixels of an image that is given; `image_shape` is (height, width) or (channels, height, width)."""

    image_shape: tuple[int, ...]

    @abstractmethod
    def mask(self) -> "Tensor":
        """True where a pixel is given; shape `image_shape`."""

    @property
    def num_dims(self) -> int:
        """Number of given pixels."""
        return int(self.mask().sum())

    def split(self, images: "Tensor") -> "tuple[Tensor, Tensor]":
        """Images (..., *image_shape) as (given pixels (..., num_dims), missing pixels (..., rest))."""
        mask = self.mask().to(images.device)
        return images[..., mask], images[..., ~mask]

    def join(self, given: "Tensor", missing: "Tensor") -> "Tensor":
        """The inverse of `split`."""
        mask = self.mask().to(missing.device)
        images = missing.new_empty(*missing.shape[:-1], *self.image_shape)
        images[..., mask], images[..., ~mask] = given.expand(*missing.shape[:-1], -1).to(missing.dtype), missing
        return images


@dataclass(frozen=True)
class Pixels(GivenPixels):
    """Any pixels that are given.

    Args:
        given: whether each pixel is given, row by row, as many as an image has.
        image_shape: shape of the whole image.
    """

    given: tuple[bool, ...]
    image_shape: tuple[int, ...]

    @staticmethod
    def of(missing: "Tensor") -> "Pixels":
        """All but the missing ones; `missing` (*image_shape), booleans."""
        return Pixels(tuple((~missing).flatten().tolist()), tuple(missing.shape))

    def mask(self) -> "Tensor":
        """True where a pixel is given; shape `image_shape`."""
        import torch

        return torch.tensor(self.given).reshape(self.image_shape)

    def __str__(self) -> str:
        digest = hashlib.sha256(bytes(self.given)).hexdigest()
        return f"{sum(self.given)} of {len(self.given)} pixels, mask {digest:.8}"


def named(name: str, shape: tuple[int, ...]) -> "Tensor":
    """True where a part of an image is missing: a quadrant or a half, one of `NAMES`; shape (*image shape)."""
    import torch

    from pyro_vae.checks import check_choice

    check_choice("the missing part", name, NAMES)
    height, width = shape[-2:]
    missing = torch.ones(shape, dtype=torch.bool)
    for word in name.split("_"):
        half = torch.zeros_like(missing)
        if word in ("top", "bottom"):
            half[..., slice(height // 2) if word == "top" else slice(height // 2, None), :] = True
        else:
            half[..., slice(width // 2) if word == "left" else slice(width // 2, None)] = True
        missing &= half
    return missing


def share_of(share: float, shape: tuple[int, ...], seed: int = 0) -> "Tensor":
    """True for a seeded random part of the pixels, round(share D) of them, at least one; shape (*image shape)."""
    import torch

    if not 0 < share < 1:
        raise ValueError(f"the missing share of the pixels must lie between 0 and 1, got {share}")
    missing = torch.zeros(shape, dtype=torch.bool).flatten()
    count = min(max(1, round(share * len(missing))), len(missing) - 1)
    missing[torch.randperm(len(missing), generator=torch.Generator().manual_seed(seed))[:count]] = True
    return missing.reshape(shape)
