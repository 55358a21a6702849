"""Encoders and decoders: plain torch, no probability; every network accepts any leading batch shape."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from pyro_vae import resnet


class Tanh(nn.Tanh):
    """tanh x; on a CPU and without gradients as 2 σ(2x) - 1, within 2e-7, which takes a quarter of the time.

    In numbers shorter than float32 it would lose digits near 0: there, too, it is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_short = input.dtype not in (torch.float32, torch.float64)
        if is_short or input.device.type != "cpu" or (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        return fast_tanh(input)


def fast_tanh(values: Tensor) -> Tensor:
    """Hyperbolic tangent as 2 σ(2x) - 1, within 2e-7, without a gradient."""
    if has_torch_function_unary(values):
        return handle_torch_function(fast_tanh, (values,), values)
    halves = values.mul(2).sigmoid_()
    return torch.add(values.new_tensor(-1.0), halves, alpha=2, out=halves)


ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU}
NETWORKS = ("mlp", "conv", "resnet")


def activation_named(name: str) -> type[nn.Module]:
    """The activation of that name, or a ValueError that lists them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def mlp(in_dim: int, hidden_dims: Sequence[int], out_dim: int, activation: str) -> nn.Sequential:
    """Fully connected layers in_dim → hidden_dims → out_dim with the activation between them, Glorot start."""
    act = activation_named(activation)
    layers: list[nn.Module] = []
    if not all(isinstance(size, int) and size > 0 for size in (in_dim, *hidden_dims, out_dim)):
        raise ValueError(f"layers must have positive whole sizes, got {[in_dim, *hidden_dims, out_dim]}")
    for size_in, size_out in zip([in_dim, *hidden_dims], [*hidden_dims, out_dim], strict=True):
        linear = nn.Linear(size_in, size_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, act()]
    return nn.Sequential(*layers[:-1])


class MLPEncoder(nn.Module):
    """Observations (..., *shape), optionally with a context (..., context_dim), to features (..., out_dim)."""

    def __init__(self, shape: Sequence[int], hidden_dims: Sequence[int], activation: str, context_dim: int = 0) -> None:
        super().__init__()
        self.event_dim, self.out_dim = len(shape), hidden_dims[-1]
        body = mlp(math.prod(shape) + context_dim, hidden_dims[:-1], hidden_dims[-1], activation)
        self.layers = nn.Sequential(*body, activation_named(activation)())

    def forward(self, obs: Tensor, context: Tensor | None = None) -> Tensor:
        flat = obs.flatten(-self.event_dim)
        return self.layers(flat if context is None else torch.cat([flat, context], -1))


class MLPDecoder(nn.Module):
    """Codes (..., in_dim) to parameters (..., num_params, *shape)."""

    def __init__(
        self, in_dim: int, hidden_dims: Sequence[int], num_params: int, shape: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.out_shape = (num_params, *shape)
        self.layers = mlp(in_dim, hidden_dims, math.prod(self.out_shape), activation)

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code).unflatten(-1, self.out_shape)

    @torch.no_grad()
    def center(self, params: Tensor) -> None:
        """Let the last bias be `params` (num_params, *shape), so that training starts at the mean image."""
        self.layers[-1].get_parameter("bias").copy_(params.flatten())


class ConvEncoder(nn.Module):
    """Images (..., [channels,] height, width), optionally with a context, to features (..., hidden_dim).

    The convolutions halve the image once per entry of `channels`; with `residual` they are those of `resnet`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int],
        hidden_dim: int,
        activation: str,
        context_dim: int = 0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        act = activation_named(activation)
        self.image, self.out_dim = _with_channels(shape), hidden_dim
        self.event_dim = len(shape)
        down = resnet.down if residual else _down
        self.convolutions = nn.Sequential(*down(self.image[0], channels, act), nn.Flatten())
        height, width = _sizes(self.image[1:], len(channels))[-1]
        self.head = nn.Sequential(nn.Linear(channels[-1] * height * width + context_dim, hidden_dim), act())

    def forward(self, obs: Tensor, context: Tensor | None = None) -> Tensor:
        batch_shape = obs.shape[: obs.ndim - self.event_dim]
        features = self.convolutions(obs.reshape(-1, *self.image)).reshape(*batch_shape, -1)
        return self.head(features if context is None else torch.cat([features, context], -1))


