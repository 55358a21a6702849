"""What the sites and the gradients of a pair must be; each check returns what it found, and raises what is broken."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import traces
from pyro_vae.traces import Pair, Site, Values

JITTER = 0.01  # of parameters, where a gradient of 0 may be no more than a start at 0


class Broken(ValueError):
    """The pair breaks the contract; the message says where."""


class Skip(Exception):
    """The check cannot be done for this pair; the message says why."""


class Subject:
    """What is checked: a pair in evaluation mode at a few data; `own` is the model with a guide that was replaced."""

    def __init__(self, pair: Pair, args: tuple[Tensor, ...], own: Pair | None, seed: int) -> None:
        self.pair, self.args, self.own, self.seed = pair, args, own, seed
        self.known = set(pyro.get_param_store().keys())  # before any run

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.args[0].device

    @cached_property
    def sites(self) -> list[Site]:
        """Every site of both programs at one draw."""
        return traces.sites(self.pair, self.args)

    @property
    def latents(self) -> list[Site]:
        """The latent sites of the guide."""
        return [site for site in self.sites if site.program == "guide" and site.is_latent]

    @property
    def draws(self) -> Values:
        """One draw of each latent for each datum."""
        return {site.name: site.value.detach() for site in self.latents}

    @cached_property
    def tiled(self) -> bool:
        """Whether the programs cannot run under an outer plate of particles."""
        return not traces.broadcasts(self.pair, self.args)

    @cached_property
    def no_density(self) -> str | None:
        """Why log q(z | x) cannot be had at any z; None if it can."""
        try:
            traces.check_density(self.pair, self.args, "this check", "do without it")
        except ValueError as error:
            return str(error)
        return None


def need_latents(subject: Subject) -> None:
    """Skip a check that is about latents."""
    if not subject.latents:
        raise Skip("no latent sites")


def named_list(names: Iterable[str]) -> str:
    """Names, in quotes."""
    return ", ".join(map(repr, names))


def tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def runs(subject: Subject) -> str:
    """Both programs run."""
    return f"{len(subject.sites)} sites at {len(subject.args[0])} data"


def latent_sites(subject: Subject) -> str:
    """Model and guide have the same latent sites."""
    try:
        return ", ".join(traces.matching_sites(subject.pair, subject.args)) or "none"
    except ValueError as error:
        raise Broken(str(error)) from error


def per_datum(subject: Subject) -> str:
    """Every site lies in the plate of the data, with a log-probability for each datum."""
    rows = len(subject.args[0])
    wrong = []
    for site in subject.sites:
        plate, shape = site.plates.get(-1), tuple(site.log_prob.shape)
        if plate != "data" or shape[-1:] != (rows,):
            where = "no plate" if plate is None else f"the plate {plate!r}"
            wrong.append(f"site {site.name!r} of the {site.program} has log_prob of shape {shape} in {where} at dim -1")
    if wrong:
        raise Broken(f"{'; '.join(wrong)}: expected (..., {rows}) inside pyro.plate('data', len(obs), dim=-1)")
    return "in the plate 'data' at dim -1"


def unscaled(subject: Subject) -> str:
    """No site is scaled."""
    wrong = [site for site in subject.sites if not (isinstance(site.scale, int | float) and site.scale == 1)]
    if wrong:
        found = "; ".join(f"site {site.name!r} of the {site.program} has scale {site.scale}" for site in wrong)
        raise Broken(f"{found}: expected 1 (no subsampling plate, no poutine.scale)")
    return "scale 1 at every site"


def reparameterised(subject: Subject) -> str:
    """Draws of the guide carry gradients wherever their law says so."""
    need_latents(subject)
    cut = [
        site.name
        for site in subject.latents
        if site.law.has_rsample and site.log_prob.requires_grad and not site.value.requires_grad
    ]
    if cut:
        raise Broken(
            f"the law at {named_list(cut)} has rsample and parameters, but its draws carry no gradient (detached?)"
        )
    without = {site.name: _law(site) for site in subject.latents if not site.law.has_rsample}
    if without:
        found = ", ".join(f"{name!r} ({law})" for name, law in without.items())
        raise Skip(f"no rsample at {found}: fitted by score gradients, refused by objectives with differentiable draws")
    return f"rsample at {named_list(subject.draws)}"


def gradients(subject: Subject) -> str:
    """The ELBO has a gradient for every parameter, those of a guide that was replaced left out."""
    named = {name: value for name, value in roots_of(subject).named_parameters() if value.requires_grad}
    if not named:
        raise Skip("no parameters in the modules of the pair")
    missing = named.keys() - _reached(subject, subject.pair, named)
    replaced = set() if subject.own is None else missing & _reached(subject, subject.own, named)
    missing -= replaced
    if missing:
        with _jittered(named):
            missing -= _reached(subject, subject.pair, named)
    if missing:
        raise Broken(f"no gradient for {', '.join(label_of(subject, name) for name in named if name in missing)}")
    rest = f"; {len(replaced)} of the guide that was replaced" if replaced else ""
    return f"for {len(named) - len(replaced)} parameters{rest}"


def roots_of(subject: Subject) -> nn.ModuleList:
    """The modules of the pair."""
    return nn.ModuleList(subject.pair.modules)


def label_of(subject: Subject, name: str) -> str:
    """The name of a parameter among `roots_of`, with the class of its module in place of a number."""
    number, _, rest = name.partition(".")
    return f"{type(subject.pair.modules[int(number)]).__name__}.{rest}"


def _reached(subject: Subject, pair: Pair, named: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters with a gradient of the ELBO that is not 0."""
    with torch.enable_grad(), pyro.validation_enabled(False):
        loss = pyro.infer.Trace_ELBO().differentiable_loss(pair.model, pair.guide, *subject.args)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return set()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
    bad = [label_of(subject, name) for name, grad in found.items() if not bool(grad.isfinite().all())]
    if bad:
        raise Broken(f"the gradient is not finite for {', '.join(bad)}")
    return {name for name, grad in found.items() if bool(grad.any())}


@contextmanager
def _jittered(named: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: value.detach().clone() for name, value in named.items()}
    with torch.no_grad():
        for value in named.values():
            value.add_(JITTER * torch.randn_like(value))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in named.items():
                value.copy_(before[name])


def _law(site: Site) -> str:
    return type(getattr(site.law, "base_dist", site.law)).__name__
