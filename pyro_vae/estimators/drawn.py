"""A guide made of a function: it draws all latents of a pair at once and knows their joint density."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import traces
from pyro_vae.traces import Program, Values


@dataclass(frozen=True)
class Draw:
    """Latents of a pair and the law that they were drawn from.

    Attributes:
        values: of every site, as `traces.draw_latents` gives them.
        log_density: joint log q at values of every site, shape (num_particles, n), nats.
        event_dims: number of event dimensions of each site.
    """

    values: Values
    log_density: Callable[[Values], Tensor]
    event_dims: Mapping[str, int]


def guide_of(draw: Callable[[tuple[Tensor, ...], int, bool], Draw]) -> Program:
    """A Pyro guide with one site for each value that `draw` gives; its log q may be asked for at any values.

    Args:
        draw: called as `draw(args, num_particles, tiled)`, in the form in which `traces` runs programs: with K
            particles of each datum or, on tiled data, with one.

    Returns:
        A program called as any guide is. Each site but the last has log-probability 0; the last holds log q of all.
    """

    def guide(*args: Tensor) -> None:
        particles = traces.particle_shape()
        with traces.apart():
            drawn = draw(args, *((particles[0], False) if particles else (1, True)))
        shape = (*particles, len(args[0]))
        seen: Values = {}
        with pyro.plate("data", len(args[0]), dim=-1):
            for name, value in drawn.values.items():
                is_last = len(seen) + 1 == len(drawn.values)
                log_density = _at_the_last(drawn, name, seen) if is_last else None
                seen[name] = pyro.sample(name, _Drawn(value, drawn.event_dims[name], shape, log_density))

    return guide


def _at_the_last(drawn: Draw, name: str, seen: Values) -> Callable[[Tensor], Tensor]:
    """Joint log q as a function of the last site's value, given those of the others."""

    def log_density(value: Tensor) -> Tensor:
        with traces.apart():
            return drawn.log_density({**seen, name: value})

    return log_density


class _Drawn(TorchDistribution):
    """A value that is already drawn, with a log-density in place of its own law's."""

    arg_constraints = {}  # noqa: RUF012 (as every law of torch has it)
    support = constraints.real

    def __init__(
        self, value: Tensor, event_dim: int, rows: tuple[int, ...], log_density: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.value, self.rows, self.log_density = value, rows, log_density
        split = value.ndim - event_dim
        super().__init__(value.shape[:split], value.shape[split:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: object = None) -> "_Drawn":
        """Itself: it has all its rows, and the value must stay the very tensor that was drawn."""
        if tuple(batch_shape) != tuple(self.batch_shape):
            raise ValueError(f"a drawn value has rows {tuple(self.batch_shape)}, the plates {tuple(batch_shape)}")
        return self

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.value

    def log_prob(self, value: Tensor) -> Tensor:
        if self.log_density is None:
            return torch.zeros(self.rows, dtype=torch.float64, device=value.device)
        return self.log_density(value).reshape(self.rows)
