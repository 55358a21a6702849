"""The only file that touches poutine: per-datum log weights, latent sites, simulation, scaled latent terms."""

import itertools
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor, nn

Program = Callable[..., object]
Values = dict[str, Tensor]
PARTICLES = "_particles"

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
    """A Pyro model p(x, z) and a guide q(z | x), called as `model(obs)` or `model(obs, context)`."""

    model: Program
    guide: Program

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The torch modules that the pair is made of: the programs, what they are methods of, what they close over."""
        parts: list[object] = [getattr(program, "__self__", program) for program in (self.model, self.guide)]
        for program in (self.model, self.guide):
            parts += [cell.cell_contents for cell in getattr(program, "__closure__", None) or ()]
        return tuple(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))


def as_pair(model: Program | nn.Module, guide: Program | None = None) -> Pair:
    """One of our models, or any Pyro model with its guide, as a pair; a missing guide means no latent sites."""
    own_model, own_guide = getattr(model, "model", None), getattr(model, "guide", None)
    if isinstance(model, nn.Module) and callable(own_model):
        return Pair(own_model, guide or own_guide or _no_latents)
    if not callable(model):
        raise TypeError(f"model must be a Pyro program or a module with the method `model`, got {type(model).__name__}")
    return Pair(model, guide or _no_latents)


def _no_latents(*args: object) -> None:
    """The guide of a model without latent sites."""


def latent_sites(pair: Pair, args: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
    """Names of the latent sites of the model and of the guide."""
    with torch.no_grad():
        guide_trace, model_trace = _traces(pair, args)
    return sorted(_latent(model_trace)), sorted(_latent(guide_trace))


def check_pair(pair: Pair, args: tuple[Tensor, ...]) -> list[str]:
    """The latent sites, after checking that model and guide have the same ones; a ValueError lists both sets."""
    in_model, in_guide = latent_sites(pair, args)
    if in_model != in_guide:
        hint = "" if in_guide else "; pass the guide as guide=..."
        raise ValueError(f"model and guide must have the same latent sites; model: {in_model}, guide: {in_guide}{hint}")
    return in_model


@dataclass(frozen=True)
class Site:
    """A sample site of one run of a program, as it was found.

    Attributes:
        program: "model" or "guide".
        name: of the site.
        law: its distribution.
        value: what was drawn or observed there.
        log_prob: of the value, nats, in the shape that the law gives it, the scale included.
        scale: what Pyro multiplies the log-probability by.
        plates: {dim: name} of the plates around it.
        is_latent: whether it holds no data.
    """

    program: str
    name: str
    law: Any
    value: Tensor
    log_prob: Tensor
    scale: float | Tensor
    plates: dict[int, str]
    is_latent: bool


def sites(pair: Pair, args: tuple[Tensor, ...]) -> list[Site]:
    """Every sample site of one run of the guide, and of the model at the guide's draws, whatever they are worth."""
    found = []
    for program, trace in zip(("guide", "model"), _traces(pair, args), strict=True):
        trace.compute_log_prob()
        for name, site in _samples(trace):
            plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
            facts = site["fn"], site["value"], site["log_prob"], site["scale"], plates, not site["is_observed"]
            found.append(Site(program, name, *facts))
    return found


def observation(pair: Pair, args: tuple[Tensor, ...]) -> Any:
    """The distribution at the site "obs", given latents drawn from the guide."""
    with torch.no_grad():
        nodes = _traces(pair, args)[1].nodes
    if "obs" not in nodes:
        sites = [name for name, node in nodes.items() if node["type"] == "sample"]
        raise ValueError(f"the data must be at the site 'obs' of the model, found the sites {sites}")
    return nodes["obs"]["fn"]


def reconstruct(pair: Pair, args: tuple[Tensor, ...]) -> Tensor:
    """The mean of p(x | z) at one draw z ~ q(z | x) for each datum; (n, *shape)."""
    return observation(pair, args).mean


def simulate(pair: Pair, args: tuple[Tensor, ...]) -> Values:
    """Latents and observations drawn from the model, {site: value}; of `obs` only the shape is used."""
    with torch.no_grad():
        trace = poutine.trace(poutine.uncondition(pair.model)).get_trace(*args)
    return {name: site["value"] for name, site in _samples(trace)}


