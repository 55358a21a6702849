"""A guide by name in a run: where its code lies, whether it is still the code of the fit, how it meets the model."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pyro_vae.guides import family
from pyro_vae.traces import Program


@dataclass(frozen=True)
class Source:
    """Where the code of a guide lies.

    Attributes:
        name: a family of guides/, or FILE.py:NAME with the full path of the file.
        path: that path; None for a family of guides/.
        sha256: of the file; what it imports is not part of it.
    """

    name: str
    path: Path | None = None
    sha256: str | None = None

    @property
    def record(self) -> dict[str, str] | None:
        """What a run notes of a file: `path` and `sha256`."""
        return None if self.path is None else {"path": str(self.path), "sha256": str(self.sha256)}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def locate(guide: str) -> Source:
    """The source of a guide as it is named from here; a FileNotFoundError if there is no such file."""
    path, colon, attribute = guide.rpartition(":")
    if not colon:
        return Source(guide)
    full = Path(path).expanduser().resolve()
    if not full.is_file():
        raise FileNotFoundError(f"no guide at {full}: there is no such file")
    return Source(f"{full}:{attribute}", full, digest(full))


def locate_again(guide: str, record: Mapping[str, str] | None, copy: Path) -> Source:
    """The source of the guide of a fitted run: where it lay then, where its name leads from here, or the run's copy.

    Args:
        guide: as it was given to the fit.
        record: `Source.record` of the fit.
        copy: where the run keeps the code as it was.

    Raises:
        FileNotFoundError: there is no file at any of these places.
        ValueError: there is one, but none is the code of the fit.
    """
    if record is None:
        return locate(guide)
    path, _, attribute = guide.rpartition(":")
    places = [Path(record["path"]), Path(path).expanduser().resolve(), copy.resolve()]
    found = {place: digest(place) for place in places if place.is_file()}
    for place, sha256 in found.items():
        if sha256 == record["sha256"]:
            return Source(f"{place}:{attribute}", place, sha256)
    if not found:
        raise FileNotFoundError(f"the guide {guide} has moved: there is no {' and no '.join(map(str, places))}")
    place, sha256 = next(iter(found.items()))
    raise ValueError(f"the guide {place} has changed since the fit: its SHA-256 was {record['sha256']}, now {sha256}")


def load(source: Source) -> Any:
    """What the name stands for; a ValueError if the file cannot be run."""
    try:
        return family.load(source.name)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"guide {source.name} cannot be loaded: {type(error).__name__}: {error}") from error


def make_program(made: Any, model: nn.Module, options: Mapping[str, Any]) -> Program:
    """A whole Pyro guide: a class is built with the model and the options, a function is taken as it is.

    Raises:
        ValueError: options that it does not have, a class that is no torch module, or a function that reads a module
            from its file, which no copy and no checkpoint would see. `fit` refuses any other hidden parameter.
    """
    name = getattr(made, "__name__", type(made).__name__)
    if inspect.isclass(made):
        return _built(made, name, model, options)
    if options:
        raise ValueError(f"guide {name} is a function and has no option {', '.join(options)}")
    code, names = getattr(made, "__code__", None), getattr(made, "__globals__", {})
    hidden = [each for each in getattr(code, "co_names", ()) if isinstance(names.get(each), nn.Module)]
    if hidden:
        raise ValueError(
            f"guide {name} reads {', '.join(hidden)} from its file, where `fit` does not see the parameters: make it a "
            f"torch module built as {name}(model) that holds them"
        )
    return made


def _built(made: type, name: str, model: nn.Module, options: Mapping[str, Any]) -> Program:
    known = list(inspect.signature(made).parameters)
    if not known:
        raise ValueError(f"guide {name} must be built as {name}(model, ...) or {name}(in_dim, latent_dim, ...), got ()")
    unknown = [option for option in options if option not in known[1:]]
    if unknown:
        raise ValueError(f"guide {name} has no option {', '.join(unknown)}; it has {', '.join(known[1:]) or 'none'}")
    try:
        guide = made(model, **options)
    except TypeError as error:
        raise ValueError(f"guide {name} cannot be built as {name}(model, ...): {error}") from error
    if not isinstance(guide, nn.Module) or type(guide).forward is nn.Module.forward:
        raise ValueError(
            f"guide {name} must be a torch module built as {name}(in_dim, latent_dim, ...) with a forward(features), "
            f"or as {name}(model, ...) with a forward(obs, context=None), got {guide!r}"
        )
    return guide
