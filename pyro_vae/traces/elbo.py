"""The ELBO of one run, added up as the programs go: what Trace_ELBO gives, without its records, checks and floats."""

from collections.abc import Mapping
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_identically_zero
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.traces.effects import PARTICLES
from pyro_vae.traces.pair import Pair, Program
from pyro_vae.traces.records import sample_sites

Sites = dict[str, Any]
Weight = float | Tensor


def elbo(
    pair: Pair, args: tuple[Tensor, ...], num_particles: int, together: bool, weight: Weight, closed_form: bool
) -> Tensor:
    """Σ_n of 1/K Σ_k [log p(x_n | z_k) + c (log p(z_k) - log q(z_k | x_n))], a scalar, nats, to be differentiated.

    Draws and sums come in the order of `pyro.infer.Trace_ELBO`, so that the gradients have its digits. Nothing is
    turned into a Python number on the way, so that a run can be traced below Python.

    Args:
        pair: model and guide; all draws of the guide are differentiable.
        args: obs (n, ...) and, if the model has one, context (n, ...).
        num_particles: K.
        together: under one outer plate of K particles; else in K runs.
        weight: c.
        closed_form: take KL(q, p) of a site in closed form where there is one, as `TraceMeanField_ELBO` does.
    """
    if together:
        with pyro.plate(PARTICLES, num_particles, dim=-2):
            return _one_run(pair, args, weight, closed_form) / num_particles
    runs = [_one_run(pair, args, weight, closed_form) / num_particles for _ in range(num_particles)]
    return runs[0] if num_particles == 1 else sum(runs[1:], runs[0])


def is_pathwise(pair: Pair, args: tuple[Tensor, ...]) -> bool:
    """Whether the gradient of the ELBO goes through the draws of the guide alone, with no score of any site."""
    trace = poutine.trace(pair.guide).get_trace(*args)
    trace.compute_score_parts()
    parts = [site["score_parts"] for _, site in sample_sites(trace)]
    return all(is_identically_zero(each.score_function) and each.entropy_term is each.log_prob for each in parts)


def _one_run(pair: Pair, args: tuple[Tensor, ...], weight: Weight, closed_form: bool) -> Tensor:
    guide = _sites_of(pair.guide, args, {})
    model = _sites_of(pair.model, args, guide)
    total: Any = 0
    for name, site in _without_plates(model).items():
        divergence = _divergence(guide[name], site) if closed_form and name in guide else None
        if divergence is None:
            total = total + _log_prob(site, weight)
        else:
            total = total - _weighted(divergence, weight)
            del guide[name]
    for site in _without_plates(guide).values():
        total = total - _log_prob(site, weight)
    return total


def _without_plates(sites: Sites) -> Sites:
    """Without what a plate draws to take a part of the data."""
    return {name: site for name, site in sites.items() if not site_is_subsample(site)}


def _divergence(posterior: Any, prior: Any) -> Tensor | None:
    """KL(q, p) of a site in closed form, one number per datum, or None where there is none."""
    try:
        divergence = kl_divergence(posterior["fn"], prior["fn"])
    except NotImplementedError:
        return None
    return _scaled(divergence, posterior)


def _log_prob(site: Any, weight: Weight) -> Tensor:
    """The sum of a site's log-probability, with its scale, its mask and, for a latent, the weight."""
    log_prob = _scaled(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), site)
    return log_prob.sum() if site["is_observed"] else _weighted(log_prob, weight)


def _scaled(values: Tensor, site: Any) -> Tensor:
    is_plain = site["mask"] is None and _is_one(site["scale"])
    return values if is_plain else scale_and_mask(values, site["scale"], site["mask"])


def _weighted(values: Tensor, weight: Weight) -> Tensor:
    return (values if _is_one(weight) else values * weight).sum()


def _is_one(factor: object) -> bool:
    """Whether a factor is the number 1; a tensor is never looked into."""
    return isinstance(factor, int | float) and factor == 1


def _sites_of(program: Program, args: tuple[Tensor, ...], draws: Mapping[str, Any]) -> Sites:
    """The sample sites of one run, at `draws` where they have the name."""
    with _Sites(draws) as sites:
        program(*args)
    return sites.found


class _Sites(Messenger):
    """Keeps the sample sites of a program, and has it take values that were drawn before."""

    def __init__(self, draws: Mapping[str, Any]) -> None:
        super().__init__()
        self.draws, self.found = draws, {}  # type: tuple[Mapping[str, Any], Sites]

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.draws and not msg["is_observed"]:
            msg["value"], msg["done"] = self.draws[msg["name"]]["value"], True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.found[msg["name"]] = msg
