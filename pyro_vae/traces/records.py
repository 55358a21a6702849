"""One run of a program on record: its sample sites, and their log-probabilities for each particle and datum."""

from collections.abc import Container
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.traces.effects import PARTICLES
from pyro_vae.traces.pair import Pair, Program


def record_both(pair: Pair, args: tuple[Tensor, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    """The guide's trace, and the model's at the latents of it."""
    guide_trace = poutine.trace(pair.guide).get_trace(*args)
    return guide_trace, poutine.trace(poutine.replay(pair.model, trace=guide_trace)).get_trace(*args)


def record(program: Program, args: tuple[Tensor, ...], num_particles: int, tiled: bool) -> poutine.Trace:
    """The trace of K particles of each datum: under an outer plate, or on data repeated K times."""
    if tiled:
        args = tuple(arg.repeat(num_particles, *[1] * (arg.ndim - 1)) for arg in args)
        return poutine.trace(program).get_trace(*args)
    with pyro.plate(PARTICLES, num_particles, dim=-2):
        return poutine.trace(program).get_trace(*args)


def sample_sites(trace: poutine.Trace) -> list[tuple[str, Any]]:
    """The sample sites, data included, by name and in their order."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not pyro.poutine.util.site_is_subsample(site)
    ]


def latent_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The sites that hold no data, by name."""
    return {name: site for name, site in sample_sites(trace) if not site["is_observed"]}


def was_observed(site: Any) -> bool:
    """Whether a site of an unconditioned trace holds data in the model itself."""
    return site["infer"].get("was_observed", False)


def log_prob_sum(
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
    for name, site in sample_sites(trace):
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
