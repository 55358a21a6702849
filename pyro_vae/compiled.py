"""The step of a fit, compiled: loss of a batch and gradients as one graph of the pair, with the digits of the pair.

Pyro's handlers, distributions and autograd run once, while the tensor operations that they issue, those of the backward
pass included, are written down. From then on only these run: one by one ("graph"), fused by inductor ("inductor"), or,
on a GPU, replayed from a CUDA graph. Random numbers are drawn by the same operations in the same order, so that a seed
gives the same noise either way.

A graph knows nothing of Python: what the pair decides by looking into a tensor, or counts on the way, would be frozen.
So a pair is traced twice, its graph is run beside the pair itself on other data, and unless all of it agrees the pair
runs as it is, for a reason that `Gradients.reason` gives.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import graphs
from pyro_vae.graphs import Graph, Unfit
from pyro_vae.objectives import Objective
from pyro_vae.traces import Pair

Args = tuple[Tensor, ...]

TRIAL = 10  # steps whose median time is taken for the time of one
WARM = 3  # steps before them
GAIN = 0.2  # of the time of a step is saved at least, where a graph pays
LOADING = 6.0  # seconds: the first trace in a process loads half of torch
STEPS_PER_TRACE = 400  # the time of so many steps is more than it takes to trace a pair
TOLERANCE = 1e-4  # relative, of the largest gradient: what inductor may differ by, for it adds in another order


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
        self.objective, self.pair, self.modules, self.num_steps = objective, pair, modules, num_steps
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.buffers = list(modules.buffers())
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
            return self._timed("graph", self._by_graph, self.graphs[key], args, weight)
        return self._by_graph(self.graphs[key], args, weight)

    def _eager(self, args: Args, weight: float) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.objective.loss(self.pair, args, weight)
        loss.backward()
        return loss.detach()

    def _by_graph(self, graph: Graph, args: Args, weight: float) -> Tensor:
        with torch.no_grad():
            loss, *gradients = graph(self.parameters, self.buffers, *args, *_weights(weight, args))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _pays(self) -> bool:
        """Whether the steps that are left would take longer than tracing and they would take as a graph."""
        times = self.seconds["eager"][WARM:]
        if len(times) < TRIAL:
            return False
        one = statistics.median(times)
        cost = STEPS_PER_TRACE * one + LOADING * (graphs.TRACER not in sys.modules)
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
            with graphs.without_side_effects():
                self.graphs[key] = self._made(key, args, weight)
        except Exception as error:  # whatever it is, the pair itself runs, and raises it again if it is its own
            self.reason = graphs.why(error)
            self.graphs.clear()
            if self.wanted:
                warnings.warn(f"compile=True has no effect, the pair runs as Pyro does: {self.reason}", stacklevel=2)
            return self._eager(args, weight)
        return self._by_graph(self.graphs[key], args, weight)

    def _made(self, key: Any, args: Args, weight: float) -> Graph:
        """The graph for batches of one shape, once it does what the pair does."""
        on_gpu, is_first = args[0].is_cuda, not self.graphs
        inputs = self.parameters, self.buffers, (*args, *_weights(weight, args))
        graph: Graph = graphs.traced(self._step(len(args)), self.modules, *inputs)
        self._compare(graph, args, weight, exact=not on_gpu)
        if self.wanted and is_first:
            graph, self.fused = graphs.fused(graph), key
        if on_gpu:
            graph = graphs.Captured(graph, *inputs, num_kept=1)  # the loss
        if on_gpu or self.fused == key:
            self._compare(graph, args, weight, exact=False)
        return graph

    def _step(self, num_args: int) -> Graph:
        """Loss and gradients of a batch as a function of tensors: parameters, buffers, the batch, the weight if any."""

        def step(parameters: list[Tensor], buffers: list[Tensor], *inputs: Tensor) -> list[Tensor | None]:
            args, weights = inputs[:num_args], inputs[num_args:]
            loss = self.objective.loss(self.pair, args, weights[0] if weights else 1.0)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [loss.detach(), *map(graphs.laid_out, gradients, parameters)]

        return step

    def _compare(self, graph: Graph, args: Args, weight: float, exact: bool) -> None:
        """Raise unless graph and pair do the same to the data, and to them in another order and at another weight."""
        backwards = tuple(arg.flip(0) for arg in args)
        for batch, each in ((args, weight), (backwards, weight if weight == 1 else weight / 2)):
            here = self._outcome(self._eager, batch, each)
            there = self._outcome(self._by_graph, graph, batch, each)
            gradients = here[1 : 1 + len(self.parameters)]
            largest = max(float(each.abs().max()) for each in gradients if each is not None)
            if not all(_is_same(mine, its, 0.0 if exact else largest) for mine, its in zip(here, there, strict=True)):
                raise Unfit("the graph of the pair does not give what the pair gives on other data or other noise")

    def _outcome(self, run: Callable[..., Tensor], *args: Any) -> list[Tensor | None]:
        """Loss, gradients, buffers, and on the CPU what is drawn next, of a step that is taken back."""
        device = self.parameters[0].device
        with graphs.unchanged(self.buffers, device):
            parts = [run(*args), *(p.grad for p in self.parameters), *self.buffers]
            # On a GPU a replay may count its draws otherwise: what they were is seen in the gradients.
            drawn_next = [] if device.type == "cuda" else [torch.rand(4)]
            return [None if part is None else part.clone() for part in (*parts, *drawn_next)]


def _weights(weight: float, args: Args) -> Args:
    """The weight as a tensor, which may change from step to step; none where it is 1."""
    return () if weight == 1 else (torch.full((), weight, dtype=torch.float64, device=args[0].device),)


def _is_same(left: Tensor | None, right: Tensor | None, largest: float) -> bool:
    """Bit for bit if `largest` is 0; else up to rounding, which is measured by the largest gradient."""
    if left is None or right is None:
        return left is right
    if largest == 0 or not left.is_floating_point():
        return torch.equal(left, right)
    return bool(((left - right).abs() <= TOLERANCE * (right.abs() + largest)).all())
