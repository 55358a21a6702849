"""Residual convolutions: pre-activation blocks, a stack that halves an image per level, and one that doubles it."""

from collections.abc import Sequence

from torch import Tensor, nn

Activation = type[nn.Module]
Sizes = Sequence[tuple[int, int]]  # height and width at each level


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(act(conv(act(x)))), on images (batch, in_channels, height, width).

    The shortcut is the identity where input and output have one size, else a convolution of single pixels. Nothing is
    normalised over the batch, so that the law of a datum does not depend on what shares its batch.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        act: the activation.
        stride: 2 halves height and width, rounded up.

    Source: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027.
    """

    def __init__(self, in_channels: int, out_channels: int, act: Activation, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            act(),
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
            act(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.shortcut(images) + self.residual(images)


def down(in_channels: int, channels: Sequence[int], act: Activation) -> list[nn.Module]:
    """Layers from an image to its features: per level a block that halves the size and one that keeps it.

    Args:
        in_channels: of the image.
        channels: of each level, from the image on.
        act: the activation.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference with Inverse
    Autoregressive Flow", 2016, arXiv:1606.04934.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels[0], 3, padding=1)]
    for size_in, size_out in zip([channels[0], *channels], channels, strict=False):
        layers += [ResidualBlock(size_in, size_out, act, stride=2), ResidualBlock(size_out, size_out, act)]
    return [*layers, act()]


def up(channels: Sequence[int], out_channels: int, sizes: Sizes, act: Activation) -> list[nn.Module]:
    """The mirror image of `down`: per level a block that keeps the size, then nearest pixels and one that narrows.

    Args:
        channels: of each level, from the image on.
        out_channels: of the result.
        sizes: at each level, the image's first; one more than `channels`.
        act: the activation.
    """
    layers: list[nn.Module] = []
    for level in range(len(channels) - 1, -1, -1):
        wide, narrow = channels[level], channels[max(level - 1, 0)]
        enlarge = nn.Upsample(size=sizes[level], mode="nearest")
        layers += [ResidualBlock(wide, wide, act), enlarge, ResidualBlock(wide, narrow, act)]
    return [*layers, act(), nn.Conv2d(channels[0], out_channels, 3, padding=1)]
