"""What a family of amortised posteriors is: how it is named, built, and put into a guide.

A family is an `nn.Module` built as `Family(in_dim, latent_dim, *, ...)`, where `in_dim` is the number of features that
the encoder gives. Called as `family(features)`, it returns q(z | x), a law with events of shape (latent_dim,) and one
row per datum. That is all that a user's own needs. Four things more are asked for by name:

- `has_density`: whether log q(z | x) can be had at any z, and not only at the draws of the law itself; True if it is
  not there.
- `sample_latents(features, log_joint)`: in place of the call, for a family that is more than a law of z. It draws the
  site "z", and perhaps others, marked by `infer=AUXILIARY`, as they are no latents of p(x, z); `log_joint(z)` is
  log p(x, z) of each datum, shape (..., n), nats.
- `stratified`: True for a family whose particles, in training mode, depend on each other. `fit` sets it to False for
  an objective whose gradient needs independent ones.
- `extend_model(z, features)`: the laws that the model gives to those other sites.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_vae.checks import check_count

LogJoint = Callable[[Tensor], Tensor]
Choice = str | nn.Module | Callable[..., nn.Module]
ARGUMENTS = ["in_dim", "latent_dim"]  # of every family's constructor, first
AUXILIARY: Any = {"extends_model": True}  # no key of Pyro's, whose auxiliary sites are in the guide alone


@cache
def listing() -> dict[str, str]:
    """The families of this folder, {file name: class name}, read from the sources without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                found[path.stem] = node.name
    return found


def load(name: str) -> Any:
    """What a guide's name stands for: a family of this folder, or NAME in a file of the user's, as FILE.py:NAME.

    Raises:
        ValueError: there is no such family, or no such name in the file.
        FileNotFoundError: there is no such file.
    """
    path, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in listing():
            raise ValueError(f"guide must be one of {', '.join(listing())}, or FILE.py:NAME, got {name!r}")
        return getattr(importlib.import_module(f"pyro_vae.guides.{name}"), listing()[name])
    module = _load_file(Path(path))
    if not callable(getattr(module, attribute, None)):
        there = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"{path} has no class or function {attribute!r}; it has {', '.join(there) or 'none'}")
    return getattr(module, attribute)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no guide at {path}: there is no such file")
    name = f"_guide_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import would, so that what it defines can be pickled
    spec.loader.exec_module(module)
    return module


def is_family(made: object) -> bool:
    """Whether a class or function builds a family, by its first arguments; else it is a guide program of its own."""
    if not callable(made):
        return False
    return list(inspect.signature(made).parameters)[: len(ARGUMENTS)] == ARGUMENTS


def make_posterior(guide: Choice, in_dim: int, latent_dim: int, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A family, built.

    Args:
        guide: name of a family ("mean_field", ...), "FILE.py:NAME", a class, or a module that is built already.
        in_dim: number of features.
        latent_dim: number of latents.
        options: further arguments of the family's constructor.

    Raises:
        ValueError: an unknown name, options that the constructor does not have, or what is no family.
    """
    check_count("latent_dim", latent_dim)
    options = dict(options or {})
    if isinstance(guide, nn.Module):
        if options:
            raise ValueError(f"options {', '.join(options)} are for a guide by name, not for one that is built already")
        return guide
    made = load(guide) if isinstance(guide, str) else guide
    name = guide if isinstance(guide, str) else getattr(made, "__name__", repr(made))
    if not is_family(made):
        raise ValueError(f"guide {name} must be built as {name}(in_dim, latent_dim, ...), with a forward(features)")
    known = [key for key in inspect.signature(made).parameters if key not in ARGUMENTS]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"guide {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return made(in_dim, latent_dim, **options)


def sample(posterior: nn.Module, features: Tensor, log_joint: LogJoint) -> None:
    """The latent sites of a guide: z ~ q(z | x), and what else the family draws."""
    own: Any = getattr(posterior, "sample_latents", None)
    if own is not None:
        own(features, log_joint)
        return
    law = posterior(features)
    if len(getattr(law, "event_shape", ())) != 1:
        found = f"event shape {tuple(law.event_shape)}" if hasattr(law, "event_shape") else type(law).__name__
        raise ValueError(
            f"the forward of guide {type(posterior).__name__} must return a Pyro distribution with event shape "
            f"(latent_dim,), as by .to_event(1), got {found}"
        )
    pyro.sample("z", law)


def extend(posterior: nn.Module, z: Tensor, features: Callable[[], Tensor]) -> None:
    """The model's laws of the sites that the family adds to "z"; none for most."""
    own: Any = getattr(posterior, "extend_model", None)
    if own is not None:
        own(z, features())


def has_density(posterior: nn.Module) -> bool:
    """Whether log q(z | x) can be had at any z."""
    return bool(getattr(posterior, "has_density", True))
