"""Tensor operations of a Python function as a graph that runs without it: traced, fused by inductor, or captured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

Tensors = Sequence[Tensor]
Graph = Callable[..., Sequence[Any]]  # (parameters, buffers, *inputs) to tensors, None for what there is not

TRACER = "torch.fx.experimental.proxy_tensor"
WARM_UP = 3  # runs before a capture, in which libraries allocate what they need


class Unfit(Exception):
    """A function cannot run as a graph; the message says why."""


def traced(step: Graph, modules: nn.Module, parameters: Tensors, buffers: Tensors, inputs: Tensors) -> Any:
    """The operations of `step`, its backward pass included, as a `torch.fx.GraphModule`.

    Args:
        step: called as `step(parameters, buffers, *inputs)`.
        modules: whose attributes must be the same after the run.
        parameters: that it takes gradients of.
        buffers: that it may change in place, as the graph will; they are as before afterwards, and so is the noise.
        inputs: of the shapes that the graph is for.

    Raises:
        Unfit: two runs do not issue the same operations on the same numbers, or the function counts its runs.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    before, graphs = _plain_attributes(modules), []
    for _ in range(2):
        with unchanged(buffers, parameters[0].device), torch.enable_grad():
            graphs.append(make_fx(step)(parameters, buffers, *inputs))
    after = _plain_attributes(modules)
    changed = sorted({names[-1] for names, value in after.items() if before.get(names) != value})
    if changed:
        raise Unfit(f"the pair changes {', '.join(changed)} as it runs, which a graph would not")
    if not are_equal(*graphs):
        raise Unfit("two runs of the pair do not issue the same operations with the same numbers")
    graphs[0].graph.eliminate_dead_code()
    graphs[0].recompile()
    return graphs[0]


def fused(graph: Graph) -> Graph:
    """The graph compiled by inductor, which draws random numbers as torch does without it."""
    return torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})


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
    function: Callable[[Tensor], tuple[Tensor, ...]], modules: nn.Module, example: Tensor
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function of one tensor on a GPU, without random numbers, as a CUDA graph.

    Args:
        function: to several tensors.
        modules: whose parameters and buffers it reads.
        example: of the shape that it will be called with.

    Raises:
        Unfit: the graph does not do what the function does.
    """
    parameters, buffers = list(modules.parameters()), list(modules.buffers())

    def step(parameters: Tensors, buffers: Tensors, value: Tensor) -> list[Tensor]:
        return list(function(value))

    with without_side_effects():
        graph = traced(step, modules, [example, *parameters], buffers, [example])
        captured = Captured(graph, [example, *parameters], buffers, [example])

    def run(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(captured([example, *parameters], buffers, value))

    for value in (example, example.flip(0) / 2):
        for mine, its in zip(run(value), function(value), strict=True):
            if not torch.allclose(mine, its, rtol=1e-4, atol=1e-4 * float(its.abs().max())):
                raise Unfit("the graph does not give what the pair gives at other latents")
    return run


@contextmanager
def unchanged(buffers: Tensors, device: torch.device) -> Iterator[None]:
    """Random state and buffers after whatever runs inside are those before."""
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@contextmanager
def without_side_effects() -> Iterator[None]:
    """Torch's compiler switches checks of distributions off for the whole process: as before afterwards."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution._validate_args = before


def laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient in the memory layout of its parameter, which the fused optimizer takes for granted."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def why(error: Exception) -> str:
    """Why a pair cannot run as a graph, in one line."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, Unfit):
        return text
    if "out of a tracing tensor" in text:
        return "the pair takes numbers out of tensors as it runs (.item(), an if, an index), and they may change"
    return f"{type(error).__name__}: {text}"


def are_equal(left: Any, right: Any) -> bool:
    """The same operations on the same constants."""
    mine, its = ({**dict(graph.named_buffers()), **dict(graph.named_parameters())} for graph in (left, right))
    is_same = left.code == right.code and mine.keys() == its.keys()
    return is_same and all(torch.equal(value, its[name]) for name, value in mine.items())


def _plain_attributes(modules: nn.Module) -> dict[tuple[str, str], object]:
    """Numbers and words that modules hold as attributes, and how often their plain tensors were changed in place.

    By the path of the module and the name of the attribute, as in "Model.count".
    """
    found: dict[tuple[str, str], object] = {}
    for path, module in modules.named_modules():
        for name, value in vars(module).items():
            names = path, f"{type(module).__name__}.{name}"
            if isinstance(value, bool | int | float | str):
                found[names] = value
            elif isinstance(value, Tensor):
                found[names] = value._version
    return found
