"""The last layers and the pixels that they give as one step: neither logits nor activations are whole in memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyro_vae.estimators.observed import Layer, is_binary, shared_log_mass
from pyro_vae.independent import PART, log_mass, pixel_sum
from pyro_vae.networks import fast_tanh

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
SMALLEST = 2**18  # numbers: a layer that gives fewer is multiplied out at once
SHARED = 128  # rows with the same bits, from which a layer of their own is worth while
GPU_PART = 2**28  # logits that are written at once on a GPU, 1 GiB: in smaller parts products take longer
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
TANH = {torch.tanh, Tensor.tanh, fast_tanh}
ACTIVATIONS = TANH | {  # functions of each number, behind which a layer may wait for the next
    torch.relu,
    torch.sigmoid,
    functional.elu,
    functional.gelu,
    functional.leaky_relu,
    functional.relu,
    functional.silu,
    functional.softplus,
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

    It changes no module: it steps in for `torch.nn.functional.linear`, wherever that is called. On a CPU what comes
    between two layers waits as well, if it is one of `ACTIVATIONS`. Where gradients are recorded no layer waits.

    Args:
        linear: called as `linear(input, weight, bias)`.
        smallest: numbers of a layer's output, from which on it waits; `SMALLEST` if None.
    """

    def __init__(self, linear: Linear = functional.linear, smallest: int | None = None) -> None:
        super().__init__()
        self.linear, self.smallest = linear, SMALLEST if smallest is None else smallest
        self.waiting: list[weakref.ref[Product]] = []
        self.writes_no_logits = False  # whether those of a layer went into their pixels part by part

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._layer(*args, **kwargs)
        if self.waiting and _writes(func, args, kwargs):
            self._multiply_out()
        return func(*args, **kwargs)

    def _layer(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_hidden = isinstance(input, Deferred) and input.is_hidden()
        product = Product(self, input if is_hidden else _plain(input), weight, bias)
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
class Waiting:
    """Numbers that are not worked out unless `value` is asked for."""

    known: Tensor | None = field(default=None, init=False)
    version: int = field(default=0, init=False)  # of `known` when it was new

    def value(self) -> Tensor:
        """The numbers; whoever has them may change them in place."""
        if self.known is None:
            self.known = self.worked_out()
            self.version = _version(self.known)
        return self.known

    def original(self) -> Tensor:
        """The numbers before anyone changed them, for what was made of them by then."""
        known = self.value()
        is_as_new = not known.is_inference() and known._version == self.version  # inference mode does not count
        return known if is_as_new else self.worked_out()

    def worked_out(self) -> Tensor:
        """The numbers, new ones each time."""
        raise NotImplementedError


@dataclass(eq=False)
class Product(Waiting):
    """A linear layer and its input, which may itself be an activation that waits."""

    mode: LinearLayers
    input: Tensor
    weight: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        self.linear, self.input_version = self.mode.linear, _version(self.input)

    @property
    def shape(self) -> torch.Size:
        """Of the output."""
        return torch.Size((*self.input.shape[:-1], len(self.weight)))

    def may_wait(self) -> bool:
        """Whether it is large, nobody records its gradient, and parts of it have the type of the whole."""
        tensors = [each for each in (self.input, self.weight, self.bias) if each is not None]
        is_one_type = len({each.dtype for each in tensors}) == 1 and self.input.element_size() >= 4
        is_plain = self.weight.ndim == 2 and self.input.ndim > 1 and self.shape.numel() >= self.mode.smallest
        is_recorded = torch.is_grad_enabled() or torch.is_autocast_enabled(self.input.device.type)
        return is_one_type and is_plain and not is_recorded

    def worked_out(self) -> Tensor:
        """The output."""
        return self.linear(self._input(), self.weight, self.bias)

    def _input(self) -> Tensor:
        if isinstance(self.input, Deferred):
            return self.input.product.original().reshape(self.input.outline.shape)
        if _version(self.input) != self.input_version:
            raise RuntimeError("what enters a linear layer was changed in place after it; change a copy instead")
        return self.input

    def layers(self) -> tuple[Tensor, list[Layer]]:
        """What is known, and the layers that lie between it and the output."""
        last = Layer(self.weight, self.bias)
        if not isinstance(self.input, Deferred) or not self.input.is_hidden():  # someone has asked for it by now
            return self._input(), [last]
        rows, layers = self.input.product.layers()
        return rows, [*layers, last]

    def log_mass(self, shape: torch.Size, bits: Tensor) -> Tensor:
        """`independent.log_mass` of the output, in a shape (..., D), in parts that stay in a CPU's cache."""
        bits, self.mode.writes_no_logits = bits.expand(shape), True
        if shape[0] == 1 and len(shape) > 2:
            return self.log_mass(shape[1:], bits[0]).unsqueeze(0)
        if shape[0] >= SHARED and bits.stride(0) == 0:
            found = self._shared(shape, bits[0])
            if found is not None:
                return found
        rows = self._input().reshape(*shape[:-1], self.input.shape[-1])
        num_parts = -(-shape.numel() // (PART if rows.device.type == "cpu" else GPU_PART))
        parts = zip(rows.chunk(num_parts), bits.chunk(num_parts), strict=True)
        masses = [pixel_sum(self.linear(h, self.weight, self.bias), x, overwrite=True) for h, x in parts]
        return torch.cat(masses)

    def _shared(self, shape: torch.Size, bits: Tensor) -> Tensor | None:
        """Log mass of bits that the rows of the output, in the shape (K, ..., D), share; None where no way is made."""
        if self.input.device.type == "cpu":
            if self.linear is not functional.linear or not is_binary(bits):
                return None
            rows, layers = self.layers()
            return shared_log_mass(rows.reshape(*shape[:-1], rows.shape[-1]), layers, bits)
        of_kernel = getattr(self.linear, "shared_log_mass", None)
        if of_kernel is None:
            return None
        data = bits.reshape(-1, bits.shape[-1])
        masses: Tensor | None = of_kernel(self._input().reshape(shape[0], len(data), -1), self.weight, self.bias, data)
        return None if masses is None else masses.reshape(shape[:-1])


@dataclass(eq=False)
class Activation(Waiting):
    """A function of each number of a layer's output."""

    product: Product
    function: Callable[[Tensor], Tensor]
    is_tanh: bool

    @property
    def shape(self) -> torch.Size:
        """Of the output."""
        return self.product.shape

    def worked_out(self) -> Tensor:
        """The output."""
        return self.function(self.product.original())

    def layers(self) -> tuple[Tensor, list[Layer]]:
        """As of a product; the last layer has the function."""
        rows, layers = self.product.layers()
        return rows, [*layers[:-1], replace(layers[-1], function=self.function, is_tanh=self.is_tanh)]


class Deferred(Tensor):
    """The output of a linear layer before it is multiplied out, in a shape that keeps its numbers in their order.

    `log_mass` takes it as it is, and so does a linear layer if an activation lies between. Whatever else is done with
    it is done with the numbers.
    """

    product: Product | Activation
    outline: Tensor  # a tensor without numbers, which knows what shape a view has

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args and isinstance(args[0], Deferred) else None
        if first is not None and not kwargs:
            if func in FACTS:
                return super().__torch_function__(func, types, args)
            if func in VIEWS and not any(isinstance(each, Deferred) for each in args[1:]):
                return _view(func, first, *args[1:])
            if func is log_mass and isinstance(first.product, Product) and first.takes(args[1]):
                return first.product.log_mass(first.outline.shape, args[1])
        if first is not None and func in ACTIVATIONS:
            waits = first.activated(func, args[1:], kwargs or {})
            if waits is not None:
                return waits
        return func(*_plain(args), **_plain(kwargs or {}))

    # Torch's stub declares another signature than the one it calls.
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_plain(args), **_plain(kwargs or {}))  # what reached torch by another way

    def activated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Deferred | None":
        """What waits for a layer behind it: the function of these numbers, unless it works in place."""
        layer, is_plain = self.product, not any(each is True for each in (*args, *kwargs.values()))
        if not (isinstance(layer, Product) and layer.linear is functional.linear and layer.known is None and is_plain):
            return None
        if self.device.type != "cpu" or "out" in kwargs:
            return None
        return deferred(Activation(layer, lambda values: func(values, *args, **kwargs), func in TANH), self.outline)

    def is_hidden(self) -> bool:
        """Whether this is a row of activations for each row of a layer's input, none of them worked out so far."""
        product, width = self.product, self.outline.shape[-1]
        if not isinstance(product, Activation) or width != product.shape[-1]:
            return False
        return product.known is None and product.product.known is None

    def takes(self, bits: Tensor) -> bool:
        """Whether these are still logits of such bits: a row of numbers for each row of the layer's input."""
        shape = self.outline.shape
        if self.product.known is not None:  # somebody has had the numbers, and may have changed them
            return False
        return type(bits) is Tensor and bits.ndim <= len(shape) > 1 and shape[-1] == self.product.shape[-1]


def deferred(product: Product | Activation, outline: Tensor | None = None) -> Deferred:
    """What waits; `outline` gives its shape where that is another than the layer's own."""
    outline = torch.empty(product.shape, device="meta") if outline is None else outline
    layer = product if isinstance(product, Product) else product.product
    dtype, device = layer.input.dtype, layer.input.device
    made = Tensor._make_wrapper_subclass(Deferred, outline.shape, dtype=dtype, device=device)
    made.product, made.outline = product, outline
    return made


def _version(values: Tensor) -> int:
    """How often a tensor was changed in place; what waits cannot be."""
    return 0 if isinstance(values, Deferred) or values.is_inference() else values._version


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
