"""Draws of a pair and their log-densities, one number per particle and datum: log weights and what they are made of."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.randomness import own_randomness
from pyro_vae.traces.pair import Pair, Program, Values
from pyro_vae.traces.records import latent_nodes, log_prob_sum, record, sample_sites, was_observed

# Of programs and laws that are asked for what they cannot do.
FAILURES = (RuntimeError, ValueError, IndexError, AssertionError, TypeError, KeyError, NotImplementedError)

PROBED = 9  # data on which it is found out whether a guide has a fixed law


def draw_latents(pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> tuple[Values, Tensor]:
    """K draws of every latent from the guide, for each datum.

    Returns:
        The values and log q(z_k | x_n), shape (num_particles, n), nats.
    """
    trace = record(pair.guide, args, num_particles, tiled)
    values = {name: site["value"] for name, site in latent_nodes(trace).items()}
    return values, log_prob_sum(trace, args[0], num_particles, tiled, program="guide")


def guide_law(pair: Pair, args: tuple[Tensor, ...]) -> tuple[str, Any] | None:
    """The name of the guide's latent site and its law, batch shape (n,); None unless there is one such site."""
    sites = latent_nodes(poutine.trace(pair.guide).get_trace(*args))
    for name, site in sites.items():
        if len(sites) == 1 and tuple(getattr(site["fn"], "batch_shape", ())) == (len(args[0]),):
            return name, site["fn"]
    return None


def draw_from(name: str, law: Any, num_particles: int) -> tuple[Values, Tensor]:
    """What `draw_latents` gives, from what `guide_law` gave: the guide is not run again."""
    law = law.expand((num_particles, *law.batch_shape))
    value = law()
    return {name: value}, law.log_prob(value).double()


def has_fixed_law(pair: Pair, args: tuple[Tensor, ...], seed: int) -> bool:
    """Whether the guide draws its latent from a law that is the same whenever it runs: then one run is enough.

    Two runs with the same random numbers tell, one under the plate of particles, one not: a guide that draws anything
    else, or whose law depends on how often it ran, gives other latents in the second. Both are of a few data from all
    over `args`, since a guide may do so for some data only.
    """
    last = len(args[0]) - 1
    few = tuple(arg[sorted({part * last // (PROBED - 1) for part in range(PROBED)})] for arg in args)
    try:
        law = guide_law(pair, few)
        if law is None:
            return False
        with own_randomness(seed, few[0].device):
            values, log_q = draw_latents(pair, few, 3, tiled=False)
        with own_randomness(seed, few[0].device):
            again, log_q_again = draw_from(*law, 3)
    except FAILURES:  # a law that was drawn already and cannot be drawn again, for one
        return False
    return torch.equal(log_q, log_q_again) and all(torch.equal(value, again[name]) for name, value in values.items())


def log_joint(pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool) -> Tensor:
    """Log p(x_n, z_k), shape (num_particles, n), nats, at given values of the latents."""
    return log_density(pair.model, args, values, num_particles, tiled, "model")


def log_density(
    program: Program, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool, name: str = "guide"
) -> Tensor:
    """Log-density of one program at given values of its latent sites (and at its data), shape (num_particles, n), nats.

    At values that a guide did not draw itself it may have no density to give: see `check_density`.
    """
    trace = record(poutine.condition(program, data=values), args, num_particles, tiled)
    return log_prob_sum(trace, args[0], num_particles, tiled, program=name)


def log_prior_and_likelihood(
    pair: Pair, args: tuple[Tensor, ...], values: Values, num_particles: int, tiled: bool
) -> tuple[Tensor, Tensor]:
    """Log p(z_k) and log p(x_n | z_k), each of shape (num_particles, n), nats, from one run of the model."""
    trace = record(poutine.condition(pair.model, data=values), args, num_particles, tiled)
    prior = log_prob_sum(trace, args[0], num_particles, tiled, program="model", sites=values.keys())
    return prior, log_prob_sum(trace, args[0], num_particles, tiled, program="model") - prior


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
    guide = record(pair.guide, args, num_particles, tiled)
    values = {name: site["value"] for name, site in latent_nodes(guide).items()}
    model = record(poutine.condition(pair.model, data=values), args, num_particles, tiled)

    def log_prob(trace: poutine.Trace, program: str, sites: Container[str]) -> Tensor:
        return log_prob_sum(trace, args[0], num_particles, tiled, program, sites)

    latents = {}
    for name, value in values.items():
        log_ratio = log_prob(model, "model", (name,)) - log_prob(guide, "guide", (name,))
        num_dims = value.numel() // log_ratio.numel()
        latents[name] = Latent(guide.nodes[name]["fn"], model.nodes[name]["fn"], log_ratio, num_dims)
    return latents, log_prob(model, "model", {name for name, _ in sample_sites(model)} - values.keys())


def draw_prior(pair: Pair, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> Values:
    """K draws of every latent from the model's prior, for each datum."""
    trace = record(poutine.uncondition(pair.model), args, num_particles, tiled)
    return {name: site["value"] for name, site in sample_sites(trace) if not was_observed(site)}


def simulate(pair: Pair, args: tuple[Tensor, ...]) -> Values:
    """Latents and observations drawn from the model, {site: value}; of `obs` only the shape is used."""
    with torch.no_grad():
        trace = poutine.trace(poutine.uncondition(pair.model)).get_trace(*args)
    return {name: site["value"] for name, site in sample_sites(trace)}


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


def take_particles(values: Values, start: int, stop: int, num_data: int, tiled: bool) -> Values:
    """The particles start..stop of what `draw_latents` gave."""
    unit = num_data if tiled else 1
    return {name: value[start * unit : stop * unit] for name, value in values.items()}


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


def broadcasts(pair: Pair, args: tuple[Tensor, ...], *, with_density: bool = True) -> bool:
    """Whether the programs may run under an outer plate: they do, and give what runs one by one give.

    Args:
        pair: model and guide.
        args: of two data or more; two are used.
        with_density: whether log q at given draws is compared too, which takes a guide that can give it. Otherwise the
            guide has to draw, and the model to agree with itself.
    """
    few = tuple(arg[:2] for arg in args)
    try:
        values, log_q = draw_latents(pair, few, 2, tiled=False)
        together = log_joint(pair, few, values, 2, tiled=False)
        alone = torch.stack([_log_joint_at(pair, few, values, k) for k in range(2)])
        if with_density:
            guide = Pair(pair.guide, pair.guide)
            together, alone = (
                together - log_q,
                alone - torch.stack([_log_joint_at(guide, few, values, k) for k in range(2)]),
            )
    except FAILURES:
        return False  # what is wrong for another reason comes up again in the tiled run, and is raised there
    return torch.allclose(together, alone, rtol=1e-4, atol=1e-3)


def _log_joint_at(pair: Pair, args: tuple[Tensor, ...], values: Values, k: int) -> Tensor:
    return log_joint(pair, args, {name: value[k] for name, value in values.items()}, 1, tiled=True)[0]
