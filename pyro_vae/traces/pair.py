"""A model and its guide: what programs they are, what they are made of, how they show their parameters to Pyro."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import pyro
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

Program = Callable[..., object]
Values = dict[str, Tensor]

_numbers = itertools.count()
_names: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()


def announce(module: nn.Module) -> None:
    """Show a module's parameters to a plain `pyro.infer.SVI` step, under names that no other module has.

    `SVI.step` collects parameters by a parameter-only trace, and only then is there anyone to tell: `fit` reads them
    from the module, and neither there nor in an estimator does this cost anything or fill Pyro's global store.
    """
    if any(isinstance(h, poutine.trace_messenger.TraceMessenger) and h.param_only for h in _PYRO_STACK):
        name = _names.setdefault(module, f"{type(module).__name__}-{next(_numbers)}")
        pyro.module(name, module)


@dataclass(frozen=True)
class Pair:
    """A Pyro model p(x, z) and a guide q(z | x), called as `model(obs)` or `model(obs, context)`.

    Args:
        model: the program of p.
        guide: the program of q.
        base: the pair that this one was made of, if it was: its modules are modules of this one, too.
    """

    model: Program
    guide: Program
    base: "Pair | None" = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The torch modules that the pair is made of: the programs, what they are methods of, what they close over."""
        parts: list[object] = [*(self.base.modules if self.base is not None else ())]
        parts += [getattr(program, "__self__", program) for program in (self.model, self.guide)]
        for program in (self.model, self.guide):
            parts += [cell.cell_contents for cell in getattr(program, "__closure__", None) or ()]
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))


def lacks_log_prob(model: object) -> str | None:
    """Why a model has no p(x), and what to use instead: its class attribute `no_log_prob`; None for all others."""
    reason = getattr(model, "no_log_prob", None)
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    return None if reason is None else f"{name} has no p(x): {reason}"


def check_has_log_prob(model: object) -> None:
    """Raise a ValueError with the model's own words if it has no p(x)."""
    reason = lacks_log_prob(model)
    if reason is not None:
        raise ValueError(reason)


def as_pair(model: Program | nn.Module, guide: Program | None = None) -> Pair:
    """One of our models, or any Pyro model with its guide, as a pair; a missing guide means no latent sites."""
    if lacks_log_prob(model) is not None:
        return Pair(_refusing(model), guide or _no_latents)
    own_model, own_guide = getattr(model, "model", None), getattr(model, "guide", None)
    if isinstance(model, nn.Module) and callable(own_model):
        return Pair(own_model, guide or own_guide or _no_latents)
    if not callable(model):
        raise TypeError(f"model must be a Pyro program or a module with the method `model`, got {type(model).__name__}")
    return Pair(model, guide or _no_latents)


def _refusing(model: object) -> Program:
    """The program of a model without p(x), which tells whoever runs it why it cannot be run; it holds the module."""

    def program(*args: object) -> None:
        check_has_log_prob(model)

    return program


def _no_latents(*args: object) -> None:
    """The guide of a model without latent sites."""