def draw_latents(pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> tuple[Values, Tensor]:
    """K draws of every latent from the guide, for each datum.

    Returns:
        The values and log q(z_k | x_n), shape (num_particles, n), nats.
    """
    trace = _trace(pair.guide, args, num_particles, tiled)
    values = {name: site["value"] for name, site in _latent(trace).items()}
    return values, _log_prob(trace, args[0], num_particles, tiled, program="guide")


def log_joint(pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool) -> Tensor:
    """Log p(x_n, z_k), shape (num_particles, n), nats, at given values of the latents."""
    return log_density(pair.model, args, values, num_particles, tiled, "model")


def log_density(
    program: Program, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool, name: str = "guide"
) -> Tensor:
    """Log-density of one program at given values of its latent sites (and at its data), shape (num_particles, n), nats.

    At values that a guide did not draw itself it may have no density to give: see `check_density`.
    """
    trace = _trace(poutine.condition(program, data=values), args, num_particles, tiled)
    return _log_prob(trace, args[0], num_particles, tiled, program=name)


def log_prior_and_likelihood(
    pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool
) -> tuple[Tensor, Tensor]:
    """Log p(z_k) and log p(x_n | z_k), each of shape (num_particles, n), nats, from one run of the model."""
    trace = _trace(poutine.condition(pair.model, data=values), args, num_particles, tiled)
    prior = _log_prob(trace, args[0], num_particles, tiled, program="model", sites=values.keys())
    return prior, _log_prob(trace, args[0], num_particles, tiled, program="model") - prior


@dataclass(frozen=True)
class Latent:
    """A latent site of a pair at draws from the guide.

    Attributes:
        posterior: its law in the guide, a row for each particle and datum.
        prior: its law in the model.
        log_ratio: log p(z) - log q(z | x), shape (num_particles, n), nats.
        num_dims: numbers in one draw.
    """

    posterior: Any
    prior: Any
    log_ratio: Tensor
    num_dims: int


def latent_terms(
    pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool
) -> tuple[dict[str, Latent], Tensor]:
    """Every latent site at K draws from the guide, and log p(x_n | z_k) there, shape (num_particles, n), nats."""
    guide = _trace(pair.guide, args, num_particles, tiled)
    values = {name: site["value"] for name, site in _latent(guide).items()}
    model = _trace(poutine.condition(pair.model, data=values), args, num_particles, tiled)

    def log_prob(trace: poutine.Trace, program: str, sites: Container[str]) -> Tensor:
        return _log_prob(trace, args[0], num_particles, tiled, program, sites)

    latents = {}
    for name, value in values.items():
        log_ratio = log_prob(model, "model", (name,)) - log_prob(guide, "guide", (name,))
        num_dims = value.numel() // log_ratio.numel()
        latents[name] = Latent(guide.nodes[name]["fn"], model.nodes[name]["fn"], log_ratio, num_dims)
    return latents, log_prob(model, "model", {name for name, _ in _samples(model)} - values.keys())


def draw_prior(pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> Values:
    """K draws of every latent from the model's prior, for each datum."""
    trace = _trace(poutine.uncondition(pair.model), args, num_particles, tiled)
    return {name: site["value"] for name, site in _samples(trace) if not _was_observed(site)}


def laws(pair: Pair, args: tuple[Tensor, ...]) -> dict[str, Any]:
    """The law of every latent site of the model, {site: distribution}, at latents drawn from the guide."""
    with torch.no_grad():
        guide_trace, model_trace = _traces(pair, args)
    return {name: model_trace.nodes[name]["fn"] for name in _latent(guide_trace)}


def with_laws(program: Program, change: Callable[[str, Any], Any]) -> Program:
    """The same program with `change(site, distribution)` in place of the law of every latent site."""

    def changed(*args: Tensor) -> object:
        with _ChangedLaws(change):
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


def check_density(pair: Pair, args: tuple[Tensor, ...], what: str, instead: str = "plain importance sampling") -> None:
    """Raise a ValueError unless the guide can give log q at values that it did not draw itself.

    Args:
        pair: model and guide.
        args: of two data or more; two are used.
        what: what needs the density, for the message.
        instead: what does not, for the message.
    """
    few = tuple(arg[:2] for arg in args)
    with torch.no_grad():
        values, log_q = draw_latents(pair, few, 1, tiled=True)
        copies = {name: value.clone() for name, value in values.items()}  # flows know their own draws by identity
        try:
            again = log_density(pair.guide, few, copies, 1, tiled=True)
        except (KeyError, NotImplementedError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ValueError(
                f"{what} needs log q(z | x) at any z, and this guide can give it at its own draws only ({reason}); use "
                f"a guide with a density, or {instead}"
            ) from error
    if not torch.allclose(again, log_q, rtol=1e-3, atol=1e-2):
        raise ValueError(
            f"{what} needs log q(z | x) at any z, and this guide gives another value for a copy of its draw"
        )


def take_particles(values: Values, start: int, stop: int, num_data: int, tiled: bool) -> Values:
    """The particles start..stop of what `draw_latents` gave."""
    unit = num_data if tiled else 1
    return {name: value[start * unit : stop * unit] for name, value in values.items()}


def log_weights(pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool = False) -> Tensor:
    """Log p(x_n, z_k) - log q(z_k | x_n) with z_k ~ q(z | x_n), one weight per particle and datum.

    Args:
        pair: model and guide.
        args: obs (n, ...) and, if the model has one, context (n, ...).
        num_particles: K.
        tiled: run the programs on data repeated K times rather than under an outer plate of K particles.

    Returns:
        Shape (num_particles, n), nats.
    """
    values, log_q = draw_latents(pair, args, num_particles, tiled)
    return log_joint(pair, args, values, num_particles, tiled) - log_q


def broadcasts(pair: Pair, args: tuple[Tensor, ...]) -> bool:
    """Whether the programs may run under an outer plate: they do, and give what runs one by one give."""
    few = tuple(arg[:2] for arg in args)
    try:
        values, log_q = draw_latents(pair, few, 2, tiled=False)
        together = log_joint(pair, few, values, 2, tiled=False) - log_q
        alone = torch.stack([_log_weight_at(pair, few, values, k) for k in range(2)])
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError, KeyError, NotImplementedError):
        return False  # what is wrong for another reason comes up again in the tiled run, and is raised there
    return torch.allclose(together, alone, rtol=1e-4, atol=1e-3)


def _log_weight_at(pair: Pair, args: tuple[Tensor, ...], values: Values, k: int) -> Tensor:
    one = {name: value[k] for name, value in values.items()}
    guide = Pair(pair.guide, pair.guide)
    return log_joint(pair, args, one, 1, tiled=True)[0] - log_joint(guide, args, one, 1, tiled=True)[0]


@contextmanager
def scaled_latents(scale: float) -> Iterator[None]:
    """Multiply log p(z) and log q(z | x) by `scale` in all that runs inside: the KL weight of a training schedule."""
    with _ScaledLatents(scale):
        yield


class _ScaledLatents(Messenger):
    def __init__(self, scale: float) -> None:
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


def nonfinite_site(pair: Pair, args: tuple[Tensor, ...]) -> str | None:
    """The first site whose log-probability or value is not finite, as "site 'z' of the guide", or None."""
    with torch.no_grad(), pyro.validation_enabled(False):
        for program, trace in zip(("guide", "model"), _traces(pair, args), strict=True):
            trace.compute_log_prob()
            for name, site in _samples(trace):
                if not bool(site["log_prob"].isfinite().all() and site["value"].isfinite().all()):
                    return f"site {name!r} of the {program}"
    return None


def _traces(pair: Pair, args: tuple[Tensor, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    """The guide's trace, and the model's at the latents of it."""
    guide_trace = poutine.trace(pair.guide).get_trace(*args)
    return guide_trace, poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(*args)


def _samples(trace: poutine.Trace) -> list[tuple[str, Any]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not pyro.poutine.util.site_is_subsample(site)
    ]


def _latent(trace: poutine.Trace) -> dict[str, Any]:
    return {name: site for name, site in _samples(trace) if not site["is_observed"]}


def _trace(program: Program, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> poutine.Trace:
    if tiled:
        args = tuple(arg.repeat(num_particles, *[1] * (arg.ndim - 1)) for arg in args)
        return poutine.trace(program).get_trace(*args)
    with pyro.plate(PARTICLES, num_particles, dim=-2):
        return poutine.trace(program).get_trace(*args)


def _was_observed(site: Any) -> bool:
    """Whether a site of an unconditioned trace holds data in the model itself."""
    return site["infer"].get("was_observed", False)


def _log_prob(
    trace: poutine.Trace,
    obs: Tensor,
    num_particles: int,
    tiled: bool,
    program: str,
    sites: Container[str] | None = None,
) -> Tensor:
    """Sum of the sites' log-probabilities, one number per particle and datum, in float64 where `obs` lies."""
    trace.compute_log_prob()
    num_data = len(obs)
    rows = num_particles * num_data if tiled else num_data
    total = torch.zeros(num_particles, num_data, dtype=torch.float64, device=obs.device)
    for name, site in _samples(trace):
        if sites is not None and name not in sites:
            continue
        _check_site(name, site, rows, program)
        log_prob = site["log_prob"].double()
        if tiled:
            log_prob = log_prob.reshape(-1, rows).sum(0).reshape(num_particles, num_data)
        elif log_prob.ndim > 2:
            raise ValueError(f"site {name!r} of the {program} lies in a plate left of the particles")
        total = total + log_prob
    return total


def _check_site(name: str, site: Any, rows: int, program: str) -> None:
    if not (isinstance(site["scale"], int | float) and site["scale"] == 1):
        raise ValueError(
            f"site {name!r} of the {program} has scale {site['scale']}; a log-likelihood needs scale 1 at every site "
            "(no subsampling plate, no poutine.scale)"
        )
    shape = tuple(site["log_prob"].shape)
    if not any(frame.dim == -1 for frame in site["cond_indep_stack"]) or shape[-1:] != (rows,):
        raise ValueError(
            f"log_prob of site {name!r} of the {program} must have shape (..., {rows}), one entry per datum, got "
            f"{shape}: put the site inside pyro.plate('data', len(obs), dim=-1)"
        )
