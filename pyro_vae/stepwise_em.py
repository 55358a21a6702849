r"""Stepwise EM for data larger than memory: an M step after each minibatch, from a running mean of its statistics.

After batch t = 0, 1, ... with mean statistics s̄ of its data under their responsibilities at the present parameters θ,

    s ← (1 - γ_t) s + γ_t s̄,    γ_t = (t + 2)^-κ,    θ ← M step from s.

In memory at a time: one batch, the statistics of K components, and an index of 8 bytes per datum. The parameters come
to rest at a stationary point of the likelihood if κ is above ½ and at most 1; a small κ forgets the start sooner, a
large one averages over more batches.

Sources: Cappé, Moulines, "On-line expectation-maximization algorithm for latent data models", 2009 (JRSS B),
arXiv:0712.4273; Liang, Klein, "Online EM for unsupervised models", 2009 (NAACL).
"""

import math

import torch
from torch import Tensor

from pyro_vae.em_pass import Expectation, Params, Task, Trace, e_step, maximized, start
from pyro_vae.k_means import random_rows


class Stepwise:
    """Stepwise EM of one mixture.

    Args:
        task: what is fitted.
        num_components: K.
        batch_size: data per update.
        decay: κ, above ½ and at most 1. With 0 all steps have size 1, which is batch EM if a batch is all data.
        generator: source of the start and of the order of the data, on the CPU.

    Raises:
        ValueError: a batch of no data, or a κ whose steps lead nowhere.
    """

    def __init__(
        self, task: Task, num_components: int, batch_size: int, decay: float, generator: torch.Generator
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0.5 < decay <= 1 and not (decay == 0 and batch_size >= len(task.rows)):
            raise ValueError(f"decay must be above 0.5 and at most 1 (0 for a batch of all data), got {decay}")
        self.task, self.num_components, self.generator = task, num_components, generator
        self.batch_size, self.decay, self.num_rows = batch_size, decay, len(task.rows)

    def climb(self, params: Params | None, num_iterations: int, trace: Trace) -> Params:
        """Passes over the data until they gain less than the tolerance; the last one only scores, in float64.

        Args:
            params: where to start, with one pass of batch EM, or None for k-means on some random rows.
            num_iterations: passes, at most.
            trace: takes the objective of each.

        Returns:
            The parameters.
        """
        num_updates = 0
        if params is None:
            params, running = self._start()
        elif num_iterations > 1:
            params, running = self._whole_pass(params, trace)
            num_updates = math.ceil(self.num_rows / self.batch_size)  # as if it had been a pass of updates
        while len(trace.values) < num_iterations - 1:
            params, running, num_updates = self._epoch(params, running, num_updates, trace)
            if trace.gain < self.task.tolerance:
                break
        trace.add(e_step(self.task.exact, self.task.rows, params, only_total=True).objective(self.num_rows))
        return params

    def _start(self) -> tuple[Params, list[Tensor]]:
        """Parameters, and the means that they come from."""
        rows = self._rows(random_rows(self.num_rows, self.num_components, self.generator))
        params, sums = start(self.task.exact, rows, self.num_components, self.generator)
        return params, [each / len(rows) for each in sums]

    def _whole_pass(self, params: Params, trace: Trace) -> tuple[Params, list[Tensor]]:
        found = e_step(self.task.exact, self.task.rows, params)
        trace.add(found.objective(self.num_rows))
        return maximized(self.task.exact, found.sums, params), [each / self.num_rows for each in found.sums]

    def _epoch(
        self, params: Params, running: list[Tensor], num_updates: int, trace: Trace
    ) -> tuple[Params, list[Tensor], int]:
        """One pass of updates, in float32 if that holds where it begins."""
        family = self.task.fast if self.task.fast is not None and self.task.agree(params) else self.task.exact
        totals, log_prior = [], family.law(params).log_prior  # of the parameters that the epoch begins with
        for index in torch.randperm(self.num_rows, generator=self.generator).split(self.batch_size):
            found = e_step(family, self._rows(index), params)
            totals.append(found.total)
            size = (num_updates + 2) ** -self.decay
            share = size / len(index)
            running = [(1 - size) * old + share * new for old, new in zip(running, found.sums, strict=True)]
            params = maximized(family, [self.num_rows * each for each in running], params)
            num_updates += 1
        trace.add(Expectation(torch.stack(totals).sum(), log_prior, []).objective(self.num_rows))
        return params, running, num_updates

    def _rows(self, index: Tensor) -> Tensor:
        """These data, in order, so that a disk is read in one direction."""
        return self.task.rows[index.sort().values.to(self.task.rows.device)]
