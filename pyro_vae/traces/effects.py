"""What can be changed around a program that runs: the scale or the law of its latents, the plates, the handlers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor

from pyro_vae.traces.pair import Program

PARTICLES = "_particles"


@contextmanager
def scaled_latents(scale: float | Tensor) -> Iterator[None]:
    """Multiply log p(z) and log q(z | x) by `scale` in all that runs inside: the KL weight of a training schedule."""
    with _ScaledLatents(scale):
        yield


def with_laws(program: Program, change: Callable[[str, Any], Any]) -> Program:
    """The same program with `change(site, distribution)` in place of the law of every latent site."""

    def changed(*args: Tensor) -> object:
        with _ChangedLaws(change):
            return program(*args)

    return changed


def with_observation(program: Program, law: Callable[[Any], Any], value: Callable[[Tensor], Tensor]) -> Program:
    """The same program with `law(distribution)` and `value(data)` in place of those of the site "obs"."""

    def changed(*args: Tensor) -> object:
        with _ChangedObservation(law, value):
            return program(*args)

    return changed


def particle_shape() -> tuple[int, ...]:
    """(num_particles,) inside a program that runs under the outer plate of particles, () elsewhere."""
    for handler in _PYRO_STACK:
        if isinstance(handler, pyro.plate) and handler.name == PARTICLES:
            return (handler.size,)
    return ()


@contextmanager
def apart() -> Iterator[None]:
    """Run programs inside as if nothing ran around them: no handler sees their sites, and no plate is open."""
    handlers, plates = _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:]
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = handlers, plates


class _ScaledLatents(Messenger):
    def __init__(self, scale: float | Tensor) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not pyro.poutine.util.site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.scale


class _ChangedLaws(Messenger):
    def __init__(self, change: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.change = change

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not pyro.poutine.util.site_is_subsample(msg):
            msg["fn"] = self.change(msg["name"], msg["fn"])


class _ChangedObservation(Messenger):
    def __init__(self, law: Callable[[Any], Any], value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.law, self.value = law, value

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "obs" and msg["is_observed"]:
            msg["fn"], msg["value"] = self.law(msg["fn"]), self.value(msg["value"])
