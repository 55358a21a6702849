"""PixelCNN: the chain rule over pixels by gated convolutions that see above and to the left only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..chain_rule import PixelByPixel, Step, num_logits
from ..checks import check_count
from ..spaces import Space


class PixelCNN(PixelByPixel):
    r"""p(x) = Π_d p(x_d | pixels before d), row by row from the top left; log p is exact.

    Of two stacks of gated convolutions one sees the rows above a pixel, the other the pixels to its left and the first
    stack one row up: together all pixels before it, within their reach, without a blind spot. A masked convolution is
    one whose kernel is cut. A bit has a logit (Binary), a grey level a softmax over the levels (Quantized), and each
    pixel a bias of its own, as images have their place in the frame.

    Args:
        space: where the observations live: images (height, width), or (1, height, width).
        num_channels: width of the layers.
        num_layers: number of gated layers, the first included.
        kernel_size: of all layers but the first, odd.
        first_kernel_size: of the first layer, odd.
        dilations: of the layers after the first, in turn and over again: distances between the pixels that a kernel
            takes, each at most as far as the layers before see to the left, so that no pixel is left out. With
            (1, 2, 4) a few layers see the whole of a stroke.
        coordinates: whether the first layer also sees the row and the column, from -1 to 1, of the pixels that it sees.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu, "Pixel Recurrent Neural Networks", 2016, arXiv:1601.06759; van den
    Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu, "Conditional Image Generation with PixelCNN Decoders",
    2016, arXiv:1606.05328. Dilations: Yu, Koltun, "Multi-scale context aggregation by dilated convolutions", 2016,
    arXiv:1511.07122; coordinates: Liu, Lehman, Molino, Petroski Such, Frank, Sergeev, Yosinski, "An intriguing failing
    of convolutional neural networks and the CoordConv solution", 2018, arXiv:1807.03247.
    """

    def __init__(
        self,
        space: Space,
        *,
        num_channels: int = 32,
        num_layers: int = 6,
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        dilations: Sequence[int] = (1,),
        coordinates: bool = False,
    ) -> None:
        super().__init__(space)
        _check_image(space.shape)
        check_count("num_channels", num_channels)
        check_count("num_layers", num_layers)
        for name, size in {"kernel_size": kernel_size, "first_kernel_size": first_kernel_size}.items():
            if not isinstance(size, int) or size < 3 or size % 2 == 0:
                raise ValueError(f"{name} must be odd, 3 or more, got {size!r}")
        if not isinstance(dilations, Sequence) or not dilations:
            raise ValueError(f"dilations must be a sequence of at least one whole number, got {dilations!r}")
        for place, each in enumerate(dilations):
            check_count(f"dilations[{place}]", each)
        if not isinstance(coordinates, bool):
            raise ValueError(f"coordinates must be True or False, got {coordinates!r}")
        self.coordinates = coordinates
        self.layers = nn.ModuleList([_Gated(3 if coordinates else 1, num_channels, first_kernel_size, is_first=True)])
        seen = first_kernel_size // 2  # pixels to the left that the layers so far see
        for layer in range(1, num_layers):
            dilation = dilations[(layer - 1) % len(dilations)]
            if dilation > seen:
                raise ValueError(
                    f"layer {layer + 1} has dilation {dilation} where those before it see {seen} pixels to the left: "
                    "some pixels would be left out"
                )
            self.layers.append(_Gated(num_channels, num_channels, kernel_size, dilation=dilation))
            seen += kernel_size // 2 * dilation
        self.reach = 1 + seen  # rows above that a pixel sees
        hidden, out = (
            nn.Conv2d(num_channels, num_channels, 1),
            nn.Conv2d(num_channels, num_logits(space), 1, bias=False),
        )
        self.head = nn.Sequential(nn.ReLU(), hidden, nn.ReLU(), out)

    def hidden(self, images: Tensor, first_row: int = 0) -> Tensor:
        """(n, num_channels, rows, width) from rows of pixels (n, rows, width); those of a pixel see what is before it.

        Args:
            images: rows of the images.
            first_row: where the first of them lies in the image.
        """
        above = left = self._planes(images, first_row)
        for layer in self.layers:
            above, left = layer(above, left)
        return left

    def _planes(self, images: Tensor, first_row: int) -> Tensor:
        """What the first layer sees, (n, 1 or 3, rows, width): the pixels and, if asked for, their coordinates."""
        pixels = self.space.to_unit(images).unsqueeze(1)
        if not self.coordinates:
            return pixels
        height, width = self.space.shape[-2:]
        # On the device of the pixels, as a copy would make a GPU wait.
        down, across = (
            torch.linspace(-1, 1, size, dtype=pixels.dtype, device=pixels.device) for size in (height, width)
        )
        rows = down[first_row : first_row + images.shape[-2]]
        place = torch.stack([rows[:, None].expand(-1, width), across.expand(len(rows), -1)])
        return torch.cat([pixels, place.expand(len(pixels), -1, -1, -1)], 1)

    def logits(self, obs: Tensor) -> Tensor:
        """Those of every pixel (..., *shape, P), P = 1 or levels, given the pixels before it; obs (..., *shape)."""
        images = obs.reshape(-1, *self.space.shape[-2:])
        return self.bias + self.head(self.hidden(images)).movedim(1, -1).reshape(*obs.shape, -1)

    def steps(self) -> Step:
        """The logits (n, P) of one pixel, from the rows of the image that it sees."""
        height, width = self.space.shape[-2:]
        bias = self.bias.flatten(0, -2)

        def step(rows: Tensor, index: int) -> Tensor:
            row, column = divmod(index, width)
            first_row = max(0, row - self.reach)
            seen = rows.reshape(-1, height, width)[:, first_row : row + 1]
            at_pixel = self.hidden(seen, first_row)[:, :, -1:, column : column + 1]
            return bias[index] + self.head(at_pixel).flatten(1)

        return step


class _Gated(nn.Module):
    """One layer of both stacks, (n, channels, height, width) each: tanh(a) σ(b) of convolutions a and b."""

    def __init__(
        self, in_channels: int, channels: int, size: int, *, is_first: bool = False, dilation: int = 1
    ) -> None:
        super().__init__()
        radius, self.is_first, self.padding = size // 2, is_first, size // 2 * dilation
        # A pixel's row and those above: the vertical kernel. In the first layer the horizontal stack must not see the
        # pixel itself; later its features are free of it.
        self.vertical = nn.Conv2d(in_channels, 2 * channels, (radius + 1, size), dilation=dilation)
        self.horizontal = nn.Conv2d(in_channels, 2 * channels, (1, radius + (not is_first)), dilation=(1, dilation))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        vertical = self.vertical(pad(above, (self.padding, self.padding, self.padding, 0)))
        one_row_up = pad(vertical[:, :, :-1], (0, 0, 1, 0))
        seen = left[..., :-1] if self.is_first else left
        horizontal = self.out(_gate(self.horizontal(pad(seen, (self.padding, 0))) + self.link(one_row_up)))
        return _gate(vertical), horizontal if self.is_first else left + horizontal


def _gate(values: Tensor) -> Tensor:
    """tanh(a) σ(b) of the two halves of the channels."""
    a, b = values.chunk(2, 1)
    return a.tanh() * b.sigmoid()


def _check_image(shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise ValueError(f"PixelCNN needs images (height, width) or (1, height, width), got shape {shape}")
