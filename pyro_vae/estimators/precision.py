"""Linear layers in shorter numbers, and in float64, which tells what that costs.

The inputs and the weights of a layer are rounded, their products are summed in float32, and the bias is added in
float32. Convolutions and whatever else a model does stay as they are, and so does the guide: draws and log q(z | x) are
the same in every precision.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_vae import traces
from pyro_vae.checks import check_choice
from pyro_vae.estimators.head import LinearLayers
from pyro_vae.estimators.names import PRECISIONS
from pyro_vae.estimators.watch import Watch
from pyro_vae.independent import kernels_for
from pyro_vae.traces import Pair, Values

REDUCED = ("tf32", "float16")
TF32_BITS = 13  # of a float32's mantissa that TF32 does without


class Scorer:
    """`traces.log_joint` in one precision.

    Args:
        precision: "float32" (whatever the parameters are), "tf32", "float16", or "float64".
        watch: what raises a number that is too large for float16.
    """

    def __init__(self, precision: str, watch: Watch) -> None:
        check_choice("precision", precision, PRECISIONS)
        self.precision, self.watch = precision, watch

    def log_joint(
        self, pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool
    ) -> Tensor:
        """Log p(x_n, z_k), shape (num_particles, n), nats."""
        if self.precision == "float64":
            args, values = _doubled(args), dict(zip(values, _doubled(values.values()), strict=True))
            with _in_float64(pair.modules), LinearLayers(_double_linear), _naming_what_stays_short():
                return traces.log_joint(pair, args, values, num_particles, tiled)
        rounded = Rounded(self.precision) if self.precision in REDUCED else None
        with LinearLayers(rounded or functional.linear):
            found = traces.log_joint(pair, args, values, num_particles, tiled)
        if rounded is not None and rounded.overflow is not None:
            self.watch(rounded.overflow, _too_large)
        return found


def writes_no_logits(pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool) -> bool:
    """Whether the last layer of a model goes into its pixels part by part, as at least `SHARED` particles show."""
    with LinearLayers(smallest=0) as layers:
        traces.log_joint(pair, args, values, num_particles, tiled)
    return layers.writes_no_logits


class Rounded:
    """`torch.nn.functional.linear` of rounded inputs and weights, summed in float32, plus the bias as it is.

    Args:
        precision: "tf32", a mantissa of 10 bits and the range of float32, or "float16", the same mantissa up to 65504.
            On a GPU a layer is multiplied out in TF32 either way, but for pixels that many particles share.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.overflow: Tensor | None = None  # whether a number that entered a layer as float16 is infinite there

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        output = self._on_gpu(rows, weight, bias) if rows.is_cuda else self._on_cpu(rows, weight, bias)
        return output.to(input.dtype).reshape(*input.shape[:-1], len(weight))

    def shared_log_mass(self, rows: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor) -> Tensor | None:
        """`kernels.layer_log_mass`, where that is the faster way: in TF32 a product of its own is faster."""
        kernels = kernels_for(rows)
        if self.precision == "tf32" or kernels is None or not kernels.takes_layer(weight):
            return None
        found = kernels.layer_log_mass(rows, self._half(weight), bias, bits)
        if found is None:
            return None
        self._remember(found[1])
        masses: Tensor = found[0]
        return masses.to(rows.dtype)

    def _half(self, values: Tensor) -> Tensor:
        short = values.half()
        self._remember(torch.linalg.vector_norm(short, math.inf).isinf())
        return short

    def _remember(self, is_infinite: Tensor) -> None:
        """It stays on the device until the end: asking for it here would stop a GPU at every layer."""
        self.overflow = is_infinite if self.overflow is None else self.overflow | is_infinite

    def _on_gpu(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with tf32_products():  # which take a bias along; those of float16 write their output twice
            return functional.linear(rows.float(), weight.float(), None if bias is None else bias.float())

    def _on_cpu(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the chip does, up to the order of its sums."""
        if self.precision == "tf32":
            product = to_tf32(rows) @ to_tf32(weight).T
        else:
            product = self._half(rows).float() @ self._half(weight).float().T
        return product if bias is None else product.to(rows.dtype).add_(bias)


def _too_large() -> ValueError:
    return ValueError(
        "a number that enters a linear layer is infinite or beyond 65504, the largest of float16; take "
        "precision='tf32' or 'float32'"
    )


def to_tf32(values: Tensor) -> Tensor:
    """Float32 numbers rounded to a mantissa of 10 bits, ties to even; NaN and infinities stay."""
    bits = values.float().contiguous().view(torch.int32)
    odd = (bits >> TF32_BITS) & 1
    rounded = (bits + (2 ** (TF32_BITS - 1) - 1) + odd) & -(2**TF32_BITS)
    return torch.where(values.isfinite(), rounded.view(torch.float32), values.float())


@contextmanager
def tf32_products() -> Iterator[None]:
    """Matrix products of float32 in TF32 on a GPU; the setting of the process is as before afterwards."""
    backend = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(backend, "fp32_precision") else ("allow_tf32", True)
    before = getattr(backend, name)
    setattr(backend, name, value)
    try:
        yield
    finally:
        setattr(backend, name, before)


def _doubled(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(each.double() if each.is_floating_point() else each for each in tensors)


def _double_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(input.double(), weight.double(), None if bias is None else bias.double())


@contextmanager
def _in_float64(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters and buffers in float64 inside; the very same tensors as before afterwards."""
    tensors = [each for root in modules for each in (*root.parameters(), *root.buffers()) if each.is_floating_point()]
    before = [each.data for each in tensors]
    try:
        for each in tensors:
            each.data = each.data.double()
        yield
    finally:
        for each, data in zip(tensors, before, strict=True):
            each.data = data


@contextmanager
def _naming_what_stays_short() -> Iterator[None]:
    """A ValueError that says what to do, in place of torch's complaint that a number is not in float64."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]  # Pyro adds the shapes of all sites
        if not all(word in reason.lower() for word in ("double", "float")):
            raise
        raise ValueError(
            "precision 'float64', which 'tf32' and 'float16' are held against, needs a model whose parameters lie in "
            f"torch modules: a method of one, or a function that closes over them; found others ({reason}); take "
            "precision='float32'"
        ) from error
