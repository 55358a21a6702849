"""One Pyro pair traced below Python: the loss of a batch and its gradients as one graph, with the digits of the pair.

Pyro's handlers, distributions and autograd run once, while the tensor operations that they issue, those of the backward
pass included, are written down (`torch.fx.experimental.proxy_tensor.make_fx`). From then on only these run: one by one
("graph"), fused by inductor ("inductor"), or, on a GPU, replayed from a CUDA graph. Random numbers are drawn by the
same operations in the same order, so that a seed gives the same noise either way.

A graph knows nothing of Python: what the pair decides by looking into a tensor, or counts on the way, would be frozen.
So a pair is traced twice, its graph is run beside the pair itself on another batch, and unless all of it agrees the
pair runs as it is, for a reason that `Gradients.reason` gives.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.objectives import Objective
from pyro_vae.traces import Pair

Args = tuple[Tensor, ...]
Graph = Callable[..., Sequence[Any]]  # (parameters, buffers, *args, weight) to the loss and its gradients

TRIAL = 10  # steps whose median time is taken for the time of one
WARM = 3  # steps before them
GAIN = 0.2  # of the time of a step is saved at least, where a graph pays
LOADING = 6.0  # seconds: the first trace in a process loads half of torch
STEPS_PER_TRACE = 400  # the time of so many steps is more than it takes to trace a pair
TRACER = "torch.fx.experimental.proxy_tensor"
TOLERANCE = 1e-4  # relative, of the largest gradient: what inductor may differ by, for it adds in another order


class Unfit(Exception):
    """A pair cannot run as a graph; the message says why."""


class Gradients:
    """Loss of a batch, with the gradients of the parameters left in their `grad`: by the pair, or by a graph of it.

    Args:
        objective: what is maximised.
        pair: model and guide.
        modules: that hold the parameters and buffers of the pair.
        compile: False: as Pyro runs it. None: a graph, where the steps that are left pay for it by times measured on
            the way; on the CPU it has the same digits. True: a graph at once, and inductor for batches of the size of
            the first one, with other last digits.
        num_steps: that are to come.
    """

    def __init__(
        self, objective: Objective, pair: Pair, modules: nn.Module, compile: bool | None, num_steps: int
    ) -> None:
        self.objective, self.pair, self.num_steps = objective, pair, num_steps
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.buffers = list(modules.buffers())
        self.modules = modules
        self.wanted = bool(compile)  # and inductor with it
        self.on_trial = compile is None  # both ways are timed before one is taken; False takes the graph at once
        self.reason = "compile is False" if compile is False else ""
        self.graphs: dict[Any, Graph] = {}
        self.fused: Any = None  # the key of the graph that inductor has fused
        self.step, self.seconds = 0, {"eager": [], "graph": []}  # type: int, dict[str, list[float]]

    @property
    def way(self) -> str:
        """What the steps run by: "eager", "graph", "inductor" or "cuda graph"."""
        if self.reason or not self.graphs:
            return "eager"
        if self.parameters[0].is_cuda:
            return "cuda graph"
        return "graph" if self.fused is None else "inductor"

    def __call__(self, args: Args, weight: float) -> Tensor:
        """The loss, nats per datum; `weight` is that of the latent terms."""
        self.step += 1
        if self.reason:
            return self._eager(args, weight)
        if self.on_trial and not self.graphs and not self._pays():
            return self._timed("eager", self._eager, args, weight)
        key = (*((arg.shape, arg.dtype) for arg in args), weight == 1)
        if key not in self.graphs:
            return self._first(key, args, weight)
        if self.on_trial and len(self.seconds["graph"]) < WARM + TRIAL:
            return self._timed("graph", self._by_graph, args, weight, key)
        return self._by_graph(args, weight, key)

    def _eager(self, args: Args, weight: float) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.objective.loss(self.pair, args, weight)
        loss.backward()
        return loss.detach()

    def _by_graph(self, args: Args, weight: float, key: Any) -> Tensor:
        return self._run(self.graphs[key], args, weight)

    def _run(self, graph: Graph, args: Args, weight: float) -> Tensor:
        with torch.no_grad():
            loss, *gradients = graph(self.parameters, self.buffers, *args, *self._weights(weight, args))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    @staticmethod
    def _weights(weight: float, args: Args) -> Args:
        """The weight as a tensor, which may change from step to step; none where it is 1."""
        return () if weight == 1 else (torch.full((), weight, dtype=torch.float64, device=args[0].device),)

    def _pays(self) -> bool:
        """Whether the steps that are left would take longer than tracing and they would take as a graph."""
        times = self.seconds["eager"][WARM:]
        if len(times) < TRIAL:
            return False
        one = statistics.median(times)
        cost = STEPS_PER_TRACE * one + LOADING * (TRACER not in sys.modules)
        return (self.num_steps - self.step) * GAIN * one > cost

    def _timed(self, way: str, run: Callable[..., Tensor], *args: Any) -> Tensor:
        """A step and its time; once there are enough of both ways, the faster one stays."""
        started = time.perf_counter()
        loss = run(*args)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        self.seconds[way].append(time.perf_counter() - started)
        if len(self.seconds["graph"]) == WARM + TRIAL:
            eager, graph = (statistics.median(self.seconds[each][WARM:]) for each in ("eager", "graph"))
            if graph > eager:
                self.reason = f"a step takes {1e3 * graph:.2f} ms as a graph and {1e3 * eager:.2f} ms without"
        return loss

    def _first(self, key: Any, args: Args, weight: float) -> Tensor:
        """The first step with batches of one shape: its graph is made, and run beside the pair."""
        try:
            with _without_side_effects():
                self.graphs[key] = self._made(key, args, weight)
        except Exception as error:
            self.reason = _reason(error)
            self.graphs.clear()
            if self.wanted:
                warnings.warn(f"compile=True has no effect, the pair runs as Pyro does: {self.reason}", stacklevel=2)
            return self._eager(args, weight)
        return self._by_graph(args, weight, key)

    def _made(self, key: Any, args: Args, weight: float) -> Graph:
        """The graph of a batch, after it was held against the pair on this batch and on its data in another order."""
        on_gpu, is_first = args[0].is_cuda, not self.graphs
        traced = self._traced(args, weight)
        self._compare(traced, args, weight, exact=not on_gpu)
        if not on_gpu and not (self.wanted and is_first):
            return traced
        graph: Graph = traced
        if self.wanted and is_first:
            graph, self.fused = _fused(traced), key
        if on_gpu:
            graph = _Captured(graph, self, args, weight)
        self._compare(graph, args, weight, exact=False)
        return graph

    def _traced(self, args: Args, weight: float) -> torch.fx.GraphModule:
        """The operations of one step, forward and backward, that two runs of the pair agree on."""
        from torch.fx.experimental.proxy_tensor import make_fx

        def step(parameters: list[Tensor], buffers: list[Tensor], *batch: Tensor) -> list[Tensor | None]:
            inputs, weights = batch[: len(args)], batch[len(args) :]
            loss = self.objective.loss(self.pair, inputs, weights[0] if weights else 1.0)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [loss.detach(), *map(_laid_out, gradients, parameters)]

        before = _plain_attributes(self.modules)
        graphs = []
        for _ in range(2):
            with self._as_it_was(), torch.enable_grad():
                graphs.append(make_fx(step)(self.parameters, self.buffers, *args, *self._weights(weight, args)))
        after = _plain_attributes(self.modules)
        changed = sorted({names[-1] for names, value in after.items() if before.get(names) != value})
        if changed:
            raise Unfit(f"the pair changes {', '.join(changed)} as it runs, which a graph would not")
        if not _are_equal(*graphs):
            raise Unfit("two runs of the pair do not issue the same operations with the same numbers")
        graphs[0].graph.eliminate_dead_code()
        graphs[0].recompile()
        return graphs[0]

    def _compare(self, graph: Graph, args: Args, weight: float, exact: bool) -> None:
        """Raise unless graph and pair do the same to the data, and to them in another order and at another weight."""
        backwards = tuple(arg.flip(0) for arg in args)
        for batch, each in ((args, weight), (backwards, weight if weight == 1 else weight / 2)):
            self._compare_once(graph, batch, each, exact)

    def _compare_once(self, graph: Graph, args: Args, weight: float, exact: bool) -> None:
        """Raise unless both give the same loss and gradients, and leave noise and buffers the same."""
        found = []
        for run in (self._eager, lambda args, weight: self._run(graph, args, weight)):
            with self._as_it_was():
                parts = [run(args, weight), *(p.grad for p in self.parameters), *self.buffers]
                found.append([None if part is None else part.clone() for part in parts])
                found[-1].append(torch.rand(4, device=args[0].device))
        largest = max(float(p.grad.abs().max()) for p in self.parameters if p.grad is not None)
        for mine, its in zip(*found, strict=True):
            if mine is None or its is None:
                is_same = mine is its
            else:
                is_same = torch.equal(mine, its) if exact else _is_close(mine, its, largest)
            if not is_same:
                raise Unfit("the graph of the pair does not give what the pair gives on other data or other noise")

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Random state and buffers after whatever runs inside are those before."""
        buffers = [buffer.clone() for buffer in self.buffers]
        device = self.parameters[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                yield
            finally:
                for buffer, before in zip(self.buffers, buffers, strict=True):
                    buffer.copy_(before)


def _fused(graph: torch.fx.GraphModule) -> Graph:
    """The graph compiled by inductor, which draws random numbers as torch does without it."""
    return torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})


