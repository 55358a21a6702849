"""Streaming: the log weights of all data and particles in blocks of fixed size, and the sums that are kept of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyro_vae import diagnostics, distributed, traces
from pyro_vae.estimators.head import SHARED, keep_memory
from pyro_vae.estimators.precision import Scorer, writes_no_logits
from pyro_vae.estimators.watch import Watch
from pyro_vae.independent import by_kernels
from pyro_vae.randomness import derived_seed, own_randomness, reseed
from pyro_vae.traces import Pair

# Rows (particles x data) of one block. On the CPU the logits of a block stay near the cache; on a GPU a block fills
# the chip. Fixed per kind of device, so that the same seed gives the same noise whatever memory is free.
BLOCK_ROWS = {"cpu": 2048, "cuda": 2**21}
GRADIENT_ROWS = {"cpu": 2048, "cuda": 2**18}  # of one block where a gradient keeps what the model computed
# Blocks that are drawn one by one, each with its seed, and scored at once, as a run of the handlers takes the time of
# some hundred rows. Where logits are written to memory, blocks of more numbers than this take longer for it.
TOGETHER = {"cpu": 10, "cuda": 1}
NUMBERS = 2**21
SERIES_TERMS = 8  # see `Accumulator.jackknife`
MIN_TAIL = 5  # fewer tail weights than this say nothing of their shape


Draw = Callable[[int], tuple[traces.Values, Tensor]]  # that many particles of each datum, and log q of them


@dataclass
class Blocks:
    """Log weights of all data and particles, block by block, each block with a seed of its own.

    With `rows`, indices of data (r,), each of these counts as a datum of its own, and data may come up many times.
    """

    pair: Pair
    args: tuple[Tensor, ...]
    num_particles: int
    seed: int
    tiled: bool
    rows: Tensor | None = None
    precision: str = "float32"  # of the model's linear layers
    fixed_law: bool = False  # whether one run of the guide is enough for all particles of a datum
    shrunk: int = field(default=1, init=False)  # parts that a block is cut into since memory ran out

    def __post_init__(self) -> None:
        rows = BLOCK_ROWS.get(self.args[0].device.type, BLOCK_ROWS["cpu"])
        self.block_particles = min(self.num_particles, rows // 4)
        self.block_data = max(1, rows // self.block_particles)
        self._watch = Watch()
        self._scorer = Scorer(self.precision, self._watch)
        self.together = self._num_together()
        if self.args[0].device.type == "cpu":
            keep_memory()

    @property
    def num_rows(self) -> int:
        """How many data there are, each as often as it comes up."""
        return len(self.args[0] if self.rows is None else self.rows)

    def _num_together(self) -> int:
        """How many blocks are scored at once.

        It is found out before the first of them, on few data, and not on the way: the last digits of a product depend
        on its number of rows, and a process that begins with later data must give the digits of one that began with
        the first.
        """
        most = TOGETHER.get(self.args[0].device.type, 1)
        numbers = self.block_particles * self.block_data * self.args[0][0].numel()
        few = max(1, min(most, NUMBERS // numbers))
        if few == most or self.num_particles <= few * self.block_particles:
            return few
        one = tuple(arg[:1] for arg in self.args)
        with own_randomness(self.seed), torch.no_grad():
            values, _ = traces.draw_latents(self.pair, one, SHARED, self.tiled)
            return most if writes_no_logits(self.pair, one, values, SHARED, self.tiled) else few

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of data, start and stop; what a GPU found to be wrong in any of them is raised after the last."""
        for start in range(0, self.num_rows, self.block_data):
            yield start, min(start + self.block_data, self.num_rows)
        self._watch.end()

    def particles(self, start: int, stop: int) -> Iterator[Tensor]:
        """Log weights (k, stop - start) of the data start..stop, until all particles are spent."""
        data: Sequence[int] = range(start, stop)
        args = tuple(arg[start:stop] for arg in self.args)
        if self.rows is not None:
            data = self.rows[start:stop].tolist()
            args = tuple(arg[self.rows[start:stop]] for arg in self.args)
        draw = self._drawer(args)
        together = self.block_particles * self.together
        for first in range(0, self.num_particles, together):
            last = min(first + together, self.num_particles)
            with by_kernels():
                log_weights = self._score_block(args, last - first, *self._draw(draw, args, start, first, last))
            self._check_weights(log_weights, data)
            yield log_weights

    def _draw(
        self, draw: Draw, args: tuple[Tensor, ...], start: int, first: int, last: int
    ) -> tuple[traces.Values, Tensor]:
        """The particles first..last of all sites, and log q of them, block by block."""
        drawn = []
        for begin in range(first, last, self.block_particles):
            reseed(derived_seed(self.seed, start, begin), args[0].device)
            drawn.append(draw(min(self.block_particles, last - begin)))
        if len(drawn) == 1:
            return drawn[0]
        values = {name: torch.cat([values[name] for values, _ in drawn]) for name in drawn[0][0]}
        return values, torch.cat([log_q for _, log_q in drawn])

    def _drawer(self, args: tuple[Tensor, ...]) -> Draw:
        """What draws that many particles and gives log q of them, the same digits either way."""
        if self.fixed_law and self.num_particles > self.block_particles:
            law = traces.guide_law(self.pair, args)
            if law is not None:
                return partial(traces.draw_from, *law)
        return partial(traces.draw_latents, self.pair, args, tiled=self.tiled)

    def _score_block(self, args: tuple[Tensor, ...], count: int, values: traces.Values, log_q: Tensor) -> Tensor:
        """One block; where memory runs out the same draws are scored in halves, so that the noise stays the same."""
        while True:
            try:
                return self._log_joint(args, values, count) - log_q
            except torch.OutOfMemoryError:
                if self.shrunk >= max(count, len(args[0]) if count == 1 else 1):
                    raise
                self.shrunk *= 2
                torch.cuda.empty_cache()

    def _log_joint(self, args: tuple[Tensor, ...], values: traces.Values, count: int) -> Tensor:
        """The block in `shrunk` parts, along the particles or, if there is one particle only, along the data."""
        num_data = len(args[0])
        if count == 1:
            step = -(-num_data // self.shrunk)
            ranges = [(first, min(first + step, num_data)) for first in range(0, num_data, step)]
            return torch.cat([self._data_part(args, values, *part) for part in ranges], 1)
        step = -(-count // self.shrunk)
        ranges = [(first, min(first + step, count)) for first in range(0, count, step)]
        return torch.cat([self._particle_part(args, values, *part) for part in ranges])

    def _particle_part(self, args: tuple[Tensor, ...], values: traces.Values, first: int, last: int) -> Tensor:
        few = traces.take_particles(values, first, last, len(args[0]), self.tiled)
        return self._scorer.log_joint(self.pair, args, few, last - first, self.tiled)

    def _data_part(self, args: tuple[Tensor, ...], values: traces.Values, first: int, last: int) -> Tensor:
        few = {name: v[first:last] if self.tiled else v[:, first:last] for name, v in values.items()}
        return self._scorer.log_joint(self.pair, tuple(arg[first:last] for arg in args), few, 1, self.tiled)

    def _check_weights(self, log_weights: Tensor, data: Sequence[int]) -> None:
        """NaN and +inf are errors that name the datum; -inf is a weight of zero."""
        bad = (log_weights.isnan() | (log_weights == math.inf)).any(0)

        def error() -> ValueError:
            column = int(bad.nonzero()[0])
            values = log_weights[:, column]
            value = float(values[values.isnan() | (values == math.inf)][0])
            return ValueError(
                f"log weight of datum {data[column]} is {value} ({int(bad.sum())} such data in its block)"
            )

        self._watch(bad.any(), error)

    def notes(self) -> tuple[str, ...]:
        """What happened on the way."""
        tiled = ("the programs ran on tiled data, one row per particle and datum",) if self.tiled else ()
        longer = ("the model was scored in float64, at the draws of the guide",) if self.precision == "float64" else ()
        parts = distributed.largest(self.shrunk)
        shrunk = (f"memory ran out: each block was scored in {parts} parts",) if parts > 1 else ()
        return tiled + longer + shrunk


class Accumulator:
    """Running sums over particles for a block of data: nothing of size particles x data is held."""

    def __init__(self, num_particles: int, num_data: int, device: torch.device, jackknife: bool) -> None:
        self.num_particles, self.count = num_particles, 0
        self.wants_jackknife = jackknife
        self.max = torch.full((num_data,), -math.inf, dtype=torch.float64, device=device)
        num_sums = SERIES_TERMS if jackknife else 2
        self.sums = torch.zeros(num_sums, num_data, dtype=torch.float64, device=device)  # Σ exp(j (v - max))
        self.tail = diagnostics.tail_length(num_particles)
        self.largest = torch.empty(0, num_data, dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_data, dtype=torch.float64, device=device)  # of the log weights
        self.squares = torch.zeros(num_data, dtype=torch.float64, device=device)  # Σ (v - mean)²
        self.snapshots: dict[int, Tensor] = {}
        self.marks = [num_particles // 4, num_particles // 2] if num_particles >= 8 else []

    def update(self, log_weights: Tensor) -> None:
        """Take in log weights (k, n); a block is cut where a snapshot is due."""
        cuts = [mark - self.count for mark in self.marks if self.count < mark < self.count + len(log_weights)]
        for piece in log_weights.tensor_split(cuts):
            self._add(piece)
            if self.count in self.marks:
                self.snapshots[self.count] = self.log_mean()

    def _add(self, log_weights: Tensor) -> None:
        top = torch.maximum(self.max, log_weights.max(0).values)
        shift = torch.where(top == -math.inf, 0.0, top)  # all weights zero so far
        powers = torch.arange(1, len(self.sums) + 1, device=top.device, dtype=torch.float64)
        weights = torch.exp(log_weights - shift)
        self.sums *= torch.exp(powers[:, None] * torch.where(self.max == -math.inf, -math.inf, self.max - shift))
        power = weights
        for j in range(len(self.sums)):
            self.sums[j] += power.sum(0)
            power = power * weights
        self._add_moments(log_weights)
        self.max, self.count = top, self.count + len(log_weights)
        keep = min(self.count, max(self.tail + 1, 64))
        self.largest = torch.cat([self.largest, log_weights]).topk(keep, 0).values

    def _add_moments(self, log_weights: Tensor) -> None:
        """Mean and sum of squares of the log weights, merged as Chan, Golub and LeVeque (1983) do."""
        added, mean = len(log_weights), log_weights.mean(0)
        delta, total = mean - self.mean, self.count + added
        self.squares = self.squares + (log_weights - mean).square().sum(0) + delta**2 * (self.count * added / total)
        self.mean = self.mean + delta * (added / total)

    def log_mean(self) -> Tensor:
        """Log of the mean weight so far, (n,)."""
        return self.max + self.sums[0].log() - math.log(self.count)

    def finish(self) -> dict[str, Tensor]:
        """The figures, once all particles are in."""
        if self.count != self.num_particles:
            raise RuntimeError(f"{self.count} particles were used where {self.num_particles} were asked for")
        ess = self.sums[0] ** 2 / self.sums[1]
        figures = {
            "log_prob": self.jackknife() if self.wants_jackknife else self.log_mean(),
            "variance": diagnostics.delta_variance(ess, self.num_particles),
            "ess": ess,
            "elbo": self.mean.nan_to_num(nan=-math.inf, neginf=-math.inf),  # NaN after a weight of zero
        }
        if self.num_particles > 1:
            figures["spread"] = self.squares.nan_to_num(nan=math.inf) / (self.num_particles - 1)
        if self.tail >= MIN_TAIL:
            figures["khat"] = diagnostics.pareto_khat(self.largest[: self.tail + 1])
        if self.marks:
            figures |= {"quarter": self.snapshots[self.marks[0]], "half": self.snapshots[self.marks[1]]}
        return figures

    def jackknife(self) -> Tensor:
        """L_J = L - (K-1)/K Σ_k [log(1 - r_k) - log(1 - 1/K)] with r_k = w_k / Σ w.

        The largest r_k are taken one by one, and for the largest of all 1 - r is the sum of the others. Each other r is
        at most 1/64, so eight terms of the series of log(1 - r) leave an error below 1e-17 each, and their power sums
        are the streamed ones less the largest's.
        """
        k = self.num_particles
        share = torch.exp(self.largest - self.max) / self.sums[0]  # largest first
        rest = torch.zeros_like(self.sums)
        if k > len(self.largest):
            powers = torch.arange(1, SERIES_TERMS + 1, device=share.device, dtype=torch.float64)[:, None]
            of_all = self.sums / self.sums[0] ** powers
            rest = (of_all - torch.stack([(share**j).sum(0) for j in range(1, SERIES_TERMS + 1)])).clamp(min=0)
        total = (share[1:].sum(0) + rest[0]).log() + torch.log1p(-share[1:]).sum(0)
        total = total - sum(rest[j - 1] / j for j in range(1, SERIES_TERMS + 1))
        return self.log_mean() - (k - 1) / k * total + (k - 1) * math.log1p(-1 / k)
