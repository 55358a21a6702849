"""The last linear layer and the pixels that it gives as one step: their logits are never whole in memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyro_vae.independent import PART, log_mass, pixel_sum, products

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
SMALLEST = 2**18  # numbers: a layer that gives fewer is multiplied out at once
SHARED = 128  # rows with the same bits, from which a layer of their own is worth while
GPU_PART = 2**28  # logits that are written at once on a GPU, 1 GiB: in smaller parts products take longer
SAFE = 1e-30  # no product of probabilities that ends above it came near the smallest float32 on its way
FACTS = {
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "ndim", "requires_grad", "shape")),
}
VIEWS = {  # what leaves all numbers in their order, if it leaves their number
    torch.broadcast_tensors,
    torch.flatten,
    Tensor.expand,
    Tensor.flatten,
    Tensor.reshape,
    Tensor.squeeze,
    Tensor.unflatten,
    Tensor.unsqueeze,
    Tensor.view,
}


def keep_memory() -> None:
    """Let the C library keep the memory of freed tensors of a block's size, as it does once it has freed a larger one.

    Until then glibc gives every such tensor back to the system, which then clears its pages anew for the next: a
    quarter of the time of a block.

    This raises glibc's thresholds for the whole process, and for good: what is smaller than the tensor freed here comes
    from the heap, and up to twice its size of free memory may stay at the end of the heap. It does no harm: glibc does
    so by itself for any program that frees an array of that size, no more than those few MiB are kept, which every
    later allocation can use, and no result depends on it.
    """
    torch.empty(4 * PART)


class LinearLayers(TorchFunctionMode):
    """Runs linear layers inside its context by a function of its own, and large ones no sooner than needed.

    It changes no module: it steps in for `torch.nn.functional.linear`, wherever that is called. Where gradients are
    recorded no layer waits.

    Args:
        linear: called as `linear(input, weight, bias)`.
    """

    def __init__(self, linear: Linear = functional.linear) -> None:
        super().__init__()
        self.linear = linear
        self.waiting: list[weakref.ref[Product]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._layer(*args, **kwargs)
        if self.waiting and _writes(func, args, kwargs):
            self._multiply_out()
        return func(*args, **kwargs)

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = Product(self.linear, _plain(input), weight, bias)
        if not product.may_wait():
            return product.value()
        self.waiting = [each for each in self.waiting if each() is not None] + [weakref.ref(product)]
        return deferred(product)

    def _multiply_out(self) -> None:
        """All layers that wait, before something is written that may be an input of theirs."""
        for each in self.waiting:
            product = each()
            if product is not None:
                product.value()
        self.waiting = []


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch may change one of its arguments."""
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    in_place = name in ("__setitem__", "__set__") or name.startswith("__i") or kwargs.get("out") is not None
    is_functional = getattr(func, "__module__", "") == functional.__name__  # which take a flag, by name or not
    return in_place or bool(kwargs.get("inplace")) or (is_functional and any(arg is True for arg in args))