def _laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient in the memory layout of its parameter, which the fused optimizer takes for granted."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class _Captured:
    """A graph captured as a CUDA graph: one launch for all of its kernels, on inputs copied to fixed places."""

    def __init__(self, graph: Graph, of: Gradients, args: Args, weight: float) -> None:
        self.inputs = [arg.clone() for arg in (*args, *of._weights(weight, args))]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with of._as_it_was(), torch.no_grad():
            with torch.cuda.stream(stream):  # libraries allocate what they need in the first runs
                for _ in range(3):
                    graph(of.parameters, of.buffers, *self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = graph(of.parameters, of.buffers, *self.inputs)

    def __call__(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return [self.outputs[0].clone(), *self.outputs[1:]]


def _reason(error: Exception) -> str:
    """Why a pair cannot run as a graph, in one line."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, Unfit):
        return text
    if "out of a tracing tensor" in text:
        return "the pair takes numbers out of tensors as it runs (.item(), an if, an index), and they may change"
    return f"{type(error).__name__}: {text}"


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


def _are_equal(left: torch.fx.GraphModule, right: torch.fx.GraphModule) -> bool:
    """The same operations on the same constants."""
    mine, its = ({**dict(graph.named_buffers()), **dict(graph.named_parameters())} for graph in (left, right))
    is_same = left.code == right.code and mine.keys() == its.keys()
    return is_same and all(torch.equal(value, its[name]) for name, value in mine.items())


def _is_close(left: Tensor, right: Tensor, largest: float) -> bool:
    """Equal up to rounding, gradients measured by the largest of all."""
    if not left.is_floating_point():
        return torch.equal(left, right)
    return bool(((left - right).abs() <= TOLERANCE * (right.abs() + largest)).all())


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """Torch's compiler switches checks of distributions off for the whole process: as before afterwards."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution._validate_args = before
