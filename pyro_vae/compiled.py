"""The step of a fit, compiled: loss of a batch and gradients as one graph of the pair, with the digits of the pair.

Pyro's handlers, distributions and autograd run once, while the tensor operations that they issue, those of the backward
pass included, are written down. From then on only these run: one by one ("graph"), fused by inductor ("inductor"), or,
on a GPU, replayed from a CUDA graph. Random numbers are drawn by the same operations in the same order, so that a seed
gives the same noise either way.

A graph knows nothing of Python: what the pair decides by looking into a tensor, or counts on the way, would be frozen.
So a pair is traced twice, its graph is run beside the pair itself on other data, and unless all of it agrees the pair
runs as it is, for a reason that `Gradients.reason` gives. From time to time a step of the fit is taken by the pair, and
what the graph gives is held to it: what no look at the pair can find, such as a count that it keeps in an object of a
class of its own, is found there.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import graphs
from pyro_vae.graphs import Graph, Unfit
from pyro_vae.kept import Kept, hooks
from pyro_vae.objectives import Objective
from pyro_vae.traces import Pair

Args = tuple[Tensor, ...]

TRIAL = 10  # steps whose median time is taken for the time of one
WARM = 3  # steps before them
GAIN = 0.2  # of the time of a step is saved at least, where a graph pays
LOADING = 6.0  # seconds: the first trace in a process loads half of torch
STEPS_PER_TRACE = 400  # the time of so many steps is more than it takes to trace a pair
STEPS_ON_GPU = 2000  # pay for the 8 s until there is a CUDA graph; a fixed number, as its digits are not the pair's
CHECK_EVERY = {"cpu": 512, "cuda": 2048}  # steps by one graph; earlier at the second, fourth, eighth, ... one
FLOOR = 1e-6  # of the largest gradient of all: rounding of float32, which is all there is to a gradient of zero


@dataclass
class Compiled:
    """A graph for batches of one shape.

    Attributes:
        plain: its operations one by one, as on the CPU they have the digits of the pair.
        run: as it is run.
        way: the name of that.
        steps: that were taken by it.
        agreed: of these, up to the last at which it did what the pair does.
    """

    plain: Graph
    run: Graph
    way: str
    steps: int = 1
    agreed: int = 1


class Gradients:
    """Loss of a batch, with the gradients of the parameters left in their `grad`: by the pair, or by a graph of it.

    Args:
        objective: what is maximised.
        pair: model and guide.
        modules: that hold the parameters and buffers of the pair.
        compile: False: as Pyro runs it. None: a graph, on the CPU where the steps that are left pay for it by times
            measured on the way, with the same digits; on a GPU, where the digits are others, if there are at least
            `STEPS_ON_GPU` steps to come, whatever the times. True: a graph at once, and inductor for batches of the
            full size, with other last digits.
        num_steps: that are to come.
        batch_size: the full size; that of the first batch if None.
    """

    def __init__(
        self,
        objective: Objective,
        pair: Pair,
        modules: nn.Module,
        compile: bool | None,
        num_steps: int,
        batch_size: int | None = None,
    ) -> None:
        self.objective, self.pair, self.modules, self.num_steps = objective, pair, modules, num_steps
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.buffers: list[Tensor] = []  # as they are when the first graph is made
        self.wanted, self.batch_size = bool(compile), batch_size  # inductor, and for which batches
        self.on_trial = compile is None  # a graph is taken only if it pays; False takes it at once
        self.checks = True  # whether some steps are taken by the pair, and the graph held to it
        self.reason = "compile is False" if compile is False else ""
        self.graphs: dict[Any, Compiled] = {}
        self.way = "eager"  # what the last step ran by: "eager", "graph", "inductor" or "cuda graph"
        self.step, self.seconds = 0, {"eager": [], "graph": []}  # type: int, dict[str, list[float]]

    @property
    def ran_as(self) -> str:
        """What most steps ran by, once some have: a ragged last batch has a graph of its own."""
        if self.reason or not self.graphs:
            return "eager"
        return max(self.graphs.values(), key=lambda graph: graph.steps).way

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
        graph = self.graphs[key]
        graph.steps, self.way = graph.steps + 1, graph.way
        if self.checks and (graph.steps % CHECK_EVERY[self.device.type] == 0 or graph.steps.bit_count() == 1):
            return self._checked(graph, args, weight)
        if self.on_trial and self.device.type == "cpu" and len(self.seconds["graph"]) < WARM + TRIAL:
            return self._timed("graph", self._by_graph, graph.run, args, weight)
        return self._by_graph(graph.run, args, weight)

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
        if self.device.type != "cpu":
            return self.num_steps >= STEPS_ON_GPU
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
        self.seconds[way].append(time.perf_counter() - started)
        if len(self.seconds["graph"]) == WARM + TRIAL:
            eager, graph = (statistics.median(self.seconds[each][WARM:]) for each in ("eager", "graph"))
            if graph > eager:
                self._leave(f"a step takes {1e3 * graph:.2f} ms as a graph and {1e3 * eager:.2f} ms without")
        return loss

    def _leave(self, reason: str) -> None:
        """From here on the pair runs as it is."""
        self.reason, self.way = reason, "eager"
        self.graphs.clear()

    def _kept(self, with_values: bool = True) -> Kept:
        return Kept(self.modules, (self.pair.model, self.pair.guide), self.device, with_values)

    def _first(self, key: Any, args: Args, weight: float) -> Tensor:
        """The first step with batches of one shape: its graph is made, and run beside the pair."""
        if not self.graphs:
            self.buffers = list(self.modules.buffers())
        before = self._kept()
        try:
            self.graphs[key] = self._made(before, args, weight)
        except Exception as error:  # whatever it is, the pair itself runs, and raises it again if it is its own
            self._leave(graphs.why(error))
        finally:
            before.put_back()
        if not self.reason:
            self.way = self.graphs[key].way
            return self._by_graph(self.graphs[key].run, args, weight)
        if self.wanted:
            warnings.warn(f"compile=True has no effect, the pair runs as Pyro does: {self.reason}", stacklevel=2)
        return self._eager(args, weight)

    def _made(self, before: Kept, args: Args, weight: float) -> Compiled:
        """The graph for batches of one shape, once it does what the pair does."""
        if hooked := hooks(self.modules):
            raise Unfit(f"there are hooks on {', '.join(hooked)}, which a graph would not call")
        on_gpu, inputs = self.device.type == "cuda", (self.parameters, self.buffers, (*args, *_weights(weight, args)))
        plain: Graph = graphs.traced(self._step(len(args)), before, *inputs)
        self._compare(plain, before, args, weight, exact=not on_gpu)
        made = Compiled(plain, plain, "graph")
        self.batch_size = self.batch_size or len(args[0])
        if self.wanted and len(args[0]) == self.batch_size:
            made = Compiled(plain, graphs.fused(plain), "inductor")
        if on_gpu:
            made = Compiled(plain, graphs.Captured(made.run, *inputs, num_kept=1), "cuda graph")  # 1: the loss
        if made.run is not plain:
            self._compare(made.run, before, args, weight, exact=False)
        return made

    def _step(self, num_args: int) -> Graph:
        """Loss and gradients of a batch as a function of tensors: parameters, buffers, the batch, the weight if any."""

        def step(parameters: list[Tensor], buffers: list[Tensor], *inputs: Tensor) -> list[Tensor | None]:
            args, weights = inputs[:num_args], inputs[num_args:]
            loss = self.objective.loss(self.pair, args, weights[0] if weights else 1.0)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [loss.detach(), *map(graphs.laid_out, gradients, parameters)]

        return step

    def _compare(self, graph: Graph, before: Kept, args: Args, weight: float, exact: bool) -> None:
        """Raise unless graph and pair do the same to the data, and, with other noise, to every other row twice.

        These are data too, of another order, sum, maximum and count.
        """
        twice = tuple(arg[torch.arange(len(arg), device=arg.device) // 2] for arg in args)
        less = weight if weight == 1 else weight * (0.75 if weight == 2 else 0.5)  # 1 would have another graph
        for draws, batch, each in ((0, args, weight), (1, twice, less)):
            found = []
            for run in (self._eager, partial(self._by_graph, graph)):
                torch.rand(draws, device=self.device)
                found.append(self._outcome(run(batch, each)))
                before.put_back()
            if not self._agree(found[0], found[1], exact):
                raise Unfit("the graph of the pair does not give what the pair gives on other data or other noise")

    def _checked(self, graph: Compiled, args: Args, weight: float) -> Tensor:
        """A step by the pair itself, to which the graph is held; on the CPU they have the same digits."""
        with graphs.unchanged(self.buffers, self.device):
            there = self._outcome(self._by_graph(graph.plain, args, weight))
        before = self._kept(with_values=False)
        loss = self._eager(args, weight)
        here = self._outcome(loss)
        changed, buffers = before.changed(), list(map(id, self.modules.buffers()))
        is_same = self._agree(here, there, exact=self.device.type == "cpu")
        if is_same and not changed and buffers == list(map(id, self.buffers)):
            graph.agreed = graph.steps
            return loss
        why = f"it changes {', '.join(changed)} as it runs" if changed else "it depends on something that no graph sees"
        self._leave(f"at step {self.step} the pair no longer does what its graph does: {why}")
        doubtful = graph.steps - graph.agreed - 1
        doubt = f"the last {doubtful} steps by the graph may be wrong, which compile=False avoids; " if doubtful else ""
        warnings.warn(f"{self.reason}; {doubt}from here on it runs as Pyro does", stacklevel=2)
        return loss

    @torch.no_grad()
    def _outcome(self, loss: Tensor) -> list[Tensor | None]:
        """A copy of loss, gradients, buffers, and on the CPU of what is drawn next, after a step."""
        parts = [loss, *(p.grad for p in self.parameters), *self.buffers]
        # On a GPU a replay may count its draws otherwise: what they were is seen in the gradients.
        noise = [torch.get_rng_state()] if self.device.type == "cpu" else []
        return [None if part is None else part.clone() for part in (*parts, *noise)]

    def _agree(self, here: list[Tensor | None], there: list[Tensor | None], exact: bool) -> bool:
        """Whether two outcomes are the same: bit for bit if `exact`, else up to rounding."""
        if exact:
            return all(map(_is_same, here, there))
        sizes = [0.0 if each is None else graphs.largest(each) for each in here]
        floor = FLOOR * max(sizes[1 : 1 + len(self.parameters)])
        return all(map(_is_same, here, there, [graphs.ROUNDING * size + floor for size in sizes]))


def _weights(weight: float, args: Args) -> Args:
    """The weight as a tensor, which may change from step to step; none where it is 1."""
    return () if weight == 1 else (torch.full((), weight, dtype=torch.float64, device=args[0].device),)


def _is_same(left: Tensor | None, right: Tensor | None, slack: float = 0.0) -> bool:
    """Up to `slack`; what is no number is the same where neither is one."""
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or torch.equal(left, right):
        return left.shape == right.shape
    return torch.allclose(left, right, rtol=0.0, atol=slack if left.is_floating_point() else 0.0, equal_nan=True)