@dataclass(eq=False)
class Product:
    """A linear layer and its input, not multiplied out unless `value` is asked for."""

    linear: Linear
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    known: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the output."""
        return torch.Size((*self.input.shape[:-1], len(self.weight)))

    def may_wait(self) -> bool:
        """Whether it is large, nobody records its gradient, and parts of it have the type of the whole."""
        tensors = [each for each in (self.input, self.weight, self.bias) if each is not None]
        is_one_type = len({each.dtype for each in tensors}) == 1 and self.input.element_size() >= 4
        is_plain = self.weight.ndim == 2 and self.input.ndim > 1 and self.shape.numel() >= SMALLEST
        is_recorded = torch.is_grad_enabled() or torch.is_autocast_enabled(self.input.device.type)
        return is_one_type and is_plain and not is_recorded

    def value(self) -> Tensor:
        """The output."""
        if self.known is None:
            self.known = self.linear(self.input, self.weight, self.bias)
        return self.known

    def log_mass(self, shape: torch.Size, bits: Tensor) -> Tensor:
        """`independent.log_mass` of the output, in a shape (..., D), in parts that stay in a CPU's cache."""
        rows, bits = self.input.reshape(*shape[:-1], self.input.shape[-1]), bits.expand(shape)
        if shape[0] == 1 and len(shape) > 2:
            return self.log_mass(shape[1:], bits[0]).unsqueeze(0)
        if shape[0] >= SHARED and bits.stride(0) == 0:
            found = self._shared(rows, bits[0])
            if found is not None:
                return found
        num_parts = -(-shape.numel() // (PART if rows.device.type == "cpu" else GPU_PART))
        parts = zip(rows.chunk(num_parts), bits.chunk(num_parts), strict=True)
        masses = [pixel_sum(self.linear(h, self.weight, self.bias), x, overwrite=True) for h, x in parts]
        return torch.cat(masses)

    def _shared(self, rows: Tensor, bits: Tensor) -> Tensor | None:
        """Log mass (K, ...) of bits (..., D) that K rows share, where there is a way made for that."""
        if rows.device.type == "cpu":
            is_plain = self.linear is functional.linear
            return shared_log_mass(rows, self.weight, self.bias, bits) if is_plain and _is_binary(bits) else None
        of_kernel = getattr(self.linear, "shared_log_mass", None)
        if of_kernel is None:
            return None
        data = bits.reshape(-1, bits.shape[-1])
        masses: Tensor | None = of_kernel(rows.reshape(len(rows), len(data), -1), self.weight, self.bias, data)
        return None if masses is None else masses.reshape(rows.shape[:-1])


def shared_log_mass(rows: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor) -> Tensor:
    r"""Log mass of bits that many rows share, Σ_d log σ(t_d) with t = s ∘ (W h + b) and s = 2x - 1.

    The signs go into the layer, once for all rows, so that its output is the logits of what was observed, and the
    logarithms are those of products of probabilities. Nothing cancels, and no step needs the bits.

    Args:
        rows: h, shape (K, ..., H).
        weight: W, shape (D, H).
        bias: b, shape (D,), or None.
        bits: x, shape (..., D), zeros and ones.

    Returns:
        Shape (K, ...), nats.
    """
    data = rows.flatten(1, -2).unbind(1) if rows.ndim > 2 else [rows]
    step = max(1, PART // len(weight))
    space = rows.new_empty(min(step, len(rows)), len(weight))
    masses = []
    for hidden, x in zip(data, bits.reshape(-1, len(weight)), strict=True):
        sign = 2 * x - 1
        layer = weight * sign[:, None], None if bias is None else bias * sign
        masses.append(torch.cat([_log_observed(part, *layer, space[: len(part)]) for part in hidden.split(step)]))
    return torch.stack(masses, 1).reshape(rows.shape[:-1])


def _is_binary(bits: Tensor) -> bool:
    return bool(((bits == 0) | (bits == 1)).all())


def _log_observed(rows: Tensor, weight: Tensor, bias: Tensor | None, space: Tensor) -> Tensor:
    """Σ_d log σ(t_d), shape (n,), of logits (n, D) that are written to `space` and lost there."""
    logits = torch.mm(rows, weight.T, out=space)
    if bias is not None:
        logits += bias
    probabilities = products(logits.sigmoid_(), 4)
    if bool(probabilities.amin() > SAFE):  # NaN is not
        return probabilities.log().sum(-1)
    return functional.logsigmoid(functional.linear(rows, weight, bias)).sum(-1)  # too unlikely for a product, or NaN


class Deferred(Tensor):
    """The output of a linear layer before it is multiplied out, in a shape that keeps its numbers in their order.

    `log_mass` takes it as it is. Whatever else is done with it is done with the numbers.
    """

    product: Product
    outline: Tensor  # a tensor without numbers, which knows what shape a view has

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args and isinstance(args[0], Deferred) else None
        if first is not None and not kwargs:
            if func in FACTS:
                return super().__torch_function__(func, types, args)
            if func in VIEWS and not any(isinstance(each, Deferred) for each in args[1:]):
                return _view(func, first, *args[1:])
            if func is log_mass and first.takes(args[1]):
                return first.product.log_mass(first.outline.shape, args[1])
        return func(*_plain(args), **_plain(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_plain(args), **_plain(kwargs or {}))  # what reached torch by another way

    def takes(self, bits: Tensor) -> bool:
        """Whether these are still logits of such bits: a row of numbers for each row of the layer's input."""
        shape = self.outline.shape
        if self.product.known is not None:  # somebody has had the numbers, and may have changed them
            return False
        return type(bits) is Tensor and bits.ndim <= len(shape) > 1 and shape[-1] == self.product.shape[-1]


def deferred(product: Product, outline: Tensor | None = None) -> Deferred:
    """A layer that waits; `outline` gives its shape where that is another than the layer's own."""
    outline = torch.empty(product.shape, device="meta") if outline is None else outline
    dtype, device = product.input.dtype, product.input.device
    made = Tensor._make_wrapper_subclass(Deferred, outline.shape, dtype=dtype, device=device)
    made.product, made.outline = product, outline
    return made


def _view(func: Any, first: Deferred, *args: Any) -> Any:
    found = func(first.outline, *args)
    outline = found if isinstance(found, Tensor) else found[0]
    if outline.numel() != first.outline.numel():  # it is copied
        return func(_plain(first), *args)
    view = deferred(first.product, outline)
    return view if isinstance(found, Tensor) else [view]


def _plain(value: Any) -> Any:
    """With numbers in place of what waits."""
    if isinstance(value, Deferred):
        return value.product.value().reshape(value.outline.shape)
    if isinstance(value, list | tuple):
        return type(value)([_plain(each) for each in value])
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else value
