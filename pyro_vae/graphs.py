"""Tensor operations of a Python function as a graph that runs without it: traced, fused by inductor, or captured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from pyro_vae.kept import Kept

Tensors = Sequence[Tensor]
Graph = Callable[..., Sequence[Any]]  # (parameters, buffers, *inputs) to tensors, None for what there is not

TRACER = "torch.fx.experimental.proxy_tensor"
WARM_UP = 3  # runs before a capture, in which libraries allocate what they need
BY_MEMORY = ("numpy", "__array__", "tolist", "data_ptr", "untyped_storage", "__dlpack__")  # of Tensor
ROUNDING = 1e-4  # relative to the largest number: what may differ by adding in another order
FROZEN = "and they may change"


class Unfit(Exception):
    """A function cannot run as a graph; the message says why."""


class _Unseen(TorchFunctionMode):
    """Inside, no tensor hands out its memory: what is made of it would not be in a graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in BY_MEMORY:
            raise Unfit(f"the pair takes numbers out of tensors as it runs (Tensor.{func.__name__}), {FROZEN}")
        return func(*args, **(kwargs or {}))


def traced(step: Graph, before: Kept, parameters: Tensors, buffers: Tensors, inputs: Tensors) -> Any:
    """The operations of `step`, its backward pass included, as a `torch.fx.GraphModule`.

    Args:
        step: called as `step(parameters, buffers, *inputs)`.
        before: what the programs in it keep; all of it is as before afterwards.
        parameters: that it takes gradients of.
        buffers: that it may change in place, as the graph will.
        inputs: of the shapes that the graph is for.

    Raises:
        Unfit: two runs do not issue the same operations on the same numbers, the function keeps something else than
            buffers from one run to the next, looks into the memory of tensors, or makes shapes out of numbers.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    graphs = []
    for _ in range(2):
        try:
            with torch.enable_grad(), _Unseen():
                graphs.append(make_fx(step)(parameters, buffers, *inputs))
            changed = before.changed()
        finally:
            before.put_back()
        if changed:
            raise Unfit(f"the pair changes {', '.join(changed)} as it runs, which a graph would not")
    if not are_equal(*graphs):
        raise Unfit("two runs of the pair do not issue the same operations with the same numbers")
    _check_shapes(graphs[0])
    graphs[0].graph.eliminate_dead_code()
    graphs[0].recompile()
    return graphs[0]


def _check_shapes(graph: Any) -> None:
    """Raise where the shape of a result depends on numbers: it would be that of the first batch."""
    for node in graph.graph.nodes:
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            is_index = node.target is torch.ops.aten.index.Tensor
            if not is_index or any(_is_mask(graph, each) for each in node.args[1] if each is not None):
                name = str(node.target).split(".")[1].strip("_")
                raise Unfit(f"shapes depend on numbers ({'a mask as an index' if is_index else name}), {FROZEN}")


def _is_mask(graph: Any, node: Any) -> bool:
    value = getattr(graph, node.target) if node.op == "get_attr" else node.meta["tensor_meta"]
    return value.dtype in (torch.bool, torch.uint8)


def fused(graph: Graph) -> Graph:
    """The graph compiled by inductor, which draws random numbers as torch does without it."""
    before = Distribution._validate_args
    try:
        return torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})
    finally:  # torch's compiler switches checks of distributions off for the whole process
        Distribution._validate_args = before


class Captured:
    """A graph captured as a CUDA graph: one launch for all of its kernels, on inputs copied to fixed places.

    Args:
        graph: called as `graph(parameters, buffers, *inputs)`.
        parameters: whose values it finds where they are.
        buffers: the same.
        inputs: of the shapes that it is for.
        num_kept: the first outputs, which outlive the next replay; all of them if None.
    """

    def __init__(
        self, graph: Graph, parameters: Tensors, buffers: Tensors, inputs: Tensors, num_kept: int | None = None
    ) -> None:
        self.inputs, self.num_kept = [value.clone() for value in inputs], num_kept
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with unchanged(buffers, inputs[0].device), torch.no_grad():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    graph(parameters, buffers, *self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.outputs = graph(parameters, buffers, *self.inputs)

    def __call__(self, parameters: Tensors, buffers: Tensors, *inputs: Tensor) -> list[Any]:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        kept = slice(self.num_kept)
        return [*(value.clone() for value in self.outputs[kept]), *self.outputs[len(self.outputs[kept]) :]]


def replayed(
    function: Callable[[Tensor], tuple[Tensor, ...]], modules: nn.Module, programs: tuple[object, ...], example: Tensor
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function of one tensor on a GPU, without random numbers, as a CUDA graph.

    Args:
        function: to several tensors.
        modules: whose parameters and buffers it reads.
        programs: functions and methods that it runs, which must not keep anything from one run to the next.
        example: of the shape that it will be called with.

    Raises:
        Unfit: the graph does not do what the function does.
    """
    parameters, buffers = list(modules.parameters()), list(modules.buffers())

    def step(parameters: Tensors, buffers: Tensors, value: Tensor) -> list[Tensor]:
        return list(function(value))

    kept = Kept(modules, programs, example.device)
    graph = traced(step, kept, [example, *parameters], buffers, [example])
    captured = Captured(graph, [example, *parameters], buffers, [example])

    def run(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(captured([example, *parameters], buffers, value))

    for value in (example, example.flip(0) / 2):
        for mine, its in zip(run(value), function(value), strict=True):
            if not torch.allclose(mine, its, rtol=0.0, atol=ROUNDING * largest(its), equal_nan=True):
                raise Unfit("the graph does not give what the pair gives at other latents")
    return run


def largest(values: Tensor) -> float:
    """Of the finite ones, by size."""
    return float(values.nan_to_num(0, 0, 0).abs().max()) if values.numel() and values.is_floating_point() else 0.0


@contextmanager
def unchanged(buffers: Tensors, device: torch.device) -> Iterator[None]:
    """Random state and buffers after a graph has run inside are those before; it changes nothing else."""
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient in the memory layout of its parameter, which the fused optimizer takes for granted."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def why(error: Exception) -> str:
    """Why a pair cannot run as a graph, in one line."""
    first, *others = str(error).splitlines() or [""]
    text = " ".join([first, *[line for line in others if line][: first.endswith(":")]])
    if isinstance(error, Unfit):
        return text
    if "out of a tracing tensor" in text:
        return f"the pair takes numbers out of tensors as it runs (.item(), an if, an index), {FROZEN}"
    return f"tracing failed: {type(error).__name__}: {text}"


def are_equal(left: Any, right: Any) -> bool:
    """The same operations on the same constants."""
    mine, its = ({**dict(graph.named_buffers()), **dict(graph.named_parameters())} for graph in (left, right))
    is_same = left.code == right.code and mine.keys() == its.keys()
    return is_same and all(torch.equal(value, its[name]) for name, value in mine.items())