class ConvDecoder(nn.Module):
    """Codes (..., in_dim) to parameters (..., num_params, *shape) of an image, the mirror image of `ConvEncoder`."""

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        channels: Sequence[int],
        num_params: int,
        shape: Sequence[int],
        activation: str,
        residual: bool = False,
    ) -> None:
        super().__init__()
        act = activation_named(activation)
        image = _with_channels(shape)
        self.out_shape = (num_params, *shape)
        sizes = _sizes(image[1:], len(channels))
        self.seed_shape = (channels[-1], *sizes[-1])
        head = [nn.Linear(in_dim, hidden_dim), act(), nn.Linear(hidden_dim, math.prod(self.seed_shape))]
        self.head = nn.Sequential(*head, *([] if residual else [act()]))  # a residual block has its own, in front
        up = resnet.up if residual else _up
        self.convolutions = nn.Sequential(*up(channels, num_params * image[0], sizes, act))
        self.bias = nn.Parameter(torch.zeros(self.out_shape))

    def forward(self, code: Tensor) -> Tensor:
        images = self.convolutions(self.head(code).reshape(-1, *self.seed_shape))
        return images.reshape(*code.shape[:-1], *self.out_shape) + self.bias

    @torch.no_grad()
    def center(self, params: Tensor) -> None:
        """Let the pixel bias be `params` (num_params, *shape), so that training starts at the mean image."""
        self.bias.copy_(params)


def make_encoder(
    network: str, shape: Sequence[int], hidden_dims: Sequence[int], activation: str, context_dim: int = 0
) -> MLPEncoder | ConvEncoder:
    """An encoder by name: "mlp" with layers `hidden_dims`; "conv" or "resnet" with `CHANNELS`, then the last of them.

    Args:
        network: "mlp", "conv" or "resnet".
        shape: of an observation; an image for the last two.
        hidden_dims: widths of the layers, from the observation on.
        activation: "tanh", "relu", "silu" or "elu".
        context_dim: number of entries of the context, 0 for none.

    Returns:
        A network from (..., *shape), and (..., context_dim), to features (..., hidden_dims[-1]).

    Raises:
        ValueError: an unknown name, no layer, or a shape that is no image.
    """
    if not hidden_dims:
        raise ValueError("hidden_dims must hold at least one layer, got none")
    _check_name(network)
    if network == "mlp":
        return MLPEncoder(shape, hidden_dims, activation, context_dim)
    return ConvEncoder(_image(shape), CHANNELS, hidden_dims[-1], activation, context_dim, network == "resnet")


def make_decoder(
    network: str,
    in_dim: int,
    hidden_dims: Sequence[int],
    num_params: int,
    shape: Sequence[int],
    activation: str,
) -> MLPDecoder | ConvDecoder:
    """A decoder by name, the mirror image of `make_encoder`, from codes (..., in_dim) to (..., num_params, *shape)."""
    _check_name(network)
    if network == "mlp":
        return MLPDecoder(in_dim, hidden_dims[::-1], num_params, shape, activation)
    residual = network == "resnet"
    return ConvDecoder(in_dim, hidden_dims[-1], CHANNELS, num_params, _image(shape), activation, residual)


CHANNELS = (32, 64)


def _down(in_channels: int, channels: Sequence[int], act: type[nn.Module]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for size_in, size_out in zip([in_channels, *channels], channels, strict=False):
        layers += [nn.Conv2d(size_in, size_out, 3, stride=2, padding=1), act()]
    return layers


def _up(
    channels: Sequence[int], out_channels: int, sizes: Sequence[tuple[int, int]], act: type[nn.Module]
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for level in range(len(channels) - 1, -1, -1):
        out = channels[level - 1] if level else out_channels
        odd = 1 - sizes[level][0] % 2, 1 - sizes[level][1] % 2  # 28 → 14 → 7 on the way down: 7 → 14 needs one more
        layers.append(nn.ConvTranspose2d(channels[level], out, 3, stride=2, padding=1, output_padding=odd))
        layers += [act()] if level else []
    return layers


def _check_name(network: str) -> None:
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")


def _image(shape: Sequence[int]) -> Sequence[int]:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"a convolutional network needs images (height, width) or (channels, height, width), got shape "
            f"{tuple(shape)}; take network='mlp'"
        )
    return shape


def _with_channels(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape) if len(shape) == 3 else (1, *shape)


def _sizes(size: Sequence[int], num_levels: int) -> list[tuple[int, int]]:
    """Heights and widths on the way down: halved at each level, rounded up; the full size first."""
    sizes = [(size[0], size[1])]
    for _ in range(num_levels):
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes
