"""Expectation-maximisation for mixtures: passes in float32 that float64 checks and ends, restarts, minibatches."""

import math

import torch
from torch import Tensor

from pyro_vae.em_pass import (
    AGREEMENT,
    MANY_ROWS,
    Family,
    Params,
    Progress,
    Task,
    Trace,
    e_step,
    maximized,
    start,
)
from pyro_vae.stepwise_em import Stepwise

SHORT_ITERATIONS = 10  # of each restart before the best one goes on
SHORT_EPOCHS = 2  # the same for stepwise EM: one pass of updates and one that scores them


@torch.no_grad()
def expectation_maximization(
    family: Family,
    rows: Tensor,
    num_components: int,
    *,
    fast: Family | None = None,
    params: Params | None = None,
    seed: int = 0,
    num_iterations: int = 100,
    num_restarts: int = 1,
    tolerance: float = 1e-4,
    batch_size: int | None = None,
    decay: float = 0.7,
    progress: Progress | None = None,
) -> tuple[Params, list[float]]:
    """Maximise mean log p(x) + log prior / n over the parameters of a mixture.

    With several restarts, each runs for a few iterations and the best one goes on. The objective of batch EM never
    falls, up to rounding. A component that no datum belongs to keeps its parameters and loses its weight.

    With a family in float32 (`fast`) and more than 2048 data, passes take it as long as log p of a sample of the data
    differs from float64 by at most 0.001 nats on average, which each pass looks at, and while they gain more than
    that. The last pass, and whatever else is left to gain, is in float64: the last entry of the trace is exact, and an
    entry before it is off by about 0.001 nats at most.

    Args:
        family: the kind of mixture, in float64.
        rows: data (n, ...). They may be mapped from disk: blocks are read in turn, none is kept.
        num_components: K.
        fast: the same kind of mixture in float32.
        params: where to start; None for a k-means partition of some random rows.
        seed: of the starts and of the order of minibatches; the global random state is neither read nor changed.
        num_iterations: passes over the data of the best restart, at most.
        num_restarts: number of starts.
        tolerance: stop when the objective gains less than this, nats per datum.
        batch_size: data per update of stepwise EM (`pyro_vae.stepwise_em`), or None for batch EM.
        decay: κ of its step sizes (t + 2)^-κ.
        progress: called with (iteration, objective) after each pass.

    Returns:
        The parameters, "logits" of the weights among them, and the objective of each pass, nats per datum; its last
        entry belongs to the parameters returned. In stepwise EM an entry before it holds the log p(x) of each datum
        under the parameters that it was shown to.

    Raises:
        ValueError: a setting makes no sense, or fewer data are distinct than there are components.
        FloatingPointError: the objective is not finite.

    Source: Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977 (JRSS B);
    restarts: Biernacki, Celeux, Govaert, "Choosing starting values for the EM algorithm", 2003 (CSDA).
    """
    for name, count in (("num_iterations", num_iterations), ("num_restarts", num_restarts)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if params is not None and num_restarts > 1:
        raise ValueError(f"a fit that goes on from parameters has one start, got num_restarts {num_restarts}")
    generator = torch.Generator().manual_seed(seed)
    task = Task(family, fast if len(rows) > MANY_ROWS else None, rows, tolerance)
    stepwise = None if batch_size is None else Stepwise(task, num_components, batch_size, decay, generator)

    def climb(params: Params | None, num_iterations: int, progress: Progress | None) -> tuple[Params, list[float]]:
        trace = Trace(progress)
        if stepwise is not None:
            return stepwise.climb(params, num_iterations, trace), trace.values
        if params is None:
            params, _ = start(task.fast or family, rows, num_components, generator)
        return _climb(task, params, num_iterations, trace), trace.values

    if num_restarts == 1:
        return climb(params, num_iterations, progress)
    short = min(SHORT_ITERATIONS if batch_size is None else SHORT_EPOCHS, num_iterations)
    params, first = max((climb(None, short, None) for _ in range(num_restarts)), key=lambda run: run[1][-1])
    offset = len(first) - 1  # the first pass of what follows repeats the last one of the short run
    shifted = None if progress is None else lambda iteration, value: progress(offset + iteration, value)
    params, trace = climb(params, num_iterations - offset, shifted)
    return params, first[:-1] + trace


def _climb(task: Task, params: Params, num_iterations: int, trace: Trace) -> Params:
    """Batch EM from `params`: the parameters of the last pass."""
    params, converged = _hasten(task, params, num_iterations - 1, trace)
    left = num_iterations - len(trace.values)
    if converged and task.tolerance >= AGREEMENT:  # one pass to score them exactly
        before = trace.values[-1]
        params = _ascend(task, params, 1, trace)
        if trace.values[-1] >= before - AGREEMENT:
            return params
        trace.values.pop()  # all data say what the sample did not: float32 has led astray
    return _ascend(task, params, left, trace)


def _hasten(task: Task, params: Params, num_iterations: int, trace: Trace) -> tuple[Params, bool]:
    """Passes in float32 while they agree with float64 and gain.

    Returns:
        The parameters to go on from, of which the trace has no entry yet, and whether these have gained nothing more.
    """
    while len(trace.values) < num_iterations and task.fast is not None and task.agree(params):
        found = e_step(task.fast, task.rows, params)
        objective = found.objective(len(task.rows))
        if not math.isfinite(objective):
            break
        if trace.values and objective - trace.values[-1] < max(task.tolerance, AGREEMENT):
            return params, True
        trace.add(objective)
        params = maximized(task.fast, found.sums, params)
    return params, False


def _ascend(task: Task, params: Params, num_iterations: int, trace: Trace) -> Params:
    """Passes in float64, their objectives added to the trace: the parameters of the last one."""
    first = len(trace.values)
    while True:
        is_last = len(trace.values) - first == num_iterations - 1
        found = e_step(task.exact, task.rows, params, only_total=is_last)
        trace.add(found.objective(len(task.rows)))
        if is_last or (len(trace.values) > first + 1 and trace.gain < task.tolerance):
            return params
        params = maximized(task.exact, found.sums, params)
