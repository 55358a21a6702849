"""The configuration of a run: what a fit depends on, and how model, guide and data are built from it."""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyro_vae import models, plugins, svi
from pyro_vae.data import Data, load_data
from pyro_vae.fitting import OWN_WAYS, own_method
from pyro_vae.guides import family
from pyro_vae.randomness import START, derived_seed, own_randomness
from pyro_vae.spaces import Space
from pyro_vae.traces import Program

GIVEN = ("label", "quadrants")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on: the same configuration gives the same digits on the same machine.

    Attributes:
        model: file name in models/.
        data: name or path of the data set.
        root: where torchvision's files lie.
        space: "binary", "quantized", "real", or None for the data set's default.
        binarization: "dynamic" or "static".
        given: None, "label" or "quadrants": what the model conditions on.
        quadrants: how many are given.
        options: arguments of the model's constructor.
        fit: arguments of `fit`.
        seed: seed of the split, the binarisation, the start and the fit.
        fit_seed: seed of the start and the fit, for another fit of the same recipe to the same data; `seed` if None.
        guide: in place of the model's own, a family of guides/ or FILE.py:NAME: a family, a class built with the
            model, or a function.
        guide_options: further arguments of its constructor.
    """

    model: str
    data: str = "digits"
    root: str | None = None
    space: str | None = None
    binarization: str = "dynamic"
    given: str | None = None
    quadrants: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    fit_seed: int | None = None
    guide: str | None = None
    guide_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("options", "fit", "guide_options"):  # as JSON reads them back, so that equal runs are equal
            object.__setattr__(self, name, json.loads(json.dumps(dict(getattr(self, name)))))
        if self.given is not None and self.given not in GIVEN:
            raise ValueError(f"given must be one of {', '.join(GIVEN)}, got {self.given!r}")
        self._check_guide()

    def _check_guide(self) -> None:
        named = self.options.get("guide")
        if self.guide is not None and named is not None:
            raise ValueError(f"the guide is given twice, as {self.guide!r} and in the model's options as {named!r}")
        if isinstance(named, str) and ":" in named:
            raise ValueError(f"a guide from a file is not an option of the model: --guide {named}")
        if self.guide_options and self.guide is None:
            raise ValueError(f"guide options {', '.join(self.guide_options)} need a guide: --guide")

    def save(self, path: Path) -> None:
        """Write the configuration as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Config":
        """Read what `save` wrote; a FileNotFoundError or ValueError says what is wrong with the file."""
        if not path.is_file():
            raise FileNotFoundError(f"no run at {path.parent}: {path.name} is missing")
        try:
            return Config(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {error}") from error

    def load_data(self) -> Data:
        """The data as this run sees them."""
        # Ignored: these are words from a file or the command line, which `load_data` and `given` check themselves.
        data = load_data(
            self.data,
            space=self.space,  # type: ignore[arg-type]
            root=self.root,
            seed=self.seed,
            binarization=self.binarization,  # type: ignore[arg-type]
        )
        return data if self.given is None else data.given(self.given, self.quadrants)  # type: ignore[arg-type]

    @property
    def start_seed(self) -> int:
        """The seed of the start and of the fit."""
        return self.seed if self.fit_seed is None else self.fit_seed

    def build(self, data: Data, source: plugins.Source | None = None) -> tuple[nn.Module, Program | None]:
        """The model at its start, and a guide that is none of its own, random numbers drawn from the seed.

        Args:
            data: what it is built for.
            source: where the code of the guide lies; as its name leads from here if None.
        """
        if self.guide is None:
            with own_randomness(derived_seed(self.start_seed, START)):
                return build_model(self.model, data, self.options), None
        with own_randomness(derived_seed(self.start_seed, START)):  # what a user's file draws, too
            made = plugins.load(source or plugins.locate(self.guide))
            if family.is_family(made):
                _check_takes_family(self.model, self.guide)
                parts = {"guide": made, "guide_options": dict(self.guide_options)}
                return build_model(self.model, data, {**self.options, **parts}), None
            if fits_its_own_way(self.model, self.fit):
                raise ValueError(f"{self.model} is fitted by maximum likelihood, which uses no guide: {self.guide}")
            model = build_model(self.model, data, self.options)
            return model, plugins.make_program(made, model, self.guide_options)


def model_class(name: str) -> type:
    """The class in models/`name`.py; a ValueError lists the files that there are."""
    listing = models.listing()
    if name not in listing:
        raise ValueError(f"model must be one of {', '.join(listing)}, got {name!r}")
    return getattr(models, listing[name])


def is_conditional(name: str) -> bool:
    """Whether a model needs a context."""
    return "context" in inspect.signature(model_class(name)).parameters


def suits(name: str, space: Space) -> bool:
    """Whether a model can live in a space."""
    return isinstance(space, model_class(name).spaces)  # type: ignore[attr-defined]


def check_suits(name: str, space: Space) -> None:
    """Raise a ValueError for a model that cannot live in a space, with those that it can live in."""
    if not suits(name, space):
        its = " or ".join(each.__name__ for each in model_class(name).spaces)  # type: ignore[attr-defined]
        raise ValueError(f"{name} cannot live in {space}: it needs data in {its}, see --space")


def fits_its_own_way(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether `fit` takes the model's own maximum likelihood or training."""
    return settings.get("method", own_method(model_class(name)) or "svi") != "svi"


def _check_takes_family(name: str, guide: str) -> None:
    def takes(model: str) -> bool:
        return "guide" in inspect.signature(model_class(model)).parameters

    if not takes(name):
        those = ", ".join(filter(takes, models.listing()))
        raise ValueError(f"{name} has no amortised posterior to put the family {guide} in its place; {those} have one")


def build_model(name: str, data: Data, options: Mapping[str, Any]) -> nn.Module:
    """A model by file name; errors name the options that its constructor does not have, or the missing context."""
    check_suits(name, data.space)
    cls = model_class(name)
    known = [p for p in inspect.signature(cls).parameters if p not in ("space", "context")]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    if not is_conditional(name) and data.context is not None:
        raise ValueError(f"{name} models p(x) and takes no context, but the data are given {data.context}")
    if is_conditional(name) and data.context is None:
        raise ValueError(f"{name} needs a context: --given label or --given quadrants")
    where = (data.space,) if data.context is None else (data.space, data.context)
    try:
        return cls(*where, **options)
    except (TypeError, RuntimeError) as error:  # an option of the wrong type or size
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be built with {dict(options)}: {reason}") from error


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError for a fit setting that the way of fitting a model does not have, or that makes no sense."""
    method = settings.get("method", own_method(model_class(name)) or "svi")
    own_way: Any = getattr(model_class(name), OWN_WAYS.get(method, ""), None)
    by_svi = own_way is None
    parameters = inspect.signature(svi.Settings if by_svi else own_way).parameters
    known = {key: p.default for key, p in parameters.items() if key not in ("self", "obs", "data", "seed", "progress")}
    unknown = [key for key in settings if key not in (*known, "method")]
    if unknown:
        raise ValueError(f"the fit of {name} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    if by_svi:  # which checks them itself
        svi.Settings(**{key: value for key, value in settings.items() if key != "method"})
        return
    for key, value in settings.items():
        default = known.get(key, "")
        if isinstance(default, str) or (value is None and default is None):
            continue
        if not isinstance(value, int | float if isinstance(default, float) else int):
            raise ValueError(f"{key} must be a{'' if isinstance(default, float) else ' whole'} number, got {value!r}")
